"""One process at a time in the directory of a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rlhf_ray.errors import UserError
from rlhf_ray.stages.lock import LOCK, locked

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
