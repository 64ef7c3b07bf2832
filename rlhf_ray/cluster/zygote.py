"""Nothing is imported twice: roles of a private Ray are forks of a process that has imported what they need.

    driver ──starts──▶ zygote: PyTorch and transformers
                         ├──forks──▶ branch for learners and scorers: and DeepSpeed
                         └──forks──▶ branch for generators: and vLLM
    raylet ──starts──▶ stand-in ──arguments, environment, files──▶ branch ──forks──▶ Ray's worker

Imports are most of what it costs to start an actor without a GPU, and to replace one. Ray starts workers by a command
(`py_executable` of a runtime environment): here the stand-in, which has itself replaced by a fork and lives as long as
that. Without a zygote it becomes an ordinary worker.

Only for a private Ray, whose driver the zygote ends with, and for actors without GPUs: CUDA does not outlive a fork.
What forks has one thread and has computed nothing. Ray is not imported: it reads its environment when it is.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from rlhf_ray.cluster import stand_in

TRUNK = ("rlhf_ray.models.hub", "rlhf_ray.models.modules", "transformers.modeling_utils")
BRANCHES = {"learners": ("rlhf_ray.engines.learner", "deepspeed"), "generators": ("rlhf_ray.engines.preload",)}
OF = {"rlhf_ray.actors.generator": "generators",  # an actor class's module -> its branch
      **{f"rlhf_ray.actors.{name}": "learners" for name in ("learners", "policy", "scorers", "supervised")}}
# One thread; no device; of engines' CPU_ENVIRONMENT what the trunk's imports read.
_ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
_LET_GO_S = 3.0  # workers end by themselves when Ray does
_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlhf_ray.cluster import zygote; zygote.main()"


class Zygote:
    """The driver's end of it. env: what all roles have in theirs, for what C libraries read is read before the fork."""

    def __init__(self, env: Mapping[str, str], trunk: Sequence[str] = TRUNK,
                 branches: Mapping[str, Sequence[str]] = BRANCHES):
        # Nobody else can look into it; in /tmp, where Ray has its sockets too: their names must be short.
        self._directory = tempfile.mkdtemp(prefix="rlhf_ray-", dir="/tmp")
        with ExitStack() as stack:
            listeners = {branch: stack.enter_context(socket.socket(socket.AF_UNIX)) for branch in branches}
            for branch, listener in listeners.items():
                listener.bind(self._path(branch))
                listener.listen(1024)
            files = {listener.fileno(): branches[branch] for branch, listener in listeners.items()}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, json.dumps(sys.path), json.dumps(trunk), json.dumps([*files.items()])],
                pass_fds=[*files], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, **env, **_ENV})

    def command(self, branch: str) -> str:
        """`py_executable` of an actor that is forked from this branch, or an ordinary worker if that is gone."""
        return shlex.join([sys.executable, "-I", "-S", stand_in.__file__, self._path(branch)])

    def close(self) -> None:
        """Its forks end with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)  # who still imports hears that, the others look at their input
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, branch: str) -> str:
        return f"{self._directory}/{branch}"


def main() -> None:
    """The zygote's life; a fork of a branch leaves `_forks` and goes on as Ray's worker."""
    trunk, branches = json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for module in trunk:
        importlib.import_module(module)
    children: set[int] = set()
    for number, modules in branches:
        if child := os.fork():
            children.add(child)
            os.close(number)
            continue
        for other, _ in branches[len(children) + 1 :]:
            os.close(other)
        for module in modules:
            importlib.import_module(module)
        worker = _forks(number)
        break
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdin.read()
        _end(children, 2 * _LET_GO_S)
    import numpy as np

    np.random.seed()  # noqa: NPY002 - else all forks would have the same state
    sys.argv = worker["argv"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _forks(number: int) -> dict[str, list[str]]:
    """Fork for every stand-in, until the driver is gone; returns in forks only, with what the stand-in was to be."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on there are forks to see to
    gc.collect()
    gc.freeze()  # or the collector would write to every page, and none would be shared
    listener, children = socket.socket(fileno=number), set[int]()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
        _reap(children)
        if sys.stdin in ready:
            _end(children, _LET_GO_S)
        if listener in ready:
            connection, _ = listener.accept()
            connection.settimeout(10.0)
            with suppress(OSError, ValueError):
                worker, files = _asked(connection)
                child = os.fork()
                if not child:
                    listener.close()
                    _become(worker, files)
                    connection.settimeout(None)
                    connection.detach()  # open as long as the process lives: the stand-in waits for its end
                    return worker
                children.add(child)
                for file in files:
                    os.close(file)
            connection.close()


def _asked(connection: socket.socket) -> tuple[dict[str, list[str]], list[int]]:
    """What a stand-in is to be, unless it has gone its own way; and its standard files."""
    connection.sendall(stand_in.READY)
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    text, size = b"", int.from_bytes(head, "big")
    while len(text) < size:
        if not (part := connection.recv(size - len(text))):
            raise ValueError("a stand-in that ended")
        text += part
    if len(files) != 3:
        raise ValueError("a stand-in that ended")
    return json.loads(text), list(files)


def _become(worker: dict[str, list[str]], files: list[int]) -> None:
    """Take the stand-in's place in all that a process inherits."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker with its group
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(worker["cwd"][0])
    os.environ.clear()
    os.environ.update(dict(zip(worker["names"], worker["values"], strict=True)))


def _end(children: set[int], patience_s: float) -> NoReturn:
    deadline = time.monotonic() + patience_s
    while children and time.monotonic() < deadline:
        _reap(children)
        time.sleep(0.05)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sys.exit()


def _reap(children: set[int]) -> None:
    while children and (ended := os.waitpid(-1, os.WNOHANG)[0]):
        children.discard(ended)
