"""From overrides to a checked `Config`: compose with Hydra, then look for what cannot work.

Everything that is wrong ends in a `UserError` whose lines each name a key and say what to do. Hydra is imported
inside the functions that need it, so that `rlhf-ray --help` does not pay for it.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rlhf_ray.config.schema import MISSING, STAGES, Config, LearnerConfig
from rlhf_ray.errors import UserError

ASSET_SPLIT_SEED = 0  # the split of the reviews that assets://reviews_base was trained on
ASSETS = "assets://"  # prefix of a model.path that comes with the package

# Which data.* keys a stage reads when data.source=files, beyond those that depend on other options.
STAGE_DATA = {
    "pretrain": ["texts", "eval_texts"],
    "sft": ["demonstrations"],
    "compare": [],
    "rm": ["demonstrations"],  # the scores are shifted so that demonstrations have mean 0
    "ppo": ["ppo_prompts"],
    "eval": ["eval_prompts", "eval_texts"],
}
# Which roles a stage starts.
STAGE_ROLES = {
    "pretrain": ["supervised"],
    "sft": ["supervised"],
    "compare": ["generator"],
    "rm": ["supervised"],
    "ppo": ["generator", "reward", "reference", "policy", "critic"],
    "eval": ["generator", "reward", "reference"],
}
_LIMITS = {"ge": (ge, ">="), "gt": (gt, ">"), "le": (le, "<="), "lt": (lt, "<")}


class Option(NamedTuple):
    """One documented key. `limits` is text such as `>= 0, < 1` or `a | b`, empty when there are none."""

    key: str
    type: str
    default: Any
    help: str
    limits: str


# --- composing ---


def conf_dir() -> Path:
    """The directory of Hydra groups: `conf/` of a checkout, `rlhf_ray/conf` of an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError("conf/config.yaml is missing beside the package: reinstall rlhf_ray")


def groups(extra_dirs: Sequence[str | Path] = ()) -> dict[str, list[str]]:
    """The options of each configuration group, sorted: `{"experiment": ["hf_8gpu", ...], ...}`."""
    found: dict[str, set[str]] = {}
    for root in (conf_dir(), *map(Path, extra_dirs)):
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def compose(overrides: Sequence[str], extra_dirs: Sequence[str | Path] = ()) -> Config:
    """The configuration that `conf/`, the schema and Hydra `overrides` make together; not yet validated.

    `extra_dirs` hold more group options (`DIR/experiment/mine.yaml`). Unset optional keys (`???`) become None, and
    `assets://NAME` in model.path the directory of that asset.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for directory in extra_dirs:
        if not Path(directory).is_dir():
            raise UserError(f"--config-dir {directory}: no such directory")
    for_hydra = _checked(overrides, groups(extra_dirs))
    if extra_dirs:
        search = ",".join(f"'file://{Path(directory).resolve()}'" for directory in extra_dirs)
        for_hydra.append(f"hydra.searchpath=[{search}]")
    ConfigStore.instance().store("base_config", Config)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base=None):
            node = hydra_compose("config", for_hydra)
        tree = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error)) from error
    cfg: Config = _build(Config, tree)
    if cfg.model.path.startswith(ASSETS):
        cfg.model.path = _asset(cfg.model.path.removeprefix(ASSETS))
    elif cfg.model.path.startswith("~"):
        cfg.model.path = str(Path(cfg.model.path).expanduser())
    return cfg


def _asset(name: str) -> str:
    return str(Path(__file__).resolve().parents[1] / "assets" / name)


def _build(kind: Any, tree: Any) -> Any:
    values = {}
    for f in fields(kind):
        value = tree[f.name]
        optional = type(None) in get_args(f.type)
        values[f.name] = (
            _build(f.type, value) if is_dataclass(f.type) else None if optional and value == MISSING else value
        )
    return kind(**values)


def _checked(overrides: Sequence[str], options: dict[str, list[str]]) -> list[str]:
    """The overrides as Hydra takes them, after everything about them that we can say better than its own errors."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    keys = {option.key for option in describe()}
    sections = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    for_hydra = []
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"override {text!r} is not KEY=VALUE in Hydra's syntax; put a value with special "
                            "characters in quotes: 'KEY=\"VALUE\"'") from error
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            raise UserError(f"override {text!r} has several values, but one run takes one; for a list write "
                            f"{key}=[a,b]")
        if key in options:
            value = parsed.value()
            if value is None and not parsed.is_delete():
                text = f"~{key}"  # GROUP=null reads better than Hydra's way to leave a group out
            elif value is not None and value not in options[key]:
                raise UserError(f"{key}={value}: no such {key}; there are {', '.join(options[key])}"
                                + _did_you_mean(str(value), options[key]))
        elif key not in keys | sections:
            raise UserError(_unknown(key))
        elif parsed.is_delete():
            raise UserError(f"override {text!r}: an option cannot be removed; leave the override out, or set "
                            f"{key}=null where null is allowed")
        for_hydra.append(text)
    return for_hydra


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown(key: str) -> str:
    known = [option.key for option in describe()]
    # A right name in the wrong section (`lr` for `sft.optimizer.lr`) is as common as a misspelt one.
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(key, same_name, n=4, cutoff=0) or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "`rlhf-ray ppo --cfg job` prints every key"
    return f"unknown key {key!r}; {hint}"


