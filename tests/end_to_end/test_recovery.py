"""Whatever dies, whenever: the run ends as if nothing had happened, to the last bit.

CHAOS_FAULTS=100 has as many seeded faults instead of one for each role; CHAOS_RESULTS is where their table goes.
"""

import json
import os
import signal
from pathlib import Path
from statistics import median

import pytest

from chaos.harness import Fault, chaos, outcome, recovery_times, seeded
from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.errors import RunFailed
from rlhf_ray.stages import ppo

FAULTS = [
    Fault(1, "rollout", "generator", 0),
    Fault(2, "score", "reference"),
    Fault(3, "update", "policy", 1, delay=0.03),
    Fault(4, "weight_sync", "generator", 1),
    Fault(5, "score", "reward"),
    Fault(6, "update", "critic", delay=0.03),
    Fault(7, "weight_sync", "policy", 0),
    Fault(8, "rollout", "generator", 1, signal=signal.SIGSTOP),
    Fault(9, "score", "policy", 0),
    Fault(10, "checkpoint", "policy", 1),
    Fault(11, "checkpoint", "critic"),
    Fault(12, "score", "reward_2"),
]


def config(directory, models, reward_model):
    cfg = ppo_config(directory, models[0], "ppo_ptx")
    cfg.roles.generator.replicas = cfg.roles.policy.ranks = 2
    cfg.reward.sources = ["model", "chaos.rewards:brevity"]
    cfg.cluster.heartbeat_s, cfg.cluster.heartbeat_timeout_s = 0.5, 6.0
    cfg.algorithm.ema_decay = 0.9
    earlier_stages(directory, models[0], reward_model)
    return cfg




def test_every_role_may_die(ray_session, models, reward_model, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where the reward function is found
    faults, long = FAULTS, int(os.environ.get("CHAOS_FAULTS", "0"))
    if long:
        faults = seeded(long, sorted({(f.role, f.index) for f in FAULTS}), seed=0)
    runs = []
    for name in ("plain", "faulty"):
        runs.append(config(tmp_path / name, models, reward_model))
        runs[-1].ppo.iterations = len(faults) + 3
    ppo.run(runs[0])
    with chaos(faults) as script:
        ppo.run(runs[1])
    assert not script.left and len(script.struck) == len(faults)
    table = recovery_times(script)
    print(json.dumps(table, indent=1))
    if "CHAOS_RESULTS" in os.environ:
        Path(os.environ["CHAOS_RESULTS"]).write_text(json.dumps(
            {"faults": len(faults), "cpus": os.cpu_count(), "iteration_s": median(script.plain), "roles": table},
            indent=1) + "\n")
    (weights, rows), (expected, plain_rows) = outcome(runs[1]), outcome(runs[0])
    assert rows == plain_rows
    assert weights == expected


def test_when_the_attempts_are_used_up_it_says_why_and_can_go_on(ray_session, models, reward_model, tmp_path,
                                                                 monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    cfg = config(tmp_path, models, reward_model)
    cfg.ppo.iterations, cfg.cluster.attempts = 3, 0
    with chaos([Fault(2, "rollout", "generator", 1)]), pytest.raises(RunFailed):
        ppo.run(cfg)
    (directory,) = (tmp_path / "ppo").glob("post_mortem-*")
    report = json.loads((directory / "report.json").read_text())
    assert (report["cause"], report["first"]["role"], report["first"]["index"]) == ("killed", "generator", 1)
    assert (report["iteration"], report["phase"], report["missing"]) == (2, "rollout", [])
    assert "generator-1" in capsys.readouterr().out
    assert {"summary.txt", "traceback.txt", "memory.csv", "memory.png", "config.yaml", "logs"} <= {
        p.name for p in directory.iterdir()}
    assert not (tmp_path / "ppo/stage.json").exists()
    assert [p.name for p in (tmp_path / "ppo/checkpoints").iterdir()] == ["step-00000001"]
    ppo.run(cfg)
    assert [row["iteration"] for row in outcome(cfg)[1]] == [1, 2, 3]
