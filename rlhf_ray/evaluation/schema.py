"""What report.json must hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BY_MODEL = ("judge_score", "rm_score", "distinct_2", "held_out_loss", "mean_length")


def validate_report(
    report: Mapping[str, Any], baselines: Sequence[str] = ("base", "sft"), policy: str = "ppo"
) -> None:
    """Raise ValueError, naming the first offending path, unless the report is complete and well-typed.

    Needed: policy (the name of the stage that made it, ppo or dpo), algorithm, total_seconds, stages.<name>.seconds,
    peak_rss_gib, judge.held_out_accuracy, labeler.(held_out_accuracy, self_agreement, noise_ceiling),
    rm.(val_accuracy, ci95), win_rate.<policy>_vs_<baseline>.(wins, ties, losses, rate, ci95, n), (judge_score,
    rm_score, distinct_2, held_out_loss, mean_length).<model>, kl_per_sequence, actors[i].(role, class, node, pid),
    versions, seed.
    May be None: `labeler`, where people made the rankings or nobody did; `rm` and `rm_score` together, where the run
    has no reward model; judge.held_out_accuracy, where the judge is a verifier or the reward model.
    If there: `accuracy`, for tasks with a verifier, holds <model>.(right, n, rate, ci95) and
    <policy>_minus_sft.(gained, lost, n, difference, ci95); `dpo` holds (val_accuracy, ci95); `config` is text and
    `data` a mapping. Numbers must be finite.
    """
    _need(report, "policy", lambda x: x == policy, policy)
    _need(report, "algorithm", lambda x: isinstance(x, str), "text")
    for path in ("total_seconds", "peak_rss_gib", "kl_per_sequence"):
        _need(report, path, _is_number, "a finite number")
    _need(report, "rm", lambda x: x is None or isinstance(x, Mapping), "a mapping or null")
    for name in ("rm", "dpo"):
        if report.get(name) is not None:
            _need(report, f"{name}.val_accuracy", _is_number, "a finite number")
            _need(report, f"{name}.ci95", _is_interval, "two ascending numbers")
    _need(report, "judge.held_out_accuracy", lambda x: x is None or _is_number(x), "a finite number or null")
    for name in _need(report, "stages", _is_filled_mapping, "a mapping with at least one stage"):
        _need(report, f"stages.{name}.seconds", _is_number, "a finite number")
    labeler = _need(report, "labeler", lambda x: x is None or isinstance(x, Mapping), "a mapping or null")
    if labeler is not None:
        for key in ("held_out_accuracy", "self_agreement", "noise_ceiling"):
            _need(report, f"labeler.{key}", _is_number, "a finite number")
    for path in (f"win_rate.{policy}_vs_{name}" for name in baselines):
        for key in ("wins", "ties", "losses", "n"):
            _need(report, f"{path}.{key}", _is_count, "a whole number, not negative")
        _need(report, f"{path}.rate", _is_number, "a finite number")
        _need(report, f"{path}.ci95", _is_interval, "two ascending numbers")
    models = (*baselines, policy)
    if report["rm"] is None:
        _need(report, "rm_score", lambda x: x is None, "null, as rm is")
    for key in BY_MODEL:
        for name in models if key != "rm_score" or report["rm"] is not None else ():
            _need(report, f"{key}.{name}", _is_number, "a finite number")
    if report.get("accuracy") is not None:
        for path in (*(f"accuracy.{name}" for name in models), f"accuracy.{policy}_minus_sft"):
            difference = path.endswith("_minus_sft")
            for key in ("gained", "lost", "n") if difference else ("right", "n"):
                _need(report, f"{path}.{key}", _is_count, "a whole number, not negative")
            _need(report, f"{path}.{'difference' if difference else 'rate'}", _is_number, "a finite number")
            _need(report, f"{path}.ci95", _is_interval, "two ascending numbers")
    actors = _need(report, "actors", lambda x: isinstance(x, list) and len(x) > 0, "a list of actors")
    for i in range(len(actors)):
        for key in ("role", "class", "node"):
            _need(report, f"actors.{i}.{key}", lambda x: isinstance(x, str), "text")
        _need(report, f"actors.{i}.pid", _is_count, "a whole number, not negative")
    _need(report, "versions", _is_filled_mapping, "a mapping of names to versions")
    _need(report, "seed", _is_count, "a whole number, not negative")
    if report.get("config") is not None:
        _need(report, "config", lambda x: isinstance(x, str), "YAML text")
    if report.get("data") is not None:
        _need(report, "data", lambda x: isinstance(x, Mapping), "a mapping")


def _need(report: Mapping[str, Any], path: str, fits: Callable[[Any], bool], what: str) -> Any:
    """The value at a dotted path (list entries by number); ValueError with the path if missing or unfit."""
    value: Any = report
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"report lacks {path}") from error
    if not fits(value):
        raise ValueError(f"report.{path} must be {what}, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(_is_number, value))
        and value[0] <= value[1]
    )


def _is_filled_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0
