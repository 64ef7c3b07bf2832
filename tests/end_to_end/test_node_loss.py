"""A node disappears in mid-run, with every actor and object on it: the run goes on where there is room."""

import json
from pathlib import Path

from ray.cluster_utils import Cluster

from chaos.harness import outcome
from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.stages import ppo
from rlhf_ray.train.ppo import PPOTrainer


def test_a_lost_node_is_a_loss_like_any_other(models, reward_model, tmp_path, monkeypatch):
    """It ends as a run on a private Ray does, where nobody is lost."""
    plain, lost = (ppo_config(tmp_path / name, models[0], "ppo") for name in ("plain", "lost"))
    for cfg in (plain, lost):
        cfg.ppo.iterations, cfg.roles.generator.replicas = 5, 2
        earlier_stages(Path(cfg.output_dir), models[0], reward_model)
    ppo.run(plain)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "object_store_memory": 2**28})
    try:
        other = cluster.add_node(num_cpus=4, object_store_memory=2**28)
        where: list[set[str]] = []

        class Loses(PPOTrainer):
            def enter(self, phase: str) -> None:
                super().enter(phase)
                if phase == "score" and self.step == 2 and not where:
                    where.append({m.node_id for m in self.cast.health.members.values()})
                    cluster.remove_node(other, allow_graceful=False)

        monkeypatch.setattr(ppo, "PPOTrainer", Loses)
        lost.cluster.address, lost.cluster.strategy = cluster.address, "SPREAD"
        ppo.run(lost)
        assert len(where[0]) == 2  # there were actors on both
        assert sum(json.loads((tmp_path / "lost/ppo/stage.json").read_text())["restarts"].values()) > 0
        assert outcome(lost) == outcome(plain)
    finally:
        cluster.shutdown()
