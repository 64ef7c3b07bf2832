"""What a run that ended badly leaves behind: a directory for whoever looks into it, and a paragraph on the console.

    <stage directory>/post_mortem-YYYYmmdd-HHMMSS/
        summary.txt      the paragraph: see diagnosis.py
        report.json      the same for programs; `missing` names what could not be had, and why
        traceback.txt    of the driver's exception, an actor's own traceback included
        memory.csv, .png resident memory of every actor over time
        config.yaml      of the run
        logs/ROLE-N.log  the last lines of each actor's standard output and error, read on its own node
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.cluster.diagnosis import ANSI, Diagnosis, Facts, diagnose
from rlhf_ray.cluster.health import Member
from rlhf_ray.metrics.memory import kernel_oom_kills
from rlhf_ray.metrics.progress import console
from rlhf_ray.storage import shown
from rlhf_ray.versions import installed

_LINES, _BYTES = 200, 2**18  # the end of a log: so many lines, looked for in so many bytes
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "KEY")


def write_post_mortem(
    directory: Path, members: Iterable[Member], error: BaseException | None, phase: str = "",
    iteration: int | None = None, config: str = "", restarts: int = 0, deadline_s: float = 10.0,
) -> Path:
    """Write `directory`/post_mortem-YYYYmmdd-HHMMSS and print its summary; returns that path.

    To be called while Ray still runs. config: the run's, as YAML. restarts: how many lost actors were replaced before.
    deadline_s: for all that is asked of the cluster, seconds. Never raises: what fails is in report.json, `missing`.
    """
    out = directory / time.strftime("post_mortem-%Y%m%d-%H%M%S")
    missing: list[str] = []

    def attempt(what: str, do: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return do()
        except Exception as failure:
            missing.append(f"{what}: {type(failure).__name__}: {failure}")
            return otherwise

    cast: list[Member] = attempt("members", lambda: [replace(m, pulses=m.pulses.copy()) for m in members], [])
    scene: _Scene = attempt("cluster", lambda: _visit(cast, deadline_s, missing), _Scene())
    facts = Facts(cast, error, phase, iteration, scene.logs, scene.oom_kills, scene.lost_nodes)
    found = attempt("diagnosis", lambda: diagnose(facts), Diagnosis("driver_error", f"The run failed: {error!r}."))
    attempt("directory", lambda: (out / "logs").mkdir(parents=True, exist_ok=True))
    attempt("summary.txt", lambda: _write(out / "summary.txt", found.summary + "\n"))
    attempt("traceback.txt", lambda: _write(out / "traceback.txt", _traceback(error)))
    attempt("config.yaml", lambda: _write(out / "config.yaml", config))
    for m in cast:
        text = scene.logs.get(m.name) or scene.silent.get(m.node_id, "nobody could be asked for this log\n")
        attempt(f"log of {m.name}", partial(_write, out / "logs" / f"{m.role}-{m.index}.log", text))
    attempt("memory.csv", lambda: _write(out / "memory.csv", _memory_table(cast)))
    attempt("memory.png", lambda: _draw_memory(cast, out / "memory.png"))
    versions = attempt("versions", installed, {})
    report = attempt("report", lambda: _report(facts, found, scene, restarts), {}) | {"versions": versions}
    attempt("report.json", lambda: _write(out / "report.json", json.dumps(report | {"missing": missing}, indent=2,
                                                                           default=str)))
    unwritten = f"{out} could not be written: {'; '.join(missing)}"
    where = f"Everything about it: {shown(out)}" if out.is_dir() else unwritten
    attempt("console", lambda: console.print(redact(f"{found.summary} {where}"), markup=False))
    return out


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the values of environment variables whose names sound secret."""
    values = {value for name, value in environment.items()
              if len(value) >= 8 and any(word in name.upper() for word in _SECRET_NAMES)}
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, "***")
    return text


def _write(path: Path, text: str) -> None:
    path.write_text(redact(text), encoding="utf-8")


# -- what is asked of the cluster --------------------------------------------------------------------------------------


