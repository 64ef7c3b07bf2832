"""The actors of one role: called by method, waited for with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_ray.cluster.health import Member
from rlhf_ray.cluster.interruption import held

IO = "io"  # the concurrency group of what may run beside an actor's work
TOGETHER_S = 0.005  # answers within so long of each other are taken together: every look is at all that are missing


@dataclass(frozen=True)
class ActorInfo:
    """One line of the run's table of actors."""

    role: str
    name: str
    actor_class: str
    node: str
    pid: int


@dataclass
class Group:
    """The actors of one role, in rank order."""

    role: str
    actors: list[Any]
    timeout_s: float
    numbers: Sequence[int] = ()  # of the actors; without, 0, 1, 2, ...

    def __len__(self) -> int:
        return len(self.actors)

    @property
    def names(self) -> list[str]:
        """As ROLE-NUMBER; whoever takes a lost one's place has the same."""
        return [self.name(i) for i in range(len(self))]

    def name(self, i: int) -> str:
        return f"{self.role}-{self.numbers[i] if self.numbers else i}"

    @property
    def ids(self) -> set[str]:
        """Ray's ids of the actors, as `debtors` gives them."""
        return {actor._actor_id.hex() for actor in self.actors}

    def submit(self, i: int, method: Callable[..., Any], args: Sequence[Any], **options: Any) -> Any:
        """Call `method` (named as `Class.method`) on actor i; a reference comes back.

        The name of the task, `policy-0 update`, says who does what. It must not say in which iteration: Ray keeps a
        metric for every name there ever was.
        """
        named = getattr(self.actors[i], method.__name__).options(name=f"{self.name(i)} {method.__name__}", **options)
        return named.remote(*args)

    def start(self, method: Callable[..., Any], *args: Any, **options: Any) -> list[ray.ObjectRef]:
        """Call `method` on every actor with the same arguments; options: of Ray's calls. References come back."""
        with held():  # one that was called would wait for the others for ever
            return [self.submit(i, method, args, **options) for i in range(len(self))]

    def start_each(self, method: Callable[..., Any], per_actor: Sequence[Sequence[Any]]) -> list[ray.ObjectRef]:
        """Call `method` on every actor with arguments of its own."""
        with held():
            return [self.submit(i, method, args) for i, args in zip(range(len(self)), per_actor, strict=True)]

    def call(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        """`start`, then wait for all results."""
        return wait(self.start(method, *args), self.timeout_s, f"{self.role}.{method.__name__}")

    def call_each(self, method: Callable[..., Any], per_actor: Sequence[Sequence[Any]]) -> list[Any]:
        return wait(self.start_each(method, per_actor), self.timeout_s, f"{self.role}.{method.__name__}")

    def ask(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call `method` on the first actor alone and wait for the result."""
        return wait([self.submit(0, method, args)], self.timeout_s, f"{self.role}.{method.__name__}")[0]


class Overdue(TimeoutError):
    """A call that was not answered in time. debtors: ids of the actors who owe an answer."""

    def __init__(self, text: str, debtors: set[str]):
        super().__init__(text, debtors)  # both, or it could not be pickled
        self.debtors = debtors

    def __str__(self) -> str:
        return str(self.args[0])


def wait(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str) -> list[Any]:
    """Results of all references; the first failure is raised as it comes, without waiting for the others.

    Raises Overdue naming `what` after `timeout_s` seconds.
    """
    found: dict[ray.ObjectRef, Any] = {}
    pending, deadline = list(refs), time.monotonic() + timeout_s
    while pending:
        left = max(0.0, deadline - time.monotonic())
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=min(left, TOGETHER_S))
        if not done and not ray.wait(pending, timeout=left)[0]:
            raise Overdue(f"{what} did not answer within {timeout_s:.0f} s ({len(pending)} of {len(refs)} calls)",
                          debtors(pending))
        found |= zip(done, ray.get(done), strict=True)
    return [found[ref] for ref in refs]


def debtors(refs: Sequence[Any]) -> set[str]:
    """Ids of the actors who are to answer these calls."""
    return {ref.task_id().actor_id().hex() for ref in refs}


def named(gone: Sequence[Member], error: Exception) -> str:
    """Who is gone, for a person; the first line of the error, if nobody is."""
    return (", ".join(f"{m.role}-{m.index} ({m.gone})" for m in gone) or str(error).partition("\n")[0]
            or type(error).__name__)
