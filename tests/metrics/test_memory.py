"""The sampler on real processes."""

import subprocess
import sys
import time

import pytest

from rlhf_ray.metrics.memory import RssSampler

MIB = 256
CHILD = f"import sys, time; block = b'x' * ({MIB} << 20); print('ready', flush=True); sys.stdin.read()"
# Starts CHILD in a session of its own and ends, so that CHILD is no descendant of ours.
DETACH = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=0,"
    " stdout=subprocess.PIPE, start_new_session=True, text=True);"
    " p.stdout.readline(); print(p.pid, flush=True)"
)


def test_the_peak_grows_by_what_a_child_takes_and_stays():
    with RssSampler(interval=0.05) as sampler:
        before = sampler.peak_gib
        assert before > 0
        with subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 30
            while sampler.peak_gib < before + MIB / 1024 and time.monotonic() < deadline:
                time.sleep(0.05)
            child.stdin.close()
    assert before + MIB / 1024 <= sampler.peak_gib < before + 2.5 * MIB / 1024
    assert sampler.sample() < sampler.peak_gib - 0.5 * MIB / 1024


def test_watch_counts_a_process_that_is_not_our_child():
    sampler = RssSampler()
    alone = sampler.sample()
    with subprocess.Popen(
        [sys.executable, "-c", DETACH, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        pid = int(launcher.stdout.readline())
        launcher.wait()
        assert sampler.sample() == pytest.approx(alone, abs=0.1)
        sampler.watch(pid)
        sampler.watch(pid)  # twice is once
        assert alone + MIB / 1024 - 0.05 <= sampler.sample() <= alone + 1.5 * MIB / 1024
        launcher.stdin.close()  # ends the detached process too: it reads the same pipe
    deadline = time.monotonic() + 30
    while sampler.sample() > alone + 0.1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sampler.sample() == pytest.approx(alone, abs=0.1)


def test_watch_ignores_a_process_that_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    sampler = RssSampler()
    sampler.watch(child.pid)
    assert sampler.sample() > 0