@dataclass
class _Scene:
    """nodes: as Ray lists them. logs: by name of the actor. silent: by node id, why it has no logs for us."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    resources: dict[str, float] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    oom_kills: dict[str, int] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)

    @property
    def lost_nodes(self) -> set[str]:
        return {node["NodeID"] for node in self.nodes if not node["Alive"]}


def _visit(members: Sequence[Member], deadline_s: float, missing: list[str]) -> _Scene:
    """What the cluster and its nodes still tell. Its head may hang: so a thread asks, and is left behind if late."""
    scene, notes = _Scene(), list[str]()
    if not ray.is_initialized():  # a task would start a new one
        missing.append("cluster: Ray is not running")
        return scene
    thread = threading.Thread(target=_look, args=(members, deadline_s, scene, notes), name="post-mortem", daemon=True)
    thread.start()
    thread.join(deadline_s + 2)
    missing += [*notes, *(f"cluster: no answer within {deadline_s + 2:.0f} s" for _ in range(thread.is_alive()))]
    return scene


def _look(members: Sequence[Member], deadline_s: float, scene: _Scene, notes: list[str]) -> None:
    try:
        deadline = time.monotonic() + deadline_s
        scene.nodes = list(ray.nodes())
        scene.resources = dict(ray.cluster_resources())
        calls = {}
        for node in {m.node_id for m in members if m.node_id}:
            if node in scene.lost_nodes:
                scene.silent[node] = "its node is gone, and this log with it\n"
                continue
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            files = {m.name: m.logs for m in members if m.node_id == node}
            scene.silent[node] = f"its node did not answer within {deadline_s:.0f} s\n"
            calls[node] = _read.options(scheduling_strategy=here).remote(files)
        for node, call in calls.items():
            try:
                logs, scene.oom_kills[node] = ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
                scene.logs |= logs
            except Exception as failure:
                scene.silent[node] = f"its node could not be asked for this log: {failure}\n"
        notes += [f"logs of node {node}: {scene.silent[node].strip()}" for node in scene.silent
                  if node not in scene.oom_kills]
    except Exception as failure:
        notes.append(f"cluster: {type(failure).__name__}: {failure}")


@ray.remote(num_cpus=0, max_retries=0)
def _read(files: dict[str, tuple[str, ...]]) -> tuple[dict[str, str], int]:
    """On a node: the ends of these logs, and what its kernel counts. Its secrets may be other than the driver's."""
    return {name: redact("".join(_end(path) for path in paths)) for name, paths in files.items()}, kernel_oom_kills()


def _end(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_LINES:]
    except OSError as error:
        lines = [f"({error})"]
    return "\n".join([f"==> {path} <==", *lines, ""])


# -- the files ---------------------------------------------------------------------------------------------------------


def _report(facts: Facts, found: Diagnosis, scene: _Scene, restarts: int) -> dict[str, Any]:
    error = facts.error
    inner = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    return {
        "cause": found.cause, "summary": found.summary, "first": _entry(found.first) if found.first else None,
        "deaths": [_entry(m) for m in facts.members if m.gone], "phase": facts.phase, "iteration": facts.iteration,
        "exception": {"type": type(inner).__name__, "message": str(inner)} if inner else None, "restarts": restarts,
        "resources": scene.resources, "kernel_oom_kills": scene.oom_kills,
        "nodes": [{"id": n["NodeID"], "host": n["NodeManagerHostname"], "address": n["NodeManagerAddress"],
                   "alive": n["Alive"], "resources": n["Resources"]} for n in scene.nodes],
    }


def _entry(m: Member) -> dict[str, Any]:
    return {"role": m.role, "index": m.index, "name": m.name, "pid": m.pid, "node": m.node, "node_id": m.node_id,
            "how": m.gone, "words": m.words, "last_pulse": asdict(m.pulses[-1][1]) if m.pulses else None}


def _traceback(error: BaseException | None) -> str:
    return ANSI.sub("", "".join(traceback.format_exception(error))) if error is not None else "no exception\n"


def _memory_table(members: Sequence[Member]) -> str:
    rows = sorted((t, f"{m.role}-{m.index}", p.rss / 2**20) for m in members for t, p in m.pulses)
    return "unix_time,actor,rss_mib\n" + "".join(f"{t:.1f},{actor},{rss:.1f}\n" for t, actor, rss in rows)


def _draw_memory(members: Sequence[Member], path: Path) -> None:
    if not any(m.pulses for m in members):
        return
    import matplotlib as mpl  # here, for `_read` imports this module on every node
    from matplotlib.figure import Figure

    from rlhf_ray.evaluation.figure import STYLE, from_zero

    end = max(m.pulses[-1][0] for m in members if m.pulses)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for m in members:
            axes.plot([(t - end) / 60 for t, _ in m.pulses], [p.rss / 2**30 for _, p in m.pulses],
                      label=f"{m.role}-{m.index}" + (f" ({m.gone})" if m.gone else ""))
        axes.set(xlabel="minutes before the last sign of life of all", ylabel="resident memory, GiB")
        from_zero(axes)
        axes.legend(loc="upper left", fontsize=8)
        figure.savefig(path, dpi=120)
