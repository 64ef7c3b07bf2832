"""Bundles on nodes: what fits, against all possible packings; and what is said when nothing does."""

import random
from collections import defaultdict
from collections.abc import Sequence

import pytest

from rlhf_ray.core import packing
from rlhf_ray.core.layout import Bundle, RoleRequest, plan_layout
from rlhf_ray.core.packing import NodeResources, comparison, hosts, pack, shortfall

R, N = RoleRequest, NodeResources
FITS = [
    ("exactly", {"a": R(2, 2, 1)}, [N("n", 4, 2)], True),
    ("one cpu short", {"a": R(2, 2, 1)}, [N("n", 3, 2)], False),
    ("enough in all, not on one node", {"a": R(1, 4)}, [N("m", 2), N("n", 2)], False),
    ("two nodes", {"a": R(2, 4)}, [N("m", 4), N("n", 4)], True),
    ("large ones first", {"a": R(2, 2), "b": R(1, 4)}, [N("m", 4), N("n", 4)], True),
    ("gpu bundles before cpu ones", {"a": R(1, 4), "b": R(1, 2, 1)}, [N("m", 4, 1), N("n", 4)], True),
    ("3 + 2 + 2 and 3 + 2, not 3 + 3 first", {"a": R(2, 1, 3), "b": R(3, 1, 2)}, [N("m", 9, 7), N("n", 9, 5)], True),
    ("4 + 1 + 1 and 3 + 3", {"a": R(2, 3), "b": R(1, 4), "c": R(2, 1)}, [N("m", 6), N("n", 6)], True),
    ("4 + 3 leaves no room for 3", {"a": R(2, 3), "b": R(2, 4)}, [N("m", 7), N("n", 6)], False),
    ("ninths add up to a device", {"a": R(9, 0, 1 / 9)}, [N("n", 1, 1)], True),
    ("ten of them do not fit", {"a": R(10, 0, 1 / 9)}, [N("n", 1, 1)], False),
    ("a share does not straddle two devices", {"a": R(3, 0, 0.6)}, [N("n", 1, 2)], False),
    ("small shares fill up the devices", {"a": R(2, 0, 0.6), "b": R(2, 0, 0.4)}, [N("n", 1, 2)], True),
    ("whole devices must be free", {"a": R(1, 0, 2), "b": R(1, 0, 0.5)}, [N("n", 1, 2)], False),
    ("a part of a device", {"a": R(1, 0, 1), "b": R(1, 0, 0.5)}, [N("n", 1, 1.5)], True),
    ("no node", {"a": R(1, 1)}, [], False),
    ("nothing wanted", {"a": R(0, 1)}, [], True),
]


@pytest.mark.parametrize(("roles", "nodes", "fits"), [c[1:] for c in FITS], ids=[c[0] for c in FITS])
def test_what_fits(roles, nodes, fits):
    layout = plan_layout(roles, "separate")
    assert (pack(layout, nodes) is not None) == fits
    message = shortfall(layout, nodes)
    assert (message is None) == fits, message


@pytest.mark.parametrize(("strategy", "nodes", "homes"), [
    ("PACK", [N("m", 2), N("n", 3)], (1, 1, 1)),  # all on the one node that holds all
    ("PACK", [N("m", 2), N("n", 2)], (0, 0, 1)),
    ("STRICT_PACK", [N("m", 2), N("n", 3)], (1, 1, 1)),
    ("STRICT_PACK", [N("m", 2), N("n", 2)], None),
    ("STRICT_SPREAD", [N("m", 3), N("n", 1), N("o", 1)], (0, 1, 2)),
    ("STRICT_SPREAD", [N("m", 3), N("n", 3)], None),
])
def test_strategies(strategy, nodes, homes):
    layout = plan_layout({"policy": R(3, 1)}, "cpu")
    assert pack(layout, nodes, strategy) == homes
    message = shortfall(layout, nodes, strategy)
    assert message is None if homes else f"cluster.strategy={strategy} wants" in message


def fits(bundles: Sequence[Bundle], nodes: list[tuple[int, tuple[int, ...]]]) -> bool:
    """Try every node and every device, one bundle after the other. nodes: CPUs and tenths of devices that are free."""
    if not bundles:
        return True
    first, rest = bundles[0], bundles[1:]
    for i, (cpus, devices) in enumerate(nodes):
        if cpus < first.cpus:
            continue
        free = [d for d, tenths in enumerate(devices) if tenths == 10]
        if first.gpus == 0:
            choices: list[list[int]] = [[]]
        elif first.gpus >= 1:  # whole devices are all alike
            choices = [free[:int(first.gpus)]] if len(free) >= first.gpus else []
        else:
            choices = [[d] for d, tenths in enumerate(devices) if tenths >= round(first.gpus * 10)]
        for chosen in choices:
            after = tuple(t - round(min(first.gpus, 1) * 10) * (d in chosen) for d, t in enumerate(devices))
            if fits(rest, [*nodes[:i], (cpus - int(first.cpus), after), *nodes[i + 1:]]):
                return True
    return False


