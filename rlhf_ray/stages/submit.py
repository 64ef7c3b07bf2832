"""`rlhf-ray submit STAGE [overrides]`: a stage as a job of a running Ray cluster.

Everything is checked before anything is sent: the configuration, the files that go along, the cluster, its token, its
versions and its resources. What only the nodes know (do they have the package, can they write output_dir) the job finds
out in its first seconds: see rlhf_ray/cluster/preflight.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.prompt import Prompt
from rich.table import Table

from rlhf_ray.cluster.submission import LOST_S, STOPPED, TROUBLE, JobServer, Lost, Output, exit_status, find_address
from rlhf_ray.cluster.working_dir import collect, write
from rlhf_ray.config.checks import check_model, stages_of, validate
from rlhf_ray.config.load import compose, did_you_mean, expand
from rlhf_ray.config.reward_sources import SERVICE
from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.core.packing import shortfall
from rlhf_ray.data.sources import paths_of
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.storage import local_root, run_name
from rlhf_ray.train.stage_roles import MODEL, layout_of, roles_of
from rlhf_ray.versions import find

COMMANDS = (*STAGES, "pipeline")
INTERRUPTED = 130  # as a shell has it
NOT_FOUND = 127
QUEUE_S = 7 * 24 * 3600.0  # a job of a sweep waits so long for its turn
_LOOK_S = 2.0  # how often several jobs are looked at


@dataclass(frozen=True)
class Job:
    """One run. variant: its choices of a sweep, or empty. overrides: as the job gets them."""

    stage: str
    variant: str
    overrides: tuple[str, ...]
    cfg: Config
    id: str


def submit(words: Sequence[str], config_dirs: Sequence[str], address: str | None, sweep: bool, wait: bool) -> int:
    """Submit `words`, a stage and overrides, and follow: the exit status of the job, of several the worst."""
    server_address = find_address(address)
    root = Path.cwd()
    jobs = plan(words, config_dirs, sweep, root)
    others = {f"config-dir-{i}": Path(d).absolute() for i, d in enumerate(config_dirs)}
    named = [path for job in jobs for path in travellers(job.cfg, job.stage, root)]
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "working_dir.zip"
        try:
            files = collect(root, {Path(job.cfg.output_dir) for job in jobs}, named, others)
            write(files, archive)
        except OSError as error:
            raise UserError(f"cannot pack {error.filename or root}: {error.strerror or error}") from error
        server = JobServer(server_address)
        check_room(server, jobs)
        if files:
            size = archive.stat().st_size / 2**20
            console.print(f"{len(files)} files of {root} go along, {size:.1f} MiB", markup=False)
        send(server, jobs, list(others), archive if files else None)
    if not wait:
        console.print(how_to(server_address, jobs), markup=False)
        return 0
    return follow_one(server, jobs[0]) if len(jobs) == 1 else follow_all(server, jobs)


# --- before anything is sent ---


def plan(words: Sequence[str], config_dirs: Sequence[str], sweep: bool, root: Path) -> list[Job]:
    """The jobs, their configurations checked. Raises UserError.

    output_dir becomes absolute, for a job runs in a directory of Ray's own; each run of a sweep gets one below it, and
    waits for its turn where not all find room at once.
    """
    if not words or words[0] not in COMMANDS:
        said = f"unknown stage {words[0]!r}" if words else "no stage"
        raise UserError(f"submit: {said}; give one of {', '.join(COMMANDS)}"
                        + (did_you_mean(words[0], COMMANDS) if words else ""))
    stage, jobs = words[0], []
    for overrides, variant in expand(words[1:]) if sweep else [(list(words[1:]), "")]:
        cfg = compose(overrides, config_dirs)
        try:
            validate(cfg, stage)
            check_paths_from(cfg, stage)
        except UserError as error:
            raise UserError("\n".join(f"{variant}: {line}" if variant else line
                                      for line in str(error).splitlines())) from error
        where = cfg.output_dir if "://" in cfg.output_dir else os.path.normpath(root / cfg.output_dir)
        cfg.output_dir = f"{where}/{variant.replace('/', '-')}" if variant else where
        kept = [text for text in overrides if not re.match(r"\+*output_dir=", text)]
        if variant and cfg.cluster.queue_timeout_s is None:  # its sisters may be there first
            cfg.cluster.queue_timeout_s = QUEUE_S
            kept.append(f"cluster.queue_timeout_s={QUEUE_S}")
        jobs.append(Job(stage, variant, (*kept, f"output_dir={quoted(cfg.output_dir)}"), cfg, job_id(stage, cfg)))
    return jobs


def check_paths_from(cfg: Config, stage: str) -> None:
    """As for a run here; but an absolute path that is not here may be on the nodes: the job looks again."""
    if not Path(cfg.model.path).is_absolute() or Path(cfg.model.path).exists():
        check_model(cfg, stage)
    for name in stages_of(cfg, stage):
        for key, path in paths_of(cfg.data, name).items():
            if not path.is_absolute() and not path.is_file():
                raise UserError(f"{key}={path}: no such file")


def travellers(cfg: Config, stage: str, root: Path) -> Iterator[Path]:
    """What the configuration names by a relative path goes along, whatever .gitignore says.

    Raises UserError if it is not below `root`.
    """
    named = {"model.path": Path(cfg.model.path)} if Path(cfg.model.path).exists() else {}
    for name in stages_of(cfg, stage):
        named |= paths_of(cfg.data, name)
    for key, path in named.items():
        if path.is_absolute():
            continue
        whole = Path(os.path.normpath(root / path))
        if not whole.is_relative_to(root):
            raise UserError(f"{key}={path} lies outside of {root} and would not go along: give an absolute path that "
                            "every node has")
        yield whole
    for source in cfg.reward.sources:
        if source != MODEL and not source.startswith(SERVICE):
            top = source.split(":")[0].split(".")[0]
            yield from (path for path in (root / top, root / f"{top}.py") if path.exists())


def check_room(server: JobServer, jobs: Sequence[Job]) -> None:
    """Raises UserError, demand beside supply, if the roles of a stage do not fit the cluster."""
    nodes = server.nodes()
    for job in jobs:
        cluster = job.cfg.cluster
        for name in stages_of(job.cfg, job.stage):
            missing = shortfall(layout_of(job.cfg, roles_of(job.cfg, name)), nodes, cluster.strategy)
            if missing and not cluster.autoscaling:
                raise UserError(f"{name}: {missing}\n  lower roles.*.replicas, ranks, cpus or gpus, add nodes, or set "
                                "cluster.autoscaling=true if they come when asked for")


def send(server: JobServer, jobs: Sequence[Job], config_dirs: Sequence[str], archive: Path | None) -> None:
    """Start every job. archive: what goes along.

    If one cannot be sent, those before it are stopped, for nobody would follow them. Raises UserError, one line.
    """
    sent = list[Job]()
    try:
        for job in jobs:
            server.submit(job.id, entrypoint(job, config_dirs), metadata(job), archive)
            console.print(f"job {job.id} on {server.address}\n  output_dir={job.cfg.output_dir}", markup=False)
            sent.append(job)
    except BaseException as error:  # Ctrl-C, too
        with suppress(UserError, IndexError):
            server.stop(jobs[len(sent)].id)  # it may have been taken, and the answer lost
        said = take_back(server, sent)
        if isinstance(error, UserError):
            raise UserError(f"{error}{said and '; '}{said}") from error
        console.print(said, markup=False)
        raise


def take_back(server: JobServer, sent: Sequence[Job]) -> str:
    """Stop jobs; says what became of them, in one line."""
    left = []
    for job in sent:
        try:
            server.stop(job.id)
        except UserError:
            left.append(job.id)
    if left:
        return (f"these, sent before it, go on: {', '.join(left)}; stop each with `RAY_AUTH_MODE=token ray job stop "
                f"--address {server.address} JOB`")
    return f"the {len(sent)} sent before it will stop" if sent else ""


def entrypoint(job: Job, config_dirs: Sequence[str]) -> str:
    """The job's command, for a shell."""
    options = [word for name in config_dirs for word in ("--config-dir", name)]
    return shlex.join(["rlhf-ray", job.stage, *options, *job.overrides])


