"""A DeepSpeed ZeRO-3 update does not depend on how it was cut up."""

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file

from end_to_end.small import small_config
from rlhf_ray.actors.learners import CriticLearner, PolicyLearner, Window
from rlhf_ray.cluster.group import Cast
from rlhf_ray.core.types import TokenDataset, TrainBatch
from rlhf_ray.train import roles

N, LENGTH, PROMPT = 12, 20, 6
ALL = np.arange(N)
NO_PTX = np.zeros(0, dtype=np.int64)


def train_batch(advantage: float = 1.0) -> TrainBatch:
    """Twelve rollouts of uneven length with made-up numbers."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(PROMPT + 2, LENGTH, N).astype(np.int32)
    total = int(lengths.sum())
    place = np.concatenate([np.arange(n) for n in lengths])
    return TrainBatch(
        ids=rng.integers(4, 300, total).astype(np.int32), lengths=lengths, in_response=place >= PROMPT,
        old_logprobs=rng.normal(-5.7, 0.2, total).astype(np.float32),
        advantages=(advantage * rng.normal(size=total)).astype(np.float32),
        values=rng.normal(size=total).astype(np.float32), returns=rng.normal(size=total).astype(np.float32),
    )


def blocks() -> TokenDataset:
    ids = np.random.default_rng(1).integers(4, 300, (6, 16)).astype(np.int32)
    in_loss = np.ones(ids.shape, dtype=bool)
    in_loss[:, 0] = False
    return TokenDataset(ids.reshape(-1), np.full(6, 16, dtype=np.int32), in_loss.reshape(-1))


def updated_policy(path, out, ranks, micro_batch_tokens, batch=None):
    """Weights and report after two optimizer steps of six rollouts and two or four text blocks each."""
    cfg = small_config(path)
    cfg.roles.policy.ranks, cfg.roles.policy.micro_batch_tokens = ranks, micro_batch_tokens
    cfg.roles.policy.param_persistence_threshold = 500
    cfg.ppo.policy_optimizer.lr, cfg.algorithm.ptx_coef = 1e-3, 0.5
    with Cast(roles.layout_of(cfg, ["policy"]), cfg.cluster) as cast:
        policy = roles.policy_learners(cast, cfg, path, 2, ray.put(blocks()))
        cast.ready()
        ref = ray.put(batch or train_batch())
        windows = [[Window(ALL[:6][rank::ranks], np.array([0, 1])[rank::ranks]),
                    Window(ALL[6:][rank::ranks], np.array([2, 3, 4, 5])[rank::ranks])] for rank in range(ranks)]
        report = policy.call_each(PolicyLearner.update, [([ref], w) for w in windows])[0]
        policy.call(PolicyLearner.save, str(out))
    return load_file(out / "model.safetensors"), report


def test_ranks_and_micro_batches_do_not_change_the_update(ray_session, models, tmp_path):
    """One rank with everything in one pass = one rank with a sequence at a time = two ranks."""
    whole, report = updated_policy(models[0], tmp_path / "whole", 1, 4096)
    before = load_file(f"{models[0]}/model.safetensors")
    assert max(np.abs(whole[k] - before[k]).max() for k in whole) > 5e-4  # it moved
    assert report["policy_skipped_steps"] == 0 and report["ptx_loss"] > 0
    for name, ranks, tokens in (("single", 1, 16), ("two", 2, 4096)):
        weights, other = updated_policy(models[0], tmp_path / name, ranks, tokens)
        for key in ("policy_loss", "ptx_loss", "policy_grad_norm", "clip_fraction", "update_kl_per_token"):
            assert other[key] == pytest.approx(report[key], rel=1e-4, abs=1e-6), (name, key)
        # Adam's first steps turn rounding of a tiny gradient into a move of its own: compare with the step size.
        worst = max(float(np.quantile(np.abs(weights[k] - whole[k]), 0.99)) for k in weights)
        assert worst < 2e-5, (name, worst)


def test_a_step_that_is_not_finite_is_dropped_by_all_ranks_and_counted(ray_session, models, tmp_path):
    batch = train_batch(advantage=float("inf"))
    weights, report = updated_policy(models[0], tmp_path / "inf", 2, 4096, batch)
    before = load_file(f"{models[0]}/model.safetensors")
    assert report["policy_skipped_steps"] == 2
    assert all(np.array_equal(weights[k], before[k]) for k in weights)


def test_the_critic_learns_and_reports_its_fit(ray_session, models):
    """Values move towards the returns: the loss falls over ten passes."""
    cfg = small_config(models[0])
    cfg.ppo.critic_optimizer.lr, cfg.algorithm.value_clip = 3e-3, 100.0
    with Cast(roles.layout_of(cfg, ["critic"]), cfg.cluster) as cast:
        critic = roles.critic_learners(cast, cfg, models[0], 20)
        cast.ready()
        ref = ray.put(train_batch())
        reports = [critic.call(CriticLearner.update, [ref], [Window(ALL, NO_PTX)])[0] for _ in range(20)]
    assert reports[-1]["value_loss"] < 0.8 * reports[0]["value_loss"]
    assert reports[-1]["explained_variance"] > reports[0]["explained_variance"]
