"""A node disappears in mid-run, with every actor and object on it: the run goes on where there is room."""

import json
from pathlib import Path

from ray.cluster_utils import Cluster

from chaos.harness import outcome
from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.stages import ppo
from rlhf_ray.train.ppo import PPOTrainer


def test_a_lost_node_is_a_loss_like_any_other(models, reward_model, tmp_path, monkeypatch):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "object_store_memory": 2**28})
    try:
        other = cluster.add_node(num_cpus=4, object_store_memory=2**28)
        where: list[set[str]] = []

        class Loses(PPOTrainer):
            def enter(self, phase: str) -> None:
                super().enter(phase)
                if phase == "score" and self.step == 2 and not where and self.cfg is runs[1]:
                    where.append({m.node_id for m in self.cast.health.members.values()})
                    cluster.remove_node(other, allow_graceful=False)

        monkeypatch.setattr(ppo, "PPOTrainer", Loses)
        runs = [ppo_config(tmp_path / name, models[0], "ppo") for name in ("plain", "lost")]
        for cfg in runs:
            cfg.cluster.address, cfg.cluster.strategy, cfg.ppo.iterations = cluster.address, "SPREAD", 5
            cfg.roles.generator.replicas = 2
            earlier_stages(Path(cfg.output_dir), models[0], reward_model)
            ppo.run(cfg)
        assert len(where[0]) == 2  # there were actors on both
        assert sum(json.loads((tmp_path / "lost/ppo/stage.json").read_text())["restarts"].values()) > 0
        assert outcome(runs[1]) == outcome(runs[0])
    finally:
        cluster.shutdown()