def metadata(job: Job) -> dict[str, str]:
    run = run_name(local_root(job.cfg.output_dir))
    return {"stage": job.stage, "run": run, "rlhf_ray": find("rlhf-ray") or "a checkout"}


def job_id(stage: str, cfg: Config) -> str:
    """Readable, and one of its kind: it names files and is part of URLs."""
    run = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(cfg.output_dir).name)[:40].strip("-.")
    return f"rlhf-{stage}-{run}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def quoted(value: str) -> str:
    """A value as Hydra's syntax has it."""
    return value if re.fullmatch(r"[\w./-]+", value, re.ASCII) else "'" + value.replace("'", r"\'") + "'"


# --- while it runs ---


def follow_one(server: JobServer, job: Job) -> int:
    """Show what the job prints until it ends; its exit status. Ctrl-C asks what is meant."""
    output, stopping = Output(server, job.id), False
    while output.ended is None:
        try:
            with ExitStack() as waiting:
                waiting.enter_context(console.status("waiting for the job"))
                asyncio.run(_show(output, waiting))
        except KeyboardInterrupt:
            if stopping or not _asked_to_stop(server, [job]):
                return INTERRUPTED
            stopping = True
        except Lost as error:
            return _lost(server, [job], error)
    status = exit_status(output.ended)
    if output.ended.driver_exit_code is None and status not in (0, STOPPED):
        console.print((output.ended.message or "").strip(), markup=False, style="red")
    if status == NOT_FOUND:
        console.print("the head node finds no rlhf-ray: install it there, and call `ray start` from its environment",
                      markup=False, style="red")
    console.print(f"job {job.id}: {_words(status)}", markup=False)
    return status


