"""A file that grows is read as it grows."""

from pathlib import Path

import pytest

from rlhf_ray.metrics.files import Tail, object_of, text_of, time_of
from rlhf_ray.metrics.recorder import Recorder


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_rows_appear_when_they_are_whole(tmp_path: Path) -> None:
    """A line cut anywhere, in the middle of a character too, waits for its end."""
    tail = Tail(tmp_path / "a.jsonl", ["step", "name"])
    assert tail.read() == [] and tail.size() == 0
    add(tail.path, '{"step": 1, "other": 5}\n{"step": 2, "na')
    assert tail.read() == [{"step": 1}]
    assert tail.read() == [{"step": 1}]
    with tail.path.open("ab") as file:
        file.write(b'me": "\xc3')
        file.flush()
        assert len(tail.read()) == 1
        file.write(b'\xa9"}\n')
    assert tail.read() == [{"step": 1}, {"step": 2, "name": "é"}]
    assert tail.size() == tail.path.stat().st_size


def test_what_is_no_row_is_left_out(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "a.jsonl", ["step"])
    tail.path.write_bytes(b'{"step": 1}\nnot json\n[1]\n\n\x00\xff\n{"step": 2}\n')
    assert tail.read() == [{"step": 1}, {"step": 2}]


def test_only_what_was_appended_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the one line that tells whether the file is still the same."""
    tail, decoded = Tail(tmp_path / "a.jsonl", ["step"]), []
    add(tail.path, "".join(f'{{"step": {k}}}\n' for k in range(100)))
    tail.read()
    monkeypatch.setattr("rlhf_ray.metrics.files.json.loads", lambda line: decoded.append(line) or {"step": -1})
    tail.read()
    assert decoded == []
    add(tail.path, '{"step": 100}\n')
    assert len(tail.read()) == 101
    assert decoded == [b'{"step": 100}']


def test_a_run_that_went_back_is_read_again_from_the_start(tmp_path: Path) -> None:
    """Whether the file is shorter now, or has grown beyond where it was."""
    tail = Tail(tmp_path / "metrics.jsonl", ["iteration", "score"])
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        recorder.log(1, {"score": 0.5})
        position = recorder.positions
        recorder.log(2, {"score": 0.25})
        recorder.log(3, {"score": 0.75})
        assert [row["score"] for row in tail.read()] == [0.5, 0.25, 0.75]
        recorder.rewind(position)
        assert tail.read() == [{"iteration": 1, "score": 0.5}]
        recorder.log(2, {"score": 0.25})
        recorder.log(3, {"score": 0.75})
        tail.read()
        recorder.rewind(position)
        for k in (2, 3, 4):
            recorder.log(k, {"score": 1.0})
        assert tail.path.stat().st_size > 3 * position["metrics.jsonl"]
        assert [row["score"] for row in tail.read()] == [0.5, 1.0, 1.0, 1.0]
    tail.path.unlink()
    assert tail.read() == []


def test_only_the_newest_rows_are_kept_if_so_asked(tmp_path: Path) -> None:
    """Whether they came at once or one by one; the place in the file is not lost."""
    tail = Tail(tmp_path / "a.jsonl", ["step"], last=2)
    add(tail.path, '{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert tail.read() == [{"step": 2}, {"step": 3}]
    add(tail.path, '{"step": 4}\n')
    assert tail.read() == [{"step": 3}, {"step": 4}]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert (time_of(tmp_path / "a"), text_of(tmp_path / "a"), object_of(tmp_path / "a")) == (None, "", None)
    for content in ("", '{"half": ', "[1]"):
        (tmp_path / "b").write_text(content)
        assert object_of(tmp_path / "b") is None
    assert time_of(tmp_path / "b" / "c") is None  # in what is no directory
