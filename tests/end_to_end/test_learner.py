"""A DeepSpeed ZeRO-3 update does not depend on how it was cut up."""

import math

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file

from end_to_end.small import small_config
from rlhf_ray.actors.learners import CriticLearner
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.core.types import CriticBatch, PolicyBatch, RolloutBatch, TokenDataset, Window
from rlhf_ray.engines import learner
from rlhf_ray.train import roles

N, PROMPT = 16, 6
ALL, HALF = np.arange(N), N // 2
NONE = np.zeros(0, dtype=np.int64)
# 8 rollouts of 8 to 20 tokens in rows of 24: all in one pass, in passes of some four, or one by one.
CUTS = {"8": 4096, "4+4": 72, "1x8": 16}


def shape() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, lengths, in_response) of sixteen rollouts of uneven length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(PROMPT + 2, 20, N).astype(np.int32)
    place = np.concatenate([np.arange(n) for n in lengths])
    return rng.integers(4, 300, int(lengths.sum())).astype(np.int32), lengths, place >= PROMPT


def policy_batch(advantage: float = 1.0) -> PolicyBatch:
    """Made-up numbers; one rollout is left out of the update, as a dropped truncated one is."""
    ids, lengths, in_response = shape()
    rng, total = np.random.default_rng(1), len(ids)
    in_response[lengths[:3].sum() : lengths[:4].sum()] = False
    whole = np.repeat(rng.normal(size=N), lengths)  # one advantage per response, as group algorithms have it
    return PolicyBatch(
        ids=ids, lengths=lengths, in_response=in_response,
        old_logprobs=rng.normal(-5.7, 0.05, total).astype(np.float32),
        ref_logprobs=rng.normal(-5.7, 0.2, total).astype(np.float32),
        advantages=(advantage * whole).astype(np.float32), weights=rng.uniform(0.5, 1.5, total).astype(np.float32),
    )


def critic_batch() -> CriticBatch:
    ids, lengths, in_response = shape()
    rng = np.random.default_rng(2)
    return CriticBatch(ids=ids, lengths=lengths, in_response=in_response,
                       values=rng.normal(size=len(ids)).astype(np.float32),
                       returns=rng.normal(size=len(ids)).astype(np.float32))


def blocks() -> TokenDataset:
    ids = np.random.default_rng(1).integers(4, 300, (6, 16)).astype(np.int32)
    in_loss = np.ones(ids.shape, dtype=bool)
    in_loss[:, 0] = False
    return TokenDataset(ids.reshape(-1), np.full(6, 16, dtype=np.int32), in_loss.reshape(-1))


def updated_policy(path, out, ranks=1, micro_batch_tokens=4096, batch=None, steps=2, turns=False, again=False,
                   scored=None, gpus=0.0, **algorithm):
    """Weights and report after optimizer steps of eight rollouts, and with ptx two or four text blocks, each.

    turns: between the steps the learners leave the device, as where they share it. again: layers are computed again in
    the backward pass. scored: rollouts whose log-probabilities are asked for before the steps, and after.
    """
    cfg = small_config(path)
    cfg.model.max_length, cfg.model.gradient_checkpointing = 24, again
    cfg.roles.policy.ranks, cfg.roles.policy.micro_batch_tokens = ranks, micro_batch_tokens
    cfg.roles.policy.param_persistence_threshold, cfg.roles.policy.gpus = 500, gpus
    cfg.ppo.policy_optimizer.lr, cfg.algorithm.ptx_coef = 1e-3, 0.5
    for key, value in algorithm.items():
        setattr(cfg.algorithm, key, value)
    with Cast(roles.layout_of(cfg, ["policy"]), cfg.cluster) as cast:
        policy = roles.policy_learners(cast, cfg, path, 2, ray.put(blocks()))
        cast.ready()
        ref = ray.put(batch or policy_batch())
        seen = [] if scored is None else [ray.put(scored)]
        if seen:
            policy.call(PolicyLearner.score, seen)
        text = [np.array([0, 1]), np.array([2, 3, 4, 5])] if cfg.algorithm.ptx else [NONE, NONE]
        windows = [[Window(ALL[:HALF][rank::ranks], text[0][rank::ranks]),
                    Window(ALL[HALF:][rank::ranks], text[1][rank::ranks])][:steps] for rank in range(ranks)]
        if turns:
            for step in range(steps):
                report = policy.call_each(PolicyLearner.update, [([ref], [w[step]], 0.1) for w in windows])[0]
                policy.call(PolicyLearner.offload, False)
                policy.call(PolicyLearner.offload, True)
                policy.call(PolicyLearner.offload, True)  # who has left stays away
                policy.call(PolicyLearner.reload)
            policy.call(PolicyLearner.offload, True)  # what is saved is looked for there
        else:
            report = policy.call_each(PolicyLearner.update, [([ref], w, 0.1) for w in windows])[0]
        if seen:
            policy.call(PolicyLearner.score, seen)
        policy.call(PolicyLearner.save, str(out))
    return load_file(out / "model.safetensors"), report


