"""Generators come and go while the run goes on; whoever works has the weights of the version."""

import json
import time
from pathlib import Path

from chaos.harness import kill
from end_to_end.small import earlier_stages, ppo_config
from rlhf_ray.config.schema import Config
from rlhf_ray.stages import ppo, scale
from rlhf_ray.train.ppo import PPOTrainer

ROLE = "generator"


def wish(trainer: PPOTrainer, number: int) -> None:
    """As the user does, in another process."""
    cfg = Config(output_dir=trainer.cfg.output_dir)
    cfg.scale.generators = number
    scale.run(cfg)


def come_up(trainer: PPOTrainer) -> None:
    """Wait until whoever was asked for could join."""
    deadline = time.monotonic() + 120
    while any(not coming.setup.future().done() for coming in trainer.cast._coming.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_one_more_one_lost_and_one_fewer(ray_session, models, reward_model, tmp_path, monkeypatch, capsys):
    """Each line: before this iteration's end, what happens; what metrics.jsonl says of it is asserted below."""

    class Trainer(PPOTrainer):
        def enter(self, phase: str) -> None:
            super().enter(phase)
            if phase != "update":
                return
            if self.step == 1:
                wish(self, 2)  # starts at this sync
            elif self.step == 3:
                come_up(self)  # joins at this one
            elif self.step == 5:
                kill(self.cast.group(ROLE).actors[0])  # the sync fails, and goes on without it
            elif self.step == 7:
                come_up(self)
            elif self.step == 8:
                wish(self, 1)

    monkeypatch.setattr(ppo, "PPOTrainer", Trainer)
    cfg = ppo_config(tmp_path, models[0], "grpo")
    cfg.ppo.iterations = 10
    earlier_stages(tmp_path, models[0], reward_model)
    ppo.run(cfg)
    rows = [json.loads(line) for line in Path(tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["generators"] for row in rows] == [1, 1, 1, 2, 2, 1, 1, 2, 1, 1]
    assert [row["weight_version"] for row in rows] == list(range(2, 12))  # every engine said that it holds it
    assert all(row["mismatch"] < 1e-4 for row in rows)  # whoever sampled had the trainer's weights
    assert json.loads((tmp_path / "ppo/stage.json").read_text())["restarts"] == {ROLE: 1}
    out = capsys.readouterr().out
    assert "joined: generator-1" in out and "joined: generator-0" in out and "left: generator-1" in out
