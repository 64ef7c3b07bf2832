"""`rlhf-ray submit` up to the cluster, and while jobs run; tests/end_to_end/test_submit.py has a real one."""

import json
import re
import shlex
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus

from rlhf_ray import cli
from rlhf_ray.config.load import compose
from rlhf_ray.core.packing import NodeResources
from rlhf_ray.errors import UserError
from rlhf_ray.stages import submit as module
from rlhf_ray.stages.submit import Job, check_room, entrypoint, follow_all, follow_one, metadata, plan, send, travellers


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path


OWN = ["experiment=null", "data=files", "data.demonstrations=demos.jsonl", "model.path=./model", "stages=[sft]"]


def jobs_of(root: Path, *words: str, sweep: bool = False) -> list[Job]:
    return plan(words, [], sweep, root)


# --- before anything is sent ---


def test_the_command_is_the_users_but_for_output_dir(here: Path) -> None:
    job, = jobs_of(here, "sft", *OWN, "output_dir=runs/first", "sft.epochs=2")
    assert shlex.split(entrypoint(job, [])) == ["rlhf-ray", "sft", *OWN, "sft.epochs=2",
                                                f"output_dir={here}/runs/first"]
    assert metadata(job)["stage"] == "sft" and metadata(job)["run"] == "first"
    assert re.fullmatch(r"rlhf-sft-first-\d{4}-\d{6}-[0-9a-f]{4}", job.id)
    job, = jobs_of(here, "pipeline")
    assert job.overrides == (f"output_dir={here}/outputs/quickstart",)
    assert shlex.split(entrypoint(job, ["config-dir-0"]))[:4] == ["rlhf-ray", "pipeline", "--config-dir",
                                                                  "config-dir-0"]


@pytest.mark.parametrize("name", ["with space", "it's", "a=b,c", "ünï"])
def test_any_output_dir_survives_shell_and_hydra(here: Path, name: str) -> None:
    job, = jobs_of(here, "pipeline", f'output_dir="{here}/{name}"')
    assert compose(shlex.split(entrypoint(job, []))[2:]).output_dir == f"{here}/{name}"


def test_a_sweep_is_a_job_and_a_directory_for_each_choice(here: Path) -> None:
    jobs = jobs_of(here, "pipeline", "seed=1,2", "output_dir=runs", "algorithm=ppo,rloo",
                   "rollout.samples_per_prompt=4", sweep=True)
    assert [job.variant for job in jobs] == ["algorithm=ppo,seed=1", "algorithm=rloo,seed=1", "algorithm=ppo,seed=2",
                                             "algorithm=rloo,seed=2"]
    assert [f"{job.cfg.algorithm.name} {job.cfg.seed}" for job in jobs] == ["ppo 1", "rloo 1", "ppo 2", "rloo 2"]
    for job in jobs:
        assert compose(shlex.split(entrypoint(job, []))[2:]) == job.cfg
        assert job.cfg.output_dir == f"{here}/runs/{job.variant}"
    assert len({job.id for job in jobs}) == 4


