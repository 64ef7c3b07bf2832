"""What a run tells in its job's metadata. Ray's key-value store is a dict here; `end_to_end/test_watching.py` has the
real one."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.experimental import internal_kv
from ray.job_submission import JobStatus

from metrics.runs import NOW, done, lock, running
from rlhf_ray.cluster import job
from rlhf_ray.cluster.job import OVERVIEW, Job, told, words
from rlhf_ray.cluster.submission import JobServer
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.overview import RunFiles
from rlhf_ray.metrics.wire import from_json, to_json


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process is the entrypoint of job `mine`, whose record is the one entry."""
    records = {"mine": {"status": "RUNNING", "entrypoint": "x", "metadata": {"owner": "ann", "run": "called so"}}}

    def get(key: str, namespace: bytes) -> bytes | None:
        found = records.get(key.removeprefix("_ray_internal_job_info_"))
        return json.dumps(found).encode() if found else None

    def put(key: str, value: str, overwrite: bool, namespace: bytes) -> None:
        records[key.removeprefix("_ray_internal_job_info_")] = json.loads(value)

    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {"job_submission_id": "mine"}}')
    monkeypatch.setattr(job, "LOOK_S", 0.01)
    return records


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def progress(store: dict[str, Any]) -> str | None:
    return store["mine"]["metadata"].get("progress")


def test_progress_is_told_as_it_is_made_and_at_the_end(tmp_path: Path, store: dict[str, Any]) -> None:
    running(tmp_path)
    lock(tmp_path, os.getpid(), 600)
    with told(tmp_path):
        until(lambda: progress(store) == "ppo 12/40")
        with (tmp_path / "ppo/metrics.jsonl").open("a") as file:
            file.write('{"iteration": 13, "score": 9.5}\n')
        until(lambda: progress(store) == "ppo 13/40")
        done(tmp_path, "ppo", 9.0)
    record = store["mine"]
    assert record["status"] == "RUNNING" and record["entrypoint"] == "x"
    metadata = record["metadata"]
    assert (metadata["owner"], metadata["run"], metadata["score"]) == ("ann", "called so", "9.5")  # others' stay
    assert from_json(metadata[OVERVIEW]).stages[3].state == "done"
    assert all(isinstance(value, str) for value in metadata.values())  # Ray refuses others


def test_a_run_of_a_sweep_is_told_from_that_of_another(tmp_path: Path, store: dict[str, Any]) -> None:
    """Where whoever submitted it gave no name."""
    del store["mine"]["metadata"]["run"]
    directory = tmp_path / "a/seed=1"
    running(directory)
    with told(directory):
        until(lambda: progress(store) == "ppo 12/40")
    assert store["mine"]["metadata"]["run"] == "a/seed=1"


def test_outside_of_a_job_nothing_is_told(tmp_path: Path, store: dict[str, Any],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (None, "{}", '{"metadata": null}'):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config or "")
        with told(running(tmp_path)):
            time.sleep(0.05)
    assert progress(store) is None


@pytest.mark.parametrize("status", ["STOPPED", "PENDING"])
def test_the_record_of_a_job_that_does_not_run_is_left_alone(tmp_path: Path, store: dict[str, Any],
                                                             status: str) -> None:
    """A status that the job's supervisor has written must not be lost."""
    store["mine"]["status"] = status
    before = json.dumps(store)
    with told(running(tmp_path)):
        time.sleep(0.05)
    assert json.dumps(store) == before


def test_of_a_job_of_another_cluster_nothing_is_made(tmp_path: Path, store: dict[str, Any]) -> None:
    """A driver in a job may start a Ray of its own."""
    store.clear()
    with told(running(tmp_path)):
        time.sleep(0.05)
    assert not store


def test_what_goes_wrong_is_said_once_and_the_run_goes_on(tmp_path: Path, store: dict[str, Any],
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing as [this]")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", broken)
    with told(running(tmp_path)):
        time.sleep(0.1)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("the metadata of job mine cannot be written") == 1 and "no such thing as [this]" in out


