"""What the supervised stages read, and in which order. Covers lines 33 (every epoch shuffles, nothing is dropped) and
37 (training and validation are split by unit: a prompt with all its responses) of the rules in tests/README.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.cluster.group import Group
from rlhf_ray.config.schema import Config, OptimizerConfig
from rlhf_ray.core.types import TokenDataset
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.recorder import Lines
from rlhf_ray.train import supervised as module
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.supervised import SupervisedTrainer, Task, batches, deal, split_units

UNITS = np.array([3, 5, 8, 13, 21, 34, 55])


def test_batches_by_hand() -> None:
    """7 units by 3: batches of 3, 3 and 1; seven steps are two epochs and the first batch of a third."""
    found = list(batches(UNITS, 3, steps=7, seed=0))
    assert [len(b) for b in found] == [3, 3, 1, 3, 3, 1, 3]
    for epoch in (found[:3], found[3:6]):
        assert sorted(np.concatenate(epoch)) == UNITS.tolist()
    assert set(found[6]) <= set(UNITS.tolist())


def test_every_epoch_has_an_order_of_its_own() -> None:
    found = list(batches(np.arange(50), 50, steps=3, seed=0))
    assert len({tuple(b.tolist()) for b in found}) == 3


def test_the_seed_decides_the_order() -> None:
    first, again, other = ([b.tolist() for b in batches(UNITS, 2, 8, seed)] for seed in (0, 0, 1))
    assert first == again != other


def test_more_steps_go_on_and_do_not_change_the_first() -> None:
    few, many = ([b.tolist() for b in batches(UNITS, 3, steps, 0)] for steps in (4, 9))
    assert many[:4] == few


@pytest.mark.parametrize(("steps", "batch_size"), [(0, 3), (1, 3), (1, 100), (5, 100), (6, 7), (20, 1)])
def test_the_number_of_steps_is_the_one_asked_for(steps: int, batch_size: int) -> None:
    found = list(batches(UNITS, batch_size, steps, seed=0))
    assert len(found) == steps
    assert all(1 <= len(b) <= batch_size for b in found)


# -- training and validation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction", "held"), [
    (100, 0.05, 5), (10, 0.15, 2), (10, 0.5, 5),
    (10, 0.001, 1), (2, 0.001, 1),  # at least one for validation
    (10, 0.999, 9), (2, 0.999, 1),  # at least one for training
])
def test_every_unit_is_in_one_of_the_two_parts(count: int, fraction: float, held: int) -> None:
    train, val = split_units(count, fraction, seed=0)
    assert len(val) == held
    assert sorted([*train, *val]) == list(range(count))
    assert train.tolist() == sorted(train)
    assert val.tolist() == sorted(val)


def test_the_split_is_at_random_by_seed() -> None:
    first, again, other = (split_units(100, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert min(first) < 50 < max(first)  # not a block at one end


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_units_of_one_key_stay_together(fraction: float, seed: int) -> None:
    keys = np.array([7, 3, 7, 7, 5, 3, 9, 7])
    train, val = split_units(8, fraction, seed, keys)
    assert sorted([*train, *val]) == list(range(8))
    assert len(train)
    assert len(val)
    assert not set(keys[train]) & set(keys[val])


def test_the_fraction_is_of_keys() -> None:
    """10 keys of 3 units each: a fifth is 2 keys, 6 units."""
    keys = np.repeat(np.arange(10), 3)
    assert len(split_units(30, 0.2, 0, keys)[1]) == 6


@pytest.mark.parametrize(("count", "keys"), [(4, np.array([2, 2, 2, 2])), (1, None)])
def test_one_key_cannot_be_split(count: int, keys: np.ndarray | None) -> None:
    with pytest.raises(UserError, match="one prompt"):
        split_units(count, 0.5, 0, keys)


# -- ranks -------------------------------------------------------------------------------------------------------


def test_deal_by_hand() -> None:
    """Weights 5, 4, 3, 3: longest first to the lighter rank gives 5 + 3 and 4 + 3."""
    weights = np.zeros(60)
    weights[[3, 5, 8, 13]] = [3, 5, 4, 3]
    (first,), (second,) = deal(np.array([3, 5, 8, 13]), weights, 2)
    assert sorted(first) == [5, 13]
    assert sorted(second) == [3, 8]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 10])
def test_every_unit_goes_to_one_rank(ranks: int) -> None:
    calls = deal(UNITS, np.arange(60), ranks)
    assert len(calls) == ranks  # a rank without units is called too: the calls are collective
    assert sorted(np.concatenate([part for (part,) in calls])) == UNITS.tolist()


# -- what a step leaves behind -----------------------------------------------------------------------------------


class Heard:
    """Listeners that note what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []

    def log(self, number: int, values: dict[str, Any]) -> None:
        self.told.append((number, values))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SupervisedTrainer:
    """Of units of 10, 20 and 30 tokens; every step takes 4 s, and orders three of four pairs as ranked."""
    clock = iter(float(t) for t in range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Group, "call_each", lambda *_: [
        {"loss": 0.5, "lr": 1e-4, "grad_norm": float("inf"), "skipped": 1.0, "correct": 3.0, "pairs": 4.0}])
    none = np.zeros(0, dtype=np.int32)
    task = Task("rm", "ranking", "", TokenDataset(none, none, none.astype(bool)), np.arange(3), np.arange(0),
                np.array([10, 20, 30]), 1.0, 2, OptimizerConfig())
    cfg, cast, heard = Config(), Any, Heard()
    return SupervisedTrainer(cfg, task, cast, Group("supervised", [None], 1.0), 2,  # type: ignore[arg-type]
                             Checkpoints(tmp_path / "checkpoints", cfg.checkpoint, {}), Lines(tmp_path / "log"),
                             heard)  # type: ignore[arg-type]


ROW = {"loss": 0.5, "lr": 1e-4, "grad_norm": None, "skipped": 1.0, "correct": 3.0, "pairs": 4.0, "accuracy": 0.75}


def test_a_step_is_a_line_and_listeners_hear_its_speed_too(trainer: SupervisedTrainer, tmp_path: Path) -> None:
    """The start at 0 s; the step from 4 to 8 s, of 10 + 30 tokens: 10 tokens per second."""
    trainer.learn(np.array([0, 2]))
    assert json.loads((tmp_path / "log").read_text()) == {"step": 1, **ROW, "seconds": 8.0}
    ((number, values),) = trainer.listeners.told  # type: ignore[attr-defined]
    assert number == 1 and values == {**trainer.last, "tokens_per_second": 10.0}


def test_what_came_after_a_checkpoint_is_gone(trainer: SupervisedTrainer, tmp_path: Path) -> None:
    """Gone back to after the first of two steps, to be done again."""
    trainer.learn(np.array([0]))
    state = {"step": 1, "last": trainer.last, "metrics": trainer.log.position}
    trainer.learn(np.array([1]))
    trainer.roll_back(Checkpoint(1, tmp_path, {"state": state}))
    trainer.learn(np.array([1]))
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [1, 2]
    trainer.roll_back(None)
    assert (tmp_path / "log").read_text() == "" and trainer.step == 0