@pytest.mark.parametrize("gpus", [(0, 1, 2, 3), (0, 0.3, 0.4, 0.5, 0.6, 1, 2)], ids=["whole", "shares"])
def test_against_all_packings(gpus):
    """Small clusters at random, those where the totals would do: a packing is found just when there is one."""
    draw, found = random.Random(0), defaultdict(int)
    for _ in range(600):
        roles = {role: R(draw.randint(0, 2), draw.randint(0, 3), draw.choice(gpus))
                 for role in ("policy", "critic", "generator", "reward")}
        nodes = [N(f"n{i}", draw.randint(1, 7), draw.randint(0, 4)) for i in range(draw.randint(1, 3))]
        layout = plan_layout(roles, "separate")
        if layout.total_cpus > sum(n.cpus for n in nodes) or layout.total_gpus > sum(n.gpus for n in nodes):
            continue
        homes = pack(layout, nodes)
        assert (homes is not None) == fits(layout.bundles, [(n.cpus, (10,) * n.gpus) for n in nodes]), (roles, nodes)
        found[homes is not None] += 1
        for i, node in enumerate(nodes if homes else []):
            here = [b for b, home in zip(layout.bundles, homes, strict=True) if home == i]
            assert fits(here, [(node.cpus, (10,) * node.gpus)])
    assert min(found.values()) > 25


@pytest.mark.parametrize(("limit", "value"), [("_PATIENCE", 1), ("_DEEPEST", 1)])
def test_a_search_that_takes_too_long_says_that_there_is_no_room(monkeypatch, limit, value):
    layout, nodes = plan_layout({"a": R(2, 1, 3), "b": R(3, 1, 2)}, "separate"), [N("m", 9, 7), N("n", 9, 5)]
    assert pack(layout, nodes) == (0, 1, 0, 0, 1)
    monkeypatch.setattr(packing, limit, value)
    assert pack(layout, nodes) is None
    assert "no room for 1 of 3 b" in shortfall(layout, nodes)


def test_shortfall_sets_demand_beside_supply():
    """Policy 0 takes node n's GPU and 2 of its CPUs; policy 1 finds no GPU; the reward actor no 3 CPUs."""
    layout = plan_layout({"reward": R(1, 3), "policy": R(2, 2, 1)}, "separate")
    assert shortfall(layout, [N("n", 4, 1), N("m", 1)]) == (
        "the roles do not fit the cluster:\n"
        "  cpus: 7 wanted, 5 offered; in bundles of 1 x 3, 2 x 2; n 4, m 1\n"
        "  gpus: 2 wanted, 1 offered; in bundles of 2 x 1; n 1, m 0\n"
        "  no room for 1 of 1 reward: 3 cpus, 0 gpus each on one node\n"
        "  no room for 1 of 2 policy: 2 cpus, 1 gpus each on one node"
    )


def test_many_nodes_are_counted():
    layout = plan_layout({"generator": R(2, 0, 8)}, "separate")
    message = shortfall(layout, [N(f"n{i}", 1, 4) for i in range(30)] + [N("last", 1, 8)])
    assert message == (
        "the roles do not fit the cluster:\n"
        "  gpus: 16 wanted, 128 offered; in bundles of 2 x 8; 30 nodes 4 each, last 8\n"
        "  no room for 1 of 2 generator: 0 cpus, 8 gpus each on one node"
    )


def test_demand_beside_what_is_free_now():
    """Policy 0 finds room on n, where others left 2 of the CPUs."""
    layout = plan_layout({"policy": R(2, 2)}, "separate")
    assert comparison(layout, [N("n", 2), N("m", 0)], supply="free") == (
        "  cpus: 4 wanted, 2 free; in bundles of 2 x 2; n 2, m 0\n"
        "  no room for 1 of 2 policy: 2 cpus, 0 gpus each on one node"
    )


def test_a_host_has_room_for_a_bundle_by_itself():
    """Whatever the others need: Ray may put any bundle there."""
    layout = plan_layout({"policy": R(8, 2), "generator": R(1, 1, 1)}, "separate")
    nodes = {"head": N("h", 0), "small": N("s", 1), "cpu": N("c", 2), "gpu": N("g", 1, 1)}
    assert hosts(layout, nodes) == {"cpu", "gpu"}
    assert hosts(plan_layout({}, "separate"), nodes) == set()
