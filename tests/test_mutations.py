"""Planted faults, each of which must make a named test fail.

The package is copied, one fault is written into the copy, and the test runs against it. So these are tests of tests:
the faults are those that implementations of PPO have had in releases.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# name -> (file, what it says, what is planted, the test that must notice)
PLANTS = {
    "temperature ignored in one pass": (
        "actors/policy.py", "engine(rows, chosen, self.sampling.temperature)", "engine(rows, chosen, 1.0)",
        "tests/end_to_end/test_weight_sync.py::test_the_gate_after_the_first_sync"),
    "a tied head sent stale": (
        "engines/weight_sync.py", "                head.cpu_linear = layer.cpu_linear\n", "",
        "tests/end_to_end/test_weight_sync.py::test_engines_sample_from_the_learners_weights[shm]"),
    "prefix cache not reset": (
        "engines/generation.py", "        self.llm.reset_prefix_cache()\n", "",
        "tests/end_to_end/test_weight_sync.py::test_nothing_that_old_weights_computed_is_reused"),
    "EOS outside the mask": (
        "core/types.py", '(never from `ids != pad`)."""\n        return _behind(self.prompt_lengths, self.lengths)',
        '"""\n        return _behind(self.prompt_lengths, self.lengths) & (self.ids != 1)',
        "tests/core/test_types.py::test_a_sampled_eos_is_an_action"),
    "whitening per rank": (
        "actors/policy.py", "Moments(*self.learner.sum(spread.total, spread.squares, spread.count))", "spread",
        "tests/end_to_end/test_prepare.py::test_two_ranks_prepare_what_one_does"),
    "one gradient accumulated twice": (
        "engines/learner.py", "batch.loss(batch.rows.to(self.device)) * self.world_size)",
        "batch.loss(batch.rows.to(self.device)) * self.world_size * (1 + (done == 2)))",
        "tests/end_to_end/test_learner.py::test_ranks_and_micro_batches_do_not_change_the_update[rloo-variants2]"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_noticed(plant: str, tmp_path: Path) -> None:
    file, right, wrong, test = PLANTS[plant]
    shutil.copytree(ROOT / "rlhf_ray", tmp_path / "rlhf_ray")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    path = tmp_path / "rlhf_ray" / file
    source = path.read_text()
    assert source.count(right) == 1, f"{file} no longer says: {right}"
    path.write_text(source.replace(right, wrong))
    done = subprocess.run(
        # from the copy's directory: Python and Ray's workers look there first
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
         f"--rootdir={ROOT}", ROOT / test], cwd=tmp_path, text=True, check=False, capture_output=True, timeout=600,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]  # 1: tests ran, and some failed
    assert re.search(rf"^FAILED \S*{test.split('[')[0]}", done.stdout, re.MULTILINE)
    assert "AssertionError" in done.stdout or "UserError" in done.stdout  # by its own judgement, not by a crash
