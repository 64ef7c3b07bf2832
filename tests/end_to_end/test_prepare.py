"""Rewards and advantages do not depend on how many ranks compute them, nor on the order in which shards arrived."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
import ray

from end_to_end.small import small_config
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.health import LOST
from rlhf_ray.core.types import Moments, RolloutBatch, ScoredShard, Shaping
from rlhf_ray.train import roles

SHARDS, EACH, PROMPT = 4, 4, 3


def shards() -> list[tuple[RolloutBatch, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(rollout, scores, reference, old log-probabilities, values) of four shards; groups of four spread over them."""
    rng = np.random.default_rng(0)
    places = rng.permutation(SHARDS * EACH)
    made = []
    for s in range(SHARDS):
        lengths = rng.integers(PROMPT + 1, 14, EACH).astype(np.int32)
        total = int(lengths.sum())
        rollout = RolloutBatch(
            ids=rng.integers(4, 300, total).astype(np.int32), lengths=lengths,
            prompt_lengths=np.full(EACH, PROMPT, dtype=np.int32),
            sampled_logprobs=rng.normal(-5, 0.1, total).astype(np.float32), truncated=rng.random(EACH) < 0.3,
            prompt_index=places[s * EACH : (s + 1) * EACH] // 4, positions=places[s * EACH : (s + 1) * EACH],
            seeds=np.arange(EACH), version=1)
        scale = 10.0 if s % 2 else 0.1  # the halves that two ranks get are far apart
        made.append((rollout, (scale * rng.normal(size=EACH)).astype(np.float32),
                     *(rng.normal(-5, 0.3, total).astype(np.float32) for _ in range(3))))
    return made


def prepared(path: str, ranks: int, order: list[int], **algorithm):
    """{position: (advantages, weights, returns)} and the numbers."""
    cfg = small_config(path)
    cfg.roles.policy.ranks, cfg.rollout.samples_per_prompt = ranks, 4
    for key, value in algorithm.items():
        setattr(cfg.algorithm, key, value)
    with Cast(roles.layout_of(cfg, ["policy"]), cfg.cluster) as cast:
        policy = roles.policy_learners(cast, cfg, path, 1, None)
        cast.ready()
        made = shards()
        scored = [ScoredShard(rollout=ray.put(r), scores=(ray.put(s),), ref_logprobs=ray.put(ref),
                              old_logprobs=ray.put(old), values=ray.put(v)) for r, s, ref, old, v in made]
        shares = [order[rank::ranks] for rank in range(ranks)]
        results = policy.call_each(PolicyLearner.prepare, [
            ([scored[i] for i in share], [1.0], Shaping(truncated="drop"), 0.2, Moments()) for share in shares])
        found = {}
        for share, result in zip(shares, results, strict=True):
            for k, i in enumerate(share):
                batch = ray.get(result.policy[k])
                returns = ray.get(result.critic[k]).returns if result.critic else np.zeros(len(batch.ids))
                ends = np.cumsum(batch.lengths)
                for j, position in enumerate(made[i][0].positions.tolist()):
                    part = slice(ends[j] - batch.lengths[j], ends[j])
                    found[position] = np.stack([batch.advantages[part], batch.weights[part], returns[part]])
    assert all(r.numbers == results[0].numbers and r.seen == results[0].seen for r in results)
    return found, results[0]


@pytest.mark.parametrize("algorithm", [
    {"name": "ppo", "importance_cap": 1.1}, {"name": "rloo"},
])
def test_two_ranks_prepare_what_one_does(ray_session, models, algorithm):
    """Whitening, group baselines and importance sums span all ranks; rows follow their response, not their shard."""
    one, first = prepared(models[0], 1, [0, 1, 2, 3], **algorithm)
    two, second = prepared(models[0], 2, [2, 1, 0, 3], **algorithm)
    assert one.keys() == two.keys() == set(range(SHARDS * EACH))
    for position in one:
        np.testing.assert_allclose(two[position], one[position], rtol=1e-5, atol=1e-6)
    assert second.numbers == pytest.approx(first.numbers, rel=1e-9)
    assert np.abs(np.concatenate([x[0] for x in one.values()])).max() > 0.5
    assert first.numbers["dropped"] > 0
    if algorithm["name"] == "ppo":
        advantages = np.concatenate([x[0][x[1] > 0] for x in one.values()])
        assert abs(advantages.mean()) < 1e-5 and advantages.std() == pytest.approx(1, abs=1e-4)  # whitened over all
        assert 0 < first.numbers["importance_ess"] <= 1 < first.numbers["importance_max"]
        assert first.numbers["importance_clip_fraction"] > 0


def test_no_field_of_a_train_batch_is_missing(ray_session, models):
    """Each per-token array is as long as the tokens: a half-filled batch cannot exist."""
    cfg = small_config(models[0])
    with Cast(roles.layout_of(cfg, ["policy"]), cfg.cluster) as cast:
        policy = roles.policy_learners(cast, cfg, models[0], 1, None)
        cast.ready()
        r, s, ref, old, v = shards()[0]
        shard = ScoredShard(ray.put(r), (ray.put(s),), ray.put(ref), ray.put(old), ray.put(v))
        result = policy.call(PolicyLearner.prepare, [shard], [1.0], Shaping(), 0.2, Moments())[0]
        for ref_ in (*result.policy, *result.critic):
            batch = ray.get(ref_)
            assert all(len(getattr(batch, f.name)) in (len(batch.ids), len(batch.lengths)) for f in fields(batch))


@ray.remote(num_cpus=0)
class Reference:
    def logprobs(self) -> np.ndarray:
        os._exit(1)


@pytest.mark.parametrize("missing", [PolicyLearner.prepare, PolicyLearner.score])
def test_what_one_rank_misses_leaves_none_waiting(ray_session, models, missing):
    """A scorer died before it had answered: all ranks fail, and both can be asked again at once."""
    cfg = small_config(models[0])
    cfg.roles.policy.ranks = 2
    with Cast(roles.layout_of(cfg, ["policy"]), cfg.cluster) as cast:
        policy = roles.policy_learners(cast, cfg, models[0], 1, None)
        cast.ready()
        lost = Reference.remote().logprobs.remote()
        made = [ScoredShard(*(ray.put(x) if k != 1 else (ray.put(x),) for k, x in enumerate(shard)))
                for shard in shards()[:2]]
        if missing is PolicyLearner.prepare:
            args = [([made[0]], [1.0], Shaping(), 0.2, Moments()),
                    ([replace(made[1], ref_logprobs=lost)], [1.0], Shaping(), 0.2, Moments())]
        else:
            args = [([made[0].rollout],), ([lost],)]
        answers = policy.start_each(missing, args)
        assert len(ray.wait(answers, num_returns=2, timeout=60)[0]) == 2
        for answer in answers:
            with pytest.raises(LOST):
                ray.get(answer)
        assert len(policy.call(PolicyLearner.describe)) == 2
