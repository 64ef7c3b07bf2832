"""The figures of report.html, as inline SVG.

Each is {"title", "caption", "svg"}, or None (left out of a list) where its numbers are missing. `rows`: one dict per
iteration (of DPO: optimizer step), as in metrics.jsonl.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf_ray.evaluation.figure import (
    COLORS,
    drawn,
    from_zero,
    iterations,
    line,
    percent_bars,
    plot,
    rate_bar,
    series,
    x_iterations,
)

_PHASES = {"rollout": "#4f81bd", "score": "#8fb3d9", "update": "#0f766e", "weight_sync": "#c2703d"}
_PHASE_OTHER = ("#b9c0c8", "#8b6aa8", "#d5b35c")


def win_plot(results: Sequence[tuple[str, Mapping[str, Any]]], policy: str = "PPO") -> dict[str, Any] | None:
    """results: per bar, from below, what is written on it and its entry of the report's `win_rate`. policy: its name
    on the page."""
    if not results:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (text, result) in enumerate(results):
            rate_bar(axes, y, result, COLORS["policy"])
            axes.text(0.02, y, text, va="center", color="white", weight="bold", fontsize=10)
        top = len(results) - 0.55
        axes.plot([0.5, 0.5], [-0.45, top], color=COLORS["warm"], linestyle=(0, (4, 3)), linewidth=1.4)
        axes.text(0.5, top + 0.03, "even", color="#a3562a", ha="center", va="bottom", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(-0.45, top + 0.32), yticks=[])
        percent_bars(axes)

    return plot(
        "win",
        f"How often {policy} is preferred",
        f"Bars show the share of held-out prompts on which the judge prefers {policy} (ties count half), "
        "whiskers the 95% interval over prompts; a whisker wholly right of the dashed line is a preference "
        "beyond chance.",
        draw,
        (5.4, 0.6 + 0.62 * len(results)),
    )


def accuracy_plot(results: Sequence[tuple[str, str, Mapping[str, Any]]], gain: str = "") -> dict[str, Any] | None:
    """results: per bar, from below, the model (base, sft or policy), its name on the page, and its entry of the
    report's `accuracy`. gain: a last sentence for the caption."""
    if not results:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (model, _, result) in enumerate(results):
            rate_bar(axes, y, result, COLORS.get(model, COLORS["policy"]))
        axes.set(xlim=(0, 1), ylim=(-0.45, len(results) - 0.55), yticks=range(len(results)),
                 yticklabels=[f"{name}   {result['rate']:.1%}" for _, name, result in results])
        percent_bars(axes)

    return plot(
        "accuracy",
        "How often the answer is right",
        "Bars show the share of the same held-out prompts that each model answers rightly, by the task's verifier, "
        f"whiskers the 95% interval over prompts. {gain}".strip(),
        draw,
        (5.4, 0.6 + 0.5 * len(results)),
    )


