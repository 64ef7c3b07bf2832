"""report.json for machines and a self-contained report.html for people."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

MODELS = ("base", "sft", "ppo")
_BY_MODEL = ("judge_score", "rm_score", "distinct_2", "held_out_loss", "mean_length")
_COLORS = {"base": "#98a2ad", "sft": "#4f81bd", "ppo": "#0f766e", "warm": "#c2703d", "plum": "#8b6aa8"}
_PHASES = {"rollout": "#4f81bd", "score": "#8fb3d9", "update": "#0f766e", "weight_sync": "#c2703d"}
_PHASE_OTHER = ("#b9c0c8", "#8b6aa8", "#d5b35c")
_STAGE_TEXT = {
    "pretrain": "trained the base model on plain text",
    "sft": "fine-tuned it on demonstrations",
    "compare": "sampled several responses per prompt and had them ranked",
    "rm": "trained the reward model on the rankings",
    "ppo": "optimised the policy against the reward model",
    "eval": "compared the three models on held-out prompts",
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "svg.fonttype": "path",  # looks the same everywhere; what the plot says is in its label and caption
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9c0c8",
    "axes.labelcolor": "#4b5661",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "xtick.color": "#4b5661",
    "ytick.color": "#4b5661",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def write_report(
    report: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    out_dir: Path,
) -> None:
    """Write report.json, then report.html, into `out_dir`; each appears whole or not at all.

    report: the keys that `validate_report` lists, and optionally `config` (YAML text) and `data` (counts by
    part). history: one dict per PPO iteration, as in metrics.jsonl. samples: {"prompt": text, "base" | "sft"
    | "ppo": {"text": text, "judge": score}}. Whatever is missing is left out of the page. Raises ValueError,
    naming the path, for a number that is not finite, before anything is written.
    """
    plain = _plain(report, "report")
    out_dir.mkdir(parents=True, exist_ok=True)
    # The numbers first: a page that cannot be drawn must not cost them.
    _write_atomic(out_dir / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    _write_atomic(out_dir / "report.html", render_html(plain, history, samples))


def validate_report(report: Mapping[str, Any], baselines: Sequence[str] = ("base", "sft")) -> None:
    """Raise ValueError, naming the first offending path, unless the report is complete and well-typed.

    Needed: total_seconds, stages.<name>.seconds, peak_rss_gib, judge.held_out_accuracy,
    labeler.(held_out_accuracy, self_agreement, noise_ceiling), rm.(val_accuracy, ci95),
    win_rate.ppo_vs_<baseline>.(wins, ties, losses, rate, ci95, n), (judge_score, rm_score, distinct_2,
    held_out_loss, mean_length).<model>, kl_per_sequence, actors[i].(role, class, node, pid), versions, seed.
    `labeler` may be None: people made the rankings; so may
    judge.held_out_accuracy: there was no judge but the reward model. `config` and `data`, if there, must be text and a
    mapping. Numbers must be finite.
    """
    for path in (
        "total_seconds",
        "peak_rss_gib",
        "rm.val_accuracy",
        "kl_per_sequence",
    ):
        _need(report, path, _is_number, "a finite number")
    _need(report, "rm.ci95", _is_interval, "two ascending numbers")
    _need(report, "judge.held_out_accuracy", lambda x: x is None or _is_number(x), "a finite number or null")
    for name in _need(report, "stages", _is_filled_mapping, "a mapping with at least one stage"):
        _need(report, f"stages.{name}.seconds", _is_number, "a finite number")
    labeler = _need(report, "labeler", lambda x: x is None or isinstance(x, Mapping), "a mapping or null")
    if labeler is not None:
        for key in ("held_out_accuracy", "self_agreement", "noise_ceiling"):
            _need(report, f"labeler.{key}", _is_number, "a finite number")
    for path in (f"win_rate.ppo_vs_{name}" for name in baselines):
        for key in ("wins", "ties", "losses", "n"):
            _need(report, f"{path}.{key}", _is_count, "a whole number, not negative")
        _need(report, f"{path}.rate", _is_number, "a finite number")
        _need(report, f"{path}.ci95", _is_interval, "two ascending numbers")
    for key in _BY_MODEL:
        for name in (*baselines, "ppo"):
            _need(report, f"{key}.{name}", _is_number, "a finite number")
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


def headline(report: Mapping[str, Any]) -> str | None:
    """The main result in a sentence, `PPO preferred over SFT in 83% ...`; None before any comparison."""
    for name in ("sft", "base"):
        result = _get(report, f"win_rate.ppo_vs_{name}")
        if result:
            return f"PPO preferred over {_title(name)} in {_rate(result)} of {result['n']:,} held-out prompts"
    return None


def render_html(
    report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> str:
    """The page as text; arguments as in `write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rows, stages, shown = list(history), _stages(report), [_sample(sample) for sample in samples]
    columns = [name for name in MODELS if any(name in (report.get(key) or {}) for key in _BY_MODEL)]
    return environment.get_template("report.html.j2").render(
        headline=headline(report),
        summary=_summary(report, rows),
        comparisons=_comparisons(report),
        columns=[_title(name) for name in columns],
        metrics=_metrics(report, columns),
        trust=_trust(report),
        sample_columns=[
            (name, _title(name)) for name in MODELS if any(name in one["by_model"] for one in shown)
        ],
        samples=shown,
        stages=stages,
        costs=_costs(report, stages, rows),
        data=list((report.get("data") or {}).items()),
        actors=report.get("actors") or [],
        versions=list((report.get("versions") or {}).items()),
        seed=report.get("seed"),
        config=report.get("config"),
        win_plot=_win_plot(report),
        progress=_present(_score_plot(rows), _kl_plot(rows), _length_plot(rows), _phase_plot(rows)),
        overoptimisation=_overoptimisation_plot(rows),
        diagnostics=_present(_loss_plot(rows), _clip_plot(rows), _entropy_plot(rows), _fit_plot(rows)),
    )


# --- what the page says -----------------------------------------------------------------------------


def _summary(report: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    """What was made, in a sentence or two."""
    done = report.get("stages") or {}
    made = "A language model was"
    steps = [
        "fine-tuned on demonstrations" if "sft" in done else "",
        "given a reward model trained on ranked responses" if "rm" in done else "",
        f"optimised against it with PPO{f' for {len(rows)} iterations' if rows else ''}"
        if "ppo" in done
        else "",
    ]
    steps = [step for step in steps if step]
    if not steps:
        return "What this run has measured so far."
    listed = steps[0] if len(steps) == 1 else f"{', '.join(steps[:-1])} and {steps[-1]}"
    return f"{made} {listed}."


def _comparisons(report: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    for name in ("sft", "base"):
        result = _get(report, f"win_rate.ppo_vs_{name}")
        if result:
            low, high = result["ci95"]
            found.append(
                {
                    "name": f"against {_title(name)}",
                    "rate": f"{result['rate']:.1%}",
                    "interval": f"{100 * low:.1f} to {high:.1%}",
                    "counts": f"{result['wins']:,} / {result['ties']:,} / {result['losses']:,}",
                }
            )
    return found


def _metrics(report: Mapping[str, Any], columns: list[str]) -> list[dict[str, Any]]:
    """The rows of the main table: name, what it means, a cell per model, and PPO's change to SFT."""

    def row(key: str, name: str, hint: str, form: str, relative: bool) -> dict[str, Any] | None:
        values = report.get(key) or {}
        if not values:
            return None
        cells = [format(values[m], form).replace("-", "−") if m in values else "–" for m in columns]
        change = ""
        if "sft" in values and "ppo" in values:
            gain = values["ppo"] - values["sft"]
            if not relative:  # the zero of a score is arbitrary, so a ratio of two would mean nothing
                change = f"{gain:+.2f}"
            elif values["sft"]:
                change = f"{gain / values['sft']:+.1%}"
        return {"name": name, "hint": hint, "cells": cells, "change": change.replace("-", "−")}

    kl = report.get("kl_per_sequence")
    cells = [{"sft": "0", "ppo": f"{kl:.1f}"}.get(m, "–") for m in columns] if kl is not None else []
    return _present(
        row(
            "judge_score",
            "Judge score",
            "mean score of a judge that training never saw; higher is better",
            ".2f",
            False,
        ),
        row(
            "rm_score",
            "Reward-model score",
            "what PPO maximised; demonstrations score 0 on average",
            ".2f",
            False,
        ),
        {
            "name": "KL per sequence",
            "hint": "distance from SFT, nats per response",
            "cells": cells,
            "change": "",
        }
        if cells
        else None,
        row(
            "distinct_2",
            "Distinct-2",
            "unique word pairs over all word pairs, same number of responses",
            ".3f",
            True,
        ),
        row("mean_length", "Length", "mean response, tokens", ".1f", True),
        row(
            "held_out_loss",
            "Held-out loss",
            "language-model loss on unseen text, nats per token; its rise over SFT is the alignment tax",
            ".3f",
            True,
        ),
    )


def _trust(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """How good the judge, the labeler and the reward model are: (name, value, meaning)."""

    def fact(path: str, name: str, meaning: str) -> dict[str, str] | None:
        value = _get(report, path)
        return None if value is None else {"name": name, "value": f"{value:.1%}", "meaning": meaning}

    ci95 = _get(report, "rm.ci95")
    interval = f"95% interval {100 * ci95[0]:.1f} to {ci95[1]:.1%}; " if ci95 else ""
    return _present(
        fact(
            "judge.held_out_accuracy",
            "Judge",
            "accuracy on human labels it was not fitted on; it scores this page",
        ),
        fact(
            "labeler.held_out_accuracy",
            "Labeler",
            "accuracy on human labels it was not fitted on; it ranked the responses",
        ),
        fact(
            "labeler.self_agreement",
            "Labeler with itself",
            "the same pair ranked twice; two people agreed on 73% for InstructGPT (Ouyang et al. 2022)",
        ),
        fact(
            "rm.val_accuracy", "Reward model", f"held-out pairs ordered as labelled; {interval}chance is 50%"
        ),
        fact(
            "labeler.noise_ceiling",
            "Noise ceiling",
            "what a perfect reward model would reach, as the labels are noisy themselves",
        ),
    )


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds = {
        name: stage["seconds"] for name, stage in (report.get("stages") or {}).items() if "seconds" in stage
    }
    longest = max(seconds.values(), default=0) or 1
    return [
        {
            "name": name,
            "text": _STAGE_TEXT.get(name, ""),
            "time": _duration(s),
            "share": f"{100 * s / longest:.1f}",
        }
        for name, s in seconds.items()
    ]


def _costs(
    report: Mapping[str, Any], stages: list[dict[str, Any]], rows: list[Mapping[str, Any]]
) -> list[dict[str, str]]:
    total, peak = report.get("total_seconds"), report.get("peak_rss_gib")
    speed = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
    return _present(
        {"value": _duration(total), "name": f"in total, {len(stages)} stages"} if total is not None else None,
        {"value": f"{peak:.1f} GiB", "name": "peak resident memory, all processes"}
        if peak is not None
        else None,
        {"value": f"{np.median(speed):,.0f}", "name": "tokens per second in PPO (median)"} if speed else None,
    )


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    by_model = {name: sample[name] for name in MODELS if sample.get(name)}
    judged = {name: one["judge"] for name, one in by_model.items() if one.get("judge") is not None}
    best = max(judged, key=lambda name: judged[name], default=None)
    cells = {
        name: {
            "text": one.get("text", "").strip(),
            "judge": f"{judged[name]:+.2f}".replace("-", "−") if name in judged else None,
            "best": name == best,
        }
        for name, one in by_model.items()
    }
    return {"prompt": sample.get("prompt", ""), "by_model": cells}


def _title(name: str) -> str:
    return {"base": "Base", "sft": "SFT", "ppo": "PPO"}.get(name, name)


def _rate(result: Mapping[str, Any]) -> str:
    low, high = result["ci95"]
    return f"{100 * result['rate']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


# --- plots ------------------------------------------------------------------------------------------


def _plot(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Figure], None],
    size: tuple[float, float] = (4.9, 2.9),
) -> dict[str, Any]:
    """A plot as inline SVG and the sentence that says how to read it; `name` keeps the ids of plots apart."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = StringIO()
        figure.savefig(
            text,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # inline in HTML: no XML declaration, no document type
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)  # the page sets the width, viewBox the shape
    label = Markup.escape(f"{title}. {caption}")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return {"title": title, "caption": caption, "svg": Markup(svg)}  # drawn here, from numbers alone


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray | None:
    """[iterations] float, NaN where a row lacks the key or holds null; None if there is no value at all."""
    values = np.array([np.nan if row.get(key) is None else float(row[key]) for row in rows], np.float64)
    return values if np.isfinite(values).any() else None


def _iterations(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row.get("iteration", i + 1) for i, row in enumerate(rows)], np.float64)


def _line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, color: str, label: str | None = None
) -> None:
    values = _series(rows, key)
    if values is None:
        return
    x, there = _iterations(rows), np.isfinite(values)
    marker = "o" if there.sum() < 2 or there.sum() < len(rows) / 2 else None  # a single point has no line
    axes.plot(x[there], values[there], color=color, label=label, marker=marker, markersize=3.5)


def _x_iterations(axes: Axes) -> None:
    axes.set_xlabel("PPO iteration")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def _from_zero(axes: Axes) -> None:
    """An axis that begins at 0 shows a change in proportion; the line keeps clear of the upper edge."""
    low, high = min(0.0, axes.dataLim.y0), max(0.0, axes.dataLim.y1)
    axes.set_ylim(low, high + 0.06 * (high - low) or 1.0)


def _win_plot(report: Mapping[str, Any]) -> dict[str, Any] | None:
    results = [
        (name, found)
        for name in ("base", "sft")
        if (found := _get(report, f"win_rate.ppo_vs_{name}")) is not None
    ]
    if not results:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (name, result) in enumerate(results):
            rate, (low, high) = result["rate"], result["ci95"]
            axes.barh(y, rate, height=0.52, color=_COLORS["ppo"], alpha=0.88)
            axes.errorbar(
                rate,
                y,
                xerr=[[max(0, rate - low)], [max(0, high - rate)]],
                color="#1f2933",
                capsize=4,
                linewidth=1.6,
            )
            axes.text(
                0.02,
                y,
                f"against {_title(name)}   {_rate(result)}",
                va="center",
                color="white",
                weight="bold",
                fontsize=10,
            )
        top = len(results) - 0.55
        axes.plot([0.5, 0.5], [-0.45, top], color=_COLORS["warm"], linestyle=(0, (4, 3)), linewidth=1.4)
        axes.text(0.5, top + 0.03, "even", color="#a3562a", ha="center", va="bottom", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(-0.45, top + 0.32), yticks=[])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))

    return _plot(
        "win",
        "How often PPO is preferred",
        "Bars show the share of held-out prompts on which the judge prefers PPO (ties count half), "
        "whiskers the 95% interval over prompts; a whisker wholly right of the dashed line is a preference "
        "beyond chance.",
        draw,
        (5.4, 0.6 + 0.62 * len(results)),
    )


def _score_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if _series(rows, "score") is None:
        return None
    judged = _series(rows, "judge_score") is not None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, rows, "score", _COLORS["sft"], "reward model")
        _line(axes, rows, "judge_score", _COLORS["ppo"], "judge")
        if judged:
            axes.legend(loc="best")
        axes.set_ylabel("mean score")
        _x_iterations(axes)

    caption = "The reward model's mean score of each batch should rise and then level off"
    tail = (
        "; the judge, which PPO never sees, should rise with it (the two have units of their own)."
        if judged
        else "."
    )
    return _plot("score", "Score", caption + tail, draw)


def _kl_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if _series(rows, "kl_per_sequence") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, rows, "kl_per_sequence", _COLORS["plum"])
        axes.set_ylabel("nats per response")
        _from_zero(axes)
        _x_iterations(axes)

    return _plot(
        "kl",
        "KL from the SFT model",
        "How far the policy has moved from where it began: a steady, bounded "
        "rise is healthy, a sudden jump is not.",
        draw,
    )


def _length_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if _series(rows, "response_length") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, rows, "response_length", _COLORS["warm"])
        axes.set_ylabel("tokens")
        _from_zero(axes)
        _x_iterations(axes)

    return _plot(
        "length",
        "Response length",
        "The mean length should stay roughly level; a strong drift hints that the "
        "reward pays for length rather than for content.",
        draw,
    )


def _phase_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    timed = [row for row in rows if row.get("seconds")]
    if not timed:
        return None
    found = dict.fromkeys(name for row in timed for name in row["seconds"])
    names = [name for name in _PHASES if name in found] + [name for name in found if name not in _PHASES]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x, bottom, spare = _iterations(timed), np.zeros(len(timed)), iter(_PHASE_OTHER * len(names))
        for name in names:
            seconds = np.array([row["seconds"].get(name) or 0.0 for row in timed], np.float64)
            axes.bar(
                x,
                seconds,
                bottom=bottom,
                width=0.85,
                color=_PHASES.get(name) or next(spare),
                label=name.replace("_", " "),
            )
            bottom += seconds
        axes.set_ylabel("seconds")
        axes.grid(axis="x", visible=False)
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(names), 5),
            fontsize=8.5,
            columnspacing=1.0,
            handlelength=1.0,
            handletextpad=0.4,
        )
        _x_iterations(axes)

    return _plot(
        "phases",
        "Time per iteration",
        "Each column is one iteration, split by what the time went into; the "
        "tallest colour is where speeding up pays.",
        draw,
    )


def _overoptimisation_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The two scores over KL, each in its own panel: their units differ, so a common axis would mislead."""
    keys = ("kl_per_sequence", "score", "judge_score")
    full = [row for row in rows if all(row.get(key) is not None and math.isfinite(row[key]) for key in keys)]
    if len(full) < 2:
        return None

    def draw(figure: Figure) -> None:
        root_kl = np.sqrt(np.maximum([row["kl_per_sequence"] for row in full], 0))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, key, name, color in (
            (panels[0], "score", "reward model", _COLORS["sft"]),
            (panels[1], "judge_score", "judge", _COLORS["ppo"]),
        ):
            values = np.array([row[key] for row in full], np.float64)
            axes.scatter(root_kl, values, s=16, color=color, alpha=0.55, linewidths=0)
            trend = _smooth(root_kl, values)
            if trend is not None:
                axes.plot(*trend, color=color)
            axes.set_ylabel(name)
        panels[1].set_xlabel("√KL from SFT   (KL in nats per response)")

    return _plot(
        "overoptimisation",
        "Over-optimisation",
        "Each dot is an iteration and each line averages its neighbours: as long as the judge (below) climbs "
        "with the reward model (above) the gain is real; where the judge turns down while the reward model "
        "goes on up, the policy is exploiting the reward model (Gao et al. 2023).",
        draw,
        (5.4, 3.9),
    )


def _smooth(x: np.ndarray, y: np.ndarray, bins: int = 6) -> tuple[np.ndarray, np.ndarray] | None:
    """Means of x and y in bins of equally many points, in the order of x; None for too few points."""
    if len(x) < 2 * bins:
        return None
    order = np.argsort(x, kind="stable")
    edges = np.linspace(0, len(x), bins + 1).astype(int)
    parts = [order[a:b] for a, b in pairwise(edges)]
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _loss_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = [
        (key, name, color)
        for key, name, color in (
            ("policy_loss", "policy", _COLORS["ppo"]),
            ("value_loss", "value", _COLORS["sft"]),
            ("ptx_loss", "ptx", _COLORS["warm"]),
        )
        if _series(rows, key) is not None
    ]
    if not found:
        return None

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(len(found), 1, sharex=True))
        for axes, (key, name, color) in zip(panels, found, strict=True):
            _line(axes, rows, key, color)
            axes.set_ylabel(name)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        _x_iterations(panels[-1])

    return _plot(
        "losses",
        "Losses",
        "The value loss should fall as the critic learns; the policy loss hovers near zero "
        "by construction, and the ptx loss should hardly rise.",
        draw,
        (4.9, 3.3),
    )


def _clip_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    keys = (("clip_fraction", "policy", _COLORS["ppo"]), ("value_clip_fraction", "value", _COLORS["sft"]))
    if all(_series(rows, key) is None for key, _, _ in keys):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for key, name, color in keys:
            _line(axes, rows, key, color, name)
        axes.legend(loc="best")
        _from_zero(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("tokens clipped")
        _x_iterations(axes)

    return _plot(
        "clip",
        "Clip fraction",
        "The share of tokens where PPO's clip held the update back: a few per cent is "
        "usual, a quarter or more means steps that are too large.",
        draw,
        (4.9, 3.3),
    )


def _entropy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if _series(rows, "entropy") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, rows, "entropy", _COLORS["plum"])
        _from_zero(axes)
        axes.set_ylabel("nats per token")
        _x_iterations(axes)

    return _plot(
        "entropy",
        "Entropy",
        "How varied the policy's next word is: a slow decline is the price of "
        "optimisation, a collapse towards zero means that it repeats itself.",
        draw,
    )


def _fit_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    values = _series(rows, "explained_variance")
    if values is None:
        return None
    low = min(float(np.nanmin(values)), 0.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, rows, "explained_variance", _COLORS["sft"])
        axes.axhline(0, color="#b9c0c8", linewidth=1)
        axes.set_ylim(max(low - 0.05, -1.05), 1.05)  # a critic that starts far off would flatten the rest
        axes.set_ylabel("explained variance")
        _x_iterations(axes)

    return _plot(
        "critic",
        "Critic",
        "The share of the returns' variance that the critic predicts: 1 is perfect, 0 no "
        "better than a constant, below 0 worse.",
        draw,
    )


# --- parts ------------------------------------------------------------------------------------------


def _present(*parts: Any) -> list[Any]:
    return [part for part in parts if part is not None]


def _get(report: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


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


def _plain(value: Any, path: str) -> Any:
    """Tuples as lists, numpy numbers as Python's, paths as text; ValueError naming a non-finite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{path}.{i}") for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is not finite: {value}")
    return str(value) if isinstance(value, Path) else value


def _write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)  # noqa: PTH105
    finally:
        partial.unlink(missing_ok=True)
