"""`rlhf-ray export`: a model of the run as a plain Hugging Face directory with a model card.

It reads the run and changes nothing in it: a run that is still training may be exported from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlhf_ray import disk, storage
from rlhf_ray.actors.policy import EMA
from rlhf_ray.config.schema import Config, ModelConfig
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.recorder import read_history
from rlhf_ray.models.hub import SCORE_SHIFT, load_causal_lm, load_scalar_model, load_tokenizer, save_model, score_shift
from rlhf_ray.models.shards import WEIGHT, Shards
from rlhf_ray.stages.card import Origin, card, is_ours
from rlhf_ray.stages.common import Paths, stage_record
from rlhf_ray.train.checkpoint import Checkpoint
from rlhf_ray.train.manifest import NotWhole, verify
from rlhf_ray.versions import installed


def run(cfg: Config) -> None:
    with storage.reading(cfg.output_dir) as directory:
        export(replace(cfg, output_dir=str(directory)))


def export(cfg: Config) -> None:
    paths, source = Paths(cfg), cfg.export.source
    target = Path(cfg.export.path).expanduser().resolve() if cfg.export.path else paths.root.resolve() / "export"
    storage.fetch(target, lambda name: not name.endswith(".safetensors"))
    with disk.writing(target):
        disk.restore(target)
    check_target(target)
    checkpoint = choose(cfg)
    if checkpoint is None:
        paths.require(source)
    else:
        paths.require("sft")
    made = {"pretrain": paths.base, "sft": paths.sft, "rm": paths.reward, "ppo": paths.policy, "dpo": paths.dpo}
    shape = str(paths.sft if checkpoint else made[source])  # where config and tokenizer are
    storage.fetch(Path(shape))
    try:
        saved = json.loads((Path(shape) / "config.json").read_text())["dtype"]
        dtype = saved if cfg.export.dtype == "saved" else cfg.export.dtype
        text = card(origin(cfg, checkpoint, dtype))
    except KeyError as error:
        raise UserError(f"{paths.stage(source)} was written by another version of rlhf-ray: it lacks {error}; run "
                        f"`rlhf-ray {source}` again") from error
    model = (load_scalar_model if source == "rm" else load_causal_lm)(shape, ModelConfig(dtype=saved))
    weights = of_checkpoint(model, checkpoint) if checkpoint else model.named_parameters()
    extra = of_rewards(model, shape) if source == "rm" else {}
    save_model(model, weights, load_tokenizer(shape), target, dtype, text, **extra)
    storage.publish(target, exact=True)
    storage.settle()
    step = f", step {checkpoint.step}" if checkpoint else ""
    console.print(f"{source}{step} exported to {storage.shown(target)} ({dtype})", markup=False)


def check_target(path: Path) -> None:
    """Raise UserError unless `path` is free, empty, or an earlier export, which is going to be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    readme = path / "README.md"
    if not (path.is_dir() and readme.is_file() and is_ours(readme.read_text(encoding="utf-8", errors="replace"))):
        raise UserError(f"export.path={storage.shown(path)} is there and is no export of rlhf-ray: nothing is "
                        "overwritten; set export.path to a new directory, or remove this one")


def choose(cfg: Config) -> Checkpoint | None:
    """The checkpoint to export; None if the finished stage's model is meant.

    Raises UserError if there is no such checkpoint, or if it is not whole.
    """
    wanted = cfg.export.checkpoint
    if cfg.export.source != "ppo" or (wanted is None and stage_record(cfg, "ppo") is not None):
        return None
    directory = Paths(cfg).stage("ppo") / "checkpoints"
    found = {int(path.name.removeprefix("step-")): path for path in sorted(directory.glob("step-*"))}
    if wanted is None and not found:
        return None  # the caller says what is missing
    step = max(found) if wanted is None else wanted
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "there are none"
        raise UserError(f"export.checkpoint={step}: no such checkpoint in {directory}; {there}")
    storage.fetch(found[step])
    try:
        return Checkpoint(step, found[step], verify(found[step]))
    except NotWhole as problem:
        others = ", ".join(str(s) for s in found if s != step) or "none"
        raise UserError(f"the checkpoint of step {step} is not whole: {problem}; choose another with "
                        f"export.checkpoint (there are: {others})") from problem


def of_checkpoint(model: Any, checkpoint: Checkpoint) -> Iterable[tuple[str, Tensor]]:
    """(name, whole float32 tensor) of every parameter: the averaged ones if there is an EMA, as when ppo saves.

    Raises UserError if the checkpoint is of a model of another shape.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    average = checkpoint.directory / EMA
    if average.is_file():
        tensors = load_file(average)
        wrong = [n for n in shapes.keys() | tensors.keys() if n not in tensors or tensors[n].shape != shapes.get(n)]
        if wrong:
            raise UserError(f"{average} and the sft model differ in {min(wrong)}: sft was run again with another base "
                            "model since; run ppo again, too")
        yield from tensors.items()
        return
    with Shards(checkpoint.directory, "policy") as shards:
        for name, shape in shapes.items():
            yield name, shards.whole(name, WEIGHT, shape)


def origin(cfg: Config, checkpoint: Checkpoint | None, dtype: str) -> Origin:
    """What the card is to say, from what the run has written down: its configuration then, not that of this call."""
    paths, source = Paths(cfg), cfg.export.source
    if checkpoint:
        then = checkpoint.identity
        return Origin(source, then["config"], then["data"], then["versions"], "trained", dtype, checkpoint.step,
                      metrics=checkpoint.manifest.get("metrics"))
    record = stage_record(cfg, source) or {}
    config = yaml.safe_load((paths.stage(source) / "config.yaml").read_text())
    report = None
    if (paths.root / "report.json").is_file():
        report = json.loads((paths.root / "report.json").read_text())
        # An earlier model of this stage took another time.
        seconds = report["stages"].get(source, {}).get("seconds")
        report = report if report.get("policy") == source and seconds == record["seconds"] else None
    metrics = next(reversed(read_history(paths.stage("ppo"))), None) if source == "ppo" else None
    versions, when = (report["versions"], "evaluated") if report else (installed(), "exported")
    return Origin(source, config, record["data"], versions, when, dtype, record=record, metrics=metrics, report=report)


def of_rewards(model: Any, path: str) -> dict[str, Any]:
    """What config.json of a reward model needs besides the model's own."""
    needed: dict[str, Any] = {SCORE_SHIFT: score_shift(path)}
    if model.config.pad_token_id == model.config.eos_token_id:
        # transformers reads the score off the last token that is no padding, which is to be the EOS
        needed["pad_token_id"] = None
    return needed
