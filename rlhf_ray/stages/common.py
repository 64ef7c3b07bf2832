"""What all stages share: where things lie, and the record that each stage leaves."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_ray import disk, storage
from rlhf_ray.config.load import config_fingerprint, to_yaml
from rlhf_ray.config.reward_sources import source_file
from rlhf_ray.config.schema import Config
from rlhf_ray.data.sources import load_task_data, read_by
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.memory import RssSampler
from rlhf_ray.metrics.progress import console
from rlhf_ray.stages.lock import locked
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.identity import check_same_run, differences, identity_of

JOB_DIRECTORIES = "working_dir_files"  # where Ray unpacks what came along with a job


class Paths:
    """Where the stages of a run keep what they make."""

    def __init__(self, cfg: Config):
        self.root = storage.local_root(cfg.output_dir)  # absolute: actors have working directories of their own
        if JOB_DIRECTORIES in self.root.parts:
            raise UserError(f"output_dir={cfg.output_dir} would lie in the working directory of this Ray job, which "
                            "Ray deletes: give an absolute path that every node has (`rlhf-ray submit` does it by "
                            "itself)")
        self._pretrains = "pretrain" in cfg.stages
        local = Path(cfg.model.path)
        self._base = str(local.absolute()) if local.exists() else cfg.model.path

    def stage(self, name: str) -> Path:
        return self.root / name

    def require(self, name: str) -> None:
        """Raise UserError unless the stage `name` has ended well in this run's directory."""
        if not (self.stage(name) / "stage.json").is_file():
            raise UserError(f"{storage.shown(self.stage(name))} has no finished {name}: run `rlhf-ray {name}` first "
                            "(same output_dir)")

    @property
    def base(self) -> Path:
        """What `pretrain` writes."""
        return self.stage("pretrain") / "model"

    @property
    def start(self) -> str:
        """The base model that sft starts from: what pretrain made if it is among the stages, else model.path."""
        return str(self.base) if self._pretrains else self._base

    @property
    def start_of_pretraining(self) -> str:
        """What pretrain goes on from with pretrain.init=model."""
        return self._base

    @property
    def sft(self) -> Path:
        return self.stage("sft") / "model"

    @property
    def comparisons(self) -> Path:
        return self.stage("compare") / "comparisons.jsonl"

    @property
    def reward(self) -> Path:
        return self.stage("rm") / "model"

    @property
    def policy(self) -> Path:
        return self.stage("ppo") / "model"

    @property
    def dpo(self) -> Path:
        return self.stage("dpo") / "model"


class StageRecord:
    """The numbers that a stage leaves in `<output_dir>/<stage>/stage.json`."""

    def __init__(self, name: str, done_before: bool = False):
        self.name = name
        self.done_before = done_before  # it had ended well when it was started
        self.started = False  # what it made before is being replaced
        self.values: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        self.values |= values


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else str(value)


# The sections of the configuration that each stage's result depends on, besides the stages before it.
DEPENDS = {
    "pretrain": ["seed", "model", "data", "pretrain", "roles.supervised"],
    "sft": ["seed", "model", "data", "sft", "roles.supervised"],
    "compare": ["seed", "model", "data", "compare", "roles.generator"],
    "rm": ["seed", "model", "data", "rm", "roles.supervised"],
    "ppo": ["seed", "model", "data", "rollout", "reward", "algorithm", "ppo", "roles", "weight_sync"],
    "dpo": ["seed", "model", "data", "dpo", "roles.supervised"],
    "eval": ["seed", "model", "data", "rollout", "eval", "roles"],
}


def fingerprints(cfg: Config) -> dict[str, str]:
    """Of every stage to run: a hash of its configuration, the data that it reads, and all stages before it,
    the base model included."""
    chain, out = model_fingerprint(cfg.model.path), {}
    cfg = replace(cfg, model=replace(cfg.model, path=""))  # what came along with a job is somewhere else every time
    for name in cfg.stages:
        data = read_by(name, cfg.data)
        facts = config_fingerprint(replace(cfg, data=data), DEPENDS[name]), load_task_data(data).fingerprint()
        code = reward_code(cfg).values() if name == "ppo" else ()
        chain = hashlib.sha256(" ".join((chain, name, *facts, *code)).encode()).hexdigest()
        out[name] = chain
    return out


