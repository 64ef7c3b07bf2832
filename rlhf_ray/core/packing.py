"""Which node gets which bundle, and what to say when there is no room. All in whole ten-thousandths, as Ray counts.

This decides whether a layout fits, before Ray is asked. Nothing is pinned to a node: Ray places by a greedy rule of
its own, so that the bundles of a lost node can go elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_ray.core.layout import UNIT, Bundle, Layout, units

LEARNERS = ("policy", "critic", "supervised")  # their ranks talk to each other in every forward pass
_PATIENCE = 5_000  # steps of the search, each 10 to 50 microseconds
_DEEPEST = 500  # nodes that the search recurses over


@dataclass(frozen=True)
class NodeResources:
    """What one node of the cluster offers."""

    name: str
    cpus: float
    gpus: float = 0.0


class _Size(NamedTuple):
    """Of a bundle, in units; sorted by GPUs first."""

    gpus: int
    cpus: int

    @classmethod
    def of(cls, bundle: Bundle) -> _Size:
        return cls(units(bundle.gpus), units(bundle.cpus))


class _Room(NamedTuple):
    """What is free on a node, in units. slots: how many more bundles it may take. devices: of each GPU, ascending."""

    slots: int
    cpus: int
    devices: tuple[int, ...]

    @classmethod
    def of(cls, node: NodeResources, slots: int) -> _Room:
        whole, rest = divmod(units(node.gpus), UNIT)
        return cls(slots, units(node.cpus), (*([rest] if rest else []), *[UNIT] * whole))

    def holds(self, size: _Size) -> int:
        """How many bundles of this size fit. A share of a GPU comes from one device, more are whole free devices."""
        most = min(self.slots, self.cpus // size.cpus) if size.cpus else self.slots
        if size.gpus >= UNIT:
            return min(most, self.devices.count(UNIT) * UNIT // size.gpus)
        return min(most, sum(free // size.gpus for free in self.devices)) if size.gpus else most

    def less(self, size: _Size, times: int) -> _Room:
        """What is left after so many bundles that it holds. Shares go to the fullest device that has room, as Ray's."""
        devices = list(self.devices)
        if size.gpus >= UNIT:
            del devices[len(devices) - times * size.gpus // UNIT:]
        elif size.gpus:
            left = times
            for d, free in enumerate(self.devices):
                here = min(left, free // size.gpus)
                devices[d] -= here * size.gpus
                left -= here
            devices = sorted(filter(None, devices))
        return _Room(self.slots - times, self.cpus - times * size.cpus, tuple(devices))


def pack(layout: Layout, nodes: Sequence[NodeResources], strategy: str = "PACK") -> tuple[int, ...] | None:
    """For each bundle the number of its node in `nodes`; None if there is no room for all.

    The ranks of a learner go to as few nodes as the bundles placed before them allow, then the other roles likewise.
    Where that finds no room, a search over all packings decides. It is exact but for two cases, in which it may miss
    a packing that exists and never invents one: it gives up after some thousand steps, and the different shares on
    one node go to its devices greedily. strategy: Ray's; STRICT_PACK wants one node, STRICT_SPREAD a node per bundle.
    """
    bundles = layout.bundles
    if strategy == "STRICT_PACK":
        kinds = {(node.cpus, node.gpus): i for i, node in reversed([*enumerate(nodes)])}
        alone = [i for i in kinds.values() if pack(layout, [nodes[i]]) is not None]
        return (min(alone),) * len(bundles) if alone else None
    slots = 1 if strategy == "STRICT_SPREAD" else len(bundles)
    rooms = [_Room.of(node, slots) for node in nodes]
    for learners_first in (True, False):
        homes = _by_role(bundles, rooms, learners_first)
        if len(homes) == len(bundles):
            return tuple(homes[number] for number in range(len(bundles)))
    return _search(bundles, rooms)


def _by_role(bundles: Sequence[Bundle], rooms: Iterable[_Room], learners_first: bool) -> dict[int, int]:
    """Bundle -> node, role by role, larger bundles and larger roles first. Bundles that find no room are left out.

    A role fills the nodes that hold most of its bundles; the rest of it goes where just enough room is.
    """
    rooms, homes = list(rooms), dict[int, int]()
    groups: dict[tuple[str, _Size], list[int]] = defaultdict(list)
    for number, bundle in enumerate(bundles):
        groups[bundle.role, _Size.of(bundle)].append(number)

    def turn(group: tuple[str, _Size]) -> tuple[bool, int, int, int]:
        role, size = group
        return learners_first and role not in LEARNERS, -size.gpus, -len(groups[group]), -size.cpus

    for role, size in sorted(groups, key=turn):
        homeless = groups[role, size]
        holds = [room.holds(size) for room in rooms]
        nodes = sorted((i for i in range(len(rooms)) if holds[i]), key=lambda i: holds[i])
        while homeless and nodes:
            wanted = min(len(homeless), holds[nodes[-1]])
            node = nodes.pop(bisect_left(nodes, wanted, key=lambda i: holds[i]))
            homes |= dict.fromkeys(homeless[:wanted], node)
            homeless = homeless[wanted:]
            rooms[node] = rooms[node].less(size, wanted)
    return homes


def _search(bundles: Sequence[Bundle], rooms: Sequence[_Room]) -> tuple[int, ...] | None:
    """Node after node, every way to fill it up with what is left, until all are placed. See `pack`."""
    waiting: dict[_Size, list[int]] = defaultdict(list)
    for number, bundle in enumerate(bundles):
        waiting[_Size.of(bundle)].append(number)
    sizes = sorted(waiting, reverse=True)
    larger = [[j for j, b in enumerate(sizes) if b.gpus >= a.gpus and b.cpus >= a.cpus] for a in sizes]
    # For each node: how many bundles of each size, how many CPUs and GPUs, it and all after it hold.
    ahead = [[0] * (len(sizes) + 2)]
    for room in reversed(rooms):
        here = [*(room.holds(size) for size in sizes), room.cpus, sum(room.devices)]
        ahead.append([a + b for a, b in zip(ahead[-1], here, strict=True)])
    ahead.reverse()
    steps, dead = 0, set[tuple[int, tuple[int, ...]]]()

    def hopeless(i: int, left: tuple[int, ...]) -> bool:
        wanted = [*(sum(left[j] for j in as_large) for as_large in larger),
                  sum(n * size.cpus for n, size in zip(left, sizes, strict=True)),
                  sum(n * size.gpus for n, size in zip(left, sizes, strict=True))]
        return any(want > there for want, there in zip(wanted, ahead[i], strict=True))

    def fill(i: int, left: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """What the nodes from i on are given, so many bundles of each size, if that places all that are left."""
        nonlocal steps
        if not any(left):
            return []
        if (i, left) in dead or hopeless(i, left):
            return None
        for given, room in _fillings(rooms[i], sizes, left):
            steps += 1
            if steps > _PATIENCE:
                return None
            after = tuple(n - k for n, k in zip(left, given, strict=True))
            full = not any(n and room.holds(size) for n, size in zip(after, sizes, strict=True))
            if full and (rest := fill(i + 1, after)) is not None:  # a node that has room for more is never better
                return [given, *rest]
        dead.add((i, left))
        return None

    found = fill(0, tuple(len(waiting[size]) for size in sizes)) if len(rooms) <= _DEEPEST else None
    if found is None:
        return None
    homes = {waiting[size].pop(0): node for node, given in enumerate(found)
             for size, times in zip(sizes, given, strict=True) for _ in range(times)}
    return tuple(homes[number] for number in range(len(bundles)))


def _fillings(room: _Room, sizes: Sequence[_Size], left: Sequence[int]) -> Iterator[tuple[tuple[int, ...], _Room]]:
    """How many bundles of each size a node may be given, large ones first, and what is free on it then."""
    if not sizes:
        yield (), room
        return
    most = min(left[0], room.holds(sizes[0]))
    for times in range(most, -1 if len(sizes) > 1 else most - 1, -1):
        for others, rest in _fillings(room.less(sizes[0], times), sizes[1:], left[1:]):
            yield (times, *others), rest


def shortfall(layout: Layout, nodes: Sequence[NodeResources], strategy: str = "PACK") -> str | None:
    """None if the bundles fit the nodes (see `pack`), else a message that sets demand beside supply."""
    if pack(layout, nodes, strategy) is not None:
        return None
    return "the roles do not fit the cluster:\n" + comparison(layout, nodes, strategy)


def comparison(layout: Layout, nodes: Sequence[NodeResources], strategy: str = "PACK", supply: str = "offered") -> str:
    """Demand beside supply: by resource, by size of bundle and by node, and for each role how many of it find no room.

    supply: what the resources of the nodes are. Indented lines, without a newline at the end.
    """
    lines = []
    for name in ("cpus", "gpus"):
        wanted = [amount for bundle in layout.bundles if (amount := getattr(bundle, name))]
        there = [getattr(node, name) for node in nodes]
        if not wanted:
            continue
        sizes = ", ".join(f"{times} x {size:g}" for size, times in sorted(Counter(wanted).items(), reverse=True))
        lines.append(f"  {name}: {sum(wanted):g} wanted, {sum(there):g} {supply}; "
                     f"in bundles of {sizes}; {_by_node(nodes, name)}")
    homes = _by_role(layout.bundles, [_Room.of(node, len(layout.bundles)) for node in nodes], False)
    groups = Counter((b.role, b.cpus, b.gpus) for b in layout.bundles)
    homeless = Counter((b.role, b.cpus, b.gpus) for number, b in enumerate(layout.bundles) if number not in homes)
    lines += [f"  no room for {n} of {groups[group]} {group[0]}: {group[1]:g} cpus, {group[2]:g} gpus each on one node"
              for group, n in homeless.items()]
    if strategy.startswith("STRICT") and pack(layout, nodes) is not None:
        wants = "one node for all" if strategy == "STRICT_PACK" else "a node for each of"
        lines.append(f"  cluster.strategy={strategy} wants {wants} {len(layout.bundles)} bundles: use "
                     f"{strategy.removeprefix('STRICT_')}")
    return "\n".join(lines)


def hosts(layout: Layout, nodes: Mapping[str, NodeResources]) -> set[str]:
    """Which of the nodes may be given any of the bundles, if nothing else were there."""
    sizes = {_Size.of(bundle) for bundle in layout.bundles}
    return {name for name, node in nodes.items() if any(_Room.of(node, 1).holds(size) for size in sizes)}


def _by_node(nodes: Sequence[NodeResources], resource: str) -> str:
    """What each node offers; more than four that offer the same are counted."""
    alike: dict[float, list[str]] = defaultdict(list)
    for node in nodes:
        alike[getattr(node, resource)].append(node.name)
    return ", ".join(
        f"{len(names)} nodes {amount:g} each" if len(names) > 4 else ", ".join(f"{name} {amount:g}" for name in names)
        for amount, names in alike.items()
    ) or "no node is there"
