"""From one laptop to 1,024 GPUs: which bundles a cluster has to hold, on which nodes, and the wire of the weight sync.

All by hand. The memory behind the numbers, of a model with B billion parameters: a generator or scorer holds weights in
bfloat16, 2B GB, over the GPUs of its engine, and a generator wants a fifth of its memory for the KV cache; learners
hold 18B GB (bfloat16 weights and gradients, float32 weights, two Adam moments, and gradients in float32 while they are
reduced) over all ranks of ZeRO-3, and want a tenth for activations, as scorers do. `test_memory` holds every row to it.
"""

import time
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import pytest

from rlhf_ray.core.layout import RoleRequest, default_sync_backend, plan_layout
from rlhf_ray.core.packing import LEARNERS, NodeResources, pack, shortfall

R = RoleRequest  # count, cpus, gpus


class Cluster(NamedTuple):
    """billions of parameters; gb of memory per GPU, 0 on CPU; bundles: {gpus: how many of them};
    where: role -> {number of node: how many of its bundles}, or what the message says that nothing fits."""

    name: str
    billions: float
    gb: float
    placement: str
    nodes: list[tuple[float, float]]  # cpus, gpus
    roles: dict[str, RoleRequest]
    bundles: dict[float, int]
    where: dict[str, dict[int, int]] | list[str]
    wire: str


def over(*nodes: int, each: int) -> dict[int, int]:
    return dict.fromkeys(nodes, each)


BIG = {  # 405B: 18 x 405 / 512 = 14 GB a policy rank, / 64 = 114 GB a critic rank; 810 GB / 8 = 101 GB of weights
    "policy": R(512, 8, 1), "critic": R(64, 8, 1), "generator": R(48, 32, 8), "reward": R(4, 16, 8),
    "reference": R(4, 16, 8),  # 512 + 64 + 384 + 32 + 32 = 1,024
}

