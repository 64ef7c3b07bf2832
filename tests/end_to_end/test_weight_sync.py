"""Weights travel from ZeRO-3 learners to vLLM engines, and arrive."""

import numpy as np
import pytest
import ray

from end_to_end.small import small_config
from rlhf_ray.actors.generator import Generator, RayEngines
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.actors.scorers import ReferenceModel
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.core.types import Sample
from rlhf_ray.errors import UserError
from rlhf_ray.train import roles
from rlhf_ray.train.answers import prompt_set
from rlhf_ray.train.mismatch import check_first_sync
from rlhf_ray.train.rollout import RolloutWorkers
from rlhf_ray.train.turns import Turns

PROMPTS = prompt_set([[0, 2, 40 + i, 41, 3] for i in range(12)])
# Longer than a block of the engine's cache (128 tokens on CPU), so that their keys and values are kept and reused.
LONG_PROMPTS = prompt_set([[0, 2, *(4 + (i * k) % 300 for k in range(1, 180)), 3] for i in range(12)])
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


def gap(reference, model: str, batches) -> float:
    """Mean |engine - reference| log-probability of what the engines sampled, nats per token."""
    reference.call(ReferenceModel.load, model)
    gaps = []
    for batch, _ in batches:
        exact = ray.get(reference.actors[0].logprobs.remote(batch, 1.0))
        gaps.append(np.abs(exact - batch.sampled_logprobs)[batch.in_response])
    return float(np.concatenate(gaps).mean())


def connect(cast, policy, generators, bucket_mib=64.0, wire="shm") -> None:
    policy.call(PolicyLearner.connect, generators.actors, 1, wire, cast.meeting_point("policy"), bucket_mib, 60.0)