def test_the_words_are_of_the_stage_that_runs(tmp_path: Path) -> None:
    found = words(RunFiles(running(tmp_path)).read(NOW))
    assert {k: found[k] for k in ("under_way", "progress", "score", "kl")} == {
        "under_way": "ppo", "progress": "ppo 12/40", "score": "1.2", "kl": "3"}
    (tmp_path / "sft/stage.json").unlink()  # it is being done again
    (tmp_path / "ppo/config.yaml").unlink()
    os.utime(tmp_path / "sft/config.yaml", (NOW, NOW))
    found = words(RunFiles(tmp_path).read(NOW))
    assert (found["under_way"], found["progress"], found["loss"]) == ("sft", "sft 10", "4")


def test_if_none_runs_any_more_they_are_of_the_last_that_did(tmp_path: Path) -> None:
    """Its last iterations may have come after the last look."""
    done(running(tmp_path), "ppo", 9.0)
    assert words(RunFiles(tmp_path).read(NOW))["progress"] == "ppo 12/40"


# --- and how it is read ---


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, Any]:
    """A job that is watched, and what the job API says of it."""
    overview = to_json(RunFiles(running(tmp_path)).read(NOW))
    api = SimpleNamespace(status=JobStatus.RUNNING, metadata={
        "at": str(int(NOW) - 3), OVERVIEW: overview, "run": "a", "stage": "pipeline", "under_way": "ppo"})

    def details(server: JobServer, job: str) -> Any:
        if api.status is None:
            raise UserError(f"{server.address}: cannot look at job {job}: it is gone")
        return api

    monkeypatch.setattr(JobServer, "__init__", lambda server, address: setattr(server, "address", address))
    monkeypatch.setattr(JobServer, "details", details)
    return Job("mine", "http://head:8265"), api


def test_a_running_job_is_as_it_told(watched: tuple[Job, Any], tmp_path: Path) -> None:
    seen = watched[0].read(NOW)
    assert seen.heard == "job mine: running ppo, told 3 s ago"
    assert to_json(replace(seen, heard="")) == to_json(RunFiles(tmp_path).read(NOW))


@pytest.mark.parametrize(("status", "state"), [
    (JobStatus.SUCCEEDED, "done"), (JobStatus.FAILED, "failed"), (JobStatus.STOPPED, "stopped")])
def test_of_a_job_that_ended_nothing_runs(watched: tuple[Job, Any], status: JobStatus, state: str) -> None:
    """Whatever it could still tell."""
    mine, api = watched
    api.status = status
    seen = mine.read(NOW)
    assert [s.state for s in seen.stages] == ["done", "done", "done", state, "waiting"]
    assert seen.holder is None and seen.policy and seen.policy.eta_s is None
    assert seen.heard == f"job mine: {status.value.lower()}, told 3 s ago"


def test_a_job_that_has_told_nothing(watched: tuple[Job, Any]) -> None:
    mine, api = watched
    api.metadata = None
    seen = mine.read(NOW)
    assert (seen.heard, seen.stages, seen.policy) == ("job mine: running, it has told nothing yet", [], None)


def test_an_answer_that_does_not_come_is_an_error_at_first_and_later_a_word(watched: tuple[Job, Any]) -> None:
    mine, api = watched
    api.status = None
    with pytest.raises(UserError, match="http://head:8265: cannot look at job mine: it is gone"):
        mine.read(NOW)
    api.status = JobStatus.RUNNING
    before = mine.read(NOW)
    api.status = None
    seen = mine.read(NOW)
    assert seen.stages == before.stages and seen.heard == "http://head:8265: cannot look at job mine: it is gone"


def test_a_word_of_another_version_is_one_line(watched: tuple[Job, Any]) -> None:
    mine, api = watched
    api.metadata[OVERVIEW] = "{}"
    with pytest.raises(UserError, match=r"job mine: not the overview of a run: .*another version of rlhf-ray"):
        mine.read(NOW)