def _one_line(error: BaseException) -> str:
    """What a Hydra or OmegaConf error is about, in one line: the file of a group option, if it is one, and the key."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    where = next((found[0] for e in chain if (found := re.match(r"In '[^']+': ", str(e)))), "")
    named = [e for e in chain if getattr(e, "full_key", None)]
    if not named:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"configuration: {_flat(error)}"
    key, text = named[0].full_key, _flat(named[0])  # type: ignore[attr-defined]  # of OmegaConf's errors
    if re.match(r"Key '.*' not in ", text):
        return where + _unknown(key)
    takes = [f" ({option.type}: {option.help})" for option in describe() if option.key == key]
    return f"{where}{key}: {text}{''.join(takes)}"


def _flat(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key", "object_type", "reference_type")
    return " ".join(line for line in lines if line and not line.startswith(noise))


# --- describing ---


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, dataclass field, value) of every option in a configuration object, in order of the schema."""
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, value


def describe() -> list[Option]:
    """Every option of the schema, for documentation."""
    return [
        Option(key, str(f.type) if get_args(f.type) else f.type.__name__, default, f.metadata["help"],
               _limits(f.metadata))
        for key, f, default in _leaves(Config())
    ]


def _limits(metadata: Any) -> str:
    if "choices" in metadata:
        return " | ".join(metadata["choices"])
    return ", ".join(f"{sign} {metadata[name]}" for name, (_, sign) in _LIMITS.items() if name in metadata)


def to_yaml(cfg: Config) -> str:
    """The whole configuration as YAML, in the order of the schema."""
    import yaml

    return yaml.safe_dump(asdict(cfg), sort_keys=False, allow_unicode=True)


def config_fingerprint(cfg: Config, sections: Sequence[str]) -> str:
    """sha256 (hex) of the named sections or keys of a configuration, dotted (`model`, `roles.policy`, `seed`)."""
    parts = {}
    for name in sections:
        part = reduce(getattr, name.split("."), cfg)
        parts[name] = asdict(part) if is_dataclass(part) else part
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- validating ---


def stages_of(cfg: Config, stage: str) -> list[str]:
    """What a command runs: the configured stages for `pipeline`, nothing for `doctor`, else the stage itself."""
    return cfg.stages if stage == "pipeline" else [stage] if stage in STAGES else []


def validate(cfg: Config, stage: str) -> None:
    """Refuse what cannot work, before anything starts.

    Checks the limits of every field, then the contradictions that matter to `stage`. Touches no file and no cluster.
    Raises UserError with one line for each problem.
    """
    problems = list(_out_of_range(cfg))
    if not problems:  # the checks below compute with values that are in range
        runs = stages_of(cfg, stage)
        problems = [
            problem
            for check in (_pipeline, _missing, _lengths, _batches, _devices, _weight_sync)
            for problem in check(cfg, runs)
        ]
    if problems:
        raise UserError("\n".join(problems))