ALGORITHMS = {
    "ppo": {"name": "ppo", "ptx": True, "entropy_coef": 0.01},
    "grpo": {"name": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
    "rloo": {"name": "rloo"},
}


@pytest.mark.parametrize(("name", "variants"), [
    ("ppo", [(1, "4+4"), (1, "1x8"), (2, "8"), (2, "4+4")]), ("grpo", [(1, "1x8"), (2, "8")]),
    ("rloo", [(1, "1x8"), (2, "4+4")]),
])
def test_ranks_and_micro_batches_do_not_change_the_update(ray_session, models, tmp_path, name, variants):
    """Micro-batch 8 = 4 + 4 = 1 x 8, so accumulation 1 = 2; packed = one sequence at a time; one rank = two, also where
    one of the two has a micro-batch more."""
    algorithm = ALGORITHMS[name]
    whole, report = updated_policy(models[0], tmp_path / "whole", **algorithm)
    before = load_file(f"{models[0]}/model.safetensors")
    assert max(np.abs(whole[k] - before[k]).max() for k in whole) > 5e-4  # it moved
    assert report["policy_skipped_steps"] == 0
    assert report["clip_fraction"] > 0  # the clip is at work
    for ranks, cut in variants:
        weights, other = updated_policy(models[0], tmp_path / f"{ranks}{cut}", ranks, CUTS[cut], **algorithm)
        assert other.keys() == report.keys()
        for key, value in report.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (ranks, cut, key)
        # Adam's first steps turn rounding of a tiny gradient into a move of its own: compare with the step size.
        worst = max(float(np.quantile(np.abs(weights[k] - whole[k]), 0.99)) for k in weights)
        assert worst < 2e-5, (ranks, cut, worst)


def test_layers_computed_again_are_gathered_again(ray_session, models, tmp_path):
    """Gradient checkpointing on two ranks, which hold half of every layer: the same update."""
    kept, again = (updated_policy(models[0], tmp_path / f"{again}", 2, CUTS["8"], again=again, **ALGORITHMS["grpo"])
                   for again in (False, True))
    assert again[1] == pytest.approx(kept[1], rel=1e-4, abs=1e-6)
    assert max(float(np.quantile(np.abs(again[0][k] - kept[0][k]), 0.99)) for k in kept[0]) < 2e-5


def test_leaving_the_device_and_coming_back_changes_no_bit(ray_session, models, tmp_path):
    """On CPU everything stays in host memory; that DeepSpeed's buffers are put together again is seen all the same."""
    stays, _ = updated_policy(models[0], tmp_path / "stays", ranks=2, name="ppo")
    leaves, _ = updated_policy(models[0], tmp_path / "leaves", ranks=2, turns=True, name="ppo")
    assert all(np.array_equal(stays[k], leaves[k]) for k in stays)


def test_a_large_model_can_be_saved_whatever_was_done_with_it(ray_session, models, tmp_path, monkeypatch):
    """Also after a pass without gradients, when DeepSpeed has begun to gather what a backward pass would want."""

    class LargePolicy(PolicyLearner):
        """What DeepSpeed does with a large model, done with a small one: a layer is let go after its turn, and what
        comes next gathered before its own."""

        def setup(self, *args):
            config = learner._deepspeed_config

            def large(*args):
                made = config(*args)
                made["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 20_000}
                return made

            learner._deepspeed_config = large
            super().setup(*args)

    ids, lengths, _ = shape()
    index, none = np.arange(N), np.zeros(len(ids), dtype=np.float32)
    rollouts = RolloutBatch(ids, lengths, np.full(N, PROMPT), none, np.zeros(N, dtype=bool), index, index, index, 1)
    small, report = updated_policy(models[0], tmp_path / "small", 2, CUTS["4+4"], **ALGORITHMS["ppo"])
    monkeypatch.setattr(roles, "PolicyLearner", LargePolicy)
    large, other = updated_policy(models[0], tmp_path / "large", 2, CUTS["4+4"], scored=rollouts, **ALGORITHMS["ppo"])
    assert other == pytest.approx(report, rel=1e-4, abs=1e-6)
    assert max(float(np.quantile(np.abs(large[k] - small[k]), 0.99)) for k in small) < 2e-5


def test_both_gradient_norms_are_those_of_each_loss_alone(ray_session, models, tmp_path):
    """Of one step on RL and ptx together: rl_grad_norm is the norm of the same step without ptx."""
    _, alone = updated_policy(models[0], tmp_path / "alone", steps=1, name="ppo")
    _, both = updated_policy(models[0], tmp_path / "both", ranks=2, steps=1, name="ppo", ptx=True)
    assert both["rl_grad_norm"] == pytest.approx(alone["policy_grad_norm"], rel=1e-4)
    total, parts = both["policy_grad_norm"], (both["rl_grad_norm"], both["ptx_grad_norm"])
    assert abs(parts[0] - parts[1]) - 1e-6 <= total <= sum(parts) + 1e-6  # the triangle
    assert not math.isclose(total, parts[0], rel_tol=1e-3) and parts[1] > 0


def test_a_step_that_is_not_finite_is_dropped_by_all_ranks_and_counted(ray_session, models, tmp_path):
    weights, report = updated_policy(models[0], tmp_path / "inf", 2, batch=policy_batch(advantage=float("inf")))
    before = load_file(f"{models[0]}/model.safetensors")
    assert report["policy_skipped_steps"] == 2
    assert report["policy_fault"] == "20 of 20 parameters, and backwards first model.norm.weight"
    assert all(np.array_equal(weights[k], before[k]) for k in weights)


@pytest.mark.parametrize("offload", [False, True])
def test_a_dropped_step_says_where_gradients_were_first_not_finite(
    ray_session, models, tmp_path, monkeypatch, offload
):
    """In the last layer what goes back into the queries is NaN: broken are their weights, the norm before them, and all
    of the nine parameters of the first layer and the embeddings."""

    class BrokenPolicy(PolicyLearner):
        def setup(self, *args):
            args[3].offload_optimizer = offload
            super().setup(*args)
            queries = self.model.model.layers[1].self_attn.q_proj
            queries.register_full_backward_pre_hook(lambda _, grads: tuple(grad * math.nan for grad in grads))

    monkeypatch.setattr(roles, "PolicyLearner", BrokenPolicy)
    _, report = updated_policy(models[0], tmp_path / "broken", 2, CUTS["4+4"], **ALGORITHMS["ppo"])
    assert report["policy_skipped_steps"] == 2 and math.isfinite(report["policy_loss"])
    assert report["policy_fault"] == ("12 of 20 parameters, and backwards first model.layers.1 "
                                      "(self_attn.q_proj.weight, input_layernorm.weight)")


def updated_critic(path, ranks=1, micro_batch_tokens=4096, rounds=1):
    cfg = small_config(path)
    cfg.model.max_length = 24
    cfg.roles.critic.ranks, cfg.roles.critic.micro_batch_tokens = ranks, micro_batch_tokens
    cfg.ppo.critic_optimizer.lr, cfg.algorithm.value_clip = 3e-3, 100.0
    with Cast(roles.layout_of(cfg, ["critic"]), cfg.cluster) as cast:
        critic = roles.critic_learners(cast, cfg, path, 20)
        cast.ready()
        ref = ray.put(critic_batch())
        windows = [[Window(ALL[rank::ranks], NONE)] for rank in range(ranks)]
        return [critic.call_each(CriticLearner.update, [([ref], w) for w in windows])[0] for _ in range(rounds)]


def test_the_critic_learns_and_reports_its_fit(ray_session, models):
    """Values move towards the returns: the loss falls over twenty passes. Two ranks, one by one: the same numbers."""
    reports = updated_critic(models[0], rounds=20)
    assert reports[-1]["value_loss"] < 0.8 * reports[0]["value_loss"]
    assert reports[-1]["explained_variance"] > reports[0]["explained_variance"]
    others = updated_critic(models[0], ranks=2, micro_batch_tokens=16, rounds=3)
    for other, report in zip(others, reports, strict=False):
        for key, value in report.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
