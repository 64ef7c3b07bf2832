"""What the loop does again when somebody is lost at its ends. Actors are played by train/fakes.py, and an iteration is
a line of notes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.config.schema import Config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import UserError
from rlhf_ray.train import ppo
from rlhf_ray.train.ppo import PPOTrainer
from rlhf_ray.train.watch import Watch
from train.fakes import Script


class Loop(PPOTrainer):
    """Two iterations, each of which ends with a checkpoint; the KL of the second is over the threshold of its alarm."""

    script: Script

    def connect(self) -> None:
        self.script.notes.append("connect")

    def run_step(self, step: int) -> dict[str, Any]:
        self.script.notes.append(f"iteration {step}")
        return {"kl_per_sequence": {1: 0.0, 2: 50.0}[step]}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr(ppo, "check_first_sync", lambda *_: None)
    return Script(tmp_path / "checkpoints", monkeypatch, ranks={"policy": 1})


def loop(script: Script, directory: Path, action: str = "log", save: Callable[[], None] = lambda: None) -> Loop:
    cfg, stays = Config(), {"state_dict": dict, "load_state_dict": lambda state: None}
    cfg.ppo.iterations, cfg.checkpoint.iterations = 2, 1
    cfg.alarms.kl.threshold, cfg.alarms.kl.action = 10.0, action
    workers: Any = SimpleNamespace(forget=lambda: None)
    recorder: Any = SimpleNamespace(positions={}, rewind=lambda positions: None)
    fleet: Any = SimpleNamespace(cast=script, wanted=1, **stays)
    Loop.script = script
    return Loop(cfg, workers, script.learners[0], None, PromptStream(8, 0), None, recorder,
                Watch(cfg.alarms, directory, save), fleet, script.checkpoints)


def told(script: Script) -> list[str]:
    """What happened, apart from saving."""
    return [note for note in script.notes if note.split()[0] not in ("snapshot", "write")]


ITERATIONS = ["ready", "connect", "iteration 1", "iteration 2"]
BACK = ["replace policy-0, to be set up with its group", "set up policy", "ready", "restore policy-0 step-00000002",
        "connect"]


def losing(script: Script, times: int = 1) -> Callable[[], None]:
    """Something with the policy, which dies of it so many times."""
    def call() -> None:
        nonlocal times
        script.notes.append("last")
        if times:
            times -= 1
            script.losses = [["policy-0"]]
            raise ActorDiedError

    return call


def test_whoever_is_lost_while_all_start_is_replaced(script: Script, tmp_path: Path) -> None:
    script.errors["ready"], script.losses = [ActorDiedError()], [["reward-0"]]
    loop(script, tmp_path).run()
    assert told(script) == ["ready", "replace reward-0", "ready", "connect", *ITERATIONS]


def test_what_is_done_with_the_learners_at_the_end_is_done_by_those_who_live(script: Script, tmp_path: Path) -> None:
    loop(script, tmp_path).run(last=losing(script))
    assert told(script) == [*ITERATIONS, "last", *BACK, "last"]


def test_but_no_more_often_than_attempts(script: Script, tmp_path: Path) -> None:
    with pytest.raises(ActorDiedError):
        loop(script, tmp_path).run(last=losing(script, times=9))
    assert told(script).count("last") == 1 + Config().cluster.attempts


def test_an_alarm_stops_the_run_though_a_learner_was_lost_in_it(script: Script, tmp_path: Path) -> None:
    """It is to save the policy, and dies of it."""
    with pytest.raises(UserError, match=r"stopped in iteration 2 by alarms\.kl"):
        loop(script, tmp_path, "stop", losing(script)).run()
    assert told(script) == [*ITERATIONS, "last", *BACK, "last"]


def test_engines_that_have_slept_are_synced_before_they_sample(script: Script, tmp_path: Path) -> None:
    """Their weights are gone: the gate puts them to sleep after the first sync, and so does an iteration that is tried
    again."""
    trainer, notes = loop(script, tmp_path), script.notes
    trainer.cfg.rollout.batch_size = 8
    turns = SimpleNamespace(stale=True, shared=True, sync=lambda: notes.append("turn to sync"))
    trainer.workers = SimpleNamespace(turns=turns, run=lambda *_: notes.append("sample"))  # type: ignore[assignment]

    def push() -> None:
        notes.append("push")
        turns.stale = False

    trainer.push = push  # type: ignore[method-assign]
    trainer.rollout(1)
    trainer.rollout(1)
    assert notes == ["turn to sync", "push", "sample", "sample"]