def check_push(cfg, engine_start: str, wire: str, bucket_mib: float, limit: float, away: bool = False) -> None:
    """Before pushes the engines' log-probabilities are those of the model that they started from, afterwards those of
    the learners' model (cfg.model.path), to `limit` nats per token. away: learners leave their device before each."""
    learner_start = cfg.model.path
    with Cast(roles.layout_of(cfg, ["policy", "generator", "reference"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, engine_start, ray.put(PROMPTS), wire)
        policy = roles.policy_learners(cast, cfg, learner_start, 1, None)
        reference = roles.reference_models(cast, cfg, learner_start)
        cast.ready()
        assert gap(reference, engine_start, rollouts(generators, 0)) < limit
        connect(cast, policy, generators, bucket_mib, wire)
        for version in (6, 7):
            if away:
                policy.call(PolicyLearner.offload, True)
            policy.call(PolicyLearner.push, version)
        batches = rollouts(generators, 7)
        assert gap(reference, learner_start, batches) < limit
        assert gap(reference, engine_start, batches) > 1e-3  # the two models really differ: this could have failed


@pytest.mark.parametrize("wire", ["shm", "gloo"])
def test_engines_sample_from_the_learners_weights(ray_session, models, wire):
    """Two engines start from model 0; two ZeRO-3 ranks hold model 1. After the push the engines' log-probabilities
    are model 1's (to 1e-5 per token, float32), embeddings and the head tied to them included; model 0's are not.

    Here nearly every tensor is a bucket of its own, elsewhere in this file all are one."""
    engine_start, learner_start = models
    cfg = small_config(learner_start)
    cfg.roles.policy.ranks, cfg.roles.generator.replicas = 2, 2
    cfg.roles.policy.param_persistence_threshold = 0  # every parameter is sharded and must be gathered
    check_push(cfg, engine_start, wire, 0.001, 1e-5)


def test_nothing_that_old_weights_computed_is_reused(ray_session, models):
    """Keys and values of long prompts stay in the engine's cache; after a push they are computed anew."""
    cfg = small_config(models[1])
    cfg.model.max_length = 240
    with Cast(roles.layout_of(cfg, ["policy", "generator", "reference"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(LONG_PROMPTS), "shm")
        policy = roles.policy_learners(cast, cfg, models[1], 1, None)
        reference = roles.reference_models(cast, cfg, models[0])
        cast.ready()
        assert gap(reference, models[0], rollouts(generators, 0)) < 1e-5  # the cache is filled
        connect(cast, policy, generators)
        policy.call(PolicyLearner.push, 1)
        assert gap(reference, models[1], rollouts(generators, 1)) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_policy_that_was_away_from_its_device_is_synced(ray_session, models, ranks):
    """Engines have what the learners have, whether they map the learner's memory (one rank) or copies (two)."""
    cfg = small_config(models[1])
    cfg.roles.policy.ranks = ranks
    check_push(cfg, models[0], "shm", 64.0, 1e-5, away=True)


def test_synced_weights_equal_the_same_weights_loaded_from_disk(ray_session, untied_models):
    """Greedy tokens are identical, log-probabilities of sampled ones agree to 1e-5 each, seeds being the same.

    (Untrained models with tied embeddings would repeat their last token whatever their weights.)"""
    cfg = small_config(untied_models[1])
    cfg.roles.generator.replicas = 2
    with Cast(roles.layout_of(cfg, ["policy", "generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, untied_models[0], ray.put(PROMPTS), "shm")
        policy = roles.policy_learners(cast, cfg, untied_models[1], 1, None)
        cast.ready()
        old = generators.call(Generator.answer, SAMPLES, 0.0, 20)[0]
        connect(cast, policy, generators)
        policy.call(PolicyLearner.push, 1)
        synced_greedy = generators.call(Generator.answer, SAMPLES, 0.0, 20)
        synced = rollouts(generators, 1)
        generators.call(Generator.load, untied_models[1])
        loaded_greedy = generators.call(Generator.answer, SAMPLES, 0.0, 20)
        loaded = rollouts(generators, 1)
    for i in range(len(SAMPLES)):
        tokens = {tuple(answers[i].tolist()) for answers in (*synced_greedy, *loaded_greedy)}
        assert len(tokens) == 1
    assert any(a.tolist() != b.tolist() for a, b in zip(old, synced_greedy[0], strict=True))
    for (a, _), (b, _) in zip(synced, loaded, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-5)


def test_untied_heads_and_padded_vocabularies_are_synced_too(ray_session, models, untied_models):
    """A model whose head is its own, and whose vocabulary of 384 is larger than the tokenizer's 320."""
    cfg = small_config(untied_models[1])
    with Cast(roles.layout_of(cfg, ["policy", "generator", "reference"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, untied_models[0], ray.put(PROMPTS), "shm")
        policy = roles.policy_learners(cast, cfg, untied_models[1], 1, None)
        reference = roles.reference_models(cast, cfg, untied_models[0])
        cast.ready()
        connect(cast, policy, generators)
        policy.call(PolicyLearner.push, 1)
        batches = rollouts(generators, 1)
        assert gap(reference, untied_models[1], batches) < 1e-5
        assert gap(reference, untied_models[0], batches) > 1e-3
    assert max(int(batch.ids.max()) for batch, _ in batches) >= 320  # sampled, trained on, and never re-tokenised


def test_a_digest_that_differs_names_the_generator(ray_session, models):
    """What was sent and what was loaded are compared on every engine, bit for bit."""
    cfg = small_config(models[1])
    with Cast(roles.layout_of(cfg, ["policy", "generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "shm")
        policy = roles.policy_learners(cast, cfg, models[1], 1, None)
        cast.ready()
        connect(cast, policy, generators)
        policy.call(PolicyLearner.push, 1)  # equal digests: nothing is raised
        engines = RayEngines(generators.actors, 1, 60.0)
        engines.start()
        with pytest.raises(RuntimeError, match=r"digest 123: generator 0 holds version 2 with digests \[0\]"):
            engines.finish(2, 123)  # nothing was sent, so the digest of what was loaded is 0


def test_the_gate_after_the_first_sync(ray_session, models):
    """At temperature 0.7 on both sides, float32 on CPU agrees to well below 1e-4 nats per token; a temperature that
    only the rollout knows stops the run, with the causes."""
    cfg = small_config(models[1])
    cfg.roles.generator.replicas, cfg.rollout.temperature = 2, 0.7
    with Cast(roles.layout_of(cfg, ["policy", "generator", "reference"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "shm")
        policy = roles.policy_learners(cast, cfg, models[1], 1, None)
        reference = roles.reference_models(cast, cfg, models[1])
        cast.ready()
        connect(cast, policy, generators)
        policy.call(PolicyLearner.push, 1)
        same = RolloutWorkers(generators, [], reference, None, Turns(generators, []), 0.7, 20)
        assert check_first_sync(same, policy, 12, 1, 0, 1e-4) < 1e-5
        hot = RolloutWorkers(generators, [], reference, None, Turns(generators, []), 1.0, 20)
        with pytest.raises(UserError, match=r"disagree by .* nats per token .*\n  1\. weights that did not arrive"):
            check_first_sync(hot, policy, 12, 1, 0, 1e-3)


def test_a_stale_engine_is_never_asked(ray_session, models):
    cfg = small_config(models[0])
    with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "shm")
        cast.ready()
        with pytest.raises(RuntimeError, match="weights 3, this engine holds 0"):
            rollouts(generators, version=3)


def test_the_same_seeds_give_the_same_samples_whoever_generates(ray_session, models):
    """One engine and two engines: the same tokens for the same prompts and seeds; other seeds, other tokens."""
    cfg = small_config(models[0])
    cfg.roles.generator.replicas = 2
    with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "shm")
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
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "shm")
        reward, reference = roles.reward_models(cast, cfg, models[0]), roles.reference_models(cast, cfg, models[0])
        cast.ready()
        turns = Turns(generators, [])
        result = RolloutWorkers(generators, [reward], reference, None, turns, 1.0, 20).run(SAMPLES, 0, 1)
        assert [len(i.lengths) for i in result.infos] == [5, 5, 1, 1]
        assert sorted(np.concatenate([i.positions for i in result.infos])) == list(range(12))
        for shard, info in zip(result.shards, result.infos, strict=True):
            assert isinstance(shard.rollout, ray.ObjectRef)
            batch = ray.get(shard.rollout)
            assert batch.lengths.tolist() == info.lengths.tolist()
            assert info.response_tokens == batch.in_response.sum() == (batch.lengths - batch.prompt_lengths).sum()
            assert ray.get(shard.scores[0]).tolist() == [0.0] * len(batch.lengths)  # a fresh head starts at zero
            # truncated means: 20 tokens and no end
            ends = batch.ids[np.cumsum(batch.lengths) - 1]
            assert (batch.truncated == ((batch.lengths - batch.prompt_lengths == 20) & (ends != 1))).all()
