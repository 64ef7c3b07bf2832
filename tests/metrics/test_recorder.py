"""metrics.jsonl and the console line."""

import json
import sys

import numpy as np
import pytest

from rlhf_ray.core.types import SampleText
from rlhf_ray.errors import UserError
from rlhf_ray.metrics import recorder as module
from rlhf_ray.metrics.recorder import Recorder, console_line, read_history

VALUES = {
    "score": 0.614,
    "judge_score": 0.72,
    "kl_per_sequence": 6.31,
    "entropy": 3.12,
    "response_length": 37.2,
    "clip_fraction": 0.041,
    "seconds": {"rollout": 1.1, "score": 0.9, "update": 3.1, "weight_sync": 0.1},
}


def test_console_line():
    assert console_line(12, 40, VALUES) == (
        "ppo 12/40  score 0.61  judge 0.72  kl 6.3  entropy 3.1  len 37  clip 4%  "
        "5.2 s (rollout 1.1 score 0.9 update 3.1 sync 0.1)"
    )
    assert console_line(3, None, {"score": float("nan"), "judge_score": None}) == "ppo 3  score nan"


def test_lines_are_on_disk_at_once_and_appended(tmp_path, capsys):
    run = tmp_path / "ppo"
    assert read_history(run) == []
    with Recorder(run, "disabled", "project", {"ppo": {"iterations": 2}}) as recorder:
        recorder.log(1, VALUES)
        assert [row["iteration"] for row in read_history(run)] == [1]
    with Recorder(run, "disabled", "project", {}) as recorder:
        recorder.log(
            2, {"score": np.float32(0.5), "value_loss": float("inf"), "seconds": {"rollout": np.float64(1)}}
        )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"iteration": 1, **VALUES}
    assert json.loads(lines[1]) == {
        "iteration": 2,
        "score": 0.5,
        "value_loss": None,
        "seconds": {"rollout": 1.0},
    }
    shown = capsys.readouterr().out
    assert "ppo 1/2  score 0.61" in shown
    assert len(shown.splitlines()) == 2  # one unwrapped line each


def test_what_was_recorded_after_a_position_is_gone_and_the_next_line_follows(tmp_path, capsys):
    """Gone back to after iteration 1, in the same process and then, from a checkpoint, in a new one."""
    def score_by_iteration():
        return [(row["iteration"], row["score"]) for row in read_history(tmp_path)]

    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        assert recorder.positions == {"metrics.jsonl": 0, "samples.jsonl": 0}
        recorder.log(1, {"score": 0.5})
        position = recorder.positions
        assert position == {"metrics.jsonl": len('{"iteration": 1, "score": 0.5}\n'), "samples.jsonl": 0}
        assert position["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
        recorder.log(2, {"score": 0.25})
        recorder.log(3, {"score": 0.75})
        recorder.rewind(position)
        assert score_by_iteration() == [(1, 0.5)] and recorder.positions == position
        recorder.log(2, {"score": 1.0})
        assert score_by_iteration() == [(1, 0.5), (2, 1.0)]
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        assert recorder.positions["metrics.jsonl"] == 2 * position["metrics.jsonl"]  # both lines are of one length
        recorder.rewind(position)
        recorder.log(2, {"score": 0.0})
    assert score_by_iteration() == [(1, 0.5), (2, 0.0)]


def test_samples_go_back_with_the_numbers(tmp_path, capsys):
    one, two = SampleText(0, "a", "b", 1, False, 0.5), SampleText(43, "c", "d\n\u2028é", 2, True, float("nan"))
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        recorder.log(1, {"score": 0.5}, [one, two])
        position = recorder.positions
        recorder.log(2, {"score": 0.25}, [one])
        recorder.rewind(position)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows == [
        {"iteration": 1, "position": 0, "prompt": "a", "response": "b", "tokens": 1, "truncated": False, "score": 0.5},
        {"iteration": 1, "position": 43, "prompt": "c", "response": "d\n\u2028é", "tokens": 2, "truncated": True,
         "score": None}]


def test_a_file_that_lost_lines_is_not_filled_up(tmp_path, capsys):
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        recorder.rewind({"metrics.jsonl": 99, "samples.jsonl": 99})
        recorder.log(5, {"score": 0.5})
    assert read_history(tmp_path) == [{"iteration": 5, "score": 0.5}]


def test_a_full_disk_is_one_line_and_costs_no_line(small_disk, capsys):
    with Recorder(small_disk.path, "disabled", "project", {}) as recorder:
        recorder.log(1, {"score": 0.5})
        small_disk.fill()
        with pytest.raises(UserError, match=f"^cannot write {small_disk.path}/metrics.jsonl: No space left"):
            recorder.log(2, {"score": float(10**300)} | {f"key {i}": i for i in range(1000)})
        assert read_history(small_disk.path) == [{"iteration": 1, "score": 0.5}]
        small_disk.empty()
        recorder.log(2, {"score": 0.25})
    assert read_history(small_disk.path)[1:] == [{"iteration": 2, "score": 0.25}]


def test_close_twice_and_no_wandb_where_disabled(tmp_path):
    before = "wandb" in sys.modules
    recorder = Recorder(tmp_path, "disabled", "project", {})
    recorder.close()
    recorder.close()
    assert ("wandb" in sys.modules) == before
    assert not hasattr(module, "wandb")


@pytest.mark.timeout(120)
def test_wandb_offline(tmp_path):
    with Recorder(tmp_path, "offline", "project", {"seed": 0}) as recorder:
        recorder.log(1, VALUES)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
