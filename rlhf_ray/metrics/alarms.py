"""What is watched while the policy trains, and when it rings: one function per alarm, on the numbers of metrics.jsonl.

Each function defines one number and returns it with a sentence where it is beyond `alarms.NAME.threshold`, else None.
A number that is absent keeps its alarm silent, and so does one that is not finite: that is the alarm `nonfinite`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_ray.config.schema import AlarmConfig, AlarmsConfig

Finding = tuple[float, str]  # the number, and what to say about it
Row = dict[str, Any]  # `iteration`, and the numbers of WATCHED: None where absent or not finite

WATCHED = ("entropy", "response_length", "score", "judge_score")  # what alarms compare over iterations
_FLOOR = 1e-9  # least standard error of a slope, so that t stays finite on a line without noise


@dataclass(frozen=True)
class Alarm:
    """One ring. value: the number as the function `name` of this module defines it; action: log, pause or stop;
    message: one sentence, what was measured, the threshold, the likely cause, what to do."""

    name: str
    iteration: int
    value: float
    threshold: float
    action: str
    message: str


# --- the alarms ---


def kl(values: Mapping[str, Any], threshold: float) -> Finding | None:
    """`kl_per_sequence`, the mean over responses of log(policy / reference): above `threshold` nats per response."""
    nats = _number(values, "kl_per_sequence")
    if nats is None or nats <= threshold:
        return None
    return nats, (
        f"KL from the reference is {nats:.3g} nats per response, above alarms.kl.threshold={threshold:g}: the policy "
        "has left the texts that the reward was made for, and its scores mean little there; raise algorithm.kl_coef or "
        "set algorithm.kl_target, or lower ppo.policy_optimizer.lr"
    )


def entropy(values: Mapping[str, Any], baseline: float | None, threshold: float) -> Finding | None:
    """`entropy` (nats per token) as a share of `baseline`, its mean over the warm-up: below `threshold`."""
    nats = _number(values, "entropy")
    if nats is None or baseline is None or baseline <= 0 or nats >= threshold * baseline:
        return None
    return nats / baseline, (
        f"entropy is {nats:.3g} nats per token, {nats / baseline:.2g} of the {baseline:.3g} it began with and below "
        f"alarms.entropy.threshold={threshold:g}: the policy is settling on a few responses and stops exploring; raise "
        "algorithm.entropy_coef or algorithm.kl_coef, or lower ppo.policy_optimizer.lr"
    )


def length(values: Mapping[str, Any], baseline: float | None, threshold: float) -> Finding | None:
    """`response_length` (tokens) over `baseline`, its mean over the warm-up: above `threshold`, below 1 / threshold^2.

    Downwards the factor counts twice, for a policy that learns to come to an end may well halve its responses: of 20
    healthy runs of the quickstart's task (4 algorithms, 5 seeds) 7 went below 1 / 1.6, none below 1 / 1.8.

    The baseline is of the first iterations, so a policy that is paid for length has hardly grown by then. What rings
    is bounded by rollout.max_response_tokens: a limit below threshold x baseline can only be reached downwards.
    """
    tokens = _number(values, "response_length")
    if tokens is None or baseline is None or baseline <= 0:
        return None
    if tokens <= threshold * baseline and baseline <= threshold**2 * tokens:
        return None
    longer = tokens > baseline
    factor = f"{threshold:g}" if longer else f"1/{threshold:g}^2"
    cause = "longer ones may be what the reward pays for" if longer else "the reward may pay for saying little"
    cure = "set reward.overlong_tokens, or " if longer else ""
    return tokens / baseline, (
        f"responses are {tokens:.3g} tokens long, {tokens / baseline:.3g} times the {baseline:.3g} they began with and "
        f"beyond {factor} (alarms.length.threshold={threshold:g}): {cause}; read samples, and {cure}raise "
        "algorithm.kl_coef or mend the reward"
    )


def repetition(values: Mapping[str, Any], threshold: float) -> Finding | None:
    """`repeated_ngrams`, the share (0 to 1) of 3-grams of tokens seen before in the same response: above `threshold`.

    What people write repeats more as it grows: 0.6% of the first 48 tokens of film reviews, 5% of the first 1024.
    Program text repeats about 25% of itself: raise the threshold for it.
    """
    share = _number(values, "repeated_ngrams")
    if share is None or share <= threshold:
        return None
    return share, (
        f"{share:.1%} of 3-grams were already in the same response, above alarms.repetition.threshold={threshold:g}: "
        "the policy fills its responses with what the reward pays for; read samples, and raise algorithm.kl_coef, "
        "lower rollout.max_response_tokens or mend the reward"
    )


def divergence(rows: Sequence[Row], window: int, threshold: float) -> Finding | None:
    """The smaller of t(score) and -t(judge_score) over the last `window` iterations: above `threshold`.

    t is a least-squares slope over its standard error, so this asks for a judge that clearly falls while the score,
    which is optimised and rises anyway, clearly rises. Rows that lack either number keep it silent.

    If noise were independent, t of a series without a trend would be Student's with window - 2 degrees of freedom:
    above 3 in 0.9% of windows of 10. But neighbouring iterations share a policy: a correlation of r between neighbours
    widens t by about sqrt((1 + r) / (1 - r)), 1.7 for r = 0.5; and every iteration looks again. So read `threshold` as
    how many (too small) standard errors both trends must stand out, not as an error rate. What keeps false alarms rare
    is that both scores are of the same responses and move together. Simulated with the noise of quickstart runs
    (correlation between the two 0.85; r = 0.2 and 0.5), a score that creeps up on a judge that stays rings in 0.2% and
    1.5% of runs of 40 iterations; a judge that falls by its noise within 2 iterations rings in all of them.
    """
    rows = rows[-window:]
    if len(rows) < window or any(row["score"] is None or row["judge_score"] is None for row in rows):
        return None
    at = [row["iteration"] for row in rows]
    (rise, t_score), (fall, t_judge) = (trend(at, [row[key] for row in rows]) for key in ("score", "judge_score"))
    if min(t_score, -t_judge) <= threshold:
        return None
    return min(t_score, -t_judge), (
        f"over the last {window} iterations the score rose by {rise:.2g} and the independent judge fell by {-fall:.2g} "
        f"per iteration (t of these slopes {t_score:.3g} and {t_judge:.3g}, both beyond alarms.divergence.threshold="
        f"{threshold:g}): the policy exploits the reward; stop here, and "
        "raise algorithm.kl_coef, take fewer ppo.iterations or mend the reward"
    )


def nonfinite(values: Mapping[str, Any], threshold: float) -> Finding | None:
    """Recorded numbers, in nested dicts too, that are NaN, infinite or None (as JSON writes those): any at all; or
    else the larger of `policy_skipped_steps` and `critic_skipped_steps`: above `threshold` steps per iteration.

    Not counted: `explained_variance`, undefined where all returns are equal, and the gradient norms of a role that
    counts its skipped steps, because they are not finite exactly where one was skipped.
    """
    skipped = {role: steps for role in ("policy", "critic")
               if (steps := _number(values, f"{role}_skipped_steps")) is not None}
    exempt = {"explained_variance", *(f"{role}_grad_norm" for role in skipped)}
    if skipped.get("policy"):
        exempt |= {"rl_grad_norm", "ptx_grad_norm"}
    broken = [path for key, value in values.items() if key not in exempt for path in _not_finite(value, str(key))]
    if broken:
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return float(len(broken)), (
            f"not a finite number: {names} (none may be): a score was none, or the weights overflowed; do not "
            "trust these weights, look at the scores, and lower ppo.policy_optimizer.lr or set model.dtype=float32"
        )
    role = max(skipped, key=lambda role: skipped[role], default="")
    if not role or skipped[role] <= threshold:
        return None
    return skipped[role], (
        f"{skipped[role]:g} optimizer steps of the {role} were skipped in this iteration, above "
        f"alarms.nonfinite.threshold={threshold:g}: gradients were not finite"
        f"{f', of {fault}' if (fault := values.get(f'{role}_fault')) else ''}; lower ppo.{role}_optimizer.lr or set "
        "model.dtype=float32"
    )


def equal_groups(values: Mapping[str, Any], threshold: float) -> Finding | None:
    """`equal_groups`, the share (0 to 1) of groups whose scores are all equal: at or above `threshold`.

    Such a group has no advantage and teaches nothing. Absent from algorithms without groups.
    """
    share = _number(values, "equal_groups")
    if share is None or share < threshold:
        return None
    return share, (
        f"in {share:.0%} of groups all responses have the same score, at or above alarms.equal_groups.threshold="
        f"{threshold:g}: such groups teach nothing, because their prompts are all too hard or too easy, or the reward "
        "tells no responses apart; raise rollout.samples_per_prompt or rollout.temperature, or change prompts or reward"
    )


def memory(values: Mapping[str, Any], first: Sequence[Mapping[str, float]], threshold: float) -> Finding | None:
    """Largest growth of an actor's resident memory since the end of the warm-up: above `threshold`, a factor.

    Not since its beginning: a first update makes room for gradients and moments, and loading a model may take more.
    """
    base = {name: gib for row in first for name, gib in row.items()}
    grown = {name: gib / base[name] for name, gib in (values.get("memory_gib") or {}).items() if base.get(name)}
    worst = max(grown, key=lambda name: grown[name], default="")
    if not worst or grown[worst] <= threshold:
        return None
    return grown[worst], (
        f"{worst} holds {values['memory_gib'][worst]:.2f} GiB, {grown[worst]:.2f} times what it held after the warm-up "
        f"and beyond alarms.memory.threshold={threshold:g}: it may be leaking, and its node may kill it; look at "
        "memory_gib in metrics.jsonl, and restart the stage if it goes on (it resumes)"
    )


# --- watching a run ---


class AlarmMonitor:
    """Looks at every iteration once and remembers what the alarms compare over iterations.

    An alarm that rang stays silent for `cooldown` further iterations; one whose action is `off` never rings. The
    baselines of `entropy` and `length` are means over the first `warmup_iterations` that the monitor saw, that of
    `memory` is what each actor held at their end; all three are silent until then.
    """

    def __init__(self, cfg: AlarmsConfig) -> None:
        self.cfg = cfg
        self._first: list[Row] = []  # the warm-up
        self._last: list[Row] = []  # the window of `divergence`
        self._rang: dict[str, int] = {}  # alarm: the iteration at which it last rang

    def check(self, iteration: int, values: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of this iteration, from the values that metrics.jsonl gets. Leave out what was not measured."""
        self._forget(iteration)
        row = {"iteration": iteration, "memory_gib": dict(values.get("memory_gib") or {})}
        row |= {key: _number(values, key) for key in WATCHED}
        warm = len(self._first) < self.cfg.warmup_iterations
        if warm:
            self._first.append(row)
        self._last = [*self._last, row][-self.cfg.window :]
        base = {key: None if warm else _mean(row[key] for row in self._first) for key in ("entropy", "response_length")}
        cfg = self.cfg
        found = {
            "kl": kl(values, cfg.kl.threshold),
            "entropy": entropy(values, base["entropy"], cfg.entropy.threshold),
            "length": length(values, base["response_length"], cfg.length.threshold),
            "repetition": repetition(values, cfg.repetition.threshold),
            "divergence": divergence(self._last, cfg.window, cfg.divergence.threshold),
            "nonfinite": nonfinite(values, cfg.nonfinite.threshold),
            "equal_groups": equal_groups(values, cfg.equal_groups.threshold),
            "memory": None if warm else memory(values, [row["memory_gib"] for row in self._first],
                                               cfg.memory.threshold),
        }
        rung = [self._ring(name, iteration, *finding) for name, finding in found.items() if finding]
        return [alarm for alarm in rung if alarm]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON-able."""
        return {"first": list(self._first), "last": list(self._last), "rang": dict(self._rang)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the monitor that `state_dict` is of."""
        self._first, self._last, self._rang = list(state["first"]), list(state["last"]), dict(state["rang"])

    def _ring(self, name: str, iteration: int, value: float, message: str) -> Alarm | None:
        alarm: AlarmConfig = getattr(self.cfg, name)
        silent = name in self._rang and iteration - self._rang[name] <= alarm.cooldown
        if alarm.action == "off" or silent:
            return None
        self._rang[name] = iteration
        return Alarm(name, iteration, value, alarm.threshold, alarm.action, message)

    def _forget(self, iteration: int) -> None:
        """Drop what was seen at this iteration or later: a resumed run repeats those since its checkpoint."""
        self._first = [row for row in self._first if row["iteration"] < iteration]
        self._last = [row for row in self._last if row["iteration"] < iteration]
        self._rang = {name: rang for name, rang in self._rang.items() if rang < iteration}