CLUSTERS = [
    Cluster("the quickstart on a laptop", 0.004, 0, "cpu", [(7, 0)],
            {"policy": R(2, 1), "critic": R(1, 1), "generator": R(1, 1), "reward": R(1, 1), "reference": R(1, 1)},
            {0: 6}, {"policy": {0: 2}, "critic": {0: 1}, "generator": {0: 1}, "reward": {0: 1}, "reference": {0: 1}},
            "gloo"),
    Cluster("three CPU nodes: the ranks stay together", 0.5, 0, "cpu", [(4, 0), (8, 0), (4, 0)],
            {"policy": R(4, 2), "generator": R(2, 4)},
            {0: 6}, {"policy": {1: 4}, "generator": {0: 1, 2: 1}}, "gloo"),
    Cluster("colocated without GPUs", 0.004, 0, "colocated", [(6, 0)],
            {"policy": R(2, 1), "generator": R(2, 1), "reference": R(1, 1)},  # 2 pairs
            {0: 3}, {"policy": {0: 2}, "reference": {0: 1}}, "gloo"),
    # 18 GB of 24 for each learner, 2 GB of 24 for the engine, 2 GB of 4 for each scorer: 0.6 + 0.3 + 0.05 + 0.05 = 1
    Cluster("1B: everything on one GPU", 1, 80, "colocated", [(8, 1)],
            {"policy": R(1, 1, 0.3), "critic": R(1, 1, 0.3), "generator": R(1, 1, 0.3), "reward": R(1, 1, 0.05),
             "reference": R(1, 1, 0.05)},
            {0.6: 1, 0.3: 1, 0.05: 2}, {"policy": {0: 1}, "critic": {0: 1}, "reward": {0: 1}, "reference": {0: 1}},
            "ipc"),
    Cluster("1B: separate roles on one GPU", 1, 80, "separate", [(8, 1)],
            {"policy": R(1, 1, 1), "generator": R(1, 1, 1)},
            {1: 2}, ["gpus: 2 wanted, 1 offered; in bundles of 2 x 1; node-0 1", "no room for 1 of 1 generator"],
            "nccl"),
    Cluster("1.5B: the recipe hf_8gpu", 1.5, 80, "separate", [(64, 8)],
            {"policy": R(2, 1, 1), "critic": R(2, 1, 1), "generator": R(2, 1, 1), "reward": R(1, 1, 1),
             "reference": R(1, 1, 1)},  # 2 + 2 + 2 + 1 + 1 = 8
            {1: 8}, {"policy": {0: 2}, "critic": {0: 2}, "generator": {0: 2}, "reward": {0: 1}, "reference": {0: 1}},
            "nccl"),
    # 18 x 7 / 8 = 16 GB of 24 and of 20 for a learner's rank, 14 GB of 20 for an engine, 14 GB of 16 for a scorer.
    # Each device has 0.3 + 0.25 and 0.25, two of them a scorer's 0.2 as well: those are full.
    Cluster("7B: everything on eight GPUs", 7, 80, "colocated", [(64, 8)],
            {"policy": R(8, 1, 0.3), "critic": R(8, 1, 0.25), "generator": R(8, 1, 0.25), "reward": R(1, 1, 0.2),
             "reference": R(1, 1, 0.2)},
            {0.55: 8, 0.25: 8, 0.2: 2}, {"policy": {0: 8}, "critic": {0: 8}, "reward": {0: 1}, "reference": {0: 1}},
            "ipc"),
    Cluster("6B: the recipe instructgpt", 6, 80, "separate", [(64, 8), (64, 8)],
            {"policy": R(8, 1, 1), "critic": R(4, 1, 1), "generator": R(2, 1, 1), "reward": R(1, 1, 1),
             "reference": R(1, 1, 1)},  # 8 and 4 + 2 + 1 + 1
            {1: 16}, {"policy": {0: 8}, "critic": {1: 4}, "generator": {1: 2}, "reward": {1: 1}, "reference": {1: 1}},
            "nccl"),
    # Pairs of 0.5 + 0.5: 18 x 13 / 16 = 15 GB of 40, 26 GB of 40. Critic: 18 x 13 / 4 = 59 GB.
    Cluster("13B: colocated over two nodes, the rest on a third", 13, 80, "colocated", [(64, 8), (64, 8), (64, 8)],
            {"policy": R(16, 2, 0.5), "critic": R(4, 2, 1), "generator": R(16, 2, 0.5), "reward": R(2, 2, 1),
             "reference": R(2, 2, 1)},
            {1: 24}, {"policy": {0: 8, 1: 8}, "critic": {2: 4}, "reward": {2: 2}, "reference": {2: 2}}, "ipc"),
    # 18 x 13 / 8 = 29 GB a policy rank, / 4 = 59 GB a critic rank, 26 GB a scorer, 13 GB each half of an engine.
    # The last node is just as large as the four reward functions, so they leave the CPUs of the GPU nodes alone.
    Cluster("13B: nodes of 4, 8, 4 and 2 GPUs, and one without", 13, 80, "separate",
            [(64, 4), (64, 8), (64, 4), (64, 2), (16, 0)],
            {"policy": R(8, 2, 1), "critic": R(4, 2, 1), "generator": R(2, 8, 2), "reward": R(1, 4, 1),
             "reference": R(1, 4, 1), "reward_2": R(4, 4)},
            {2: 2, 1: 14, 0: 4},
            {"policy": {1: 8}, "critic": {0: 4}, "generator": {2: 2}, "reward": {3: 1}, "reference": {3: 1},
             "reward_2": {4: 4}}, "nccl"),
    Cluster("7B: ranks on the large node, engines on the small ones", 7, 80, "separate", [(64, 8), (32, 4), (32, 4)],
            {"policy": R(8, 2, 1), "generator": R(4, 4, 2)},
            {1: 8, 2: 4}, {"policy": {0: 8}, "generator": {1: 2, 2: 2}}, "nccl"),
    # The ranks, 18 x 7 / 4 = 32 GB each, would have node 0 to themselves, but only there is room for the engine.
    Cluster("7B: an engine of 8 takes the only node of 8", 7, 80, "separate", [(96, 8), (96, 2), (96, 2)],
            {"policy": R(4, 2, 1), "generator": R(1, 32, 8)},
            {1: 4, 8: 1}, {"policy": {1: 2, 2: 2}, "generator": {0: 1}}, "nccl"),
    Cluster("7B: CPUs for one engine a node, so the ranks share both", 7, 80, "separate", [(32, 8), (32, 8)],
            {"policy": R(8, 3, 1), "generator": R(2, 20, 4)},  # 20 + 4 x 3 = 32
            {1: 8, 4: 2}, {"policy": {0: 4, 1: 4}, "generator": {0: 1, 1: 1}}, "nccl"),
    # 24 ranks of 53 GB; 16 would be 79 GB each. Over two GPUs the weights take 70 of 80 GB: that does for a reference,
    # but leaves an engine no KV cache.
    Cluster("70B on five nodes", 70, 80, "separate", [(96, 8)] * 5,
            {"policy": R(24, 4, 1), "generator": R(2, 16, 4), "reference": R(2, 8, 2)},
            {1: 24, 4: 2, 2: 2}, {"policy": over(0, 1, 2, each=8), "generator": {3: 2}, "reference": {4: 2}}, "nccl"),
    # 18 x 32 / 32 = 18 GB a policy rank, / 16 = 36 GB a critic rank; 64 GB a scorer, 32 GB half an engine.
    Cluster("32B on 64 GPUs, all of them busy", 32, 80, "separate", [(128, 8)] * 8,
            {"policy": R(32, 4, 1), "critic": R(16, 4, 1), "generator": R(4, 8, 2), "reward": R(4, 4, 1),
             "reference": R(4, 4, 1)},  # 32 + 16 + 8 + 4 + 4 = 64
            {1: 56, 2: 4},
            {"policy": over(0, 1, 2, 3, each=8), "critic": over(4, 5, each=8), "generator": {6: 4}, "reward": {7: 4},
             "reference": {7: 4}}, "nccl"),
    Cluster("7B: a broken GPU, the ranks go to the other node", 7, 80, "separate", [(64, 7), (64, 8)],
            {"policy": R(8, 2, 1), "critic": R(2, 2, 1), "generator": R(1, 8, 4), "reference": R(1, 2, 1)},
            {1: 11, 4: 1}, {"policy": {1: 8}, "critic": {0: 2}, "generator": {0: 1}, "reference": {0: 1}}, "nccl"),
    Cluster("70B: a broken GPU, and no engine of 8", 70, 80, "separate", [(64, 7)], {"generator": R(1, 8, 8)},
            {8: 1}, ["gpus: 8 wanted, 7 offered; in bundles of 1 x 8; node-0 7"], "nccl"),
    Cluster("70B: engines of 8 on nodes of 4 and 8", 70, 80, "separate", [(64, 4), (64, 8)], {"generator": R(2, 8, 8)},
            {8: 2}, ["gpus: 16 wanted, 12 offered; in bundles of 2 x 8; node-0 4, node-1 8",
                     "no room for 1 of 2 generator: 8 cpus, 8 gpus each on one node"], "nccl"),
    Cluster("70B: the totals fit, no packing does", 70, 80, "separate", [(64, 6), (64, 6)], {"generator": R(3, 8, 4)},
            {4: 3}, ["gpus: 12 wanted, 12 offered; in bundles of 3 x 4; node-0 6, node-1 6",
                     "no room for 1 of 3 generator"], "nccl"),
    Cluster("405B on 1,024 GPUs", 405, 141, "separate", [(192, 8)] * 128, BIG,
            {1: 576, 8: 56},
            {"policy": over(*range(64), each=8), "critic": over(*range(64, 72), each=8),
             "generator": over(*range(72, 120), each=1), "reward": over(*range(120, 124), each=1),
             "reference": over(*range(124, 128), each=1)}, "nccl"),
    Cluster("405B: one of 1,024 GPUs is broken", 405, 141, "separate", [*[(192, 8)] * 127, (192, 7)], BIG,
            {1: 576, 8: 56}, ["gpus: 1024 wanted, 1023 offered; in bundles of 56 x 8, 576 x 1; 127 nodes 8 each, "
                              "node-127 7", "no room for 1 of 64 critic"], "nccl"),
    Cluster("405B: one is broken, and a node is spare", 405, 141, "separate", [(192, 7), *[(192, 8)] * 128], BIG,
            {1: 576, 8: 56},
            {"policy": over(*range(1, 65), each=8), "critic": over(*range(65, 73), each=8),
             "generator": over(*range(73, 121), each=1), "reward": over(*range(121, 125), each=1),
             "reference": over(*range(125, 129), each=1)}, "nccl"),
]


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: c.name)
def test_clusters(cluster: Cluster) -> None:
    nodes = [NodeResources(f"node-{i}", *offered) for i, offered in enumerate(cluster.nodes)]
    began = time.process_time()
    layout = plan_layout(cluster.roles, cluster.placement)
    homes, message = pack(layout, nodes), shortfall(layout, nodes)
    assert time.process_time() - began < 0.2, "this is arithmetic: milliseconds"
    assert Counter(round(b.gpus, 4) for b in layout.bundles) == cluster.bundles
    assert default_sync_backend(cluster.gb > 0, cluster.placement == "colocated", one_host=False) == cluster.wire
    if isinstance(cluster.where, list):
        assert homes is None
        for line in cluster.where:
            assert message is not None and line in message
        return
    assert message is None and homes is not None
    where: dict[str, Any] = defaultdict(Counter)
    for bundle, node in zip(layout.bundles, homes, strict=True):
        where[bundle.role][node] += 1
    assert where == cluster.where


@pytest.mark.parametrize("cluster", [c for c in CLUSTERS if c.gb], ids=lambda c: c.name)
def test_memory(cluster: Cluster) -> None:
    """The table asks for what such models take: the docstring of this file."""
    for role, request in cluster.roles.items():
        if not request.gpus:
            continue  # a reward function
        gpus, of_each = max(1, request.gpus), min(1, request.gpus) * cluster.gb
        if role in LEARNERS:
            assert 18 * cluster.billions / request.count <= 0.9 * of_each, role
        else:
            assert 2 * cluster.billions / gpus <= (0.8 if role == "generator" else 0.9) * of_each, role
