"""Nothing grows: memory, file handles, objects in the store. CHAOS_ITERATIONS=200 makes it a long test."""

import os
import re
import time
from unittest.mock import patch

import psutil
import ray
from ray._private.internal_api import memory_summary  # what `ray memory` prints

from chaos.harness import results
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


def pulse_of_this_process() -> Pulse:
    """The driver of the run."""
    process = psutil.Process()
    return Pulse(process.memory_info().rss, process.num_fds(), 0)


def test_nothing_grows(ray_session, models, reward_model, tmp_path):
    pulses: dict[str, list[Pulse]] = {}
    stored: list[int] = []

    class Watched(PPOTrainer):
        def advance(self) -> None:
            super().advance()
            for m in self.cast.health.members.values():
                pulses.setdefault(f"{m.role}-{m.index}", []).append(m.pulses[-1][1])
            pulses.setdefault("driver", []).append(pulse_of_this_process())
            if self.step % (ITERATIONS // 20) == 0:
                stored.append(objects_in_store())

    cfg = ppo_config(tmp_path, models[0], "ppo_ptx")
    cfg.ppo.iterations, cfg.cluster.heartbeat_s = ITERATIONS, 0.2
    earlier_stages(tmp_path, models[0], reward_model)
    with patch.object(ppo, "PPOTrainer", Watched):
        ppo.run(cfg)
    deadline = time.monotonic() + 20
    while (left := objects_in_store()) and time.monotonic() < deadline:
        time.sleep(0.5)
    quarter = ITERATIONS // 4  # the first is for warming up
    table = {}
    for name, seen in pulses.items():
        before, after = seen[quarter : 2 * quarter], seen[-quarter:]
        rss = [sum(p.rss for p in part) / len(part) / 2**20 for part in (before, after)]
        files = [min(p.fds for p in part) for part in (before, after)]  # what stays open, not what is being written
        table[name] = {"mib": [round(x, 1) for x in rss], "growth": round(rss[1] / rss[0] - 1, 5), "files": files}
    results("endurance", {"iterations": ITERATIONS, "between": "means of the second and of the last quarter",
                          "processes": table, "objects_in_store": stored, "objects_at_the_end": left})
    for name, row in table.items():
        assert row["growth"] < 0.02, name
        assert row["files"][1] <= row["files"][0] + 1, name  # one connection may be made late; it is one, however long
    assert max(stored[10:]) <= 2 * max(stored[:10])  # they are let go a moment after an iteration
    assert left == 0
