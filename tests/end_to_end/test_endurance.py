"""Nothing grows: memory, file handles, objects in the store. CHAOS_ITERATIONS=200 makes it a long test."""

import os
import re
import time
from unittest.mock import patch

import ray
from ray._private.internal_api import memory_summary  # what `ray memory` prints

from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.cluster.health import Pulse
from rlhf_ray.stages import ppo
from rlhf_ray.train.ppo import PPOTrainer

ITERATIONS = int(os.environ.get("CHAOS_ITERATIONS", "40"))


def objects_in_store() -> int:
    """Objects that live in the shared store of the cluster."""
    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    found = re.search(r"Plasma memory usage \d+ MiB, (\d+) objects", summary)
    assert found, summary
    return int(found[1])


def test_nothing_grows(ray_session, models, reward_model, tmp_path):
    pulses: dict[str, list[Pulse]] = {}
    stored: list[int] = []

    class Watched(PPOTrainer):
        def advance(self) -> None:
            super().advance()
            for m in self.cast.health.members.values():
                pulses.setdefault(f"{m.role}-{m.index}", []).append(m.pulses[-1][1])
            if self.step % (ITERATIONS // 20) == 0:
                stored.append(objects_in_store())

    cfg = ppo_config(tmp_path, models[0], "ppo_ptx")
    cfg.ppo.iterations, cfg.cluster.heartbeat_s = ITERATIONS, 0.2
    earlier_stages(tmp_path, models[0], reward_model)
    with patch.object(ppo, "PPOTrainer", Watched):
        ppo.run(cfg)
    half, quarter = ITERATIONS // 2, ITERATIONS // 4
    for name, seen in pulses.items():
        before, after = seen[half : half + quarter], seen[-quarter:]
        rss = [sum(p.rss for p in part) / len(part) / 2**20 for part in (before, after)]
        fds = [min(p.fds for p in part) for part in (before, after)]
        print(f"{name}: {rss[0]:.1f} -> {rss[1]:.1f} MiB ({rss[1] / rss[0] - 1:+.2%}), {fds[0]} -> {fds[1]} files")
        assert rss[1] < 1.02 * rss[0], name
        assert fds[1] <= fds[0], name  # least of a quarter: what stays open, not what is being written just then
    print("objects in the store:", *stored)
    assert max(stored[10:]) <= 2 * max(stored[:10])  # they are let go a moment after an iteration
    deadline = time.monotonic() + 20
    while objects_in_store() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert objects_in_store() == 0
