"""Refusing what cannot work: every problem is a line of a UserError that names the key."""

from pathlib import Path

import pytest

from rlhf_ray.config.checks import check_model, validate
from rlhf_ray.config.load import compose
from rlhf_ray.errors import UserError

GPUS = [f"roles.{role}.gpus=1" for role in ("generator", "reward", "reference", "policy", "critic", "supervised")]
SHARED = ["cluster.placement=colocated", "roles.generator.replicas=2", "roles.generator.gpus=0.5",
          "roles.policy.gpus=0.5", "roles.generator.gpu_memory_utilization=0.4"]
RL = "stages=[sft,compare,rm,ppo,eval]"
FILES = ["experiment=null", "data=files", "model.path=some/model", "compare.ranker=file", RL]


def refused(overrides: list[str], stage: str = "pipeline") -> str:
    with pytest.raises(UserError) as error:
        validate(compose(overrides), stage)
    return str(error.value)


@pytest.mark.parametrize(("override", "says"), [
    ("seed=-1", "seed=-1: must be >= 0"),
    ("algorithm.clip_ratio=1", "algorithm.clip_ratio=1.0: must be > 0, < 1"),
    ("algorithm.gamma=nan", "algorithm.gamma=nan: must be > 0, <= 1"),
    ("sft.optimizer.lr=inf", "must be a finite number"),
    ("compare.responses_per_prompt=3", "compare.responses_per_prompt=3: must be >= 4, <= 9"),
    ("compare.responses_per_prompt=10", "compare.responses_per_prompt=10"),
    ("model.dtype=bf16", "model.dtype=bf16: must be one of float32, bfloat16; did you mean bfloat16?"),
    ("stages=[sft,evaluate]", "stages=evaluate: must be one of pretrain, sft"),
    ("eval.baselines=[ppo]", "eval.baselines=ppo: must be one of base, sft"),
    ("seed=???", "seed is not set"),
])
@pytest.mark.parametrize("stage", ["pretrain", "doctor", "pipeline"])
def test_range_is_checked_for_every_stage(override: str, says: str, stage: str) -> None:
    assert says in refused([override], stage)


def test_all_range_problems_come_together() -> None:
    assert len(refused(["seed=-1", "rm.epochs=0", "sft.dropout=1"]).splitlines()) == 3


