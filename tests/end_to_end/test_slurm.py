"""deploy/slurm.sbatch under a real Slurm: a controller and two nodes, each a host of its own (see hosts.py).

What it does with each of Slurm's and Ray's commands: deploy/test_slurm.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end.hosts import Host, NotAllowed, network
from end_to_end.small import earlier_stages
from end_to_end.test_pipeline import SMALL, files  # noqa: F401 - files is a fixture

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
ITERATIONS = 6
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
AuthInfo=socket=/tmp/ray/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile=/tmp/ray/slurmctld.pid
SlurmdPidFile=/tmp/ray/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=10
FirstJobId={first_job}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """The commands of its users."""

    def __init__(self, controller: Host, nodes: list[Host], directory: Path):
        self.controller, self.nodes, self.directory = controller, nodes, directory
        (directory / "state").mkdir()
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        conf = CONFIGURATION.format(controller=controller, directory=directory, first_job=os.getpid())
        (directory / "slurm.conf").write_text(conf + "".join(
            f"NodeName={n.name} NodeAddr={n.address} CPUs=4 RealMemory=8000\n" for n in nodes))
        for host in (controller, *nodes):
            host.run("munged", f"--key-file={key}", "--force", *(
                f"--{what}-file=/tmp/ray/munge.{what}" for what in ("pid", "log", "seed")),
                "--socket=/tmp/ray/munge.socket")
            host.run("slurmctld" if host is controller else "slurmd")
        until(lambda: self.told("sinfo", "--noheader", "--format=%D %t") == "2 idle", "the nodes did not come")

    def told(self, *words: str) -> str:
        return self.controller.run("env", f"--chdir={self.directory}", *words).strip()

    def submit(self, *words: str) -> str:
        """Submit deploy's script with rlhf-ray's words; returns the job's number."""
        return self.told("sbatch", "--parsable", "--gpus-per-node=0", "--time=20", str(SCRIPT), *words)

    def job(self, number: str) -> dict[str, str]:
        words = self.told("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float = 120.0) -> dict[str, str]:
        until(lambda: self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
              f"job {number} does not end", seconds)
        return self.job(number)

    def left(self) -> list[str]:
        """Processes on the nodes that are not Slurm's own, and files of jobs."""
        found = [line for n in self.nodes for line in n.run("ps", "-eo", "args").splitlines()
                 if line.split()[0] not in ("COMMAND", "cat", "ps", *DAEMONS)]
        return [*found, *map(str, Path("/tmp").glob(f"ray-{os.getpid()}*")),
                *map(str, (self.directory / ".ray").iterdir())]


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.3)
    return found


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Two nodes with 4 CPUs each, and a checkout with its .venv."""
    if os.geteuid() != 0:
        pytest.skip("not root: namespaces are not allowed")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    missing = [program for program in (*DAEMONS, "sbatch") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not on PATH (Debian: slurm-wlm)")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        with network(["controller", "alpha", "beta"], tmp_path) as (controller, *nodes):
            yield Slurm(controller, nodes, tmp_path)
    except NotAllowed as why:
        pytest.skip(f"namespaces are not allowed: {why}")


def rows(run: Path) -> list[dict]:
    file = run / "ppo/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_preempted_it_goes_on(slurm, models, reward_model, files, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    earlier_stages(run, models[0], reward_model)
    try:
        t0 = time.monotonic()
        number = slurm.submit("ppo", *[o for o in SMALL if o != "cluster=local"], *files, "stages=[ppo]", f"model.path={models[0]}",
                     f"output_dir={run}", f"ppo.iterations={ITERATIONS}")
        until(lambda: len(rows(run)) >= 2, "no iterations", 200)
        print("iterations", time.monotonic() - t0)
        for h in slurm.nodes: print(h.run("ps", "-eo", "pid,args"))
        slurm.told("scancel", "--signal=TERM", "--batch", number)
        until(lambda: slurm.job(number)["JobState"] not in ("RUNNING","COMPLETING"), "pree", 60)
        print("preempted", time.monotonic() - t0, slurm.job(number), slurm.left())
        print(slurm.ended(number, 200))
        print("end", time.monotonic() - t0)
        print(slurm.left())
        print(rows(run)[-1])
    finally:
        for f in tmp_path.glob("*.out"): print(f.name, f.read_text()[-5000:])
        for f in tmp_path.glob("*.log"): print(f.name, f.read_text()[-2500:])
