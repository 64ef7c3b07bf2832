"""Placement as arithmetic: roles and resources in, bundles out. `cluster` turns the result into Ray calls.

cpus are Ray's CPU slots and gpus are numbers or shares of devices, both per actor unless said otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TOLERANCE = 1e-6  # 1 less 8 ninths is not quite a ninth; Ray itself counts in 1e-4


@dataclass(frozen=True)
class RoleRequest:
    """`count` actors that want `cpus` and `gpus` each; more than one GPU is a whole number, as Ray has it."""

    count: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Bundle:
    """Resources that belong together on one node. role and index name the actor that it was made for."""

    cpus: float
    gpus: float
    role: str
    index: int


@dataclass(frozen=True)
class Share:
    """What one actor asks Ray for inside its bundle."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Layout:
    """assignment: (role, index) -> number of its bundle; shares: (role, index) -> its part of that bundle."""

    bundles: tuple[Bundle, ...]
    assignment: dict[tuple[str, int], int]
    shares: dict[tuple[str, int], Share]

    @property
    def total_cpus(self) -> float:
        return sum(b.cpus for b in self.bundles)

    @property
    def total_gpus(self) -> float:
        return sum(b.gpus for b in self.bundles)


@dataclass(frozen=True)
class NodeResources:
    """What one node of the cluster offers."""

    name: str
    cpus: float
    gpus: float = 0.0


def plan_layout(roles: Mapping[str, RoleRequest], placement: str) -> Layout:
    """One bundle per actor, in the order of `roles`; `colocated`: generator i shares that of policy rank i.

    A shared bundle offers the CPUs of both and one device: gpus = min(1, sum of both). If the two ask for
    more than one device together, their shares shrink in proportion, for Ray has to fit both into the bundle.
    `colocated` changes nothing for a stage that lacks one of the two roles. Raises ValueError for an unknown
    placement, for 1.5 GPUs, and, if colocated, for more generators than policy ranks, for an actor on more
    than one device, or when only one of the two uses a GPU.
    """
    if placement not in ("separate", "colocated"):
        raise ValueError(f"unknown placement {placement!r}: separate or colocated")
    for role, request in roles.items():
        if request.gpus > 1 and request.gpus != int(request.gpus):
            raise ValueError(f"{role} asks for {request.gpus:g} GPUs: more than one must be a whole number")
    shared = placement == "colocated" and {"policy", "generator"} <= roles.keys()
    if shared:
        _check_colocated(roles["policy"], roles["generator"])
    bundles: list[Bundle] = []
    assignment: dict[tuple[str, int], int] = {}
    shares: dict[tuple[str, int], Share] = {}
    for role, request in roles.items():
        if shared and role == "generator":
            continue  # lives in the bundles of the policy
        for i in range(request.count):
            tenants = {role: request}
            if shared and role == "policy" and i < roles["generator"].count:
                tenants["generator"] = roles["generator"]
            wanted = sum(r.gpus for r in tenants.values())
            scale = min(1.0, 1 / wanted) if len(tenants) > 1 and wanted > 0 else 1.0
            for tenant, r in tenants.items():
                assignment[tenant, i] = len(bundles)
                shares[tenant, i] = Share(r.cpus, r.gpus if scale == 1 else _round_down(r.gpus * scale))
            gpus = min(1.0, wanted) if len(tenants) > 1 else wanted
            bundles.append(Bundle(sum(r.cpus for r in tenants.values()), gpus, role, i))
    return Layout(tuple(bundles), assignment, shares)


def _check_colocated(policy: RoleRequest, generator: RoleRequest) -> None:
    if generator.count > policy.count:
        raise ValueError(
            f"colocated placement: {generator.count} generators share the devices of {policy.count} policy "
            "ranks; lower roles.generator.replicas, raise roles.policy.ranks, or "
            "use cluster.placement=separate"
        )
    asked = f"a generator asks for {generator.gpus:g} and a policy rank for {policy.gpus:g} GPUs"
    if max(policy.gpus, generator.gpus) > 1:
        raise ValueError(
            f"colocated placement shares one device; {asked}. Tensor parallelism wants "
            "cluster.placement=separate"
        )
    if (policy.gpus > 0) != (generator.gpus > 0):
        raise ValueError(f"colocated placement shares one device; {asked}. Both or neither must use one")