def _needs_model(cfg: Config, runs: list[str]) -> bool:
    """Whether a run starts from model.path: not when the recipe has a pretrain stage that starts from scratch."""
    scratch = cfg.pretrain.init == "scratch" and ("pretrain" in cfg.stages or runs == ["pretrain"])
    return bool(runs) and not scratch


def check_model(cfg: Config, stage: str) -> None:
    """Refuse a local model.path that holds no model, unless `stage` makes it; hub names are left to transformers."""
    if not _needs_model(cfg, stages_of(cfg, stage)):
        return
    path = Path(cfg.model.path)
    local = cfg.model.path.startswith((".", "/", "~")) or cfg.model.path.count("/") > 1 or path.exists()
    if local and not (path / "config.json").is_file():
        raise UserError(f"model.path={cfg.model.path}: no model there (no config.json); give a Hugging Face directory "
                        "or hub name, or make one with `rlhf-ray pretrain`")
    if not local:
        return
    context = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    if context is not None and cfg.model.max_length > context:
        raise UserError(f"model.max_length={cfg.model.max_length} is more than the {context} positions that "
                        f"{cfg.model.path} was built for: lower it")


def _out_of_range(cfg: Config) -> Iterator[str]:
    for key, f, value in _leaves(cfg):
        meaning = f.metadata["help"]
        if value == MISSING:
            if key != "model.path":  # which pretrain from scratch does without
                yield f"{key} is not set: give {key}=VALUE ({meaning})"
            continue
        for entry in value if isinstance(value, list) else [value]:
            if "choices" in f.metadata and entry not in f.metadata["choices"]:
                allowed = ", ".join(f.metadata["choices"])
                yield f"{key}={entry}: must be one of {allowed}{_did_you_mean(str(entry), f.metadata['choices'])}"
        if isinstance(value, (int, float)):
            # `not (value >= limit)` and not `value < limit`: NaN fails too.
            inside = all(op(value, f.metadata[name]) for name, (op, _) in _LIMITS.items() if name in f.metadata)
            if not inside:
                yield f"{key}={value}: must be {_limits(f.metadata)} ({meaning})"
            elif not math.isfinite(value):
                yield f"{key}={value}: must be a finite number ({meaning})"


def _pipeline(cfg: Config, runs: list[str]) -> Iterator[str]:
    order = [STAGES.index(stage) for stage in cfg.stages]
    if not order:
        yield f"stages=[]: nothing to run; name some of {', '.join(STAGES)}"
    elif order != sorted(set(order)):
        right = ",".join(STAGES[i] for i in sorted(set(order)))
        yield f"stages=[{','.join(cfg.stages)}]: each stage once and in order; write stages=[{right}]"
    if "compare" in runs and len(runs) > 1 and cfg.compare.ranker == "people":
        yield ("compare.ranker=people ends before anybody has ranked: run `rlhf-ray compare` alone, have its "
               "to_rank.jsonl ranked, then go on with compare.ranker=file data.comparisons=RANKED")
    if "ppo" in runs and cfg.ppo.critic_warmup_iterations >= cfg.ppo.iterations:
        yield (f"ppo.critic_warmup_iterations={cfg.ppo.critic_warmup_iterations} leaves the policy nothing of "
               f"ppo.iterations={cfg.ppo.iterations}: lower the first or raise the second")
    p = cfg.pretrain
    if "pretrain" in runs and p.init == "scratch" and p.hidden_size % p.num_heads:
        yield (f"pretrain.hidden_size={p.hidden_size} is not a multiple of pretrain.num_heads={p.num_heads}: "
               "change one of them")
    elif "pretrain" in runs and p.init == "scratch" and p.hidden_size // p.num_heads % 2:
        yield (f"pretrain.hidden_size={p.hidden_size} / pretrain.num_heads={p.num_heads} is odd, but rotary embeddings "
               "need an even head size: change one of them")


