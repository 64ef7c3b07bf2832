"""What the figures of report.html are drawn with: colours, axes, and one function from data to inline SVG."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLORS = {"base": "#98a2ad", "sft": "#4f81bd", "policy": "#0f766e", "warm": "#c2703d", "plum": "#8b6aa8"}
STYLE: dict[Any, Any] = {
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


def rate_bar(axes: Axes, y: float, result: Mapping[str, Any], color: str) -> None:
    """A bar of `rate` with a whisker of `ci95`."""
    rate, (low, high) = result["rate"], result["ci95"]
    axes.barh(y, rate, height=0.52, color=color, alpha=0.88)
    whisker = [[max(0, rate - low)], [max(0, high - rate)]]
    axes.errorbar(rate, y, xerr=whisker, color="#1f2933", capsize=4, linewidth=1.6)


def percent_bars(axes: Axes) -> None:
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def drawn(*plots: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [plot for plot in plots if plot is not None]


def plot(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Figure], None],
    size: tuple[float, float] = (4.9, 2.9),
) -> dict[str, Any]:
    """A plot as inline SVG and the sentence that says how to read it; `name` keeps the ids of plots apart."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
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


def series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray | None:
    """[iterations] float, NaN where a row lacks the key or holds null; None if there is no value at all."""
    values = np.array([np.nan if row.get(key) is None else float(row[key]) for row in rows], np.float64)
    return values if np.isfinite(values).any() else None


def iterations(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row.get("iteration", row.get("step", i + 1)) for i, row in enumerate(rows)], np.float64)


def line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, color: str, label: str | None = None
) -> None:
    values = series(rows, key)
    if values is None:
        return
    x, there = iterations(rows), np.isfinite(values)
    marker = "o" if there.sum() < 2 or there.sum() < len(rows) / 2 else None  # a single point has no line
    axes.plot(x[there], values[there], color=color, label=label, marker=marker, markersize=3.5)


def x_iterations(axes: Axes, name: str = "iteration") -> None:
    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def from_zero(axes: Axes) -> None:
    """An axis that begins at 0 shows a change in proportion; the line keeps clear of the upper edge."""
    low, high = min(0.0, axes.dataLim.y0), max(0.0, axes.dataLim.y1)
    axes.set_ylim(low, high + 0.06 * (high - low) or 1.0)
