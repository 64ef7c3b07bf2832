"""Resident memory: the peak of a run over all its processes, and what one process says of itself."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

GIB = 2**30


def kernel_oom_kills() -> int:
    """Processes that this machine's kernel has killed for lack of memory since boot, those that reached the limit of
    their container included; 0 where it does not say (Linux before 4.13)."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def own_pulse_numbers() -> tuple[int, int, int]:
    """Of the calling process: resident memory in bytes, open file descriptors; and `kernel_oom_kills`."""
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), kernel_oom_kills()


class RssSampler:
    """Samples the resident memory of this process and of all its descendants.

    A context manager with a background thread. The sum is of resident set sizes (as in `ps`), so pages shared
    between processes, such as mapped libraries and the object store, count once for each: it is an upper bound
    of the memory really taken. A peak shorter than `interval` seconds can go unseen, and so do processes that
    are not descendants, such as those of a Ray cluster that was joined rather than started.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self._peak = 0
        self._root = psutil.Process(os.getpid())
        self._lock = threading.Lock()  # `sample` may be called by the thread and by the owner
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_gib(self) -> float:
        """The highest sum seen so far, GiB."""
        return self._peak / GIB

    def sample(self) -> float:
        """Measure once, now. Returns the sum, GiB."""
        with self._lock:
            total = sum(_rss(process) for process in _with_descendants(self._root))
            self._peak = max(self._peak, total)
        return total / GIB

    def __enter__(self) -> Self:
        self.sample()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()


def _with_descendants(root: psutil.Process) -> list[psutil.Process]:
    """The root and everything below it, each once; one pass over the process table."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process)
    found: dict[int, psutil.Process] = {}
    left = [root]
    while left:
        process = left.pop()
        if process.pid not in found:
            found[process.pid] = process
            left.extend(children.get(process.pid, []))
    return list(found.values())


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended between being found and being measured
        return 0
