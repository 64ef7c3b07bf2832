"""Where scorers work. What they compute: tests/end_to_end/test_scorers.py."""

import pytest
import torch

from rlhf_ray.actors import scorers
from rlhf_ray.actors.scorers import RewardModel
from rlhf_ray.config.schema import ScorerConfig


@pytest.mark.parametrize(("gpus", "there", "devices"), [
    (0.0, 0, ["cpu"]), (0.3, 1, ["cuda:0"]), (1.0, 1, ["cuda:0"]), (2.0, 2, ["cuda:0", "cuda:1"]),
    (1.0, 8, ["cuda:0"]), (0.0, 8, ["cuda:0"]),  # where Ray leaves all of them in sight, others have the rest
])
def test_a_scorer_has_as_many_devices_as_it_asked_for(monkeypatch, gpus, there, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(scorers, "use_processors", lambda threads: None)  # or this process would give way from now on
    scorer = RewardModel()
    scorer._use(ScorerConfig(gpus=gpus, micro_batch_tokens=1000))
    assert [str(device) for device in scorer._devices] == devices
    assert scorer.micro_batch_tokens == 1000 // len(devices)  # a micro-batch for each at a time
