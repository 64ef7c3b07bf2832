"""The sampler on real processes."""

import subprocess
import sys
import time

from rlhf_ray.metrics.memory import RssSampler

MIB = 256
CHILD = f"import sys, time; block = b'x' * ({MIB} << 20); print('ready', flush=True); sys.stdin.read()"


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