@pytest.mark.parametrize(("overrides", "keys"), [
    (["model.max_length=100", "data.max_prompt_tokens=64", "compare.max_response_tokens=8"],
     ["data.max_prompt_tokens=64", "rollout.max_response_tokens=48", "model.max_length=100"]),
    (["compare.max_response_tokens=100"], ["compare.max_response_tokens=100", "model.max_length=112"]),
    (["rollout.batch_size=32"], ["algorithm.minibatch_size=64", "rollout.batch_size=32"]),
    (["rollout.samples_per_prompt=3"], ["rollout.batch_size=128", "rollout.samples_per_prompt=3"]),
    (["algorithm=grpo", "rollout.samples_per_prompt=1"], ["algorithm.name=grpo", "rollout.samples_per_prompt=1"]),
    (["algorithm.name=rloo"], ["algorithm.name=rloo", "algorithm=rloo sets 4"]),
    (["algorithm.kl_in=loss"], ["algorithm.kl_estimator=k1", "algorithm.kl_in=loss", "use k2 or k3"]),
    (["algorithm.kl_estimator=k3"], ["algorithm.kl_estimator=k3", "algorithm.kl_in=reward", "use k1"]),
    (["algorithm.kl_target=6", "algorithm.kl_coef=0"], ["algorithm.kl_target=6", "algorithm.kl_coef"]),
    (["algorithm.old_logprobs=engine", "algorithm.minibatch_size=8"], ["old_logprobs=engine", "ppo_epochs=1"]),
    (["algorithm.old_logprobs=engine", "algorithm.ppo_epochs=2"], ["old_logprobs=engine", "ppo_epochs=1"]),
    (["algorithm.old_logprobs=engine", "algorithm.importance_cap=2"], ["old_logprobs=engine", "importance_cap=2"]),
    (["schedule=one_step_off", "algorithm.importance_cap=null"], ["one_step_off", "algorithm.importance_cap=null"]),
    (["schedule=one_step_off", "checkpoint.iterations=1"], ["one_step_off", "checkpoint.iterations=1"]),
    (["schedule=one_step_off", *GPUS, "cluster.placement=colocated"], ["one_step_off", "cluster.placement=colocated"]),
    (["algorithm=reinforce_pp", "ppo.critic_warmup_iterations=2"], ["ppo.critic_warmup_iterations=2", "no critic"]),
    (["export.source=dpo", "export.checkpoint=3"], ["export.checkpoint=3", "export.source=dpo"]),
    (["reward.sources=[]"], ["reward.sources=[]"]),
    (["reward.sources=[model,'m:f']", "reward.weights=[1]"], ["reward.weights has 1 entries for the 2"]),
    (["reward.sources=[model,model]"], ["reward.sources names model twice"]),
    (["reward.sources=[length]"], ["reward.sources=length: must be model, MODULE:FUNCTION or an http"]),
    (["reward.timeout_s=1000", "reward.sources=['m:f']"], ["reward.timeout_s=1000", "cluster.call_timeout_s=1800"]),
    (["reward.overlong_tokens=49"], ["reward.overlong_tokens=49", "rollout.max_response_tokens=48"]),
    (["data=reasoning", "stages=[sft,ppo,eval]"], ["reward.sources has `model`", "data.source=reasoning"]),
    (["data=reasoning", "reward.sources=['m:f']"], ["stages compare, rm rank responses", "data.source=reasoning"]),
    (["alarms.length.threshold=1"], ["alarms.length.threshold=1", "more than 1"]),
    (["algorithm.minibatch_size=1"], ["algorithm.minibatch_size=1", "roles.policy.ranks=2"]),
    (["sft.batch_size=1"], ["sft.batch_size=1", "roles.supervised.ranks=2"]),
    (["rm.prompts_per_batch=1"], ["rm.prompts_per_batch=1", "roles.supervised.ranks=2"]),
    (["algorithm.ptx_blocks=1"], ["algorithm.ptx_blocks=1", "roles.policy.ranks=2"]),
    (["weight_sync.backend=nccl"], ["weight_sync.backend=nccl", "roles.generator.gpus=0", "roles.policy.gpus=0"]),
    (["weight_sync.backend=ipc", *SHARED[:2]], ["weight_sync.backend=ipc", "roles.generator.gpus=0"]),
    (["weight_sync.backend=ipc", *GPUS], ["weight_sync.backend=ipc", "cluster.placement=separate"]),
    (["weight_sync.backend=nccl", *SHARED], ["weight_sync.backend=nccl", "cluster.placement=colocated"]),
    (["cluster.placement=colocated"], ["roles.generator.replicas=1", "roles.policy.ranks=2"]),
    (["cluster.placement=colocated", "roles.generator.replicas=2", *GPUS],
     ["cluster.placement=colocated", "roles.generator.gpus=1", "roles.policy.gpus=1"]),
    ([*SHARED, "roles.generator.tensor_parallel_size=2"], ["roles.generator.tensor_parallel_size=2"]),
    ([*SHARED, "roles.generator.gpu_memory_utilization=0.6"],
     ["roles.generator.gpu_memory_utilization=0.6", "roles.generator.gpus=0.5"]),
    (["roles.generator.tensor_parallel_size=2"], ["roles.generator.tensor_parallel_size=2", "roles.generator.gpus=0"]),
    ([*GPUS, "roles.generator.gpus=0.5", "roles.generator.tensor_parallel_size=2"],
     ["roles.generator.tensor_parallel_size=2", "roles.generator.gpus=0.5"]),
    ([*GPUS, "roles.reference.gpus=2.5"], ["roles.reference.gpus=2.5", "set it to 2"]),
    (["cluster.placement=cpu", "roles.reward.gpus=0.5", "roles.policy.gpus=1"],
     ["cluster.placement=cpu", "roles.reward.gpus=0.5", "roles.policy.gpus=1", "cluster.placement=separate"]),
    (["model.attn_implementation=flash_attention_2"],
     ["model.attn_implementation=flash_attention_2", "roles.policy.gpus=0"]),
    (["model.dtype=bfloat16"], ["model.dtype=bfloat16", "weight_sync.max_mismatch=0.001", "set it to 0.05"]),
    (["stages=[]"], ["stages=[]"]),
    (["stages=[rm,sft]"], ["stages=[rm,sft]", "stages=[sft,rm]"]),
    (["stages=[sft,sft]"], ["stages=[sft,sft]", "write stages=[sft]"]),
    (["ppo.critic_warmup_iterations=40", "ppo.iterations=40"],
     ["ppo.critic_warmup_iterations=40", "ppo.iterations=40"]),
    (["stages=[pretrain]", "pretrain.num_heads=3"], ["pretrain.hidden_size=256", "pretrain.num_heads=3"]),
    (["stages=[pretrain]", "pretrain.hidden_size=36"], ["pretrain.hidden_size=36", "odd"]),
    (["experiment=null", RL], ["model.path is not set"]),
    (["experiment=null", "pretrain.init=model"], ["model.path is not set"]),
    (["experiment=null", "model.path=a/b"], ["model.path=a/b would not be used", f"leave pretrain out, {RL}"]),
    (["compare.ranker=file"], ["data.comparisons is not set", "compare.ranker=file"]),
    (["data.split_seed=1"], ["data.split_seed=1", "data.split_seed=0"]),  # the bundled base has read what is held out
    (["data.source=files"], ["compare.ranker=simulated", "data.source=files"]),
    (FILES, ["data.comparisons is not set", "data.demonstrations is not set, but needed by sft and rm",
             "data.ppo_prompts", "data.eval_prompts", "data.eval_texts"]),
    ([*FILES, "algorithm=ppo_ptx"], ["data.texts is not set, but needed by algorithm.ptx=true"]),
])
def test_contradictions_name_their_keys(overrides: list[str], keys: list[str]) -> None:
    message = refused(overrides)
    for key in keys:
        assert key in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("overrides", "stage"), [
    ([], "pipeline"),
    (["experiment=null", "~cluster"], "pipeline"),
    (["experiment=null"], "sft"),  # it starts from what pretrain made
    (["experiment=null"], "pretrain"),  # a model from scratch needs no model.path
    (["experiment=null"], "doctor"),
    (["model.dtype=bfloat16"], "sft"),  # only PPO compares the engine's log-probabilities with its own
    (["model.max_length=64"], "sft"),
    (["cluster.placement=cpu"], "pipeline"),
    (["cluster.placement=cpu", "roles.critic.gpus=1"], "sft"),  # which has no critic
    (["weight_sync.backend=nccl"], "sft"),
    ([*SHARED, "weight_sync.backend=ipc"], "ppo"),
    ([*GPUS, "weight_sync.backend=nccl", "model.dtype=bfloat16", "weight_sync.max_mismatch=0.05"],
     "ppo"),
    ([*FILES, "data.demonstrations=d.jsonl"], "sft"),
    ([*FILES, "data.ppo_prompts=p.jsonl"], "ppo"),
    (["data.max_prompt_tokens=64"], "ppo"),  # exactly the context
    ([*SHARED, "roles.generator.gpu_memory_utilization=0.5"], "ppo"),  # exactly its share
    (["data.split_seed=1", "model.path=a/b"], "sft"),
    (["experiment=reviews_base", "data.split_seed=1"], "pretrain"),
])
def test_what_is_fine(overrides: list[str], stage: str) -> None:
    validate(compose(overrides), stage)


def test_local_model_must_be_there(tmp_path: Path) -> None:
    cfg = compose([f"model.path={tmp_path}", "stages=[sft,rm]"])
    with pytest.raises(UserError, match=r"model.path=.*no config.json"):
        check_model(cfg, "pipeline")
    check_model(cfg, "doctor")
    check_model(cfg, "pretrain")
    (tmp_path / "config.json").write_text("{}")
    check_model(cfg, "sft")
    check_model(compose(["model.path=Org/Name"]), "sft")
    with pytest.raises(UserError, match="assets/nope"):
        check_model(compose(["model.path=assets://nope"]), "sft")


def test_a_context_that_the_model_was_not_built_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 96}')
    with pytest.raises(UserError, match=r"model\.max_length=97 .*96 positions"):
        check_model(compose([f"model.path={tmp_path}", "model.max_length=97"]), "sft")
    check_model(compose([f"model.path={tmp_path}", "model.max_length=96"]), "sft")
    check_model(compose([f"model.path={tmp_path}", "model.max_length=97"]), "pretrain")  # from scratch: not read
