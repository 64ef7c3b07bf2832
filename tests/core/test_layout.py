import pytest

from rlhf_ray.core.layout import (
    RoleRequest,
    Share,
    check_sync_backend,
    default_sync_backend,
    plan_layout,
)

R = RoleRequest
# name, roles, placement -> bundles (role, index, cpus, gpus), bundle numbers of the generators
LAYOUTS = [
    ("cpu separate", {"generator": R(2, 2), "policy": R(2, 1)}, "separate",
     [("generator", 0, 2, 0), ("generator", 1, 2, 0), ("policy", 0, 1, 0), ("policy", 1, 1, 0)], [0, 1]),
    ("cpu colocated", {"generator": R(2, 2), "policy": R(2, 1)}, "colocated",
     [("policy", 0, 3, 0), ("policy", 1, 3, 0)], [0, 1]),
    ("gpu separate", {"policy": R(1, 1, 1), "generator": R(1, 1, 1)}, "separate",
     [("policy", 0, 1, 1), ("generator", 0, 1, 1)], [1]),
    ("gpu shares that fit", {"policy": R(1, 1, 0.5), "generator": R(1, 1, 0.3)}, "colocated",
     [("policy", 0, 2, 0.8)], [0]),
    ("gpu shares above one device", {"policy": R(1, 1, 1), "generator": R(1, 1, 1)}, "colocated",
     [("policy", 0, 2, 1)], [0]),
    ("fewer generators than ranks", {"critic": R(1, 4), "policy": R(2, 1, 0.5), "generator": R(1, 2, 0.5)},
     "colocated", [("critic", 0, 4, 0), ("policy", 0, 3, 1), ("policy", 1, 1, 0.5)], [1]),
    ("tensor parallel", {"generator": R(1, 2, 4), "policy": R(1, 1, 1)}, "separate",
     [("generator", 0, 2, 4), ("policy", 0, 1, 1)], [0]),
    ("cpu", {"policy": R(2, 1), "generator": R(1, 2)}, "cpu",
     [("policy", 0, 1, 0), ("policy", 1, 1, 0), ("generator", 0, 2, 0)], [2]),
    ("a stage without generators", {"policy": R(1, 1)}, "colocated", [("policy", 0, 1, 0)], []),
    ("a stage without a policy", {"generator": R(1, 1), "reward": R(1, 1)}, "colocated",
     [("generator", 0, 1, 0), ("reward", 0, 1, 0)], [0]),
    ("a role that is switched off", {"critic": R(0, 1), "policy": R(1, 1)}, "separate",
     [("policy", 0, 1, 0)], []),
]


@pytest.mark.parametrize(("roles", "placement", "bundles", "generators"), [c[1:] for c in LAYOUTS],
                         ids=[c[0] for c in LAYOUTS])
def test_layouts(roles, placement, bundles, generators):
    layout = plan_layout(roles, placement)
    assert [(b.role, b.index, b.cpus, pytest.approx(b.gpus)) for b in layout.bundles] == bundles
    assert [layout.assignment["generator", i] for i in range(len(generators))] == generators
    assert layout.total_cpus == sum(b[2] for b in bundles)
    assert layout.total_gpus == pytest.approx(sum(b[3] for b in bundles))
    actors = {(role, i) for role, request in roles.items() for i in range(request.count)}
    assert layout.assignment.keys() == layout.shares.keys() == actors
    for number, bundle in enumerate(layout.bundles):  # what the tenants ask for fits into the bundle
        tenants = [layout.shares[actor] for actor, home in layout.assignment.items() if home == number]
        assert sum(s.cpus for s in tenants) == bundle.cpus
        assert sum(s.gpus for s in tenants) <= bundle.gpus + 1e-9


@pytest.mark.parametrize(
    ("policy", "generator", "expected"),
    [(1.0, 1.0, (0.5, 0.5)), (0.5, 0.3, (0.5, 0.3)), (1.0, 0.5, (0.6666, 0.3333)), (0.7, 0.7, (0.5, 0.5))],
)
def test_shares_of_one_device(policy, generator, expected):
    """Scaled down in proportion when they exceed it, at Ray's resolution of 1e-4: 1 / 1.5, 0.5 / 1.5."""
    shares = plan_layout({"policy": R(1, 2, policy), "generator": R(1, 3, generator)}, "colocated").shares
    assert shares == {("policy", 0): Share(2, expected[0]), ("generator", 0): Share(3, expected[1])}


@pytest.mark.parametrize(
    ("policy", "generator", "placement", "message"),
    [
        (R(1, 1), R(2, 1), "colocated", "2 generators share the devices of 1 policy ranks"),
        (R(1, 1, 1), R(1, 1, 2), "colocated", "separate"),
        (R(1, 1, 1), R(1, 1, 0), "colocated", "Both or neither"),
        (R(1, 1, 1.5), R(1, 1, 1), "separate", "policy asks for 1.5 GPUs"),
        (R(1, 1), R(1, 1, 0.5), "cpu", "generator asks for 0.5 GPUs: ask for none"),
        (R(1, 1), R(1, 1), "together", "unknown placement 'together'"),
    ],
)
def test_impossible_layouts(policy, generator, placement, message):
    with pytest.raises(ValueError, match=message):
        plan_layout({"policy": policy, "generator": generator}, placement)


# device_gpus, colocated -> the default on several hosts and on one, and what may be asked for besides gloo and shm
WIRES = [
    (False, False, "gloo", "shm", set()),
    (False, True, "gloo", "shm", set()),
    (True, False, "nccl", "nccl", {"nccl"}),
    (True, True, "ipc", "ipc", {"ipc"}),
]


@pytest.mark.parametrize(("gpus", "colocated", "default", "one_host", "allowed"), WIRES)
def test_sync_backends(gpus, colocated, default, one_host, allowed):
    assert default_sync_backend(gpus, colocated, False) == default
    assert default_sync_backend(gpus, colocated, True) == one_host
    for backend in ("gloo", "shm", "nccl", "ipc", "auto"):
        if backend in {"gloo", "shm", *allowed}:
            check_sync_backend(backend, gpus, colocated)
        else:
            with pytest.raises(ValueError, match=f"weight_sync.backend.*{backend}"):
                check_sync_backend(backend, gpus, colocated)
