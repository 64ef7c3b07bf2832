"""How a run is doing, told in the metadata of its Ray job, and read from there by whoever may ask the job API.

The driver writes: a thread looks every two seconds whether the run's files have grown. Ray has no public way to change
the metadata of a job that runs; this file alone knows the private one, and a run goes on without it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.errors import UserError
from rlhf_ray.metrics.overview import Overview, RunFiles
from rlhf_ray.metrics.progress import console
from rlhf_ray.metrics.wire import from_json, to_json
from rlhf_ray.storage import run_name

UNDER_WAY = "under_way"  # the key of the stage's name
OVERVIEW = "overview"  # the key of what `rlhf-ray watch` shows; the others are for people
LOOK_S = 2.0  # how often it is looked whether a file has grown
REPEAT_S = 10.0  # told again after so long, though none has: a stage may have begun
_ENDED = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}  # a stage that was running when it ended


def submission_id() -> str | None:
    """Of the job whose entrypoint this process is a part of; None outside of any."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return (config.get("metadata") or {}).get("job_submission_id")


@contextmanager
def told(directory: Path) -> Iterator[None]:
    """For as long as this lasts, the metadata of this process's job say how the run in `directory` is doing.

    Does nothing outside of a job, or in one of another cluster. What goes wrong is said once, and nothing more is told.
    """
    job = submission_id()
    if job is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_tell, args=(job, RunFiles(directory), stop), name="job-metadata", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)  # a cluster that does not answer must not keep a run from ending


def _tell(job: str, files: RunFiles, stop: threading.Event) -> None:
    name, told_at = run_name(files.directory), 0.0
    before: list[int] | None = None
    try:
        while before is None or not stop.is_set():
            now = files.sizes()
            if now != before or time.monotonic() - told_at > REPEAT_S:
                if not _put(job, name, words(files.read(time.time()))):
                    return
                before, told_at = now, time.monotonic()
            stop.wait(LOOK_S)
        _put(job, name, words(files.read(time.time())))
    except Exception as error:
        console.print(f"the metadata of job {job} cannot be written, so it can only be watched by its files: {error}",
                      markup=False)


def words(overview: Overview) -> dict[str, str]:
    """The entries of the metadata: `at`, unix seconds; UNDER_WAY, `progress` and numbers of the stage that runs, else
    of the one that ran last; OVERVIEW."""
    found = {"at": str(int(time.time()))}
    begun = [stage for stage in overview.stages if stage.state == "running" or stage.age_s is not None]
    now = min(begun, key=lambda stage: (stage.state != "running", stage.age_s or 0.0), default=None)
    if now:
        total = overview.policy.total if overview.policy and now.name == "ppo" else None
        found[UNDER_WAY] = now.name  # of a pipeline; `stage` is what was submitted
        found["progress"] = f"{now.name} {now.step}" + (f"/{total}" if total else "")
        for name, key in (("loss", "loss"), ("score", "score"), ("kl", "kl_per_sequence")):
            last = (now.series.get(key) or [None])[-1]
            if last is not None:
                found[name] = f"{last:.4g}"
    return {**found, OVERVIEW: to_json(overview)}


def _put(job: str, run: str, entries: Mapping[str, str]) -> bool:
    """Add entries to a job's metadata; those that others made stay. False if there is no such job, or it has ended.

    Nobody else writes the job's record while its entrypoint runs, so read and write need no transaction.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job)
    found = _internal_kv_get(key, namespace=KV_NAMESPACE_JOB)
    record: dict[str, Any] = json.loads(found) if found else {"status": "none"}
    if record["status"] != "RUNNING":
        return False
    record["metadata"] = {"run": run, **(record.get("metadata") or {}), **entries}
    _internal_kv_put(key, json.dumps(record), overwrite=True, namespace=KV_NAMESPACE_JOB)
    return True


class Job:
    """A run on any machine, as its job tells of it. address: of the cluster's dashboard (None: as `find_address` does).

    Raises UserError if the job server does not answer the first questions; later the last answer is given again.
    """

    def __init__(self, submission_id: str, address: str | None) -> None:
        from rlhf_ray.cluster.submission import JobServer, find_address

        self.id, self._server = submission_id, JobServer(find_address(address))
        self._last: Overview | None = None

    def read(self, now: float) -> Overview:
        """now: unix seconds."""
        try:
            self._last = self._read(now)
        except UserError as error:
            if self._last is None:
                raise
            return replace(self._last, heard=str(error))
        return self._last

    def _read(self, now: float) -> Overview:
        details = self._server.details(self.id)
        status, told = str(details.status.value), details.metadata or {}
        heard = f"job {self.id}: {status.lower()}"
        if status == "RUNNING" and UNDER_WAY in told:
            heard += f" {told[UNDER_WAY]}"
        if OVERVIEW not in told:
            return Overview(Path(told.get("run", "?")), None, [], None, f"{heard}, it has told nothing yet")
        try:
            overview, told_s = from_json(told[OVERVIEW]), max(0.0, now - float(told["at"]))
        except ValueError as error:
            raise UserError(f"job {self.id}: {error}; it was started by another version of rlhf-ray") from error
        heard += f", told {told_s:.0f} s ago"
        if status not in _ENDED:
            return replace(overview, heard=heard)
        stages = [replace(s, state=_ENDED[status]) if s.state == "running" else s for s in overview.stages]
        policy = overview.policy and replace(overview.policy, eta_s=None)
        return replace(overview, holder=None, stages=stages, policy=policy, heard=heard)