@pytest.mark.parametrize(("words", "sweep", "says"), [
    (["sftt"], False, "unknown stage 'sftt'.*did you mean sft"),
    (["watch"], False, "unknown stage 'watch'"),
    (["sft", "seed=1,2"], False, "for a job each `rlhf-ray submit -m`"),
    (["sft", "seed=interval(1,2)"], True, "nor a finite choice"),
    (["sft", "seed=1,-2,-3"], True, r"seed=-2: seed=-2: must be >= 0"),
    (["sft", *OWN, "data.demonstrations=none.jsonl"], False, "data.demonstrations=none.jsonl: no such file"),
    (["sft", *OWN, "model.path=./none"], False, "no model there"),
])
def test_the_configuration_is_checked(here: Path, words: list[str], sweep: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        jobs_of(here, *words, sweep=sweep)


def test_an_absolute_path_may_be_there_only(here: Path) -> None:
    job, = jobs_of(here, "sft", *OWN, "data.demonstrations=/shared/demos.jsonl", "model.path=/shared/model")
    assert not list(travellers(job.cfg, "sft", here))


def test_what_is_named_travels(here: Path) -> None:
    job, = jobs_of(here, "sft", *OWN)
    assert set(travellers(job.cfg, "sft", here)) == {here / "demos.jsonl", here / "model"}
    (here / "rewards.py").write_text("")
    cfg = compose(["reward.sources=[model,'rewards:f','torch:g','http://h']"])
    assert list(travellers(cfg, "ppo", here)) == [here / "rewards.py"]
    cfg = compose([*OWN, "data.demonstrations=../x.jsonl"])
    with pytest.raises(UserError, match=r"data.demonstrations=../x.jsonl lies outside of .* give an absolute path"):
        list(travellers(cfg, "sft", here))


class Cluster:
    """A cluster whose jobs become what `looks` says, one after the other. None: Ctrl-C; an exception is raised."""

    address = "http://a:1"

    def __init__(self, *looks: JobStatus | BaseException, nodes: Sequence[NodeResources] = ()) -> None:
        self._looks, self._nodes = list(looks), list(nodes)
        self.stopped: list[str] = []

    def nodes(self) -> list[NodeResources]:
        return self._nodes

    def stop(self, job: str) -> None:
        self.stopped.append(job)

    def look(self, job: str) -> JobDetails:
        now = self._looks.pop(0)
        if isinstance(now, BaseException):
            raise now
        return JobDetails(type=JobType.SUBMISSION, status=now, entrypoint="", message="it says why",
                          driver_exit_code={"FAILED": 2, "SUCCEEDED": 0}.get(now.value))

    async def pieces(self, job: str) -> AsyncGenerator[str, None]:
        yield f"{len(self._looks)}\n"


def test_roles_that_do_not_fit_are_refused_stage_by_stage(here: Path) -> None:
    jobs = jobs_of(here, "pipeline")
    check_room(Cluster(nodes=[NodeResources("a", 4), NodeResources("b", 4)]), jobs)  # type: ignore[arg-type]
    small = Cluster(nodes=[NodeResources("a", 4)])
    with pytest.raises(UserError, match=r"ppo: the roles do not fit the cluster:\n  cpus: .* wanted, 4 offered"):
        check_room(small, jobs)  # type: ignore[arg-type]
    check_room(small, jobs_of(here, "pipeline", "cluster.autoscaling=true"))  # type: ignore[arg-type]


class Full(Cluster):
    """Takes two jobs; what comes then is an error. deaf: jobs that it cannot stop."""

    def __init__(self, error: BaseException, deaf: Sequence[str] = ()) -> None:
        super().__init__()
        self._error, self._deaf, self.taken = error, deaf, list[str]()

    def submit(self, job: str, entrypoint: str, metadata: dict[str, str], archive: Path | None) -> None:
        if len(self.taken) == 2:
            raise self._error
        self.taken.append(job)

    def stop(self, job: str) -> None:
        if job in self._deaf:
            raise UserError("cannot")
        super().stop(job)


def three() -> list[Job]:
    return [Job("sft", f"seed={k}", (), compose([]), f"job-{k}") for k in (1, 2, 3)]


def test_if_one_of_several_cannot_be_sent_those_before_it_are_stopped() -> None:
    """And itself, for what was lost may have been the answer."""
    cluster = Full(UserError("http://a:1: the cluster did not take job job-3: it is full"))
    with pytest.raises(UserError) as told:
        send(cluster, three(), [], None)  # type: ignore[arg-type]
    assert cluster.taken == ["job-1", "job-2"] and sorted(cluster.stopped) == ["job-1", "job-2", "job-3"]
    assert str(told.value) == ("http://a:1: the cluster did not take job job-3: it is full; the 2 sent before it will "
                               "stop")


def test_those_that_cannot_be_stopped_are_named() -> None:
    with pytest.raises(UserError) as told:
        send(Full(UserError("gone"), deaf=["job-2", "job-3"]), three(), [], None)  # type: ignore[arg-type]
    assert str(told.value) == ("gone; these, sent before it, go on: job-2; stop each with `RAY_AUTH_MODE=token ray job "
                               "stop --address http://a:1 JOB`")


def test_one_that_cannot_be_sent_says_why_and_no_more() -> None:
    cluster = Full(UserError("full"))
    cluster.taken += ["another's"] * 2
    with pytest.raises(UserError, match=r"^full$"):
        send(cluster, three()[:1], [], None)  # type: ignore[arg-type]


def test_ctrl_c_while_jobs_are_sent_takes_them_back(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Full(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        send(cluster, three(), [], None)  # type: ignore[arg-type]
    assert {"job-1", "job-2"} <= set(cluster.stopped)
    assert "the 2 sent before it will stop" in capsys.readouterr().out


# --- while it runs ---

RUNNING, DONE, FAILED, STOPPED = JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> list[str | BaseException]:
    """What somebody at a terminal says to Ctrl-C."""
    answers: list[str | BaseException] = []

    def ask(*_: object, **__: object) -> str:
        said = answers.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr(module.Prompt, "ask", ask)
    monkeypatch.setattr(module.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(type(module.console), "is_terminal", True)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    return answers


def run(cluster: Cluster, *variants: str) -> int:
    cfg = compose([])
    jobs = [Job("sft", name, (), cfg, f"rlhf-sft-{name or 'run'}") for name in variants or [""]]
    if len(jobs) == 1:
        return follow_one(cluster, jobs[0])  # type: ignore[arg-type]
    return follow_all(cluster, jobs)  # type: ignore[arg-type]


def test_the_end_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Cluster(DONE)) == 0
    assert run(Cluster(FAILED)) == 2
    assert "job rlhf-sft-run: failed with exit status 2" in capsys.readouterr().out


def test_ctrl_c_where_nobody_can_answer_stops_watching_only(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(KeyboardInterrupt())
    assert run(cluster) == 130 and not cluster.stopped
    out = capsys.readouterr().out
    assert "the job goes on; watch: " in out and "ray job stop --address http://a:1 rlhf-sft-run" in out


def test_ctrl_c_and_an_answer(answer: list[str | BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    answer[:] = ["w"]
    cluster = Cluster(KeyboardInterrupt())
    assert run(cluster) == 130 and not cluster.stopped
    answer[:] = [KeyboardInterrupt()]
    cluster = Cluster(KeyboardInterrupt())
    assert run(cluster) == 130 and not cluster.stopped
    answer[:] = ["s"]
    cluster = Cluster(KeyboardInterrupt(), RUNNING, STOPPED)
    assert run(cluster) == 143 and cluster.stopped == ["rlhf-sft-run"]
    assert "stopped; the same command goes on" in capsys.readouterr().out
    answer[:] = ["s"]
    cluster = Cluster(KeyboardInterrupt(), KeyboardInterrupt())  # it is stopped, and nobody wants to wait
    assert run(cluster) == 130 and cluster.stopped == ["rlhf-sft-run"]


def test_several_jobs(answer: list[str | BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Cluster(RUNNING, RUNNING, ConnectionError(), DONE, FAILED), "seed=1", "seed=2") == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:4]] == ["seed=1: running", "seed=2: running", "seed=1: succeeded",
                                                            "seed=2: failed"]
    answer[:] = ["s"]
    cluster = Cluster(DONE, RUNNING, KeyboardInterrupt(), STOPPED)
    assert run(cluster, "seed=1", "seed=2") == 143 and cluster.stopped == ["rlhf-sft-seed=2"]


# --- the command ---


@pytest.mark.parametrize(("argv", "says"), [
    (["submit"], "submit: no stage; give one of pretrain"),
    (["submit", "sft", "--address", "10.0.0.1"], "--address=10.0.0.1: give the address of the cluster's dashboard"),
    (["ppo", "-m", "seed=1,2"], "--multirun is an option of `rlhf-ray submit`"),
    (["ppo", "--no-wait"], "--no-wait is an option of `rlhf-ray submit`"),
])
def test_one_line_and_status_2(argv: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_everything_is_packed_and_sent(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, str], list[str]]] = []

    class Sees(Cluster):
        def __init__(self, address: str) -> None:
            super().__init__(nodes=[NodeResources("a", 8)])

        def submit(self, job: str, entrypoint: str, metadata: dict[str, str], archive: Path) -> None:
            from zipfile import ZipFile

            sent.append((entrypoint, metadata, ZipFile(archive).namelist()))

    monkeypatch.setattr(module, "JobServer", Sees)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    (here / "own/experiment").mkdir(parents=True)
    (here / "own/experiment/mine.yaml").write_text("# @package _global_\nseed: 5\n")
    assert cli.main(["submit", "--no-wait", "-m", "sft", *OWN, "experiment=mine", "sft.epochs=1,2", "--config-dir",
                     "own"]) == 0
    assert [shlex.split(command)[:4] for command, _, _ in sent] == [["rlhf-ray", "sft", "--config-dir",
                                                                     "config-dir-0"]] * 2
    assert [facts["run"] for _, facts, _ in sent] == ["run/sft.epochs=1", "run/sft.epochs=2"]
    assert "config-dir-0/experiment/mine.yaml" in sent[0][2] and "demos.jsonl" in sent[0][2]
    assert json.dumps(sent[0][2]) == json.dumps(sent[1][2])