def model_fingerprint(path: str) -> str:
    """Of a local model (or one file) a hash (hex) of names and contents of its files, the same wherever it is copied
    to; of a hub model, its name."""
    sizes = storage.sizes(Path(path))
    facts = [(file.name, storage.digest(file, sizes[file])) for file in sorted(sizes)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if facts else path


def reward_code(cfg: Config) -> dict[str, str]:
    """Of every reward function: source -> hash of the file in which it is written, without what that file imports."""
    files = {source: source_file(source) for source in cfg.reward.sources}
    return {source: hashlib.sha256(file.read_bytes()).hexdigest() for source, file in files.items() if file}


def stage_record(cfg: Config, name: str) -> dict[str, Any] | None:
    """What a stage recorded when it ended well, or None."""
    path = Paths(cfg).stage(name) / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else None


def resumed(
    cfg: Config, record: StageRecord, models: Mapping[str, Path | str], last: int
) -> tuple[Checkpoints, Checkpoint | None]:
    """The checkpoints of a stage, and the one from which to go on: None to start over.

    models: what the stage starts from, by name; last: the step at which it is done. A stage that had ended well starts
    over, unless it only has to go further now; a line says why. Raises UserError if the checkpoints of an unfinished
    one are of another run.
    """
    record.started = True
    now = identity_of(record.name, cfg, load_task_data(read_by(record.name, cfg.data)).fingerprint(),
                      {name: model_fingerprint(str(path)) for name, path in models.items()},
                      reward_code(cfg) if record.name == "ppo" else {})
    checkpoints = Checkpoints(Paths(cfg).stage(record.name) / "checkpoints", cfg.checkpoint, now)
    newest = None if cfg.resume == "never" else checkpoints.newest()
    if newest and record.done_before:
        why = differences(newest.identity, now, DEPENDS[record.name])
        if newest.step >= last:
            why.append(f"it was at step {newest.step} of {last} already")
        if why:
            console.print(f"{record.name} had ended well and starts over, without its checkpoints: {'; '.join(why)}",
                          markup=False)
            newest = None
    if newest:
        check_same_run(newest.identity, now, DEPENDS[record.name])
    else:
        checkpoints.clear()
    return checkpoints, newest


@contextmanager
def stage(cfg: Config, name: str) -> Iterator[StageRecord]:
    """Run a stage: its resolved configuration first, its record (with seconds and peak memory) if it ends well.

    If it fails before it has begun to replace what it made before, the record of that stays.
    """
    directory = Paths(cfg).stage(name)
    with locked(directory.parent):
        file, before = directory / "stage.json", directory / ".stage.json.old"
        record = StageRecord(name, file.is_file())
        disk.write_text(directory / "config.yaml", to_yaml(cfg))
        load_task_data(cfg.data).save_split(directory.parent / "split.json")
        storage.publish(directory.parent / "split.json")
        console.rule(f"[bold]{name}")
        fingerprint = fingerprints(cfg).get(name)  # of what the stage is about to read
        started = time.monotonic()
        with disk.writing(file):
            before.unlink(missing_ok=True)
            if record.done_before:
                file.rename(before)
        storage.withdraw(file)
        storage.publish(directory, storage.of_driver)
        try:
            with RssSampler() as memory:
                yield record
        except BaseException:
            if record.done_before and not record.started:
                before.rename(file)
            before.unlink(missing_ok=True)
            storage.publish(directory, storage.of_driver)
            raise
        record.add(seconds=time.monotonic() - started, peak_rss_gib=memory.peak_gib,
                   fingerprint=fingerprint)
        disk.write_text(file, json.dumps(record.values, indent=2, default=_plain) + "\n")
        before.unlink(missing_ok=True)
        storage.publish(directory, storage.of_driver)
        if name != "ppo":  # whose checkpoints are worth a look, an export, or more iterations
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            storage.withdraw(directory / "checkpoints")
        console.print(f"{name} done in {record.values['seconds']:.0f} s")
