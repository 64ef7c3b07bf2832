"""The reward model and the critic that starts from it read the same tokens alike."""

import numpy as np
import ray

from end_to_end.small import small_config
from rlhf_ray.actors.learners import CriticLearner
from rlhf_ray.actors.scorers import ReferenceModel, RewardModel
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.core.types import RolloutBatch
from rlhf_ray.train import roles

EOS = 1


def rollout(sequences: list[list[int]], prompt: int, truncated: list[bool]) -> RolloutBatch:
    n, lengths = len(sequences), np.array([len(s) for s in sequences], dtype=np.int32)
    return RolloutBatch(
        ids=np.concatenate([np.array(s, dtype=np.int32) for s in sequences]), lengths=lengths,
        prompt_lengths=np.full(n, prompt, dtype=np.int32),
        sampled_logprobs=np.zeros(int(lengths.sum()), dtype=np.float32), truncated=np.array(truncated),
        prompt_index=np.arange(n), positions=np.arange(n), seeds=np.arange(n), version=1)


def test_a_truncated_response_is_read_as_if_it_ended_there(ray_session, models, reward_model):
    """[.. 7] cut at the limit scores as [.. 7 EOS] does; not cut, [.. 7] scores otherwise."""
    cfg = small_config(models[0])
    with Cast(roles.layout_of(cfg, ["reward"]), cfg.cluster) as cast:
        reward = roles.reward_sources(cast, cfg, reward_model, models[0], None)[0]
        cast.ready()
        cut = reward.ask(RewardModel.scores, rollout([[5, 6, 7], [5, 9]], 1, [True, False]))
        ended = reward.ask(RewardModel.scores, rollout([[5, 6, 7, EOS], [5, 9]], 1, [False, False]))
        bare = reward.ask(RewardModel.scores, rollout([[5, 6, 7], [5, 9]], 1, [False, False]))
    np.testing.assert_allclose(cut, ended, atol=1e-5)
    assert abs(bare[0] - cut[0]) > 1e-3


def test_the_critic_starts_as_the_reward_model(ray_session, models, reward_model):
    """Before any update the value before token t is the score of the text up to t - 1, head and shift included."""
    cfg, tokens = small_config(models[0]), [5, 6, 7, 8, 9]
    with Cast(roles.layout_of(cfg, ["reward", "critic"]), cfg.cluster) as cast:
        reward = roles.reward_sources(cast, cfg, reward_model, models[0], None)[0]
        critic = roles.critic_learners(cast, cfg, reward_model, 1)
        cast.ready()
        prefixes = [tokens[:n] for n in (2, 3, 4)]
        scores = reward.ask(RewardModel.scores, rollout(prefixes, 1, [False] * 3))
        (refs,) = critic.call(CriticLearner.values, [ray.put(rollout([tokens], 2, [False]))])
        values = ray.get(refs[0])
    np.testing.assert_allclose(values, [0, 0, *scores], atol=1e-5)
    assert np.std(scores) > 1e-2


def test_passes_side_by_side_find_what_one_after_another_do(ray_session, models, reward_model):
    """Thirteen responses in micro-batches of at most 32 tokens, on one thread and on three."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, 60, n).tolist() for n in range(4, 17)]
    some, found = rollout(sequences, 2, [False] * 13), []
    for threads, tokens in ((1, 32), (3, 96)):
        cfg = small_config(models[0])
        for role in (cfg.roles.reward, cfg.roles.reference):
            role.threads, role.micro_batch_tokens = threads, tokens
        with Cast(roles.layout_of(cfg, ["reward", "reference"]), cfg.cluster) as cast:
            reward = roles.reward_sources(cast, cfg, reward_model, models[0], None)[0]
            reference = roles.reference_models(cast, cfg, models[0])
            cast.ready()
            found.append((reward.ask(RewardModel.scores, some), reference.ask(ReferenceModel.logprobs, some, 0.7)))
    (scores, logprobs), (scores_of_three, logprobs_of_three) = found
    np.testing.assert_allclose(scores_of_three, scores, atol=1e-5)
    np.testing.assert_allclose(logprobs_of_three, logprobs, atol=1e-5)
    assert (np.abs(logprobs) > 1e-3).sum() == some.in_response.sum() > 100
