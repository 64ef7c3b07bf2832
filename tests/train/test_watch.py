"""What an alarm does: log, pause, stop."""

import json
import threading
import time
from pathlib import Path

import pytest

from rlhf_ray.config.schema import AlarmsConfig
from rlhf_ray.errors import UserError
from rlhf_ray.train.watch import PAUSED, Watch


def watch(tmp_path: Path, action: str, saved: list[str]) -> Watch:
    cfg = AlarmsConfig()
    cfg.kl.threshold, cfg.kl.action, cfg.kl.cooldown = 10.0, action, 1
    return Watch(cfg, tmp_path, lambda: saved.append("policy"))


def test_a_logged_alarm_is_a_line_and_the_run_goes_on(tmp_path: Path) -> None:
    saved: list[str] = []
    w = watch(tmp_path, "log", saved)
    for iteration, kl in enumerate([3.0, 12.0, 13.0, 14.0], start=1):
        w(iteration, {"kl_per_sequence": kl})
    lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(x["name"], x["iteration"], x["value"], x["action"]) for x in lines] == [
        ("kl", 2, 12.0, "log"), ("kl", 4, 14.0, "log")]  # 3 is within the cool-down
    assert saved == []


def test_stop_saves_the_policy_and_ends_with_one_clear_error(tmp_path: Path) -> None:
    saved: list[str] = []
    with pytest.raises(UserError, match=r"stopped in iteration 7 by alarms\.kl, .*saved: .*KL"):
        watch(tmp_path, "stop", saved)(7, {"kl_per_sequence": 11.0})
    assert saved == ["policy"]
    assert (tmp_path / "alarms.jsonl").exists()


def test_a_pause_lasts_until_its_file_is_removed(tmp_path: Path) -> None:
    w, flag = watch(tmp_path, "pause", []), tmp_path / PAUSED
    thread = threading.Thread(target=w, args=(2, {"kl_per_sequence": 11.0}), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "iteration 2" in flag.read_text()
    thread.join(0.7)
    assert thread.is_alive()
    flag.unlink()
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_off_never_rings(tmp_path: Path) -> None:
    watch(tmp_path, "off", [])(1, {"kl_per_sequence": 1e6})
    assert not (tmp_path / "alarms.jsonl").exists()
