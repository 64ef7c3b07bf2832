"""Why a run ended: from what was seen to one cause, and one paragraph for a person. Pure.

Ray says the same of a process that kill -9 ended, that the kernel ended for lack of memory, or that crashed: "common
causes include the OOM killer and SIGSEGV". What tells them apart is the kernel's count of such kills and the actor's
own log, so Ray's words are matched only where they say one thing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from rlhf_ray.cluster.health import Member
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.memory import GIB

# Causes of which an actor died; where several did, the others are more likely to follow from the earlier one here.
_DEATHS = ("node_lost", "out_of_memory", "killed", "crashed", "python_error", "hung", "overdue")
CAUSES = (*_DEATHS, "user_error", "driver_error")

_NODE = re.compile(r"its node has died|actor \w+ is unavailable")
_RAY_OOM = re.compile(r"killed due to the node running low on memory\.[^\n]*?(Memory on the node[^\n]*)?$", re.M)
_NO_MEMORY = re.compile(r"MemoryError\b[^\n]*|std::bad_alloc|can't allocate memory[^\n]*|out of memory[^\n]*", re.I)
_CRASH = re.compile(r"\*\*\* (SIG(?:SEGV|ABRT|BUS|ILL|FPE)) received|Fatal Python error: ([^\n]+)")
_FRAME = re.compile(r"most recent call first\):\n\s*File ([^\n]+)")
_EXIT = re.compile(r"exits with an exit code (\d+)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its words


@dataclass(frozen=True)
class Facts:
    """What was seen. members: all that were watched, the lost ones with `gone`. error: what the driver caught.
    iteration: None outside of one. logs: the end of each actor's output and errors, by its name. oom_kills: what the
    kernel of each node counted after the end, by node id; a node that cannot be asked is absent. lost_nodes: ids."""

    members: Sequence[Member] = ()
    error: BaseException | None = None
    phase: str = ""
    iteration: int | None = None
    logs: Mapping[str, str] = field(default_factory=dict)
    oom_kills: Mapping[str, int] = field(default_factory=dict)
    lost_nodes: Collection[str] = ()


@dataclass(frozen=True)
class Diagnosis:
    """cause: one of CAUSES. first: the actor that failed first, None if it was the driver or is unknown."""

    cause: str
    summary: str
    first: Member | None = None


def diagnose(facts: Facts) -> Diagnosis:
    """The cause, and a paragraph: who failed first, where and when, what tells it apart, and what to do next."""
    cause, first, evidence = _find(facts)
    when = f"in iteration {facts.iteration}" if facts.iteration is not None else "outside of any iteration"
    when += f", phase {facts.phase}" if facts.phase else ""
    others = ", ".join(f"{_short(m)} ({m.gone})" for m in facts.members if m.gone and m is not first)
    text = [f"{_who(first)} {_HAPPENED[cause]} {when}: {evidence}.", others and f"Also gone: {others}.",
            _next(cause, first)]
    return Diagnosis(cause, " ".join(t for t in text if t), first)


def _find(facts: Facts) -> tuple[str, Member | None, str]:
    errors = list(_chain(facts.error))
    plain = [e for e in errors if not isinstance(e, RayTaskError)]
    told = next((e for e in plain if isinstance(e, UserError)), None)
    lost = [e for e in plain if isinstance(e, RayActorError | OutOfMemoryError | NodeDiedError)]
    if told is not None and not lost:
        return "user_error", None, str(told)
    gone = [m for m in facts.members if m.gone] or [_lost(e, facts) for e in lost[:1]]
    if gone:
        found = [(*_death(m, facts), m) for m in gone]
        cause, evidence, first = min(found, key=lambda x: _DEATHS.index(x[0]))
        return cause, first, evidence
    raised = next((e for e in errors if isinstance(e, RayTaskError)), None)
    if raised is not None:
        raiser, said = _member(str(raised), facts), _said(raised.cause or raised)
        cause = "out_of_memory" if _NO_MEMORY.search(said) else "python_error"
        return cause, raiser, f"it raised {said}{_kills_so_far(raiser, facts)}"
    late = next((e for e in plain if isinstance(e, TimeoutError)), None)
    if late is not None:
        return "overdue", None, str(late)
    return "driver_error", None, f"it raised {_said(facts.error)}" if facts.error else "nothing says why"


def _death(m: Member, facts: Facts) -> tuple[str, str]:
    """Cause and evidence of one death."""
    log = facts.logs.get(m.name, "")
    if m.node_id in facts.lost_nodes:
        return "node_lost", "Ray has declared its node dead"
    if m.gone in ("hung", "overdue"):
        return m.gone, m.words
    if m.gone == "failed":
        said = ANSI.sub("", m.words).strip().splitlines()[-1]
        return "out_of_memory" if _NO_MEMORY.search(said) else "python_error", f"its setup raised {said}"
    if ray_says := _RAY_OOM.search(m.words):
        return "out_of_memory", f"Ray's memory monitor killed it. {ray_says[1] or ''}; {_held(m)}"
    if ray_says := _NODE.search(m.words):
        return "node_lost", f"Ray says: {ray_says[0]}; no end of its process was reported"
    if crash := _CRASH.search(log):
        if refused := _NO_MEMORY.search(log):
            return "out_of_memory", f"its log says {refused[0]}; {_held(m)}"
        frame = _FRAME.search(log)
        return "crashed", f"its log says {crash[1] or crash[2]}" + (f", in {frame[1]}" if frame else "")
    if "creation task" in m.words:
        return "python_error", "its constructor raised " + ANSI.sub("", m.words).strip().splitlines()[-1]
    if code := _EXIT.search(m.words):
        return "python_error", f"it called sys.exit, exit code {code[1]}"
    if "SIGTERM" in m.words:
        return "killed", "its process received SIGTERM"
    if "`ray.kill`" in m.words:
        return "killed", "somebody called ray.kill on it"
    return _silent(m, facts)


def _silent(m: Member, facts: Facts) -> tuple[str, str]:
    """A process that ended without a word: only the kernel's count tells why."""
    after, last = facts.oom_kills.get(m.node_id), m.pulses[-1][1] if m.pulses else None
    if after is None or last is None:
        return "killed", (f"its process ended without a word; whether for lack of memory is not known ({_held(m)}; "
                          "`dmesg` on its node says)")
    if (kills := after - last.oom_kills) > 0:
        return "out_of_memory", (f"the kernel of node {m.node} counted {kills} kill{'s' * (kills > 1)} for lack of "
                                 f"memory after its last sign of life; {_held(m)}")
    return "killed", ("its process ended without a word, as by kill -9 or os._exit; the kernel of its node counted no "
                      f"kill for lack of memory; {_held(m)}")