def _missing(cfg: Config, runs: list[str]) -> Iterator[str]:
    if _needs_model(cfg, runs):
        if cfg.model.path == MISSING:
            yield "model.path is not set: give a Hugging Face directory or hub name, or put pretrain into stages"
    elif runs not in ([], ["pretrain"]) and cfg.model.path != MISSING:
        yield (f"model.path={cfg.model.path} would not be used, because stages has pretrain with pretrain.init="
               f"scratch: leave pretrain out, stages=[{','.join(s for s in cfg.stages if s != 'pretrain')}], or set "
               "pretrain.init=model")
    if cfg.data.source == "reviews":
        if cfg.data.split_seed != ASSET_SPLIT_SEED and cfg.model.path == _asset("reviews_base") and \
                _needs_model(cfg, runs):
            yield (f"data.split_seed={cfg.data.split_seed} would hold out reviews that the base model has read: it was "
                   f"trained on the split of data.split_seed={ASSET_SPLIT_SEED}; make a base of your own with pretrain")
        if "compare" in runs and cfg.compare.ranker == "file" and not cfg.data.comparisons:
            yield _no_data("comparisons", "compare.ranker=file", "or set compare.ranker=simulated")
        return
    if cfg.compare.ranker == "simulated" and "compare" in runs:
        yield ("compare.ranker=simulated needs the sentiment labels of data.source=reviews, but data.source=files: "
               "set compare.ranker=file and data.comparisons=PATH")
    elif "compare" in runs and cfg.compare.ranker == "file" and not cfg.data.comparisons:
        yield _no_data("comparisons", "compare.ranker=file", "with your rankings")
    elif "compare" in runs and cfg.compare.ranker == "people" and not cfg.data.compare_prompts:
        yield _no_data("compare_prompts", "compare.ranker=people", "with prompts to answer")
    if "ppo" in runs and cfg.algorithm.ptx_coef > 0 and not cfg.data.texts:
        yield _no_data("texts", f"algorithm.ptx_coef={cfg.algorithm.ptx_coef}", "or set algorithm.ptx_coef=0")
    needs: dict[str, list[str]] = {}
    for stage in runs:
        for name in STAGE_DATA[stage]:
            needs.setdefault(name, []).append(stage)
    for name, stages in needs.items():
        if not getattr(cfg.data, name):
            yield _no_data(name, f"{' and '.join(stages)} with data.source=files", "or set data=reviews")


def _no_data(name: str, who: str, otherwise: str) -> str:
    return f"data.{name} is not set, but needed by {who}: give data.{name}=PATH or hf://NAME, {otherwise}"


def _lengths(cfg: Config, runs: list[str]) -> Iterator[str]:
    for section, users in (("compare", {"compare"}), ("rollout", {"ppo", "eval"})):
        response = getattr(cfg, section).max_response_tokens
        if users & set(runs) and cfg.data.max_prompt_tokens + response > cfg.model.max_length:
            yield (f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {section}.max_response_tokens={response} "
                   f"is longer than model.max_length={cfg.model.max_length}: shorten one or raise model.max_length")


def _batches(cfg: Config, runs: list[str]) -> Iterator[str]:
    """A batch must not be larger than what there is, nor smaller than the ranks that share it."""
    roles, a, r = cfg.roles, cfg.algorithm, cfg.rollout
    shared = [
        ("pretrain", "pretrain.batch_blocks", cfg.pretrain.batch_blocks, "supervised"),
        ("sft", "sft.batch_size", cfg.sft.batch_size, "supervised"),
        ("rm", "rm.prompts_per_batch", cfg.rm.prompts_per_batch, "supervised"),
        ("ppo", "algorithm.minibatch_size", a.minibatch_size, "policy"),
        ("ppo", "algorithm.minibatch_size", a.minibatch_size, "critic"),
    ]
    if a.ptx_coef > 0:
        shared.append(("ppo", "algorithm.ptx_blocks", a.ptx_blocks, "policy"))
    for stage, key, size, role in shared:
        ranks = getattr(roles, role).ranks
        if stage in runs and size < ranks:
            yield f"{key}={size} is less than roles.{role}.ranks={ranks}: every rank needs at least one; raise {key}"
    rollouts = r.prompts_per_step * r.samples_per_prompt
    if "ppo" in runs and a.minibatch_size > rollouts:
        yield (f"algorithm.minibatch_size={a.minibatch_size} is more than rollout.prompts_per_step="
               f"{r.prompts_per_step} x rollout.samples_per_prompt={r.samples_per_prompt}: lower the first")


