"""From `DataConfig` to data, whichever the source: embedded reviews, tasks of reasoning-gym, or the user's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from rlhf_ray import disk, storage
from rlhf_ray.config.checks import STAGE_DATA
from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data import formats, reasoning, reviews
from rlhf_ray.data.formats import Demonstration, Prompt
from rlhf_ray.errors import UserError
from rlhf_ray.versions import find

if TYPE_CHECKING:
    from rlhf_ray.data.sentiment import SentimentClassifier, SimulatedLabeler

T = TypeVar("T")
PPO_PROMPTS_PER_REVIEW = 4
REASONING_COUNTS = {"demonstrations": 4000, "train": 4000, "held_out": 1000}  # or all that a task has

# (prompts, responses, metadata of the prompts) to 1.0 for every right response and 0.0 for the others.
Verifier = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]

# Keys that other options may make a stage read; looked at if they are set.
MAY_NEED = {"compare": ["comparisons", "compare_prompts"], "ppo": ["texts"]}


class TaskData(Protocol):
    """What the stages read. A member that the source lacks raises UserError naming the key to set."""

    def demonstrations(self) -> list[Demonstration]: ...
    def compare_prompts(self) -> list[Prompt]: ...
    def ppo_prompts(self) -> list[Prompt]: ...
    def eval_prompts(self) -> list[Prompt]: ...
    def texts(self) -> list[str]: ...
    def eval_texts(self) -> list[str]: ...
    def fingerprint(self) -> str: ...
    def counts(self) -> dict[str, int]: ...
    def save_split(self, path: Path) -> None: ...
    def labeler(self, scale: float) -> SimulatedLabeler: ...
    def labeler_accuracy(self) -> dict[str, Any]: ...
    def judge(self) -> SentimentClassifier | None: ...
    def judge_accuracy(self) -> dict[str, Any]: ...
    def verifier(self) -> Verifier | None: ...


class FileData:
    """The user's files, read when they are asked for."""

    def __init__(self, cfg: DataConfig):
        self.cfg = cfg

    def demonstrations(self) -> list[Demonstration]:
        return self._read("demonstrations", formats.read_demonstrations)

    def compare_prompts(self) -> list[Prompt]:
        return self._read("compare_prompts", formats.read_prompts)

    def ppo_prompts(self) -> list[Prompt]:
        return self._read("ppo_prompts", formats.read_prompts)

    def eval_prompts(self) -> list[Prompt]:
        return self._read("eval_prompts", formats.read_prompts)

    def texts(self) -> list[str]:
        return self._read("texts", formats.read_texts)

    def eval_texts(self) -> list[str]:
        return self._read("eval_texts", formats.read_texts)

    def fingerprint(self) -> str:
        """Hash of the configuration, with the contents of every file in place of its path."""
        facts: dict[str, Any] = {}
        for key, value in sorted(vars(self.cfg).items()):
            facts[key] = value
            if isinstance(value, str) and not value.startswith("hf://") and Path(value).is_file():
                facts[key] = storage.digest(Path(value), Path(value).stat().st_size)
        return _sha256(facts)

    def counts(self) -> dict[str, int]:
        return {}

    def save_split(self, path: Path) -> None:
        """Files are split by whoever made them: nothing to write down."""

    def labeler(self, scale: float) -> SimulatedLabeler:
        raise UserError("the simulated labeler knows movie reviews only: set compare.ranker=file and data.comparisons")

    def labeler_accuracy(self) -> dict[str, Any]:
        return {}

    def judge(self) -> SentimentClassifier | None:
        """There is no independent judge for data that we do not know."""
        return None

    def judge_accuracy(self) -> dict[str, Any]:
        return {"held_out_accuracy": None}

    def verifier(self) -> Verifier | None:
        """Nobody knows the answers; a function of the user's, in reward.sources, may."""
        return None

    def _read(self, key: str, reader: Callable[[str], list[T]]) -> list[T]:
        source = getattr(self.cfg, key)
        if source is None:
            raise UserError(f"data.{key} is not set: give a path or hf://NAME")
        return reader(source)


class ReviewData:
    """The embedded movie reviews."""

    def __init__(self, seed: int):
        self.seed = seed

    @cached_property
    def all(self) -> list[reviews.Review]:
        return reviews.load_reviews()

    @cached_property
    def split(self) -> reviews.ReviewSplit:
        return reviews.split_reviews(self.all, self.seed)

    def demonstrations(self) -> list[Demonstration]:
        return reviews.demonstrations(self.all, self.split.parts["demonstrations"], self.seed)

    def compare_prompts(self) -> list[Prompt]:
        return reviews.prompts(self.all, self.split.parts["compare"], self.seed)

    def ppo_prompts(self) -> list[Prompt]:
        return reviews.prompts(self.all, self.split.parts["ppo"], self.seed, PPO_PROMPTS_PER_REVIEW)

    def eval_prompts(self) -> list[Prompt]:
        return reviews.prompts(self.all, self.split.parts["held_out"], self.seed)

    def texts(self) -> list[str]:
        return reviews.texts(self.all, self.split.parts["base"])

    def eval_texts(self) -> list[str]:
        return reviews.texts(self.all, self.split.parts["held_out"])

    def fingerprint(self) -> str:
        return _sha256([self.split.corpus_sha256, self.seed])

    def counts(self) -> dict[str, int]:
        """Documents in each part."""
        return {name: len(ids) for name, ids in self.split.parts.items()}

    def save_split(self, path: Path) -> None:
        self.split.save(path)

    @cached_property
    def _classifiers(self) -> tuple[SentimentClassifier, SentimentClassifier]:
        from rlhf_ray.data.sentiment import fit_labeler_and_judge

        return fit_labeler_and_judge(self.all, self.split, self.seed)

    def labeler(self, scale: float) -> SimulatedLabeler:
        from rlhf_ray.data.sentiment import SimulatedLabeler

        return SimulatedLabeler(self._classifiers[0], scale)

    def labeler_accuracy(self) -> dict[str, Any]:
        return self._classifiers[0].held_out

    def judge(self) -> SentimentClassifier | None:
        return self._classifiers[1]

    def judge_accuracy(self) -> dict[str, Any]:
        return self._classifiers[1].held_out

    def verifier(self) -> Verifier | None:
        """No continuation of a review is right or wrong."""
        return None