def replay(cfg: AlarmsConfig, history: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    """The alarms that would have rung over lines of metrics.jsonl, oldest first."""
    monitor = AlarmMonitor(cfg)
    return [alarm for line in history for alarm in monitor.check(line["iteration"], line)]


# --- numbers ---


def trend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(least-squares slope of y over x, its t: the slope over its standard error, 0 without a trend).

    The standard error is at least 1e-9, so that points on a line give a large number, not infinity or NaN.
    """
    dx, dy = np.asarray(x, np.float64) - np.mean(x), np.asarray(y, np.float64) - np.mean(y)
    squares = dx @ dx
    slope = dx @ dy / squares
    residuals = dy - slope * dx
    return float(slope), float(slope / max(_FLOOR, math.sqrt(residuals @ residuals / (len(dx) - 2) / squares)))


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """A recorded number; None where it is absent or not finite."""
    value = values.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def _mean(numbers: Iterable[float | None]) -> float | None:
    known = [n for n in numbers if n is not None]
    return sum(known) / len(known) if known else None


def _not_finite(value: Any, path: str) -> Iterator[str]:
    """Dotted paths of the entries of a recorded value that are NaN, infinite or None."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _not_finite(entry, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _not_finite(entry, f"{path}.{i}")
    else:
        value = value.item() if hasattr(value, "item") else value
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            yield path
