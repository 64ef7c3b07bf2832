"""The ppo stage's arithmetic."""

import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.stages.ppo import optimizer_steps


@pytest.mark.parametrize(("batch", "minibatch", "epochs", "per_iteration"), [
    (128, 64, 1, 2), (128, 64, 3, 6), (100, 64, 1, 2), (64, 64, 1, 1),
])
def test_schedules_count_optimizer_steps(batch: int, minibatch: int, epochs: int, per_iteration: int) -> None:
    """Minibatches of all epochs, the last, smaller one included; micro-batches do not count."""
    cfg = Config()
    cfg.rollout.batch_size, cfg.algorithm.minibatch_size, cfg.algorithm.ppo_epochs = batch, minibatch, epochs
    cfg.roles.policy.micro_batch_tokens = 16
    assert optimizer_steps(cfg, 20) == 20 * per_iteration