def _devices(cfg: Config, runs: list[str]) -> Iterator[str]:
    on_cpu = [role for stage in runs for role in STAGE_ROLES[stage] if getattr(cfg.roles, role).gpus == 0]
    torch_on_cpu = [role for role in dict.fromkeys(on_cpu) if role != "generator"]  # vLLM picks its own kernel
    if cfg.model.attn_implementation == "flash_attention_2" and torch_on_cpu:
        keys = ", ".join(f"roles.{role}.gpus=0" for role in torch_on_cpu)
        yield f"model.attn_implementation=flash_attention_2 needs GPUs, but {keys}: give them GPUs or set it to sdpa"
    if cfg.model.dtype == "bfloat16" and "ppo" in runs:
        ppo_on_cpu = [role for role in STAGE_ROLES["ppo"] if role in on_cpu]
        if ppo_on_cpu:
            keys = ", ".join(f"roles.{role}.gpus=0" for role in ppo_on_cpu)
            yield (f"model.dtype=bfloat16 on CPU ({keys}) makes sampled and trained log-probabilities differ: set "
                   "model.dtype=float32, or give these roles GPUs")
    generator = cfg.roles.generator
    if "generator" in on_cpu and generator.tensor_parallel_size > 1:
        yield (f"roles.generator.tensor_parallel_size={generator.tensor_parallel_size} needs GPUs, but "
               "roles.generator.gpus=0: set it to 1 and raise roles.generator.replicas instead")


def _weight_sync(cfg: Config, runs: list[str]) -> Iterator[str]:
    if "ppo" not in runs:
        return
    generator, policy, backend = cfg.roles.generator, cfg.roles.policy, cfg.weight_sync.backend
    colocated = cfg.cluster.placement == "colocated"
    if colocated:
        yield from _colocated(generator, policy)
    if backend in ("nccl", "ipc"):
        for name, role in (("generator", generator), ("policy", policy)):
            if role.gpus == 0:
                yield f"weight_sync.backend={backend} needs GPUs, but roles.{name}.gpus=0: use gloo or auto"
    if backend == "ipc" and not colocated:
        yield ("weight_sync.backend=ipc needs shared GPUs, but cluster.placement=separate: set "
               "cluster.placement=colocated, or weight_sync.backend=auto")
    if backend == "nccl" and colocated:
        yield ("weight_sync.backend=nccl cannot connect two processes on one GPU, but cluster.placement=colocated: "
               "use ipc or auto")


def _colocated(generator: Any, policy: LearnerConfig) -> Iterator[str]:
    if generator.tensor_parallel_size != 1:
        yield (f"cluster.placement=colocated puts one engine on one device, but roles.generator.tensor_parallel_size="
               f"{generator.tensor_parallel_size}: set it to 1, or cluster.placement=separate")
    if generator.replicas != policy.ranks:
        yield (f"cluster.placement=colocated pairs generators with policy ranks, but roles.generator.replicas="
               f"{generator.replicas} and roles.policy.ranks={policy.ranks}: make them equal")
    if generator.gpus and generator.gpu_memory_utilization > generator.gpus:
        yield (f"roles.generator.gpu_memory_utilization={generator.gpu_memory_utilization:g} is more than its share of "
               f"the GPU, roles.generator.gpus={generator.gpus:g}: lower the first")
    if generator.gpus + policy.gpus > 1:
        yield (f"cluster.placement=colocated shares a GPU, but roles.generator.gpus={generator.gpus:g} + "
               f"roles.policy.gpus={policy.gpus:g} is more than 1: use shares such as 0.5 and 0.5")