def _held(m: Member) -> str:
    """Memory at the last sign of life, and up to five minutes before."""
    if not m.pulses:
        return "it never gave a sign of life"
    end, last = m.pulses[-1]
    start, before = next((t, p) for t, p in m.pulses if t >= end - 300)
    text = f"it held {last.rss / GIB:.1f} GiB at its last sign of life"
    grown = last.rss > 1.1 * before.rss
    return text + (f", up from {before.rss / GIB:.1f} GiB {end - start:.0f} s before" if grown else "")


def _kills_so_far(m: Member | None, facts: Facts) -> str:
    # What an actor raises may be that a process of its own, such as an engine's, is gone.
    if m is None or not m.pulses:
        return ""
    kills = facts.oom_kills.get(m.node_id, 0) - m.pulses[0][1].oom_kills
    return f" (and the kernel of its node counted {kills} kills for lack of memory since it began)" if kills > 0 else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, what an actor raised included."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            yield error.cause
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _lost(error: BaseException, facts: Facts) -> Member:
    """The actor whose death only the error tells of."""
    words = str(error)
    member = _member(words, facts) or Member("an actor", -1, "", None)
    return Member(**{**vars(member), "gone": "died",
                     "words": "its node has died" if isinstance(error, NodeDiedError) else words})


def _member(text: str, facts: Facts) -> Member | None:
    """The actor that Ray's text names by its process."""
    pid = re.search(r"\bpid[=:] ?(\d+)", text)
    return next((m for m in facts.members if pid and m.pid == int(pid[1])), None)


def _said(error: object) -> str:
    """Type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")


def _short(m: Member) -> str:
    return f"{m.role}-{m.index}" if m.index >= 0 else m.role


def _who(m: Member | None) -> str:
    if m is None:
        return "The run"
    return _short(m) + (f" (pid {m.pid}, node {m.node})" if m.pid else "")


_HAPPENED = {
    "node_lost": "was lost with its node", "out_of_memory": "ran out of memory", "killed": "was killed from outside",
    "crashed": "crashed", "python_error": "failed", "hung": "hung and was killed", "overdue": "took too long",
    "user_error": "was stopped", "driver_error": "failed in the driver",
}
_NEXT = {
    "node_lost": "Look at that machine and its network (`ray status`), bring it back or add another.",
    "killed": "Find out who ended it: a person, a job scheduler, a container's limit.",
    "crashed": "The native stack is in {log}; `rlhf-ray doctor` names libraries that do not fit together.",
    "python_error": "The whole traceback is in traceback.txt.",
    "hung": "What it did last is in {log}; if the machine was merely slow, raise cluster.heartbeat_timeout_s.",
    "overdue": "What it did last is in {log}; if the work takes so long, raise cluster.call_timeout_s.",
    "driver_error": "The whole traceback is in traceback.txt.",
}
_SMALLER = {"generator": "kv_cache_gib", **dict.fromkeys(("policy", "critic", "supervised", "reward", "reference"),
                                                         "micro_batch_tokens")}


def _next(cause: str, m: Member | None) -> str:
    if cause == "user_error":
        return ""  # its message says what to do
    advice = _NEXT.get(cause, "").format(log=f"logs/{_short(m)}.log" if m else "logs/")
    if cause == "out_of_memory":
        smaller = f", or lower roles.{m.role}.{_SMALLER[m.role]}" if m and m.role in _SMALLER else ""
        advice = f"Give it more memory{smaller}; memory.csv shows who grew."
    return f"{advice} The same command goes on from the newest whole checkpoint, if there is one."
