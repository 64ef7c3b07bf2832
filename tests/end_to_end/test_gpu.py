"""What only a GPU can show. One is enough: roles ask for shares of it.

    NCCL_MULTI_RANK_GPU_ENABLE=1 .venv/bin/pytest -m gpu tests/end_to_end/test_gpu.py

NCCL refuses two processes on one GPU; from version 2.30 on it lets itself be told otherwise by that variable.
"""

import json
import os

import numpy as np
import pytest
import ray
import torch

from end_to_end.small import earlier_stages, ppo_config, small_config
from end_to_end.test_learner import ALGORITHMS, CUTS, updated_policy
from end_to_end.test_scorers import rollout
from end_to_end.test_weight_sync import PROMPTS, SAMPLES, check_push, connect
from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.actors.scorers import ReferenceModel, RewardModel
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import RolloutBatch
from rlhf_ray.errors import UserError
from rlhf_ray.stages import ppo
from rlhf_ray.train import roles
from rlhf_ray.train.turns import Turns

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
SHARES = {"generator": 0.2, "policy": 0.2, "critic": 0.1, "reward": 0.05, "reference": 0.05}
NCCL = pytest.mark.skipif(
    torch.cuda.device_count() < 2 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1",
    reason="NCCL_MULTI_RANK_GPU_ENABLE=1 is not set, and there is one GPU only")


def on_gpu(cfg: Config, placement: str = "separate") -> Config:
    """Every role has its share of a GPU."""
    cfg.cluster.placement = placement
    for role, share in SHARES.items():
        getattr(cfg.roles, role).gpus = share
    cfg.roles.generator.gpu_memory_utilization = 0.1
    return cfg


@pytest.mark.parametrize("bucket_mib", [0.001, 64.0])
@pytest.mark.parametrize(("wire", "placement", "count"), [
    ("ipc", "colocated", 1), pytest.param("nccl", "separate", 2, marks=NCCL)])
def test_engines_sample_from_the_learners_weights(ray_session, models, wire, placement, count, bucket_mib):
    """As on CPU: after the push the engines' log-probabilities are those of the learners' model. Nearly every tensor
    is a bucket of its own, or all are one."""
    cfg = on_gpu(small_config(models[1]), placement)
    cfg.roles.policy.ranks = cfg.roles.generator.replicas = count
    cfg.roles.policy.param_persistence_threshold = 0
    check_push(cfg, models[0], wire, bucket_mib, 1e-4)


def memory_in_use() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def test_who_has_no_turn_is_not_on_the_device(ray_session, models):
    """Engines that sleep give back their cache and weights, and sample again once they were synced."""
    cfg = on_gpu(small_config(models[0]), "colocated")
    cfg.roles.generator.max_num_seqs = 1024  # a cache of 256 MiB
    with Cast(roles.layout_of(cfg, ["policy", "generator"]), cfg.cluster) as cast:
        generators = roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "ipc", elastic=True)
        policy = roles.policy_learners(cast, cfg, models[1], 1, None)
        cast.ready()
        turns = Turns(generators, [policy])
        connect(cast, policy, generators, wire="ipc")
        policy.call(PolicyLearner.push, 1)
        turns.sample()
        first, awake = generators.call(Generator.answer, SAMPLES, 0.0, 20)[0], memory_in_use()
        generators.call(Generator.sleep)
        asleep = memory_in_use()
        turns.learn()
        turns.learn()  # who is there stays
        assert memory_in_use() > asleep
        turns.sync()
        policy.call(PolicyLearner.push, 2)
        turns.sample()
        again = generators.call(Generator.answer, SAMPLES, 0.0, 20)[0]
        policy.call(LearnerRole.reload)
    assert asleep < awake - 200
    assert [a.tolist() for a in first] == [a.tolist() for a in again]


@pytest.mark.parametrize("placement", ["colocated", pytest.param("separate", marks=NCCL)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(ray_session, models, reward_model, tmp_path, placement, dtype):
    """PPO-ptx with all roles on one GPU. Trainer and engines agree in every iteration, and the run goes on from its
    checkpoint."""
    cfg = on_gpu(ppo_config(tmp_path, models[0], "ppo_ptx"), placement)
    limit = 1e-3 if dtype == "float32" else 0.05
    cfg.model.dtype, cfg.weight_sync.max_mismatch = dtype, limit
    cfg.ppo.iterations, cfg.checkpoint.iterations = 2, 2
    earlier_stages(tmp_path, models[0], reward_model)
    ppo.run(cfg)
    cfg.ppo.iterations = 4
    ppo.run(cfg)
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["mismatch"] < limit
        assert row["policy_skipped_steps"] == 0
        assert np.isfinite([row["policy_loss"], row["value_loss"], row["ptx_loss"], row["policy_grad_norm"]]).all()
    assert rows[-1]["kl_per_token"] != 0  # it moved


@pytest.mark.parametrize(("name", "cut"), [("ppo", "8"), ("grpo", "1x8")])
def test_a_learner_computes_what_it_computes_on_a_processor(ray_session, models, tmp_path, name, cut):
    """Two optimizer steps in float32; between them it leaves the device and comes back."""
    algorithm = ALGORITHMS[name]
    expected, report = updated_policy(models[0], tmp_path / "cpu", **algorithm)
    weights, other = updated_policy(models[0], tmp_path / "gpu", micro_batch_tokens=CUTS[cut], gpus=0.2, **algorithm)
    moved, last = updated_policy(models[0], tmp_path / "turns", gpus=0.2, turns=True, **algorithm)
    for key, value in report.items():
        assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for found in (weights, moved):
        assert max(float(np.quantile(np.abs(found[k] - expected[k]), 0.99)) for k in expected) < 5e-5
    assert last["policy_grad_norm"] > 0


def test_scorers_find_what_they_find_on_a_processor(ray_session, models, reward_model):
    rng = np.random.default_rng(0)
    some: RolloutBatch = rollout([rng.integers(5, 60, n).tolist() for n in range(4, 17)], 2, [False] * 13)
    found = []
    for gpus in (0.0, 0.05):
        cfg = small_config(models[0])
        cfg.roles.reward.gpus = cfg.roles.reference.gpus = gpus
        with Cast(roles.layout_of(cfg, ["reward", "reference"]), cfg.cluster) as cast:
            reward = roles.reward_sources(cast, cfg, reward_model, models[0], None)[0]
            reference = roles.reference_models(cast, cfg, models[0])
            cast.ready()
            found.append((reward.ask(RewardModel.scores, some), reference.ask(ReferenceModel.logprobs, some, 0.7)))
    for on_processor, on_device in zip(*found, strict=True):
        np.testing.assert_allclose(on_device, on_processor, atol=1e-4)


def test_a_share_too_small_for_an_engine_is_said(ray_session, models):
    cfg = on_gpu(small_config(models[0]))
    cfg.roles.generator.gpu_memory_utilization = 0.001
    with pytest.raises(UserError, match=r"roles\.generator\.gpu_memory_utilization=0\.001 is .* too little"):
        with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
            roles.generators(cast, cfg, models[0], ray.put(PROMPTS), "nccl")
            cast.ready()
