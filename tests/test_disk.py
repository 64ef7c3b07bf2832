"""Whole or not there, whatever happens; and what is said of a disk that cannot be written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disks import Disk
from rlhf_ray import disk
from rlhf_ray.disk import Log, replacing, restore, write_text
from rlhf_ray.errors import UserError

CANNOT = (r"^cannot write {}: {}; 0\.00 GiB are free there; what was written before is as it was: make room or make it "
          r"writable, and give the same command again$")
FULL, READ_ONLY = "No space left on device", "Read-only file system"


class Killed(BaseException):
    """No handler of ours runs after it, as after kill -9."""


def kill_at(moment: int, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `call` ended before the call number `moment` (from 0) that changes the disk; nothing is changed after."""
    left = moment
    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
            def counted(*args: Any, real: Callable[..., Any] = getattr(os, name), **options: Any) -> Any:  # noqa: B008
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*args, **options)
            patch.setattr(os, name, counted)
        try:
            call()
            return True
        except Killed:
            return False


def put(path: Path, text: str) -> None:
    with replacing(path) as fresh:
        (fresh / "a").write_text(text)
        (fresh / "sub").mkdir()
        (fresh / "sub/b").write_text(text)


def held(path: Path) -> tuple[str, ...]:
    return tuple(file.read_text() for file in (path / "a", path / "sub/b"))


@pytest.mark.parametrize("before", [False, True])
def test_a_directory_that_is_replaced_is_at_every_moment_the_old_or_the_new_one(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, ended, seen = 0, False, set()
    while not ended:
        path = tmp_path / str(moment) / "model"
        if before:
            put(path, "old")
        ended = kill_at(moment, lambda path=path: put(path, "new"), monkeypatch)
        restore(path)
        seen.add(held(path) if path.exists() else None)
        put(path, "next")  # what the kill has left is in nobody's way
        assert held(path) == ("next", "next") and [p.name for p in path.parent.iterdir()] == ["model"]
        moment += 1
    assert seen == {("old", "old") if before else None, ("new", "new")} and moment > 5


def test_everything_is_on_the_disk_before_the_old_directory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "model", "old")
    synced, real = list[str](), disk.sync

    def sync(path: Path) -> None:
        assert held(tmp_path / "model") == ("old", "old") if path != tmp_path else True
        synced.append(path.name)
        real(path)

    monkeypatch.setattr(disk, "sync", sync)
    put(tmp_path / "model", "new")
    assert sorted(synced[:-1]) == [".model.tmp", "a", "b", "sub"] and synced[-1] == tmp_path.name


def test_what_fails_while_it_is_filled_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    put(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as fresh:
        (fresh / "a").write_text("new")
        raise ZeroDivisionError
    assert held(path) == ("old", "old") and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "old")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    for text in ("new", "newer"):
        put(tmp_path / "model", text)
        assert held(tmp_path / "model") == (text, text)
    assert held(tmp_path / "elsewhere") == ("old", "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model"]


def test_a_file_is_at_every_moment_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, moment, seen = tmp_path / "stage.json", 0, set[str]()
    write_text(path, "old")
    while not kill_at(moment, lambda: write_text(path, "new"), monkeypatch):
        seen.add(path.read_text())
        write_text(path, "old")
        moment += 1
    assert seen == {"old", "new"} and path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["stage.json"]


def test_a_log_grows_goes_back_and_is_never_filled_up_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "ppo/metrics.jsonl"
    log = Log(path)
    log.add(b"one\n")
    assert (path.read_bytes(), log.sync()) == (b"one\n", 4)
    log.add(b"two\n")
    log.rewind(4)
    log.add(b"2\n")
    log.rewind(99)
    log.close()
    log = Log(path)
    assert (path.read_bytes(), log.sync()) == (b"one\n2\n", 6)
    log.rewind(0)
    log.add(b"1\n")
    log.close()
    assert path.read_bytes() == b"1\n"


def test_a_full_disk_is_one_line_and_costs_nothing(small_disk: Disk) -> None:
    log, file, model = Log(small_disk.path / "log"), small_disk.path / "file", small_disk.path / "model"
    log.add(b"old\n")
    write_text(file, "old")
    put(model, "old")
    small_disk.fill(4096)
    with pytest.raises(UserError, match=CANNOT.format(small_disk.path / "log", FULL)):
        log.add(b"x" * 9000 + b"\n")  # there is room for some of it
    with pytest.raises(UserError, match=CANNOT.format(file, FULL)):
        write_text(file, "x" * 9000)
    with pytest.raises(UserError, match=CANNOT.format(model, FULL)):
        put(model, "x" * 9000)
    assert (small_disk.path / "log").read_bytes() == b"old\n"
    assert file.read_text() == "old" and held(model) == ("old", "old")
    assert sorted(p.name for p in small_disk.path.iterdir()) == ["file", "filler", "log", "model"]
    small_disk.empty()
    log.add(b"x" * 9000 + b"\n")
    log.close()
    assert log.path.read_bytes() == b"old\n" + b"x" * 9000 + b"\n"


def test_a_read_only_disk_is_one_line(small_disk: Disk) -> None:
    small_disk.forbid()
    for name, attempt in (("log", Log), ("file", lambda path: write_text(path, "")), ("model", lambda p: put(p, ""))):
        with pytest.raises(UserError, match=CANNOT.format(small_disk.path / name, READ_ONLY)):
            attempt(small_disk.path / name)
