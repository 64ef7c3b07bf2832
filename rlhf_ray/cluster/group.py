"""Groups of Ray actors: placed together, started with a deadline, called by method, ended together."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.cluster.role import Role
from rlhf_ray.cluster.runtime import nodes
from rlhf_ray.config.schema import ClusterConfig
from rlhf_ray.core.layout import Layout, shortfall
from rlhf_ray.errors import UserError

# Nothing that runs in a role asks a hub or a usage server for anything.
_ROLE_ENV = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}


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

    def __len__(self) -> int:
        return len(self.actors)

    def start(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        """Call `method` (named as `Class.method`) on every actor with the same arguments; references come back."""
        return [getattr(a, method.__name__).remote(*args, **kwargs) for a in self.actors]

    def start_each(self, method: Callable[..., Any], per_actor: Sequence[Sequence[Any]]) -> list[ray.ObjectRef]:
        """Call `method` on every actor with arguments of its own."""
        return [getattr(a, method.__name__).remote(*args) for a, args in zip(self.actors, per_actor, strict=True)]

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`start`, then wait for all results."""
        return wait(self.start(method, *args, **kwargs), self.timeout_s, f"{self.role}.{method.__name__}")

    def call_each(self, method: Callable[..., Any], per_actor: Sequence[Sequence[Any]]) -> list[Any]:
        return wait(self.start_each(method, per_actor), self.timeout_s, f"{self.role}.{method.__name__}")

    def ask(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call `method` on the first actor alone and wait for the result."""
        ref = getattr(self.actors[0], method.__name__).remote(*args)
        return wait([ref], self.timeout_s, f"{self.role}.{method.__name__}")[0]


def wait(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str) -> list[Any]:
    """Results of all references; the first failure is raised at once, without waiting for the others.

    Raises TimeoutError naming `what` after `timeout_s` seconds.
    """
    pending, deadline = list(refs), time.monotonic() + timeout_s
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise TimeoutError(f"{what} did not answer within {timeout_s:.0f} s ({len(pending)} of {len(refs)} calls)")
        ray.get(done)
    return list(ray.get(list(refs)))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


_CASTS = itertools.count(1)  # names of actors are unique in a run: a killed one frees its name only later


@ray.remote
def _meeting_point() -> tuple[str, int]:
    return str(ray.util.get_node_ip_address()), free_port()


class Cast:
    """The actors of a stage: one placement group, one group of actors per role. A context manager."""

    def __init__(self, layout: Layout, cfg: ClusterConfig):
        self.layout, self.cfg = layout, cfg
        self.groups: list[Group] = []
        self._placement: PlacementGroup | None = None
        self._number = next(_CASTS)
        self._setups: list[ray.ObjectRef] = []

    def __enter__(self) -> Cast:
        missing = shortfall(self.layout, nodes())
        if missing:
            raise UserError(f"the cluster cannot hold the roles: {missing}; lower roles.*.replicas, ranks, cpus or "
                            "gpus, or add nodes")
        bundles = [{k: v for k, v in (("CPU", b.cpus), ("GPU", b.gpus)) if v} or {"CPU": 0.001}
                   for b in self.layout.bundles]
        self._placement = placement_group(bundles, strategy=self.cfg.strategy)
        if not self._placement.wait(self.cfg.start_timeout_s):
            remove_placement_group(self._placement)
            raise UserError(f"no resources within cluster.start_timeout_s={self.cfg.start_timeout_s:.0f} s: asked for "
                            f"{bundles}, free now {ray.available_resources()}; is another run using the cluster?")
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            for actor in group.actors:
                ray.kill(actor)
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def meeting_point(self, role: str) -> tuple[str, int]:
        """Where the actors of a role meet: address of the node that holds the first, and a port free there."""
        if len(nodes()) == 1:
            return "127.0.0.1", free_port()
        task = _meeting_point.options(num_cpus=0, scheduling_strategy=self._in_bundle(role, 0))
        address, port = ray.get(task.remote(), timeout=self.cfg.start_timeout_s)
        return address, port

    def _in_bundle(self, role: str, index: int) -> PlacementGroupSchedulingStrategy:
        assert self._placement is not None, "a Cast is used inside its `with` block"
        return PlacementGroupSchedulingStrategy(
            self._placement, placement_group_bundle_index=self.layout.assignment[role, index])

    def start(
        self, actor_class: type[Role], role: str, per_actor: Sequence[tuple[Any, ...]], threads: int
    ) -> Group:
        """Start one actor per argument tuple, with its share of the layout; they come up side by side: see `ready`."""
        actors = []
        for i in range(len(per_actor)):
            env = {**_ROLE_ENV, "OMP_NUM_THREADS": str(threads)}
            if not self.layout.shares[role, i].gpus:
                env["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the node's GPUs in sight of actors that asked for none
            options: Any = ray.remote(actor_class).options(
                name=f"{role}-{i}.{self._number}",
                num_cpus=self.layout.shares[role, i].cpus,
                num_gpus=self.layout.shares[role, i].gpus,
                max_concurrency=1,
                scheduling_strategy=self._in_bundle(role, i),
                runtime_env={"env_vars": env},
            )
            actors.append(options.remote())
        group = Group(role, actors, self.cfg.call_timeout_s)
        self.groups.append(group)
        self._setups += group.start_each(actor_class.setup, per_actor)
        return group

    def ready(self) -> list[ActorInfo]:
        """Wait until every actor answers; raises what the first failing one raised."""
        wait(self._setups, self.cfg.start_timeout_s, "start of " + ", ".join(g.role for g in self.groups))
        return [ActorInfo(role=group.role, **info) for group in self.groups for info in group.call(Role.describe)]
