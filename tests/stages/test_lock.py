"""One process at a time in the directory of a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rlhf_ray import remote, storage
from rlhf_ray.errors import UserError
from rlhf_ray.stages import lock
from rlhf_ray.stages.lock import LOCK, locked
from rlhf_ray.storage import local_root

# Takes the lock as `pipeline` does, starts a process of its own as Ray does, says who that is, and waits.
HOLDER = """
import subprocess, sys
from pathlib import Path
from rlhf_ray.stages.lock import locked
sys.argv[:] = ["/venv/bin/rlhf-ray", "ppo", "model.path=my model"]
with locked(Path(sys.stdin.readline().strip())):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
    child.kill()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A second process that holds the lock of `tmp_path/run`, and the pid of a process that it started."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=Path(__file__).parents[2], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdin.write(f"{tmp_path / 'run'}\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.communicate()
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def test_a_second_process_is_told_who_is_there(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    with pytest.raises(UserError) as error, locked(tmp_path / "run"):
        pass
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'run'} is in use by process {holder[0].pid} on host {os.uname().nodename} "
                              "since 20")
    assert message.endswith("(rlhf-ray ppo 'model.path=my model'): wait for it, stop it, or set another output_dir")
    with locked(tmp_path / "another"):
        pass


def test_kill_frees_it_though_processes_of_the_holder_live_on(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int]
) -> None:
    holder[0].kill()
    holder[0].wait()
    os.kill(holder[1], 0)  # is there
    with locked(tmp_path / "run"):
        pass


def test_the_end_frees_it(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    holder[0].communicate()
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).read_text() == ""


def test_who_holds_it_goes_through(tmp_path: Path) -> None:
    """A pipeline holds it around its stages, and each stage takes it again."""
    with locked(tmp_path):
        with locked(tmp_path / "x" / ".."):
            pass
        other = subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; from rlhf_ray.stages.lock import locked\n"
             "with locked(Path(sys.argv[1])): pass", tmp_path], cwd=Path(__file__).parents[2], capture_output=True,
            text=True, check=False)
        assert f"is in use by process {os.getpid()}" in other.stderr  # the inner one has not let go
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


# --- at a URL ---

AT_URL = """
import sys
import threading
from rlhf_ray import storage
from rlhf_ray.stages import lock
lock.BEAT_S = 0.2
with lock.locked(storage.local_root(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process is on machine b; it waits a second for a beat, of which there are five."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "b"))
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "SILENCE_S", 1.0)
    yield f"file://{tmp_path}/there/run"
    storage.renew()


def on_machine_a(url: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A process there that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", AT_URL, url], cwd=Path(__file__).parents[2], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, storage.CACHE: str(tmp_path / "a")})
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_holder_on_another_machine_is_found_by_his_beat(url: str, tmp_path: Path) -> None:
    holder = on_machine_a(url, tmp_path)
    with pytest.raises(UserError, match=f"^{url} is in use by process {holder.pid} on host .*: wait for it, "), \
            locked(local_root(url)):
        pass
    holder.communicate()
    assert list((tmp_path / "there/run").iterdir()) == []
    with locked(local_root(url)):
        pass


def test_one_who_was_killed_is_silent(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = on_machine_a(url, tmp_path)
    holder.kill()
    holder.communicate()
    with locked(local_root(url)):
        assert "waiting 1 s for a sign of its life" in capsys.readouterr().out
    assert list((tmp_path / "there/run").iterdir()) == []


def test_one_who_was_killed_on_this_machine_is_dead_for_sure(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock of the copy is free: nobody waits."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "a"))
    holder = on_machine_a(url, tmp_path)
    holder.kill()
    holder.communicate()
    with locked(local_root(url)):
        assert capsys.readouterr().out == ""


def test_one_who_was_taken_for_dead_writes_no_more(url: str, tmp_path: Path) -> None:
    """A machine that slept."""
    holder = on_machine_a(url, tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)  # a beat may be under way
    with locked(local_root(url)):
        os.kill(holder.pid, signal.SIGCONT)
        time.sleep(1)
        _, said = holder.communicate()
        assert holder.returncode == 1 and "was taken over by another process" in said
        assert remote.read(f"{url}/{LOCK}") == (local_root(url) / LOCK).read_bytes()


def test_a_beat_that_hangs_holds_nobody_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is gone for one request."""
    write, over, hangs = remote.write, threading.Event(), threading.Event()

    def hanging(to: str, data: bytes) -> None:
        if to.endswith(".beat"):
            hangs.set()
            over.wait(60)
        write(to, data)

    monkeypatch.setattr(remote, "write", hanging)
    with locked(local_root(url)):
        assert hangs.wait(10)
    left = [thread for thread in threading.enumerate() if thread.name == "lock"]
    over.set()
    assert left  # nobody waited for it


def test_the_copy_is_as_the_url_from_the_start(url: str, tmp_path: Path) -> None:
    (tmp_path / "there/run/sft").mkdir(parents=True)
    (tmp_path / "there/run/sft/stage.json").write_text("{}")
    stale = local_root(url) / "rm/stage.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    with locked(local_root(url)):
        assert (local_root(url) / "sft/stage.json").exists() and not stale.exists()
        (local_root(url) / "sft/metrics.jsonl").write_text("")
        storage.publish(local_root(url) / "sft")
    assert (tmp_path / "there/run/sft/metrics.jsonl").exists()


def test_a_directory_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted: {done.stderr.strip()}")
    try:
        for directory in (tmp_path, tmp_path / "run"):
            with pytest.raises(UserError, match=r"cannot write .*: Read-only file system; make it writable for you, "
                                                r"or set another output_dir"), locked(directory):
                pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/\.lock: "), locked(tmp_path / "file"):
        pass
