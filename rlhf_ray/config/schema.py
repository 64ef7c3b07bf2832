"""Every option of rlhf-ray: a typed field with its default, meaning, unit and legal range.

This is the only place where a default is written. `conf/` holds choices and recipes on top of it;
`rlhf_ray.config.load` composes the two, `rlhf_ray.config.checks` checks the result. Imports nothing but the standard
library.
"""

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # Hydra's marker of a value that the user must give
STAGES = ("pretrain", "sft", "compare", "rm", "ppo", "dpo", "eval")  # in the order in which `pipeline` runs them
DEFAULT_STAGES = ("pretrain", "sft", "compare", "rm", "ppo", "eval")


def opt(default: Any, help: str, **limits: Any) -> Any:
    """A documented field. `limits`: any of ge, gt, le, lt (numbers), choices (a tuple; of lists: of entries)."""
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = opt(MISSING, "base model: a Hugging Face directory or hub name; every stage starts from it")
    dtype: str = opt("float32", "parameters and activations of every role", choices=("float32", "bfloat16"))
    attn_implementation: str = opt(
        "sdpa", "attention kernel of the training and scoring roles", choices=("sdpa", "flash_attention_2")
    )
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass to save memory")
    max_length: int = opt(256, "context: prompt plus response, tokens", ge=8)


@dataclass
class DataConfig:
    source: str = opt("files", "`reviews`: the embedded movie reviews; `reasoning`: tasks of reasoning-gym, whose "
                      "answers can be verified; `files`: the paths below", choices=("reviews", "reasoning", "files"))
    reasoning_task: str = opt("chain_sum", "which task of data.source=reasoning",
                              choices=("chain_sum", "letter_counting", "coin_flip", "last_letters"))
    demonstrations: str | None = opt(None, "SFT data: .jsonl/.parquet path or hf://NAME[:SPLIT]")
    comparisons: str | None = opt(None, "human rankings: .jsonl/.parquet path or hf://NAME[:SPLIT]")
    compare_prompts: str | None = opt(None, "prompts answered by the SFT policy for ranking: path or hf://")
    ppo_prompts: str | None = opt(None, "prompts of the PPO stage: path or hf://")
    eval_prompts: str | None = opt(None, "held-out prompts of the eval stage: path or hf://")
    texts: str | None = opt(None, "plain text for pretrain and ptx mixing: .txt/.jsonl/.parquet path or hf://")
    eval_texts: str | None = opt(None, "held-out plain text for the alignment tax: path or hf://")
    template: str = opt("chat", "how a prompt becomes text: the tokenizer's chat template, Alpaca's "
                        "published form, or the prompt as it is", choices=("chat", "alpaca", "none"))
    max_prompt_tokens: int = opt(64, "longer prompts are dropped and counted, tokens", ge=1)
    split_seed: int = opt(0, "seed of the split of the embedded reviews by document", ge=0)


