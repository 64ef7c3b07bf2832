"""What an alarm does: log, pause, stop; and what a run that goes on from a checkpoint knows of it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.config.schema import AlarmsConfig
from rlhf_ray.errors import UserError
from rlhf_ray.train.watch import PAUSED, Watch


def watch(tmp_path: Path, action: str, saved: list[str] | Callable[[], None]) -> Watch:
    cfg = AlarmsConfig()
    cfg.kl.threshold, cfg.kl.action, cfg.kl.cooldown = 10.0, action, 1
    return Watch(cfg, tmp_path, saved if callable(saved) else lambda: saved.append("policy"))


def run(w: Watch, *kls: float, first: int = 1) -> None:
    for iteration, kl in enumerate(kls, start=first):
        w.check(iteration, {"kl_per_sequence": kl})
        w.act(iteration)


def rang(tmp_path: Path) -> list[tuple[int, float]]:
    return [(x["iteration"], x["value"]) for x in map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())]


def test_a_logged_alarm_is_a_line_and_the_run_goes_on(tmp_path: Path) -> None:
    saved: list[str] = []
    run(watch(tmp_path, "log", saved), 3.0, 12.0, 13.0, 14.0)
    lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(x["name"], x["iteration"], x["value"], x["action"]) for x in lines] == [
        ("kl", 2, 12.0, "log"), ("kl", 4, 14.0, "log")]  # 3 is within the cool-down
    assert saved == []


def test_checking_reports_and_only_acting_stops(tmp_path: Path) -> None:
    """Between the two the trainer saves its checkpoint."""
    saved: list[str] = []
    w = watch(tmp_path, "stop", saved)
    w.check(7, {"kl_per_sequence": 11.0})
    assert rang(tmp_path) == [(7, 11.0)] and saved == []
    with pytest.raises(UserError, match=r"stopped in iteration 7 by alarms\.kl, .*saved: .*KL"):
        w.act(7)
    assert saved == ["policy"]


def test_a_stop_is_not_forgotten_because_somebody_was_lost_in_it(tmp_path: Path) -> None:
    """The learner that was to save dies; another has its state when the trainer asks again."""
    saved: list[str] = []
    answers = iter([ActorDiedError(), None])

    def save() -> None:
        if error := next(answers):
            raise error
        saved.append("policy")

    w = watch(tmp_path, "stop", save)
    w.check(7, {"kl_per_sequence": 11.0})
    with pytest.raises(ActorDiedError):
        w.act(7)
    with pytest.raises(UserError, match="stopped in iteration 7"):
        w.act(7)
    assert saved == ["policy"]


def test_a_run_that_went_back_is_not_stopped_before_it_is_there_again(tmp_path: Path) -> None:
    saved: list[str] = []
    w = watch(tmp_path, "stop", saved)
    w.check(7, {"kl_per_sequence": 11.0})
    w.act(5)
    assert saved == []


def test_what_was_done_about_is_not_done_again(tmp_path: Path) -> None:
    """An actor is lost in the iteration after a pause."""
    w = watch(tmp_path, "pause", [])
    w.check(2, {"kl_per_sequence": 11.0})

    def remove() -> None:
        while not (tmp_path / PAUSED).exists():
            time.sleep(0.01)
        (tmp_path / PAUSED).unlink()

    threading.Thread(target=remove, daemon=True).start()
    w.act(2)
    w.act(2)  # at once


def test_a_pause_lasts_until_its_file_is_removed(tmp_path: Path) -> None:
    w, flag = watch(tmp_path, "pause", []), tmp_path / PAUSED
    w.check(2, {"kl_per_sequence": 11.0})
    assert not flag.exists()
    thread = threading.Thread(target=w.act, args=(2,), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not (flag.exists() and flag.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "iteration 2" in flag.read_text()
    thread.join(0.7)
    assert thread.is_alive()
    flag.unlink()
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_off_never_rings(tmp_path: Path) -> None:
    run(watch(tmp_path, "off", []), 1e6)
    assert not (tmp_path / "alarms.jsonl").exists()


@pytest.mark.parametrize("fresh", [True, False], ids=["resumed", "rolled back"])
def test_what_rang_after_the_checkpoint_is_forgotten_and_rings_again(tmp_path: Path, fresh: bool) -> None:
    """Saved after iteration 1; 2 rings, 3 is within the cool-down; gone back, the second 2 is quiet, so 3 rings."""
    w = watch(tmp_path, "log", [])
    run(w, 3.0)
    state = json.loads(json.dumps(w.state_dict()))
    run(w, 12.0, 13.0, first=2)
    assert rang(tmp_path) == [(2, 12.0)]
    again = watch(tmp_path, "log", []) if fresh else w
    again.load_state_dict(state)
    run(again, 9.0, 13.0, first=2)
    assert rang(tmp_path) == [(3, 13.0)]


def test_a_file_that_lost_lines_is_not_filled_up(tmp_path: Path) -> None:
    """The machine went down before its disk had all; the manifest tells of a longer file."""
    w = watch(tmp_path, "log", [])
    run(w, 12.0)
    state = w.state_dict()
    (tmp_path / "alarms.jsonl").write_text("")
    w.load_state_dict(state)
    run(w, 13.0, first=3)
    assert rang(tmp_path) == [(3, 13.0)]


def test_what_rang_before_the_checkpoint_stays_and_its_cool_down_holds(tmp_path: Path) -> None:
    """Saved after iteration 2, which rang: 3 stays silent."""
    w = watch(tmp_path, "log", [])
    run(w, 3.0, 12.0)
    state = w.state_dict()
    run(w, 13.0, 14.0, first=3)
    assert rang(tmp_path) == [(2, 12.0), (4, 14.0)]
    w.load_state_dict(state)
    run(w, 13.0, 9.0, first=3)
    assert rang(tmp_path) == [(2, 12.0)]