class ReasoningData:
    """A task of reasoning-gym, whose answers can be verified."""

    def __init__(self, task: str, seed: int):
        self.task, self.seed = task, seed

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        return reasoning.demonstrations(self.task, self.seed, REASONING_COUNTS["demonstrations"])

    @cached_property
    def _train(self) -> list[Prompt]:
        return reasoning.prompts(self.task, "train", self.seed, REASONING_COUNTS["train"])

    @cached_property
    def _held_out(self) -> list[Prompt]:
        return reasoning.prompts(self.task, "held_out", self.seed, REASONING_COUNTS["held_out"])

    def demonstrations(self) -> list[Demonstration]:
        return self._demonstrations

    def compare_prompts(self) -> list[Prompt]:
        _no_rankings()

    def ppo_prompts(self) -> list[Prompt]:
        return self._train

    def eval_prompts(self) -> list[Prompt]:
        return self._held_out

    def texts(self) -> list[str]:
        """Questions of the demonstrations, each with its answer."""
        return [f"{_asked(d.prompt)} {d.response}" for d in self._demonstrations]

    def eval_texts(self) -> list[str]:
        """Held-out questions, each with its answer."""
        return [f"{_asked(p)} {json.loads(p.metadata)['answer']}" for p in self._held_out]

    @cached_property
    def _sha256(self) -> dict[str, str]:
        """Of each part's questions and answers, in their order."""
        parts = {"demonstrations": [d.prompt for d in self._demonstrations], "train": self._train,
                 "held_out": self._held_out}
        return {name: _sha256([(_asked(p), p.metadata) for p in prompts]) for name, prompts in parts.items()}

    def fingerprint(self) -> str:
        return _sha256([self.task, self.seed, self._sha256])

    def counts(self) -> dict[str, int]:
        """Questions in each part."""
        return {"demonstrations": len(self._demonstrations), "train": len(self._train),
                "held_out": len(self._held_out)}

    def save_split(self, path: Path) -> None:
        """What the parts were drawn from, their counts and hashes, and the held-out questions themselves."""
        disk.write_text(path, json.dumps({
            "task": self.task, "options": reasoning.TASKS[self.task], "seed": self.seed,
            "held_out_every": reasoning.HELD_OUT_EVERY, "reasoning_gym": find("reasoning-gym"),
            "counts": self.counts(), "sha256": self._sha256, "held_out": [_asked(p) for p in self._held_out],
        }) + "\n")

    def labeler(self, scale: float) -> SimulatedLabeler:
        _no_rankings()

    def labeler_accuracy(self) -> dict[str, Any]:
        _no_rankings()

    def judge(self) -> SentimentClassifier | None:
        """None: there is no matter of taste. See `verifier`."""
        return None

    def judge_accuracy(self) -> dict[str, Any]:
        return {"held_out_accuracy": None}

    def verifier(self) -> Verifier | None:
        return reasoning.verify


def _no_rankings() -> NoReturn:
    raise UserError("data.source=reasoning has answers that are right or wrong, and needs no rankings: leave compare "
                    "and rm out of stages, and set reward.sources=[rlhf_ray.data.reasoning:verify]")


def _asked(prompt: Prompt) -> str:
    return prompt.turns[-1].content


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def load_task_data(cfg: DataConfig) -> TaskData:
    """The data of a run; the stages of a pipeline share what was read and fitted."""
    if cfg.source == "reviews":
        return _review_data(cfg.split_seed)
    return _reasoning_data(cfg.reasoning_task, cfg.split_seed) if cfg.source == "reasoning" else FileData(cfg)


@cache
def _review_data(seed: int) -> ReviewData:
    return ReviewData(seed)


@cache
def _reasoning_data(task: str, seed: int) -> ReasoningData:
    return ReasoningData(task, seed)


def read_by(stage: str, cfg: DataConfig) -> DataConfig:
    """`cfg` without the paths that only other stages read: those may come later, and change."""
    mine = {*STAGE_DATA[stage], *MAY_NEED.get(stage, [])}
    all_paths = {key for table in (STAGE_DATA, MAY_NEED) for keys in table.values() for key in keys}
    others: dict[str, Any] = dict.fromkeys(all_paths - mine)
    return replace(cfg, **others)


def paths_of(cfg: DataConfig, stage: str) -> dict[str, Path]:
    """Key -> file, of all that a stage reads from files. Reads nothing. Raises UserError for a key that is not set."""
    keys = STAGE_DATA.get(stage, []) if cfg.source == "files" else []
    found = {}
    for key in [*keys, *MAY_NEED.get(stage, [])]:
        source = getattr(cfg, key)
        if source is None:
            if key in keys:
                raise UserError(f"data.{key} is not set, and {stage} needs it: give a path or hf://NAME")
        elif not source.startswith("hf://"):
            found[f"data.{key}"] = Path(source)
    return found


def check_paths(cfg: DataConfig, stage: str) -> None:
    """Before anything starts: the files that a stage reads are named and exist. Raises UserError naming the key."""
    for key, path in paths_of(cfg, stage).items():
        if not path.is_file():
            raise UserError(f"{key}={path}: no such file")
