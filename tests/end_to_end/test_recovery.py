"""Whatever dies, whenever: the run ends as if nothing had happened, to the last bit."""

import signal
from pathlib import Path


from chaos.harness import Fault, chaos, outcome
from end_to_end.small import earlier_stages, ppo_config
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
    cfg.ppo.iterations = 13
    cfg.roles.generator.replicas = cfg.roles.policy.ranks = 2
    cfg.reward.sources = ["model", "chaos.rewards:brevity"]
    cfg.cluster.heartbeat_s, cfg.cluster.heartbeat_timeout_s = 0.5, 6.0
    cfg.algorithm.ema_decay = 0.9
    earlier_stages(directory, models[0], reward_model)
    return cfg




def test_every_role_may_die(ray_session, models, reward_model, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where the reward function is found
    plain = config(tmp_path / "plain", models, reward_model)
    ppo.run(plain)
    faulty = config(tmp_path / "faulty", models, reward_model)
    with chaos(FAULTS) as script:
        ppo.run(faulty)
    assert not script.left and len(script.struck) == len(FAULTS)
    for fault in script.struck:
        print(f"{fault.role}-{fault.index} in {fault.phase}: {fault.recovered:.1f} s")
    (weights, rows), (expected, plain_rows) = outcome(faulty), outcome(plain)
    assert rows == plain_rows
    assert weights == expected
