"""The loop of the supervised stages: pretrain, sft, rm and dpo differ only in data and objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from rlhf_ray.actors.supervised import SupervisedLearner
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import ActorInfo, Group
from rlhf_ray.cluster.interruption import Interruption
from rlhf_ray.config.schema import Config, DPOConfig, OptimizerConfig
from rlhf_ray.core.minibatches import balance
from rlhf_ray.core.types import RankedDataset, TokenDataset
from rlhf_ray.disk import Log
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console, progress_bar
from rlhf_ray.metrics.recorder import METRICS, Listeners, json_lines
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.recovery import Recovery, Saver
from rlhf_ray.train.roles import layout_of, learner_ranks

T = TypeVar("T")
Resume = Callable[[int], tuple[Checkpoints, Checkpoint | None]]
MOST_DROPPED = 10  # optimizer steps in a row
START: dict[str, Any] = {"step": 0, "last": {}, "metrics": 0}  # the driver's state; metrics: bytes of metrics.jsonl


@dataclass(frozen=True)
class Task:
    """What to learn, from which model, for how long.

    `train` and `val` are unit numbers: sequences of a TokenDataset, prompts of a RankedDataset. `weights` [units]
    is how much work each unit is (tokens), by which units are dealt to the ranks.
    """

    name: str
    objective: str
    path: str
    data: TokenDataset | RankedDataset
    train: np.ndarray
    val: np.ndarray
    weights: np.ndarray
    epochs: float
    batch_size: int
    optimizer: OptimizerConfig
    dropout: float = 0.0
    autocast: bool = False
    dpo: DPOConfig | None = None  # with objective "dpo"


def deal(units: np.ndarray, weights: np.ndarray, ranks: int) -> list[tuple[np.ndarray]]:
    """Units to ranks, balanced by work: arguments for one call per rank."""
    return [(part,) for part in balance(units, weights, ranks)]


def split_units(
    count: int, val_fraction: float, seed: int, keys: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Unit numbers for training and for validation, at least one of each.

    Units of one key (int [count], such as the number of their prompt) stay together. Raises UserError if there is
    only one key.
    """
    keys = np.arange(count) if keys is None else keys
    kinds = np.random.default_rng((seed, 1)).permutation(np.unique(keys))
    if len(kinds) < 2:
        raise UserError("the data has one unit (or one prompt) only: it cannot be split into training and validation; "
                        "give more")
    held = np.isin(keys, kinds[: min(len(kinds) - 1, max(1, round(val_fraction * len(kinds))))])
    return np.flatnonzero(~held), np.flatnonzero(held)