def preference_plots(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether DPO went well: its loss, and how it orders the pairs of each batch."""
    return drawn(_dpo_loss_plot(rows), _dpo_accuracy_plot(rows))


def progress_plots(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether reinforcement learning went well: score, KL, length and time."""
    return drawn(_score_plot(rows), _kl_plot(rows), _length_plot(rows), _phase_plot(rows))


def diagnostic_plots(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Why it went so: losses, clipping, entropy and the critic's fit."""
    return drawn(_loss_plot(rows), _clip_plot(rows), _entropy_plot(rows), _fit_plot(rows))


def overoptimisation_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The two scores over KL, each in its own panel: their units differ, so a common axis would mislead."""
    keys = ("kl_per_sequence", "score", "judge_score")
    full = [row for row in rows if all(row.get(key) is not None and math.isfinite(row[key]) for key in keys)]
    if len(full) < 2:
        return None

    def draw(figure: Figure) -> None:
        root_kl = np.sqrt(np.maximum([row["kl_per_sequence"] for row in full], 0))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, key, name, color in (
            (panels[0], "score", "reward", COLORS["sft"]),
            (panels[1], "judge_score", "judge", COLORS["policy"]),
        ):
            values = np.array([row[key] for row in full], np.float64)
            axes.scatter(root_kl, values, s=16, color=color, alpha=0.55, linewidths=0)
            trend = _smooth(root_kl, values)
            if trend is not None:
                axes.plot(*trend, color=color)
            axes.set_ylabel(name)
        panels[1].set_xlabel("√KL from SFT   (KL in nats per response)")

    return plot(
        "overoptimisation",
        "Over-optimisation",
        "Each dot is an iteration and each line averages its neighbours: as long as the judge (below) climbs "
        "with the reward (above) the gain is real; where the judge turns down while the reward goes on up, the "
        "policy is exploiting what rewards it (Gao et al. 2023).",
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


def _score_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "score") is None:
        return None
    judged = series(rows, "judge_score") is not None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "score", COLORS["sft"], "reward")
        line(axes, rows, "judge_score", COLORS["policy"], "judge")
        if judged:
            axes.legend(loc="best")
        axes.set_ylabel("mean score")
        x_iterations(axes)

    caption = "The mean reward of each batch should rise and then level off"
    tail = (
        "; the judge, which training never sees, should rise with it (the two have units of their own)."
        if judged
        else "."
    )
    return plot("score", "Score", caption + tail, draw)


def _kl_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "kl_per_sequence") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "kl_per_sequence", COLORS["plum"])
        axes.set_ylabel("nats per response")
        from_zero(axes)
        x_iterations(axes)

    return plot(
        "kl",
        "KL from the SFT model",
        "How far the policy has moved from where it began: a steady, bounded "
        "rise is healthy, a sudden jump is not.",
        draw,
    )


def _length_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "response_length") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "response_length", COLORS["warm"])
        axes.set_ylabel("tokens")
        from_zero(axes)
        x_iterations(axes)

    return plot(
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
        x, bottom, spare = iterations(timed), np.zeros(len(timed)), iter(_PHASE_OTHER * len(names))
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
        x_iterations(axes)

    return plot(
        "phases",
        "Time per iteration",
        "Each column is one iteration, split by what the time went into; the "
        "tallest colour is where speeding up pays.",
        draw,
    )


def _loss_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = [
        (key, name, color)
        for key, name, color in (
            ("policy_loss", "policy", COLORS["policy"]),
            ("value_loss", "value", COLORS["sft"]),
            ("ptx_loss", "ptx", COLORS["warm"]),
        )
        if series(rows, key) is not None
    ]
    if not found:
        return None

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(len(found), 1, sharex=True))
        for axes, (key, name, color) in zip(panels, found, strict=True):
            line(axes, rows, key, color)
            axes.set_ylabel(name)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        x_iterations(panels[-1])

    return plot(
        "losses",
        "Losses",
        "The policy loss hovers near zero by construction; a value loss should fall as the critic learns, and a "
        "ptx loss should hardly rise.",
        draw,
        (4.9, 3.3),
    )


def _clip_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    keys = (("clip_fraction", "policy", COLORS["policy"]), ("value_clip_fraction", "value", COLORS["sft"]))
    if all(series(rows, key) is None for key, _, _ in keys):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for key, name, color in keys:
            line(axes, rows, key, color, name)
        axes.legend(loc="best")
        from_zero(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("tokens clipped")
        x_iterations(axes)

    return plot(
        "clip",
        "Clip fraction",
        "The share of tokens where the clip held the update back: a few per cent is "
        "usual, a quarter or more means steps that are too large.",
        draw,
        (4.9, 3.3),
    )


def _entropy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "entropy") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "entropy", COLORS["plum"])
        from_zero(axes)
        axes.set_ylabel("nats per token")
        x_iterations(axes)

    return plot(
        "entropy",
        "Entropy",
        "How varied the policy's next word is: a slow decline is the price of "
        "optimisation, a collapse towards zero means that it repeats itself.",
        draw,
    )


def _fit_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    values = series(rows, "explained_variance")
    if values is None:
        return None
    low = min(float(np.nanmin(values)), 0.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "explained_variance", COLORS["sft"])
        axes.axhline(0, color="#b9c0c8", linewidth=1)
        axes.set_ylim(max(low - 0.05, -1.05), 1.05)  # a critic that starts far off would flatten the rest
        axes.set_ylabel("explained variance")
        x_iterations(axes)

    return plot(
        "critic",
        "Critic",
        "The share of the returns' variance that the critic predicts: 1 is perfect, 0 no "
        "better than a constant, below 0 worse.",
        draw,
    )


def _dpo_loss_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "loss") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "loss", COLORS["policy"])
        axes.set_ylabel("nats per prompt")
        x_iterations(axes, "optimizer step")

    return plot(
        "dpo_loss",
        "Loss",
        "The loss on each batch of comparisons begins at log 2 = 0.69 (less where the labeler saw ties) and should "
        "fall; a fall towards zero means that the comparisons are learnt by heart.",
        draw,
    )


def _dpo_accuracy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if series(rows, "accuracy") is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line(axes, rows, "accuracy", COLORS["sft"])
        axes.axhline(0.5, color="#b9c0c8", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("pairs ordered rightly")
        x_iterations(axes, "optimizer step")

    return plot(
        "dpo_accuracy",
        "Implicit reward",
        "The share of each batch's pairs whose preferred response gained more log-probability than the other: it "
        "begins at chance, 50%, and should rise.",
        draw,
    )
