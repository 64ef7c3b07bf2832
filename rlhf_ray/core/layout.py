"""Placement as arithmetic: roles and resources in, bundles out. `packing` says which node can have which bundle;
`cluster` turns the result into Ray calls.

cpus are Ray's CPU slots and gpus are numbers or shares of devices, both per actor unless said otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

PLACEMENTS = ("separate", "colocated", "cpu")
UNIT = 10_000  # Ray counts CPU slots and GPUs in ten-thousandths


def units(amount: float) -> int:
    """In ten-thousandths, rounded down, so that nine ninths of a device still fit into it."""
    return math.floor(amount * UNIT + 1e-6)


@dataclass(frozen=True)
class RoleRequest:
    """`count` actors that want `cpus` and `gpus` each; more than one GPU is a whole number, as Ray has it."""

    count: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Bundle:
    """Resources that belong together on one node: one actor's, or, colocated, those of policy rank and generator i.

    role and index name the actor that it was made for. An engine of tensor-parallel size N is one actor with N GPUs.
    """

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


def plan_layout(roles: Mapping[str, RoleRequest], placement: str) -> Layout:
    """One bundle per actor, in the order of `roles`.

    placement: `separate`; `cpu`, the same with a promise that no role asks for a GPU; or `colocated`: generator i
    shares the bundle of policy rank i, which offers the CPUs of both and one device: gpus = min(1, sum of both). If
    the two ask for more than one device together, their shares shrink in proportion, for Ray has to fit both into
    the bundle. `colocated` changes nothing for a stage that lacks one of the two roles.

    Raises ValueError for an unknown placement, for 1.5 GPUs, for a GPU in placement `cpu`, and, if colocated, for
    more generators than policy ranks, for an actor on more than one device, or when only one of the two uses a GPU.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}: {', '.join(PLACEMENTS)}")
    for role, request in roles.items():
        if request.gpus > 1 and request.gpus != int(request.gpus):
            raise ValueError(f"{role} asks for {request.gpus:g} GPUs: more than one must be a whole number")
        if request.gpus and placement == "cpu":
            raise ValueError(f"{role} asks for {request.gpus:g} GPUs: ask for none, or use cluster.placement=separate")
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
                shares[tenant, i] = Share(r.cpus, r.gpus if scale == 1 else units(r.gpus * scale) / UNIT)
            gpus = min(1.0, wanted) if len(tenants) > 1 else wanted
            bundles.append(Bundle(sum(r.cpus for r in tenants.values()), gpus, role, i))
    return Layout(tuple(bundles), assignment, shares)


def _check_colocated(policy: RoleRequest, generator: RoleRequest) -> None:
    if generator.count > policy.count:
        raise ValueError(
            f"colocated placement: {generator.count} generators share the devices of {policy.count} policy ranks; "
            "lower roles.generator.replicas, raise roles.policy.ranks, or use cluster.placement=separate"
        )
    asked = f"a generator asks for {generator.gpus:g} and a policy rank for {policy.gpus:g} GPUs"
    if max(policy.gpus, generator.gpus) > 1:
        raise ValueError(
            f"colocated placement shares one device; {asked}. Tensor parallelism wants cluster.placement=separate"
        )
    if (policy.gpus > 0) != (generator.gpus > 0):
        raise ValueError(f"colocated placement shares one device; {asked}. Both or neither must use one")


def default_sync_backend(device_gpus: bool, colocated: bool, one_host: bool) -> str:
    """The wire for weights: without GPUs `shm` if all are on one host, else `gloo`; `ipc` on a shared GPU, `nccl`
    between separate ones."""
    if not device_gpus:
        return "shm" if one_host else "gloo"
    return "ipc" if colocated else "nccl"


def check_sync_backend(backend: str, device_gpus: bool, colocated: bool) -> None:
    """Raise ValueError for a wire that cannot work in this layout; gloo always can, and shm on one host."""
    if backend not in ("gloo", "shm", "nccl", "ipc"):
        raise ValueError(f"unknown weight_sync.backend {backend!r}: gloo, shm, nccl or ipc")
    if backend in ("gloo", "shm"):
        return
    if not device_gpus:
        why = "needs GPUs, and the policy and generators have none"
    elif backend == "ipc" and not colocated:
        why = "needs generator i on the GPU of policy rank i, and the placement is not colocated"
    elif backend == "nccl" and colocated:
        why = "refuses two ranks on one GPU, and generator i shares the GPU of policy rank i"
    else:
        return
    best = default_sync_backend(device_gpus, colocated, one_host=False)
    raise ValueError(f"weight_sync.backend={backend} {why}; use {best} or auto")