async def _show(output: Output, waiting: ExitStack) -> None:
    async for text in output.follow():
        waiting.close()
        sys.stdout.write(text)
        sys.stdout.flush()


def follow_all(server: JobServer, jobs: Sequence[Job]) -> int:
    """Tell of every change until all jobs have ended, then how each ended; the worst exit status."""
    before, ended = dict[str, str](), dict[str, int]()
    heard, stopping = time.monotonic(), False
    while len(ended) < len(jobs):
        try:
            for job in (job for job in jobs if job.id not in ended):
                now = server.look(job.id)
                if before.get(job.id) != now.status:
                    before[job.id] = now.status
                    console.print(f"{time.strftime('%T')} {job.variant}: {now.status.value.lower()}", markup=False)
                if now.status.is_terminal():
                    ended[job.id] = exit_status(now)
            heard = time.monotonic()
            time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            if stopping or not _asked_to_stop(server, [job for job in jobs if job.id not in ended]):
                return INTERRUPTED
            stopping = True
        except TROUBLE as error:
            if time.monotonic() - heard > LOST_S:
                return _lost(server, jobs, error)
            time.sleep(_LOOK_S)
    table = Table("run", "job", "")
    for job in jobs:
        table.add_row(job.variant, job.id, _words(ended[job.id]))
    console.print(table)
    return max(ended.values())


def _asked_to_stop(server: JobServer, jobs: Sequence[Job]) -> bool:
    """After Ctrl-C: stop the jobs, or say how that is done later. Where nobody can answer, and at a second Ctrl-C,
    they go on."""
    what = "the job" if len(jobs) == 1 else f"all {len(jobs)} jobs"
    answer = "w"
    if sys.stdin.isatty() and console.is_terminal:
        try:
            answer = Prompt.ask(f"stop {what} (s), or only stop watching (w)?", choices=["s", "w"], default="w")
        except (KeyboardInterrupt, EOFError):
            console.print()
    if answer == "w":
        console.print(f"{what} {'goes' if len(jobs) == 1 else 'go'} on; {how_to(server.address, jobs)}", markup=False)
        return False
    for job in jobs:
        server.stop(job.id)
    console.print(f"stopping {what}: what there is will be saved first", markup=False)
    return True


def _lost(server: JobServer, jobs: Sequence[Job], error: BaseException) -> int:
    console.print(f"{server.address} has not answered for {LOST_S:.0f} s ({error}); the job may still run, "
                  f"{how_to(server.address, jobs)}", markup=False, style="red")
    return 1


def how_to(address: str, jobs: Sequence[Job]) -> str:
    """How to watch and to stop jobs from elsewhere."""
    ray_job = f"RAY_AUTH_MODE=token ray job {{}} --address {address}"
    ids = " ".join(job.id for job in jobs) if len(jobs) == 1 else "JOB"
    return f"watch: {ray_job.format('logs --follow')} {ids}\n  stop: {ray_job.format('stop')} {ids}"


def _words(status: int) -> str:
    if status == STOPPED:
        return "stopped; the same command goes on from what it saved"
    return "done" if status == 0 else f"failed with exit status {status}"
