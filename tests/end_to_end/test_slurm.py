"""deploy/slurm.sbatch under a real Slurm: a controller and two nodes, each a host of its own (see hosts.py).

What it does with each of Slurm's and Ray's commands: deploy/test_slurm.py.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from end_to_end.hosts import Host, NotAllowed, network
from end_to_end.small import earlier_stages, until
from end_to_end.test_pipeline import SMALL, files  # noqa: F401 - files is a fixture

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
ITERATIONS = 40
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
AuthInfo=socket=/tmp/ray/munge.socket,cred_expire=5
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
FirstJobId={first_job}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A controller, its nodes, and the commands of a user in `directory`, a checkout."""

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
            host.run("munged", "--force", f"--key-file={key}", "--socket=/tmp/ray/munge.socket",
                     *(f"--{what}-file=/tmp/ray/munge.{what}" for what in ("pid", "log", "seed")))
            host.run("slurmctld" if host is controller else "slurmd")
        until(lambda: self.told("sinfo", "--noheader", "--format=%D %t") == "2 idle", "the nodes did not come")

    def told(self, *words: str) -> str:
        return self.controller.run("env", f"--chdir={self.directory}", *words).strip()

    def submit(self, *words: str) -> str:
        """deploy's script with words for rlhf-ray, without GPUs. Returns the number of the job, which runs."""
        number = self.told("sbatch", "--parsable", "--gpus-per-node=0", str(SCRIPT), *words)
        self.running(number)
        return number

    def running(self, number: str) -> None:
        until(lambda: self.job(number)["JobState"] == "RUNNING", lambda: str(self.job(number)))

    def job(self, number: str) -> dict[str, str]:
        words = self.told("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float = 120.0) -> dict[str, str]:
        """The job when it has left its nodes, for good or for another time."""
        until(lambda: self.job(number)["JobState"] not in ("RUNNING", "COMPLETING"), lambda: self.output(number),
              seconds)
        return self.job(number)

    def output(self, number: str) -> str:
        file = self.directory / f"rlhf-ray-{number}.out"
        return file.read_text() if file.exists() else ""

    def processes(self) -> list[str]:
        """What runs on the nodes besides Slurm itself."""
        return [line for n in self.nodes for line in n.run("ps", "-ww", "-eo", "args", "--no-headers").splitlines()
                if line.split()[0] not in ("cat", "ps", *DAEMONS)]

    def left(self, number: str) -> list[str]:
        """What a job left behind: processes, files of Ray, its token."""
        with suppress(AssertionError):
            until(lambda: not self.processes(), "", 10)
        return [*self.processes(), *map(str, Path("/tmp").glob(f"ray-{number}*")),
                *map(str, (self.directory / ".ray").iterdir())]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes with 4 CPUs each, and a checkout with its .venv on a disk that all share."""
    directory = tmp_path_factory.mktemp("slurm")
    (directory / ".venv").symlink_to(sys.prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("SLURM_CONF", str(directory / "slurm.conf"))
        patch.setenv("HOME", str(directory))
        patch.setenv("HEAD_START_S", "8")
        missing = [program for program in (*DAEMONS, "sbatch") if shutil.which(program) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not on PATH (Debian: slurm-wlm)")
        try:
            with network(["controller", "alpha", "beta"], directory) as (controller, *nodes):
                yield Slurm(controller, nodes, directory)
        except NotAllowed as why:
            pytest.skip(f"namespaces are not allowed: {why}")


def test_a_mistake_is_handed_back(slurm):
    number = slurm.submit("ppo", "ppo.iteration=3")
    job = slurm.ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), slurm.output(number)
    assert "did you mean ppo.iterations" in slurm.output(number)
    assert slurm.left(number) == []


def test_preempted_it_saves_and_goes_on(slurm, models, reward_model, files, tmp_path):  # noqa: F811
    """TERM to the script alone, as at the time limit (--signal=B:TERM) and on preemption."""
    earlier_stages(tmp_path, models[0], reward_model)
    number = slurm.submit("ppo", *(o for o in SMALL if o != "cluster=local"), *files, "stages=[ppo]",
                          f"model.path={models[0]}", f"output_dir={tmp_path}", f"ppo.iterations={ITERATIONS}")
    metrics = tmp_path / "ppo/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, lambda: slurm.output(number), 200)
    slurm.told("scancel", "--signal=TERM", "--batch", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), slurm.output(number)
    assert slurm.left(number) == []
    slurm.running(number)
    job = slurm.ended(number, 200)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.output(number)
    saved = re.search(r"going on after iteration (\d+)", slurm.output(number))
    assert saved and 2 <= int(saved[1]) < ITERATIONS
    rows = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert rows == list(range(1, ITERATIONS + 1))
    assert slurm.left(number) == []


def test_cancelled_it_is_over(slurm, tmp_path):
    number = slurm.submit("ppo", f"output_dir={tmp_path}")
    until(lambda: sum("raylet/raylet " in line for line in slurm.processes()) == 2, lambda: slurm.output(number))
    slurm.told("scancel", number)
    assert slurm.ended(number)["JobState"] == "CANCELLED"
    assert slurm.left(number) == []
