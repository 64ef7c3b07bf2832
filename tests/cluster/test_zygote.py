"""Forks in place of new interpreters: real processes, without Ray."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_ray.cluster.zygote import Zygote

BRANCHES = {"one": [], "two": ["other"]}
WORKER = """
import json, os, sys
import numpy as np
print(json.dumps({"argv": sys.argv, "forked": sorted({"slow", "other"} & {*sys.modules}), "cwd": os.getcwd(),
                  "env": os.environ.get("MINE"), "name": __name__, "random": np.random.random(),
                  "parent": os.getppid(), "group": os.getpgid(0), "pid": os.getpid(), "input": sys.stdin.read()}),
      flush=True)
import neighbour
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a worker, a module beside it, and one that takes its time to be imported."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.5)")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/worker.py").write_text(WORKER)
    (tmp_path / "workers/neighbour.py").write_text("import time; time.sleep(float(__import__('sys').argv[1]))")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the driver's path is the zygote's
    return tmp_path


@pytest.fixture
def zygote(directory: Path) -> Iterator[Zygote]:
    made = Zygote({}, ["slow"], BRANCHES)
    yield made
    made.close()


def start(zygote: Zygote, directory: Path, seconds: float = 0.0, branch: str = "one") -> subprocess.Popen[str]:
    """As Ray starts a worker."""
    command = shlex.split(zygote.command(branch))
    return subprocess.Popen([*command, str(directory / "workers/worker.py"), str(seconds), "an argument"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory,
                            env={**os.environ, "MINE": "\udce4 of mine"})


def said(process: subprocess.Popen[str]) -> dict:
    assert process.stdin and process.stdout
    process.stdin.write("hello")
    process.stdin.close()
    return json.loads(process.stdout.readline())


def test_a_fork_is_what_the_command_would_have_been(zygote: Zygote, directory: Path) -> None:
    process = start(zygote, directory)
    found = said(process)
    assert found["forked"] == ["slow"]
    assert psutil.Process(found["parent"]).ppid() == zygote._process.pid
    assert found["argv"] == [str(directory / "workers/worker.py"), "0.0", "an argument"] and found["input"] == "hello"
    assert found["cwd"] == str(directory) and found["env"] == "\udce4 of mine" and found["name"] == "__main__"
    assert found["group"] == found["pid"]  # Ray ends a worker with its group: no other is in it
    assert process.wait(10) == 0


def test_forks_draw_other_random_numbers(zygote: Zygote, directory: Path) -> None:
    first, second = start(zygote, directory), start(zygote, directory)
    assert said(first)["random"] != said(second)["random"]


def test_a_stand_in_lives_as_long_as_its_fork_and_others_longer(zygote: Zygote, directory: Path) -> None:
    first, second = start(zygote, directory, 60), start(zygote, directory, 60)
    pid, other = said(first)["pid"], said(second)["pid"]
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.5)
    os.kill(pid, signal.SIGKILL)
    assert first.wait(10) == 0
    assert psutil.Process(other).is_running() and second.poll() is None


def test_branches_share_what_the_trunk_has_imported(zygote: Zygote, directory: Path) -> None:
    assert said(start(zygote, directory, branch="two"))["forked"] == ["other", "slow"]
    assert said(start(zygote, directory))["forked"] == ["slow"]


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_without_a_zygote_there_is_an_ordinary_worker(end: signal.Signals | None, directory: Path) -> None:
    """One that was killed, one whose imports fail."""
    zygote = Zygote({}, ["slow"], {"one": [] if end else ["nothing_of_that_name"]})
    if end:
        os.killpg(zygote._process.pid, end)
    try:
        assert not said(start(zygote, directory))["forked"]
    finally:
        zygote.close()


def test_no_fork_outlives_it(directory: Path) -> None:
    """Not even one that hangs."""
    zygote = Zygote({}, ["slow"], BRANCHES)
    processes = [start(zygote, directory, 60) for _ in range(2)]
    forks = [psutil.Process(said(process)["pid"]) for process in processes]
    forks[0].suspend()
    zygote.close()
    for process in processes:
        process.wait(10)
    assert not any(fork.is_running() for fork in forks)


def test_closed_while_it_imports_it_ends_at_once(directory: Path) -> None:
    (directory / "slow.py").write_text("import time; time.sleep(60)")
    zygote = Zygote({}, ["slow"], BRANCHES)
    started = time.monotonic()
    zygote.close()
    assert time.monotonic() - started < 20
