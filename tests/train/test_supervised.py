"""What the supervised stages read, and in which order. Covers lines 33 (every epoch shuffles, nothing is dropped) and
37 (training and validation are split by unit: a prompt with all its responses) of the rules in tests/README.md."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.actors.supervised import SupervisedLearner
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import TokenDataset
from rlhf_ray.disk import Log
from rlhf_ray.errors import UserError
from rlhf_ray.train import supervised as module
from rlhf_ray.train.checkpoint import Checkpoint
from rlhf_ray.train.supervised import SupervisedTrainer, Task, batches, deal, split_units
from train.fakes import Script

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


# -- who is lost on the way. The ranks are played by train/fakes.py ---------------------------------------------------


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script(tmp_path / "checkpoints", monkeypatch, ranks={"supervised": 1})
    made.answers = {"train": {"loss": 0.5, "pairs": 0.0, "skipped": 0.0}, "evaluate": {"loss": 0.25}}
    return made


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with closing(Log(tmp_path / "metrics.jsonl")) as log:
        yield log


class Heard:
    """Listeners that note what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []

    def log(self, number: int, values: dict[str, Any]) -> None:
        self.told.append((number, values))


def trainer(script: Script, log: Log, checkpoint: Checkpoint | None = None) -> SupervisedTrainer:
    """Of three steps; no checkpoint falls due."""
    cast: Any = script
    none = np.zeros(0, dtype=np.int32)
    task = Task(name="sft", objective="lm", path="", data=TokenDataset(none, none, none.astype(bool)),
                train=np.arange(3), val=np.arange(3), weights=np.ones(3), epochs=1, batch_size=1,
                optimizer=Config().sft.optimizer)
    heard: Any = Heard()
    return SupervisedTrainer(Config(), task, cast, script.learners[0], 3, script.checkpoints, checkpoint, log, heard)


TRAIN, REPLACE = ["train supervised-0"], ["replace supervised-0, to be set up with its group"]
ANEW = [*REPLACE, "set up supervised", "ready"]


def evaluated(trained: SupervisedTrainer) -> dict[str, float]:
    found: dict[str, float] = trained.persist(lambda: trained.dealt(SupervisedLearner.evaluate, trained.task.val)[0])
    return found


def test_a_learner_lost_after_the_last_step_learns_what_it_had_learnt_again(script: Script, log: Log) -> None:
    """Nothing was saved, so it begins at the start. No line of the log is there twice."""
    script.errors["evaluate"], script.losses = [ActorDiedError()], [["supervised-0"]]
    assert evaluated(trainer(script, log)) == {"loss": 0.25}
    assert script.notes == ["ready", *TRAIN * 3, "evaluate supervised-0", *ANEW, *TRAIN * 3, "evaluate supervised-0"]
    lines = Path(log.path).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_what_comes_after_needs_no_step_again(script: Script, log: Log) -> None:
    trained = trainer(script, log)
    evaluated(trained)
    script.notes.clear()
    trained.save_model(Path("model"), "float32")
    assert script.notes == ["save supervised-0 model float32"]


def test_one_that_is_lost_while_it_starts_or_restores_is_replaced(script: Script, log: Log) -> None:
    script.saver.save(2, {"step": 2, "last": {}, "metrics": 0}, {})
    script.saver.finish()
    script.notes.clear()
    script.errors = {"ready": [ActorDiedError()], "restore": [ActorDiedError()]}
    script.losses = [["supervised-0"], ["supervised-0"]]
    assert evaluated(trainer(script, log, script.checkpoints.newest())) == {"loss": 0.25}
    restore = "restore supervised-0 step-00000002"
    assert script.notes == ["ready", *ANEW, restore, *ANEW, restore, "ready", restore, *TRAIN, "evaluate supervised-0"]


def test_a_measurement_that_goes_wrong_costs_no_step(script: Script, log: Log) -> None:
    """What was learnt is saved before the error is told."""
    script.errors["evaluate"] = [ValueError("bad number")]
    with pytest.raises(ValueError, match="bad number"):
        evaluated(trainer(script, log))
    found = script.checkpoints.newest()
    assert found is not None and found.step == 3


def dropped(script: Script, trained: SupervisedTrainer, *drops: float) -> None:
    """Learn as many steps, dropped or not."""
    for skipped in drops:
        script.answers["train"] = {"loss": 0.5, "pairs": 0.0, "skipped": skipped, "fault": "1 of 20 parameters"}
        trained.learn(np.array([0]))


def test_of_dropped_steps_the_first_of_a_row_is_told(
    script: Script, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trainer(script, log)
    trained.steps = 1000
    dropped(script, trained, 0, *[1] * 9, 0, 1)
    told = [line for line in capsys.readouterr().out.replace("\n", " ").split("sft: ") if line.strip()]
    assert [line.split(":")[0] for line in told] == ["optimizer step 2 was dropped", "optimizer step 12 was dropped"]
    assert "not finite, of 1 of 20 parameters; lower sft.optimizer.lr or set model.dtype=float32" in told[0]


@pytest.mark.parametrize(("steps", "most"), [(1000, 10), (3, 3)])
def test_a_row_of_dropped_steps_or_all_of_them_end_the_stage(script: Script, log: Log, steps: int, most: int) -> None:
    """The weights stay as they are, and nobody would know. The log has them all."""
    trained = trainer(script, log)
    trained.steps = steps
    with pytest.raises(UserError, match=rf"sft: {most} optimizer steps in a row were dropped: .*sft\.optimizer\.lr"):
        dropped(script, trained, *[1] * 20)
    assert len(Path(log.path).read_text().splitlines()) == most


def test_who_goes_back_counts_dropped_steps_anew(script: Script, log: Log) -> None:
    trained = trainer(script, log)
    trained.steps = 1000
    dropped(script, trained, *[1] * 9)
    trained.roll_back(None)
    dropped(script, trained, *[1] * 9)


def test_listeners_hear_how_fast_a_step_was(script: Script, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of one token each: two of them in 4 s are half a token per second. The file has no such number."""
    trained = trainer(script, log)
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    trained.learn(np.array([0, 2]))
    assert trained.listeners.told == [(1, {**trained.last, "tokens_per_second": 0.5})]  # type: ignore[attr-defined]
    assert "tokens_per_second" not in Path(log.path).read_text()
