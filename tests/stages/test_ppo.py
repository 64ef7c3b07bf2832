"""The ppo stage's arithmetic."""

import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.stages.ppo import optimizer_steps, other_rates


@pytest.mark.parametrize(("batch", "minibatch", "epochs", "per_iteration"), [
    (128, 64, 1, 2), (128, 64, 3, 6), (100, 64, 1, 2), (64, 64, 1, 1),
])
def test_schedules_count_optimizer_steps(batch: int, minibatch: int, epochs: int, per_iteration: int) -> None:
    """Minibatches of all epochs, the last, smaller one included; micro-batches do not count."""
    cfg = Config()
    cfg.rollout.batch_size, cfg.algorithm.minibatch_size, cfg.algorithm.ppo_epochs = batch, minibatch, epochs
    cfg.roles.policy.micro_batch_tokens = 16
    assert optimizer_steps(cfg, 20) == 20 * per_iteration


@pytest.mark.parametrize(("schedule", "warmup", "was", "now", "done", "rate"), [
    # 1 step each iteration, so that of 5 the rates fall from 1 to 0 by quarters, and of 9 by eighths
    ("linear", 0.0, 5, 9, 5, "38% of the peak instead of 0%"),
    ("linear", 0.0, 9, 5, 2, "50% of the peak instead of 75%"),
    ("constant", 0.5, 10, 20, 7, "80% of the peak instead of 100%"),  # still warming up: step 8 of 10
    ("constant", 0.5, 10, 20, 10, None),
    ("constant", 0.0, 5, 50, 5, None),
    ("linear", 0.0, 5, 5, 3, None),
    ("linear", 0.0, 9, 5, 6, None),  # there is nothing to do
])
def test_more_iterations_are_another_learning_rate_unless_it_is_constant(
    schedule: str, warmup: float, was: int, now: int, done: int, rate: str | None
) -> None:
    cfg = Config()
    cfg.rollout.batch_size = cfg.algorithm.minibatch_size = 16
    cfg.algorithm.name, cfg.algorithm.ppo_epochs, cfg.ppo.iterations = "ppo", 1, now
    for optimizer in (cfg.ppo.policy_optimizer, cfg.ppo.critic_optimizer):
        optimizer.schedule, optimizer.warmup_ratio, optimizer.min_lr_ratio = schedule, warmup, 0.0
    assert other_rates(cfg, was, done) == (rate and (
        f"ppo.iterations was {was} in the checkpoint, is {now} now, and the learning rates go on as in a run of {now}: "
        f"in iteration {done + 1} critic {rate}, policy {rate}"))


def test_the_policy_has_a_schedule_of_its_own_where_the_critic_warms_up_and_no_critic_has_none() -> None:
    """Of 6 and of 10 iterations the policy learns in 4 and in 8: after 3, in which it had one step, 1/3 and 1/7 of the
    way down."""
    cfg = Config()
    cfg.rollout.batch_size = cfg.algorithm.minibatch_size = 16
    cfg.algorithm.name, cfg.algorithm.ppo_epochs, cfg.ppo.iterations = "ppo", 1, 10
    cfg.ppo.critic_warmup_iterations = 2
    cfg.ppo.critic_optimizer.schedule, cfg.ppo.critic_optimizer.warmup_ratio = "constant", 0.0
    policy = cfg.ppo.policy_optimizer
    policy.schedule, policy.warmup_ratio, policy.min_lr_ratio = "linear", 0.0, 0.0
    line = other_rates(cfg, 6, 3)
    assert line is not None and line.endswith(": in iteration 4 policy 86% of the peak instead of 67%")
    cfg.algorithm.name, cfg.ppo.critic_optimizer.schedule = "grpo", "linear"
    line = other_rates(cfg, 6, 3)  # of 6 and of 10 iterations, 3/5 and 3/9 of the way down
    assert line is not None and line.endswith(": in iteration 4 policy 67% of the peak instead of 40%")