def _round_down(gpus: float) -> float:
    """To Ray's resolution, downwards, so that the rounded shares still fit."""
    return math.floor(gpus * 1e4 + _TOLERANCE) / 1e4


class _Room:
    """What is left on a node. A share of a GPU comes from one device, several GPUs are whole free devices."""

    def __init__(self, node: NodeResources):
        self.cpus = node.cpus
        whole = int(node.gpus + _TOLERANCE)
        self.devices = [1.0] * whole + ([node.gpus - whole] if node.gpus - whole > _TOLERANCE else [])

    def take(self, bundle: Bundle) -> bool:
        """Take the bundle's resources; False, and nothing taken, if they are not there."""
        share, needed = min(1.0, bundle.gpus), math.ceil(bundle.gpus)
        fitting = [d for d, free in enumerate(self.devices) if free >= share - _TOLERANCE]
        if bundle.cpus > self.cpus + _TOLERANCE or len(fitting) < needed:
            return False
        self.cpus -= bundle.cpus
        for device in fitting[:needed]:
            self.devices[device] -= share
        return True


def shortfall(layout: Layout, nodes: Sequence[NodeResources]) -> str | None:
    """None if the bundles fit the nodes, else a message that sets demand beside supply.

    First-fit decreasing, GPUs before CPUs: what it places does fit, while in rare cases a cleverer packing
    exists where it finds none. STRICT_PACK and STRICT_SPREAD may want more than is looked at here.
    """
    rooms = [_Room(node) for node in nodes]
    homeless = [
        bundle
        for bundle in sorted(layout.bundles, key=lambda b: (-b.gpus, -b.cpus))
        if not any(room.take(bundle) for room in rooms)
    ]
    if not homeless:
        return None
    lines = [
        "the roles do not fit the cluster:",
        f"  cpus: {layout.total_cpus:g} wanted, {sum(n.cpus for n in nodes):g} offered",
        f"  gpus: {layout.total_gpus:g} wanted, {sum(n.gpus for n in nodes):g} offered",
    ]
    lines += [
        f"  node {node.name}: offers {node.cpus:g} cpus, {node.gpus:g} gpus; "
        f"{room.cpus:g} cpus, {sum(room.devices):g} gpus left"
        for node, room in zip(nodes, rooms, strict=True)
    ] or ["  no node is there"]
    lines += [
        f"  no room for {b.role} {b.index}: wants {b.cpus:g} cpus, {b.gpus:g} gpus on one node" for b in
        homeless
    ]
    return "\n".join(lines)


def default_sync_backend(device_gpus: bool, colocated: bool) -> str:
    """The wire for weights: `gloo` without GPUs, `ipc` on a shared GPU, `nccl` between separate ones."""
    if not device_gpus:
        return "gloo"
    return "ipc" if colocated else "nccl"


def check_sync_backend(backend: str, device_gpus: bool, colocated: bool) -> None:
    """Raise ValueError for a wire that cannot work in this layout; gloo always can."""
    if backend not in ("gloo", "nccl", "ipc"):
        raise ValueError(f"unknown weight_sync.backend {backend!r}: gloo, nccl or ipc")
    if backend == "gloo":
        return
    if not device_gpus:
        why = "needs GPUs, and the policy and generators have none"
    elif backend == "ipc" and not colocated:
        why = "needs generator i on the GPU of policy rank i, and the placement is separate"
    elif backend == "nccl" and colocated:
        why = "refuses two ranks on one GPU, and generator i shares the GPU of policy rank i"
    else:
        return
    best = default_sync_backend(device_gpus, colocated)
    raise ValueError(f"weight_sync.backend={backend} {why}; use {best} or auto")
