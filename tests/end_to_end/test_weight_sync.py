"""Weights travel from ZeRO-3 learners to vLLM engines, and arrive."""

import numpy as np
import pytest
import ray

from end_to_end.small import small_config
from rlhf_ray.actors.generator import Generator, Sample
from rlhf_ray.actors.learners import PolicyLearner
from rlhf_ray.actors.scorers import ReferenceModel
from rlhf_ray.cluster.group import Cast
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set
from rlhf_ray.train.rollout import RolloutWorkers

PROMPTS = prompt_set([[0, 2, 40 + i, 41, 3] for i in range(12)])
SAMPLES = [Sample(i, i, 1000 + i) for i in range(12)]


def rollouts(generators, version):
    """All shards of a rollout over the given generators, as (batch, info)."""
    n = len(generators)
    streams = [
        actor.rollout.options(num_returns="streaming").remote(SAMPLES[i::n], version, 1.0, 20)
        for i, actor in enumerate(generators.actors)
    ]
    items = [ray.get(ref) for stream in streams for ref in stream]
    return list(zip(items[::2], items[1::2], strict=True))


@pytest.mark.parametrize("bucket_mib", [64.0, 0.001])  # one bucket for all; one for nearly every tensor
def test_engines_sample_from_the_learners_weights(ray_session, models, bucket_mib):
    """Two engines start from model 0; two ZeRO-3 ranks hold model 1. After the push the engines' log-probabilities
    are model 1's (to 1e-5 per token, float32), embeddings and the head tied to them included; model 0's are not."""
    engine_start, learner_start = models
    cfg = small_config(learner_start)
    cfg.roles.policy.ranks, cfg.roles.generator.replicas = 2, 2
    cfg.roles.policy.param_persistence_threshold = 0  # every parameter is sharded and must be gathered
    with Cast(roles.layout_of(cfg, ["policy", "generator", "reference"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, engine_start, ray.put(PROMPTS), "gloo")
        policy = roles.policy_learners(cast, cfg, learner_start, 1, None)
        reference = roles.reference_models(cast, cfg, learner_start)
        cast.ready()

        def gap(path: str) -> float:
            """Mean |engine - reference| log-probability of what the engines sample now."""
            reference.call(ReferenceModel.load, path)
            gaps = []
            for batch, _ in rollouts(generators, version):
                exact = ray.get(reference.actors[0].logprobs.remote(batch, 1.0))
                gaps.append(np.abs(exact - batch.sampled_logprobs)[batch.in_response])
            return float(np.concatenate(gaps).mean())

        version = 0
        assert gap(engine_start) < 1e-5
        policy.call(PolicyLearner.connect, generators.actors, 1, "gloo", cast.meeting_point("policy"),
                    bucket_mib, 60.0)
        policy.call(PolicyLearner.push, 7)
        version = 7
        assert gap(learner_start) < 1e-5
        assert gap(engine_start) > 1e-3  # the two models really differ: the check above could have failed


def test_a_stale_engine_is_never_asked(ray_session, models):
    cfg = small_config(models[0])
    with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "gloo")
        cast.ready()
        with pytest.raises(RuntimeError, match="weights 3, this engine holds 0"):
            rollouts(generators, version=3)


def test_the_same_seeds_give_the_same_samples_whoever_generates(ray_session, models):
    """One engine and two engines: the same tokens for the same prompts and seeds; other seeds, other tokens."""
    cfg = small_config(models[0])
    cfg.roles.generator.replicas = 2
    with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "gloo")
        cast.ready()
        both = generators.call(Generator.answer, SAMPLES, 1.0, 20)
        half = generators.call_each(Generator.answer, [(SAMPLES[i::2], 1.0, 20) for i in range(2)])
        other = generators.call(Generator.answer, [Sample(s.position, s.prompt_index, s.seed + 50) for s in SAMPLES],
                                1.0, 20)[0]
    for i, tokens in enumerate(both[0]):
        assert tokens.tolist() == both[1][i].tolist() == half[i % 2][i // 2].tolist()
    assert any(a.tolist() != b.tolist() for a, b in zip(both[0], other, strict=True))


def test_shards_are_scored_as_they_arrive_and_the_driver_sees_numbers_only(ray_session, models):
    cfg = small_config(models[0])
    cfg.roles.generator.shard_size = 5
    with Cast(roles.layout_of(cfg, ["generator", "reference", "reward"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "gloo")
        reward, reference = roles.reward_models(cast, cfg, models[0]), roles.reference_models(cast, cfg, models[0])
        cast.ready()
        result = RolloutWorkers(generators, reward, reference, None, 1.0, 20).run(SAMPLES, 0)
        assert [len(i.lengths) for i in result.infos] == [5, 5, 2]
        assert sorted(np.concatenate([i.positions for i in result.infos])) == list(range(12))
        for shard, info in zip(result.shards, result.infos, strict=True):
            assert isinstance(shard.rollout, ray.ObjectRef)
            batch = ray.get(shard.rollout)
            assert batch.lengths.tolist() == info.lengths.tolist()
            assert info.response_tokens == batch.in_response.sum() == (batch.lengths - batch.prompt_lengths).sum()
            assert ray.get(shard.scores).tolist() == [0.0] * len(batch.lengths)  # a fresh head starts at zero
            # truncated means: 20 tokens and no end
            ends = batch.ids[np.cumsum(batch.lengths) - 1]
            assert (batch.truncated == ((batch.lengths - batch.prompt_lengths == 20) & (ends != 1))).all()
