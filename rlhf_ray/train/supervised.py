"""The loop of the supervised stages: pretrain, sft, rm and dpo differ only in data and objective."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from rlhf_ray.actors.supervised import SupervisedLearner
from rlhf_ray.cluster.group import ActorInfo, Cast, Group
from rlhf_ray.config.schema import Config, DPOConfig, OptimizerConfig
from rlhf_ray.core.minibatches import balance
from rlhf_ray.core.types import RankedDataset, TokenDataset
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import progress_bar
from rlhf_ray.train.roles import layout_of, learner_ranks


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


@dataclass
class Trained:
    """A group of learners that holds the trained model, until the `supervised` context ends."""

    group: Group
    actors: list[ActorInfo]
    last: dict[str, float]  # what the last optimizer step reported
    val: dict[str, float]


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


@contextmanager
def supervised(cfg: Config, task: Task, out_dir: Path) -> Iterator[Trained]:
    """Train; inside the context the learners still live, so that the caller can evaluate and save."""
    role = cfg.roles.supervised
    out_dir.mkdir(parents=True, exist_ok=True)
    # An epoch's last batch may be smaller, so a whole number of epochs takes ceil(per epoch) steps each.
    per_epoch = math.ceil(len(task.train) / task.batch_size)
    steps = max(1, round(task.epochs * per_epoch))
    with Cast(layout_of(cfg, ["supervised"]), cfg.cluster) as cast:
        data = ray.put(task.data)
        group = cast.start(
            SupervisedLearner, "supervised",
            [(rank, task.objective, task.path, data, cfg.model, role, task.optimizer, steps, cfg.seed, task.dropout,
              task.autocast, cfg.cluster.call_timeout_s, task.dpo)
             for rank in learner_ranks(cast, "supervised", role.ranks)],
            role.threads,
        )
        actors = cast.ready()
        started = time.monotonic()
        if task.dpo is not None:
            everything = np.concatenate([task.train, task.val])
            group.call_each(SupervisedLearner.remember_reference, deal(everything, task.weights, len(group)))
        with progress_bar(task.name, steps) as bar, (out_dir / "metrics.jsonl").open("w") as log:
            for step, units in enumerate(batches(task.train, task.batch_size, steps, cfg.seed), start=1):
                result = group.call_each(SupervisedLearner.train, deal(units, task.weights, len(group)))[0]
                shown = f"loss {result['loss']:.3f}"
                if result["pairs"]:
                    result["accuracy"] = result["correct"] / result["pairs"]
                    shown += f"  pairs {result['accuracy']:.2f}"
                    if "margin_sum" in result:
                        result["margin"] = result["margin_sum"] / result["pairs"]
                        shown += f"  margin {result['margin']:.2f}"
                log.write(json.dumps({"step": step, **result, "seconds": time.monotonic() - started}) + "\n")
                log.flush()
                bar(shown)
        val = group.call_each(SupervisedLearner.evaluate, deal(task.val, task.weights, len(group)))[0]
        yield Trained(group, actors, result, val)
