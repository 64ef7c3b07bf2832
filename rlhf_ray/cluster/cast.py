"""The actors of a stage: placed together, started with a deadline, replaced when they are lost, ended together.

An elastic group (the generators of ppo) may also grow, shrink, and go on without those it lost: see `Cast.recruit`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.cluster.group import IO, ActorInfo, Group, Overdue, named, wait
from rlhf_ray.cluster.health import HEALTH, LOST, Health, Member
from rlhf_ray.cluster.post_mortem import write_post_mortem
from rlhf_ray.cluster.preflight import Visit, check_nodes
from rlhf_ray.cluster.role import ROLE_ENV, Role
from rlhf_ray.cluster.runtime import address_of, free, free_port, nodes, python_of
from rlhf_ray.config.schema import ClusterConfig
from rlhf_ray.core.layout import Bundle, Layout, Share
from rlhf_ray.core.packing import comparison, shortfall
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.storage import shown

T = TypeVar("T")

_GRACE_S = 5.0
_SOON_S = 10.0  # whoever waits longer for resources is told so
_LET_GO_S = 10.0
_CASTS = itertools.count(1)  # names of actors are unique in a run: a killed one frees its name only later


@ray.remote
def _meeting_point() -> tuple[str, int]:
    return str(ray.util.get_node_ip_address()), free_port()


@dataclass
class _Part:
    """How an actor is made."""

    actor_class: type[Role]
    args: tuple[Any, ...]
    threads: int
    takes: int = 0
    placement: PlacementGroup | None = None  # its own, if it was not part of the layout


@dataclass
class _Coming:
    """Somebody who comes up while the others work: the answer to `setup`, and since when its process lives."""

    setup: ray.ObjectRef
    since: float = 0.0


def _resources(part: Bundle | Share) -> dict[str, float]:
    """As Ray wants them; a bundle of nothing is not allowed."""
    return {k: v for k, v in (("CPU", part.cpus), ("GPU", part.gpus)) if v} or {"CPU": 0.001}


class Cast:
    """The actors of a stage: one placement group, one group of actors per role. A context manager.

    Its `health` watches them; one that is gone can be replaced in its place.
    """

    def __init__(self, layout: Layout, cfg: ClusterConfig, directory: Path | None = None):
        self.layout, self.cfg, self.directory = layout, cfg, directory
        self.groups: list[Group] = []
        self.health = Health(cfg.heartbeat_s, cfg.heartbeat_timeout_s)
        self.phase = "start"  # this and the iteration are for the post-mortem
        self.iteration: int | None = None
        self._parts: dict[tuple[str, int], _Part] = {}
        self._actors: dict[tuple[str, int], Any] = {}
        self._coming: dict[tuple[str, int], _Coming] = {}  # not in their group yet
        self._elastic: set[str] = set()
        self._placement: PlacementGroup | None = None
        self._number = next(_CASTS)
        self._setups: dict[tuple[str, int], ray.ObjectRef] = {}  # not answered yet, as far as `ready` knows
        self._visits: dict[tuple[str, int], Visit] = {}  # to nodes where somebody comes up later

    def __enter__(self) -> Cast:
        missing = shortfall(self.layout, [*nodes().values()], self.cfg.strategy)
        if missing and not self.cfg.autoscaling:
            raise UserError(f"{missing}\n  lower roles.*.replicas, ranks, cpus or gpus, or add nodes")
        bundles = [_resources(b) for b in self.layout.bundles]
        self._placement = placement_group(bundles, strategy=self.cfg.strategy)
        try:
            self._wait_for_resources(self._placement)
            if address_of(self.cfg) != "local":
                check_nodes(placement_group_table(self._placement)["bundles_to_node_id"].values(), self.directory,
                            self.cfg.start_timeout_s)
        except BaseException:
            self._end()
            raise
        self.health.start()
        return self

    def _wait_for_resources(self, placement: PlacementGroup) -> None:
        limit = self.cfg.queue_timeout_s or self.cfg.start_timeout_s
        if placement.wait(min(limit, _SOON_S)):
            return
        wanted = f"asked for {self.layout.total_cpus:g} cpus and {self.layout.total_gpus:g} gpus in bundles"
        console.print(f"waiting for resources, up to {limit:.0f} s: {wanted}", markup=False)
        if not placement.wait(max(0.0, limit - _SOON_S)):
            key = "queue_timeout_s" if self.cfg.queue_timeout_s else "start_timeout_s"
            raise UserError(f"no resources within cluster.{key}={limit:.0f} s; is another run using the cluster?\n"
                            + comparison(self.layout, free(), self.cfg.strategy, "free"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.directory and isinstance(error, Exception) and not isinstance(error, UserError):
                raise RunFailed(f"what is known about it: {shown(self._post_mortem(self.directory, error))}") from error
        finally:
            self._end()

    def _post_mortem(self, directory: Path, error: Exception) -> Path:
        config = directory / "config.yaml"
        return write_post_mortem(directory, self.health.members.values(), error, self.phase, self.iteration,
                                 config.read_text() if config.is_file() else "",
                                 sum(part.takes for part in self._parts.values()))

    def _end(self) -> None:
        self.health.stop()
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        for placement in (self._placement, *(part.placement for part in self._parts.values())):
            if placement is not None:
                remove_placement_group(placement)
        for seat in [*self._visits]:
            self._end_visit(seat)
        self._placement = None
        self._parts.clear()  # the store may let go of what the actors were given
        self._actors.clear()

    def meeting_point(self, role: str) -> tuple[str, int]:
        """Where the actors of a role meet: address of the node that holds the first, and a port free there."""
        if len(nodes()) == 1:
            return "127.0.0.1", free_port()
        task = _meeting_point.options(num_cpus=0, scheduling_strategy=self._in_bundle(role, 0))
        address, port = ray.get(task.remote(), timeout=self.cfg.start_timeout_s)
        return address, port

    def _in_bundle(self, role: str, index: int) -> PlacementGroupSchedulingStrategy:
        bundle = self.layout.assignment.get((role, index))
        placement = self._parts[role, index].placement if bundle is None else self._placement
        assert placement is not None, "a Cast is used inside its `with` block"
        return PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle or 0)

    def start(
        self, actor_class: type[Role], role: str, per_actor: Sequence[tuple[Any, ...]], threads: int,
        elastic: bool = False,
    ) -> Group:
        """Start one actor per argument tuple, with its share of the layout; they come up side by side: see `ready`.

        elastic: the group can do without one that is lost while its successor comes up; all have the same arguments.
        """
        if elastic:
            self._elastic.add(role)
        for i, args in enumerate(per_actor):
            self._parts[role, i] = _Part(actor_class, args, threads)
        group = Group(role, [self._launch(role, i) for i in range(len(per_actor))], self.cfg.call_timeout_s)
        self.groups.append(group)
        self._setups |= {(role, i): ref for i, ref in enumerate(group.start_each(actor_class.setup, per_actor))}
        return group

    def ready(self) -> list[ActorInfo]:
        """Wait until every actor answers; raises what the first failing one raised, or UserError if the node where
        one took another's place lacks something.

        If the one that failed came for another that was lost, it is gone as well: see `lost`. Who had not answered yet
        is waited for the next time.
        """
        failure = None
        try:
            wait(list(self._setups.values()), self.cfg.start_timeout_s,
                 "start of " + ", ".join(dict.fromkeys(role for role, _ in self._setups)))
        except Exception as error:
            failure = error
        for seat, setup in list(self._setups.items()):
            if ray.wait([setup], timeout=0)[0]:
                del self._setups[seat]
                if self._parts[seat].takes:
                    self._came_up(seat, setup)
        late = [seat for seat in self._visits if seat not in self._coming]
        if problems := [problem for seat in late if (problem := self._lacks(seat, _GRACE_S))]:
            raise UserError("\n".join(dict.fromkeys(problems))) from failure  # says more than that an actor died there
        if failure:
            raise failure
        self.health.started(self._name(*seat) for seat in self._actors if seat not in self._coming)
        return [ActorInfo(group.role, *(info[k] for k in ("name", "actor_class", "node", "pid")))
                for group in self.groups for info in group.call(Role.describe)]

    # -- nodes that were not there at the start --------------------------------------------------------------

    def _visit(self, role: str, i: int) -> None:
        """Begin to look at the node where an actor comes up."""
        if address_of(self.cfg) != "local":
            self._end_visit((role, i))
            self._visits[role, i] = Visit(self._in_bundle(role, i), self.directory)

    def _lacks(self, seat: tuple[str, int], patience_s: float = 0.0) -> str:
        """What is wrong with that node; empty if nothing, or if it does not answer."""
        visit = self._visits.get(seat)
        if visit is None or not ray.wait([visit.answer], timeout=patience_s)[0]:
            return ""
        self._end_visit(seat)
        with suppress(RayError):  # it is lost, and with it the actor
            return visit.problem()
        return ""

    def _end_visit(self, seat: tuple[str, int]) -> None:
        if visit := self._visits.pop(seat, None):
            visit.close()

    # -- when actors are lost --------------------------------------------------------------------------------

    def lost(self, error: BaseException) -> list[Member]:
        """Who is gone. Waits a few seconds for it: whoever worked with an actor that died may notice before Ray does.

        An actor that owes an answer which is overdue, or that a call could not reach, is killed first.
        """
        late = error.debtors if isinstance(error, Overdue) else set()
        away = {error.actor_id} if isinstance(error, ActorUnavailableError) else set()
        for seat, actor in self._actors.items():
            if actor._actor_id.hex() in late | away:
                self.health.kill(self._name(*seat), "overdue" if late else "died", str(error))
        deadline = time.monotonic() + _GRACE_S
        while not (gone := self.health.look()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return gone

    def stuck(self, roles: Collection[str]) -> list[Member]:
        """Those of these groups who do not end in a few seconds what they are at; they are killed.

        Whoever is in a collective with one that is lost may not hear of it: a host without power closes no connection.
        Nor does who still looks for the others of its group.
        """
        asked = {self._actors[m.role, m.index].describe.remote(): m for m in self.health.members.values()
                 if m.role in roles and not m.gone}
        late = ray.wait(list(asked), num_returns=len(asked), timeout=_LET_GO_S)[1] if asked else []
        for ref in late:
            self.health.kill(asked[ref].name, "hung", f"at work {_LET_GO_S:.0f} s after others of its group were lost")
        return [asked[ref] for ref in late]

    def replace(self, member: Member, set_up: bool = True) -> None:
        """Start a new actor in the place of one that is gone; it comes up in the background: see `ready`, and, if its
        group is elastic and others of it are left, `enlist`.

        set_up: as the old one was; else `set_up_again` is still to come.
        """
        seat = member.role, member.index
        self.health.forget(member.name)
        ray.kill(self._actors[seat])
        self._setups.pop(seat, None)
        self._parts[seat].takes += 1
        self._launch(*seat)
        self._visit(*seat)
        if set_up:
            setup = self._set_up(*seat)
            if seat in self._coming or (member.role in self._elastic and len(self.group(member.role)) > 1):
                self._coming[seat] = _Coming(setup)
            else:
                self._setups[seat] = setup
        self._muster(member.role)

    def persist(self, call: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        """What `call` gives, once all have come up. If actors are lost meanwhile, they are replaced and it is called
        again: cluster.attempts times in a row in which `done` does not change. For roles without learners, which
        train/recovery.py brings back together.

        Raises what `call` raised if no loss explains it, or if the attempts are used up.
        """
        tries, before = 0, done()
        while True:
            try:
                self.ready()
                return call()
            except Exception as error:
                gone = [] if isinstance(error, UserError) else self.lost(error)
                tries, before = (tries + 1 if done() == before else 1), done()
                if not (gone or isinstance(error, LOST)) or tries > self.cfg.attempts:
                    raise
                console.print(f"lost: {named(gone, error)}; trying again", markup=False)
                for member in gone:
                    self.replace(member)

    def set_up_again(self, group: Group, per_actor: Sequence[tuple[Any, ...]]) -> None:
        """Call `setup` on all actors of a group, those that live too, with new arguments."""
        for i, args in enumerate(per_actor):
            self._parts[group.role, i].args = args
            self._setups[group.role, i] = self._set_up(group.role, i)

    def args(self, group: Group) -> list[tuple[Any, ...]]:
        """What each actor of the group was last set up with."""
        return [self._parts[group.role, i].args for i in range(len(group))]

    def group(self, role: str) -> Group:
        return next(g for g in self.groups if g.role == role)

    # -- elastic groups --------------------------------------------------------------------------------------

    def seats(self, role: str) -> dict[int, bool]:
        """Number -> whether it works in its group; one that does not is still coming up."""
        return {i: (r, i) not in self._coming for r, i in self._actors if r == role}

    def recruit(self, role: str, i: int) -> None:
        """Start one more actor like the first of its group, on resources of its own if the layout has none for it.

        It comes up in the background, whenever there is room: see `enlist`.
        """
        seat, first = (role, i), self._parts[role, 0]
        old = self._parts.get(seat)
        self._parts[seat] = _Part(first.actor_class, first.args, first.threads, old.takes + 1 if old else 0)
        if seat not in self.layout.assignment:
            self._parts[seat].placement = placement_group([_resources(self.layout.shares[role, 0])])
        self._launch(role, i)
        self._visit(role, i)
        self._coming[seat] = _Coming(self._set_up(role, i))

    def enlist(self, role: str) -> list[int]:
        """Those who have come up: they are in their group from here on. Waits for nobody."""
        joined = []
        for (r, i), coming in list(self._coming.items()):
            member = self.health.members[self._name(r, i)]
            if r == role and (problem := self._lacks((r, i))):
                self.health.kill(member.name, "died", problem)
                member.words = problem  # it may have died of it before
            if r != role or member.gone:
                continue
            if member.pid and not coming.since:
                coming.since = time.monotonic()
            if ray.wait([coming.setup], timeout=0)[0] and (r, i) not in self._visits:
                if self._came_up((r, i), coming.setup):
                    del self._coming[r, i]
                    joined.append(i)
            elif coming.since and time.monotonic() - coming.since > self.cfg.start_timeout_s:
                self.health.kill(member.name, "overdue", f"not up after {self.cfg.start_timeout_s:.0f} s")
        self.health.started(self._name(role, i) for i in joined)
        self._muster(role)
        return joined

    def fallen(self, role: str) -> list[Member]:
        """Those who died, or failed, while they came up."""
        return [member for r, i in self._coming if r == role and (member := self.health.members[self._name(r, i)]).gone]

    def dismiss(self, role: str, i: int) -> None:
        """End an actor that is needed no more; what it had beyond the layout is free again."""
        actor, part = self._actors.pop((role, i)), self._parts[role, i]
        self._coming.pop((role, i), None)
        self._end_visit((role, i))
        self.health.forget(self._name(role, i))
        ray.kill(actor)
        if part.placement is not None:
            remove_placement_group(part.placement)
            part.placement = None
        self._muster(role)

    def _muster(self, role: str) -> None:
        group = self.group(role)
        group.numbers = [i for r, i in sorted(self._actors) if r == role and (r, i) not in self._coming]
        group.actors[:] = [self._actors[role, i] for i in group.numbers]

    def _came_up(self, seat: tuple[str, int], setup: ray.ObjectRef) -> bool:
        """Whether a `setup` that is over went well; else the actor is killed."""
        try:
            ray.get(setup)
        except RayError as error:
            self.health.kill(self._name(*seat), "failed" if isinstance(error, RayTaskError) else "died", str(error))
            return False
        return True

    def _name(self, role: str, i: int) -> str:
        takes = self._parts[role, i].takes
        return f"{role}-{i}.{self._number}" + (f".{takes}" if takes else "")

    def _set_up(self, role: str, i: int) -> ray.ObjectRef:
        setup = self._actors[role, i].setup.options(name=f"{role}-{i} setup")
        return setup.remote(*self._parts[role, i].args)

    def _launch(self, role: str, i: int) -> Any:
        part, name = self._parts[role, i], self._name(role, i)
        share = self.layout.shares.get((role, i), self.layout.shares[role, 0])
        env = {**ROLE_ENV, "OMP_NUM_THREADS": str(part.threads)}
        if not share.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the node's GPUs in sight of actors that asked for none
        environment: dict[str, Any] = {"env_vars": env}
        if not share.gpus and (python := python_of(part.actor_class.__module__)):
            environment["py_executable"] = python
        remote: Any = ray.remote
        options = remote(concurrency_groups={HEALTH: 1, IO: 1})(part.actor_class).options(
            name=name, num_cpus=share.cpus, num_gpus=share.gpus, max_concurrency=1,
            scheduling_strategy=self._in_bundle(role, i), runtime_env=environment,
        )
        self._actors[role, i] = actor = options.remote()
        self.health.watch(Member(role, i, name, actor))
        return actor