@dataclass
class ClusterConfig:
    address: str = opt("local", "`local` starts a private Ray on this machine, or joins the cluster whose Ray job this "
                       "is; `auto` or host:port joins a cluster")
    num_cpus: int | None = opt(None, "CPU slots a local Ray offers (null: what the roles ask for; they are "
                               "shares of the machine, not cores)", ge=1)
    object_store_gib: float = opt(0.5, "object store of a local Ray, GiB", gt=0)
    placement: str = opt("separate", "`separate`: each role on resources of its own; `colocated`: generator "
                         "i shares the device of policy rank i; `cpu`: as separate, and a role that asks for a GPU is "
                         "refused", choices=("separate", "colocated", "cpu"))
    strategy: str = opt("PACK", "Ray placement strategy of a role's bundles",
                        choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    autoscaling: bool = opt(False, "nodes come when roles ask for them: what does not fit yet is waited for, "
                            "start_timeout_s long, not refused")
    dashboard: bool = opt(False, "serve Ray's dashboard (loopback) from a local Ray")
    start_timeout_s: float = opt(300.0, "deadline for resources and for each role to start, seconds", gt=0)
    queue_timeout_s: float | None = opt(None, "how long to wait for resources that other runs use, seconds (null: "
                                        "start_timeout_s)", gt=0)
    call_timeout_s: float = opt(1800.0, "deadline of any single remote call, seconds", gt=0)
    heartbeat_s: float = opt(2.0, "so often actors are asked for a sign of life, of many 32 in turn, seconds", gt=0)
    heartbeat_timeout_s: float = opt(60.0, "an actor silent for so long hangs: it is killed, seconds", gt=0)
    attempts: int = opt(3, "how often in a row an iteration, or what else was under way, may be tried again after "
                        "actors were lost", ge=0)


@dataclass
class GeneratorConfig:
    replicas: int = opt(1, "vLLM engines", ge=1)
    tensor_parallel_size: int = opt(1, "devices per engine", ge=1)
    cpus: float = opt(1.0, "Ray CPU slots per engine", ge=0)
    gpus: float = opt(0.0, "GPUs per device of an engine", ge=0, le=1)
    threads: int = opt(2, "OpenMP threads per engine on CPU", ge=1)
    kv_cache_gib: int = opt(1, "KV cache of an engine on CPU, GiB at most", ge=1)
    gpu_memory_utilization: float = opt(0.85, "share of GPU memory vLLM may take", gt=0, le=1)
    max_num_seqs: int = opt(128, "sequences decoded together", ge=1)
    enforce_eager: bool = opt(True, "no graph capture or compilation in vLLM")
    shard_size: int = opt(32, "rollouts per object-store shard, fewer in the last; scoring starts as they arrive", ge=1)


@dataclass
class ScorerConfig:
    replicas: int = opt(1, "actors of this role", ge=1)
    cpus: float = opt(1.0, "Ray CPU slots per actor", ge=0)
    gpus: float = opt(0.0, "GPUs per actor: a share of one, or several of a node, over which the model's layers are "
                      "spread", ge=0)
    threads: int = opt(1, "forward passes side by side per actor on CPU, each on a thread", ge=1)
    micro_batch_tokens: int = opt(4096, "tokens of the forward passes side by side", ge=16)


@dataclass
class LearnerConfig:
    ranks: int = opt(1, "DeepSpeed ZeRO-3 ranks", ge=1)
    cpus: float = opt(1.0, "Ray CPU slots per rank", ge=0)
    gpus: float = opt(0.0, "GPUs per rank", ge=0, le=1)
    threads: int = opt(1, "torch threads per rank on CPU", ge=1)
    micro_batch_tokens: int = opt(4096, "tokens per forward and backward pass", ge=16)
    param_persistence_threshold: int = opt(100_000, "ZeRO-3 keeps smaller parameters whole on every rank, "
                                           "elements", ge=0)
    offload_optimizer: bool = opt(False, "keep optimizer state in host memory")


@dataclass
class RolesConfig:
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    reward: ScorerConfig = field(default_factory=ScorerConfig)
    reference: ScorerConfig = field(default_factory=ScorerConfig)
    policy: LearnerConfig = field(default_factory=LearnerConfig)
    critic: LearnerConfig = field(default_factory=LearnerConfig)
    supervised: LearnerConfig = field(default_factory=LearnerConfig)


@dataclass
class WeightSyncConfig:
    backend: str = opt("auto", "wire from learner to generators: shm (CPU, one host), gloo (CPU), nccl (separate "
                       "GPUs), ipc (shared GPU); auto takes it from the layout",
                       choices=("auto", "shm", "gloo", "nccl", "ipc"))
    bucket_mib: float = opt(64.0, "weights are sent in packed buckets of this size, MiB", gt=0)
    max_mismatch: float = opt(1e-3, "after the first sync, mean |trainer - engine| log-probability above which the run "
                              "stops, nats per token; bfloat16 rounds by 0.01 to 0.03", gt=0)


@dataclass
class OptimizerConfig:
    lr: float = opt(1e-4, "peak learning rate", gt=0)
    weight_decay: float = opt(0.0, "AdamW weight decay", ge=0)
    beta1: float = opt(0.9, "AdamW beta 1", ge=0, lt=1)
    beta2: float = opt(0.95, "AdamW beta 2", ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW epsilon", gt=0)
    max_grad_norm: float = opt(1.0, "gradient norm is clipped to this once per optimizer step", gt=0)
    warmup_ratio: float = opt(0.03, "share of optimizer steps with rising learning rate", ge=0, le=1)
    schedule: str = opt("cosine", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    min_lr_ratio: float = opt(0.1, "final learning rate as a share of the peak", ge=0, le=1)


@dataclass
class PretrainConfig:
    init: str = opt("scratch", "`scratch`: a new Llama and byte-level BPE; `model`: go on from model.path",
                    choices=("scratch", "model"))
    vocab_size: int = opt(4096, "byte-level BPE vocabulary, special tokens included", ge=300)
    hidden_size: int = opt(256, "width of a new model", ge=32)
    num_layers: int = opt(4, "layers of a new model", ge=1)
    num_heads: int = opt(4, "attention heads of a new model", ge=1)
    intermediate_size: int = opt(688, "MLP width of a new model", ge=32)
    block_length: int = opt(256, "tokens per training block", ge=16)
    batch_blocks: int = opt(32, "blocks per optimizer step", ge=1)
    epochs: float = opt(1.0, "passes over the text", gt=0)
    autocast: bool = opt(True, "bfloat16 autocast in the forward pass; parameters stay float32")
    save_dtype: str = opt("bfloat16", "dtype of the saved weights", choices=("float32", "bfloat16"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SFTConfig:
    epochs: int = opt(1, "passes over the demonstrations", ge=1)
    batch_size: int = opt(32, "demonstrations per optimizer step", ge=1)
    val_fraction: float = opt(0.05, "share of demonstrations held out for the validation loss", gt=0, lt=1)
    dropout: float = opt(0.0, "dropout during SFT, wherever the model has any", ge=0, lt=1)
    max_examples: int | None = opt(None, "use at most this many demonstrations (null: all)", ge=2)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class CompareConfig:
    prompts: int = opt(1000, "prompts to answer and rank", ge=2)
    responses_per_prompt: int = opt(4, "K: responses ranked per prompt", ge=4, le=9)
    temperature: float = opt(1.0, "sampling temperature", gt=0)
    max_response_tokens: int = opt(48, "longest response, tokens", ge=1)
    ranker: str = opt("simulated", "`simulated`: a noisy sentiment labeler; `people`: write the responses down for "
                      "people to rank, and stop; `file`: their rankings, data.comparisons",
                      choices=("simulated", "people", "file"))
    labeler_scale: float = opt(1.0, "Bradley-Terry utility per unit of the labeler's log-odds; larger is less "
                               "noisy", gt=0)


@dataclass
class RMConfig:
    epochs: int = opt(1, "passes over the comparisons", ge=1)
    prompts_per_batch: int = opt(64, "prompts, each with all its K responses, per optimizer step", ge=1)
    val_fraction: float = opt(0.15, "share of prompts held out for validation", gt=0, lt=1)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RolloutConfig:
    batch_size: int = opt(128, "responses per iteration: samples_per_prompt of each of batch_size / samples_per_prompt "
                          "prompts", ge=1)
    samples_per_prompt: int = opt(1, "responses per prompt: the group of GRPO, Dr. GRPO and RLOO", ge=1)
    temperature: float = opt(1.0, "sampling temperature; divides the logits in every pass", gt=0)
    max_response_tokens: int = opt(48, "longest response, tokens", ge=1)


@dataclass
class RewardConfig:
    """Where scores come from, and what becomes of them before KL is added."""

    sources: list[str] = opt(["model"], "each an actor of its own: `model`, the reward model of stage rm; "  # noqa: RUF009 - opt makes a field
                             "MODULE:FUNCTION, a Python function; http(s)://..., a service")
    weights: list[float] = opt([], "one per source; the score is the weighted sum (empty: 1 each)")  # noqa: RUF009 - opt makes a field
    timeout_s: float = opt(60.0, "deadline of one call of a function or service, seconds", gt=0)
    retries: int = opt(2, "how often a failed call is tried again before the run stops", ge=0)
    truncated: str = opt("score", "a response cut at max_response_tokens: `score` as it is, give it "
                         "truncation_penalty instead, or `drop` it from the update",
                         choices=("score", "penalty", "drop"))
    truncation_penalty: float = opt(-1.0, "the score of a truncated response with truncated=penalty")
    overlong_tokens: int = opt(0, "DAPO's soft length penalty: it grows linearly over this many last tokens before "
                               "max_response_tokens; 0 turns it off", ge=0)
    overlong_penalty: float = opt(1.0, "what a response of max_response_tokens loses by overlong_tokens", ge=0)
    normalize: bool = opt(False, "divide scores, less their mean, by their standard deviation, both over the run so "
                          "far")
    clip: float | None = opt(None, "scores are clipped to +- this, after normalisation (null: not)", gt=0)


@dataclass
class AlgorithmConfig:
    name: str = opt("ppo", "how scores become advantages and a loss: see rlhf_ray/core/algorithms/",
                    choices=("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp"))
    kl_coef: float = opt(0.02, "beta: weight of the KL penalty towards the reference", ge=0)
    kl_in: str = opt("reward", "where the KL penalty enters: per token in the `reward`, or as a term of the `loss`",
                     choices=("reward", "loss"))
    kl_estimator: str = opt("k1", "per-token estimator: k1 in the reward, k2 or k3 in the loss",
                            choices=("k1", "k2", "k3"))
    kl_target: float | None = opt(None, "adaptive kl_coef: the KL to hold, nats per response (null: fixed kl_coef)",
                                  gt=0)
    kl_horizon: int = opt(10_000, "responses over which an adaptive kl_coef moves by about 10 to 20%", ge=1)
    clip_ratio: float = opt(0.2, "PPO clip range of the policy ratio, downwards; upwards too unless clip_ratio_high",
                            gt=0, lt=1)
    clip_ratio_high: float | None = opt(None, "clip range upwards (null: clip_ratio)", gt=0)
    dual_clip: float | None = opt(None, "with a negative advantage the ratio counts at most this much (null: no "
                                  "limit)", gt=1)
    importance_cap: float | None = opt(None, "correct for engine and trainer disagreeing: weigh tokens by exp(trainer "
                                       "- engine log-probability), at most this (null: no correction)", gt=0)
    old_logprobs: str = opt("learner", "who says the old log-probabilities: the `learner`, in a forward pass, or the "
                            "`engine` that sampled, at no cost (with one optimizer step per batch)",
                            choices=("learner", "engine"))
    entropy_coef: float = opt(0.0, "weight of the entropy bonus", ge=0)
    value_clip: float = opt(0.2, "clip range of the value around its old prediction", gt=0)
    gamma: float = opt(1.0, "discount", gt=0, le=1)
    lam: float = opt(0.95, "GAE lambda", ge=0, le=1)
    ppo_epochs: int = opt(1, "passes over each batch", ge=1)
    minibatch_size: int = opt(64, "rollouts per optimizer step", ge=1)
    whiten_advantages: bool = opt(True, "ppo: normalise advantages over the whole batch and all ranks")
    ptx: bool = opt(False, "mix the pre-training loss into the policy's optimizer steps (PPO-ptx)")
    ptx_coef: float = opt(1.0, "weight of the pre-training loss", gt=0)
    ptx_blocks: int = opt(16, "text blocks of model.max_length tokens per optimizer step", ge=1)
    ema_decay: float = opt(0.0, "decay of the exponential moving average of policy weights per iteration; "
                           "0 turns it off, else the average is what is saved", ge=0, lt=1)


@dataclass
class PPOConfig:
    iterations: int = opt(40, "PPO iterations", ge=1)
    schedule: str = opt("synchronous", "`synchronous`: sample, learn, sync; `one_step_off`: the next batch is sampled "
                        "while this one is learnt from", choices=("synchronous", "one_step_off"))
    critic_warmup_iterations: int = opt(0, "first iterations that update only the critic", ge=0)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class DPOConfig:
    beta: float = opt(0.1, "weight of the implicit KL penalty towards the SFT policy", gt=0)
    epochs: int = opt(1, "passes over the comparisons", ge=1)
    prompts_per_batch: int = opt(16, "prompts, each with all its pairs, per optimizer step", ge=1)
    val_fraction: float = opt(0.1, "share of prompts held out for validation", gt=0, lt=1)
    label_smoothing: float = opt(0.0, "conservative DPO: the chance that a label is the wrong way round", ge=0, lt=0.5)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class AlarmConfig:
    threshold: float = opt(0.0, "when it rings; see rlhf_ray/metrics/alarms.py for each alarm's unit")
    action: str = opt("log", "`log`; `pause` until the file PAUSED in the run's ppo directory is removed; `stop`: save "
                      "the policy and end the run", choices=("off", "log", "pause", "stop"))
    cooldown: int = opt(5, "iterations for which it then stays silent", ge=0)


@dataclass
class AlarmsConfig:
    """What is watched while the policy trains: see rlhf_ray/metrics/alarms.py."""

    kl: AlarmConfig = field(default_factory=lambda: AlarmConfig(30.0))
    entropy: AlarmConfig = field(default_factory=lambda: AlarmConfig(0.3))
    length: AlarmConfig = field(default_factory=lambda: AlarmConfig(1.6))
    repetition: AlarmConfig = field(default_factory=lambda: AlarmConfig(0.15))
    divergence: AlarmConfig = field(default_factory=lambda: AlarmConfig(3.0))
    nonfinite: AlarmConfig = field(default_factory=lambda: AlarmConfig(0.0))
    equal_groups: AlarmConfig = field(default_factory=lambda: AlarmConfig(1.0))
    memory: AlarmConfig = field(default_factory=lambda: AlarmConfig(1.5))
    warmup_iterations: int = opt(2, "first iterations that make the baseline of entropy, length and memory alarms",
                                 ge=1)
    window: int = opt(10, "last iterations that the divergence alarm looks at", ge=4)


@dataclass
class EvalConfig:
    policy: str = opt("ppo", "the policy to judge: what stage ppo or stage dpo made", choices=("ppo", "dpo"))
    prompts: int = opt(512, "held-out prompts", ge=2)
    temperature: float = opt(1.0, "sampling temperature", gt=0)
    tie_margin: float = opt(0.1, "responses closer than this in the judge's log-odds are a tie", ge=0)
    bootstrap_samples: int = opt(10_000, "resamples of the confidence interval over prompts", ge=100)
    table_samples: int = opt(12, "before-and-after samples in the report", ge=0)
    loss_blocks: int = opt(256, "held-out text blocks for the alignment tax", ge=1)
    baselines: list[str] = opt(["base", "sft"], "models that the policy is compared with",  # noqa: RUF009 - opt makes a field
                               choices=("base", "sft"))


@dataclass
class ExportConfig:
    source: str = opt("ppo", "the stage whose model `rlhf-ray export` writes",
                      choices=("pretrain", "sft", "rm", "ppo", "dpo"))
    checkpoint: int | None = opt(None, "ppo: the step of a checkpoint (null: the finished stage's model, or the newest "
                                 "checkpoint if the stage is unfinished)", ge=0)
    path: str | None = opt(None, "directory to write (null: <output_dir>/export)")
    dtype: str = opt("saved", "of the exported weights; `saved`: as the stage saves them",
                     choices=("saved", "float32", "bfloat16"))


@dataclass
class ScaleConfig:
    generators: int | None = opt(None, "how many generators a ppo stage that is under way shall have", ge=1)


@dataclass
class CheckpointConfig:
    iterations: int = opt(1, "ppo: save after every so many iterations", ge=1)
    seconds: float = opt(60.0, "pretrain, sft, rm, dpo: save when so long has passed since the last save, seconds",
                         ge=0)
    keep_last: int = opt(2, "how many of the newest checkpoints to keep", ge=1)
    best_metric: str | None = opt(None, "ppo: keep the checkpoint with the highest value of this metric too "
                                  "(score, judge_score, ...)")


@dataclass
class LoggingConfig:
    wandb: str = opt("offline", "`offline`: into the run's directory, to be sent by `wandb sync`; `online`: to the "
                     "server at once", choices=("disabled", "offline", "online"))
    wandb_project: str = opt("rlhf_ray", "wandb project")
    wandb_model: bool = opt(True, "log the final policy as an artifact; online that sends it")


@dataclass
class Config:
    """The whole configuration of a run. Stage outputs live in `<output_dir>/<stage>/`."""

    output_dir: str = opt("outputs/run", "directory of the run: a path that leads every node to the same place, or a "
                          "URL that fsspec opens (s3://bucket/run)")
    seed: int = opt(0, "seed of everything random", ge=0)
    resume: str = opt("auto", "`auto`: an unfinished stage goes on from its newest whole checkpoint; `never`: it "
                      "starts over, and its checkpoints are deleted", choices=("auto", "never"))
    stages: list[str] = opt(list(DEFAULT_STAGES), "what `pipeline` runs, in order", choices=STAGES)  # noqa: RUF009 - opt makes a field
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    rm: RMConfig = field(default_factory=RMConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