def batches(train: np.ndarray, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches; every unit once per epoch in a new order; an epoch's last batch may be smaller."""
    done, epoch = 0, 0
    while done < steps:
        order = np.random.default_rng((seed, epoch)).permutation(train)
        for first in range(0, len(order), batch_size):
            if done == steps:
                return
            yield order[first : first + batch_size]
            done += 1
        epoch += 1


class SupervisedTrainer:
    """The loop, and a group of learners that holds the trained model, until the `supervised` context ends.

    Who is lost on the way is replaced, and all learners go back to the newest checkpoint. checkpoint: to begin at.
    """

    def __init__(self, cfg: Config, task: Task, cast: Cast, group: Group, steps: int, checkpoints: Checkpoints,
                 checkpoint: Checkpoint | None, log: Log, listeners: Listeners):
        self.cfg, self.task, self.cast, self.group, self.steps = cfg, task, cast, group, steps
        self.checkpoint, self.log, self.listeners = checkpoint, log, listeners
        self.saver = Saver(checkpoints, [group])
        self.recovery = Recovery(cast, [group], self.saver, cfg.cluster.attempts, connect=lambda: None,
                                 roll_back=self.roll_back)
        self.begun, self.step, self.started = False, 0, time.monotonic()
        self.dropped = 0  # optimizer steps in a row, up to the last one
        self.last, self.val = dict[str, Any](), dict[str, float]()  # of the last optimizer step, of the validation
        self.actors: list[ActorInfo] = []  # as they came up
        self._saved_at = self.started

    def persist(self, call: Callable[[], T]) -> T:
        """What `call` gives when all steps are done. If learners are lost in it, what they had learnt since the newest
        checkpoint is learnt again, and it is called again."""
        with Interruption() as interruption:
            try:
                while True:
                    try:
                        self.go_on(interruption)
                        return call()
                    except Exception as error:
                        interruption.allow()
                        self.recovery.heal(error)
            except BaseException:
                self.saver.last(self.save)
                raise

    def go_on(self, interruption: Interruption) -> None:
        if not self.begun:
            self.begin()
        if self.step == self.steps:
            return
        with progress_bar(self.task.name, self.steps) as bar:
            for units in islice(batches(self.task.train, self.task.batch_size, self.steps, self.cfg.seed), self.step,
                                None):
                interruption.defer()
                self.recovery.updating = True
                self.learn(units)
                self.recovery.updating = False
                self.recovery.succeeded(self.step)
                interruption.allow()
                bar(self.step, self.shown())
                if time.monotonic() - self._saved_at >= self.cfg.checkpoint.seconds:
                    self.save()
        self.saver.give_up()

    def begin(self) -> None:
        self.actors = self.cast.ready()
        if self.checkpoint:
            self.recovery.restore(self.checkpoint)
        self.roll_back(self.checkpoint)
        self.begun = True

    def dealt(self, method: Callable[..., Any], units: np.ndarray) -> list[Any]:
        """Call `method` on every rank, with its share of the units."""
        return self.group.call_each(method, deal(units, self.task.weights, len(self.group)))

    def save_model(self, path: Path, dtype: str, config: Mapping[str, object] | None = None) -> None:
        """Write what was learnt as a Hugging Face directory, with these entries in its config.json."""
        self.persist(lambda: self.group.call(SupervisedLearner.save, str(path), dtype, config or {}))

    def learn(self, units: np.ndarray) -> None:
        """One optimizer step."""
        begun = time.monotonic()
        result = self.dealt(SupervisedLearner.train, units)[0]
        if result["pairs"]:
            result["accuracy"] = result["correct"] / result["pairs"]
            if "margin_sum" in result:
                result["margin"] = result["margin_sum"] / result["pairs"]
        self.step, self.last = self.step + 1, result
        now = time.monotonic()
        self.log.add(json_lines({"step": self.step, **result, "seconds": now - self.started}))
        speed = float(self.task.weights[units].sum()) / (now - begun)
        self.listeners.log(self.step, {**result, "tokens_per_second": speed})
        self.look_at_drop(result)

    def look_at_drop(self, result: Mapping[str, Any]) -> None:
        """Say it when a step was dropped and the one before was not. Raises UserError when MOST_DROPPED in a row were,
        or all of the stage: the weights stay as they are."""
        self.dropped = self.dropped + 1 if result["skipped"] else 0
        if not self.dropped:
            return
        name, last = self.task.name, self.dropped == min(MOST_DROPPED, self.steps)
        why = (f"gradients were not finite, of {result['fault']}; lower {name}.optimizer.lr or set "
               "model.dtype=float32")
        if last:
            raise UserError(f"{name}: {self.dropped} optimizer steps in a row were dropped: {why}")
        if self.dropped == 1:
            console.print(f"{name}: optimizer step {self.step} was dropped: {why}", markup=False)

    def shown(self) -> str:
        """The last step for a person."""
        words = {"loss": "loss {:.3f}", "accuracy": "pairs {:.2f}", "margin": "margin {:.2f}"}
        return "  ".join(form.format(self.last[key]) for key, form in words.items() if key in self.last)

    def save(self) -> None:
        if self.step > self.saver.saved and self.recovery.settled:
            self.saver.save(self.step, {"step": self.step, "last": self.last, "metrics": self.log.sync()}, {})
            self._saved_at = time.monotonic()

    def roll_back(self, checkpoint: Checkpoint | None) -> None:
        """The learners hold a checkpoint's state, or that of the start: so does the driver."""
        state = checkpoint.state_like(START) if checkpoint else START
        self.step, self.last, self.dropped = state["step"], state["last"], 0
        self.log.rewind(state["metrics"])
        if checkpoint:
            console.print(f"going on after step {self.step} of {self.steps}")
        elif self.task.dpo is not None:
            self.dealt(SupervisedLearner.remember_reference, np.concatenate([self.task.train, self.task.val]))


@contextmanager
def supervised(cfg: Config, task: Task, resume: Resume) -> Iterator[SupervisedTrainer]:
    """Train; inside the context the learners still live, so that the caller can measure and save what they learnt.

    resume: given the last step, where the checkpoints are and the one from which to go on, if any.
    """
    role = cfg.roles.supervised
    # An epoch's last batch may be smaller, so a whole number of epochs takes ceil(per epoch) steps each.
    per_epoch = math.ceil(len(task.train) / task.batch_size)
    steps = max(1, round(task.epochs * per_epoch))
    checkpoints, checkpoint = resume(steps)
    out_dir = checkpoints.directory.parent
    with Cast(layout_of(cfg, ["supervised"]), cfg.cluster, out_dir) as cast:
        data = ray.put(task.data)
        group = cast.start(
            SupervisedLearner, "supervised",
            [(rank, task.objective, task.path, data, cfg.model, role, task.optimizer, steps, cfg.seed, task.dropout,
              task.autocast, cfg.cluster.call_timeout_s, task.dpo)
             for rank in learner_ranks(cast, "supervised", role.ranks)],
            role.threads,
        )
        done = checkpoint.step if checkpoint else 0
        heard = Listeners(out_dir, "step", cfg.logging.wandb, cfg.logging.wandb_project, asdict(cfg), done, steps)
        with closing(heard), closing(Log(out_dir / METRICS)) as log:
            trainer = SupervisedTrainer(cfg, task, cast, group, steps, checkpoints, checkpoint, log, heard)
            trainer.val = trainer.persist(lambda: trainer.dealt(SupervisedLearner.evaluate, task.val)[0])
            yield trainer
