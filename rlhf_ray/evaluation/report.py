"""report.json for machines and a self-contained report.html for people."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from rlhf_ray import disk
from rlhf_ray.evaluation.plots import (
    accuracy_plot,
    diagnostic_plots,
    overoptimisation_plot,
    preference_plots,
    progress_plots,
    win_plot,
)
from rlhf_ray.evaluation.schema import BY_MODEL

_TITLES = {
    "base": "Base",
    "sft": "SFT",
    "ppo": "PPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "dpo": "DPO",
}
_STAGE_TEXT = {
    "pretrain": "trained the base model on plain text",
    "sft": "fine-tuned it on demonstrations",
    "compare": "sampled several responses per prompt and had them ranked",
    "rm": "trained the reward model on the rankings",
    "ppo": "optimised the policy against its reward",
    "dpo": "trained the policy on the rankings directly",
    "eval": "compared the three models on held-out prompts",
}


def write_report(
    report: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    out_dir: Path,
) -> None:
    """Write report.json, then report.html, into `out_dir`; each appears whole or not at all.

    report: the keys that `schema.validate_report` lists, and optionally `config` (YAML text) and `data` (counts by
    part). history: one dict per iteration (of DPO: optimizer step), as in metrics.jsonl. samples: {"prompt": text,
    "base" | "sft" | policy: {"text": text, "judge": score}}. Whatever is missing is left out of the page. Raises
    ValueError, naming the path, for a number that is not finite, before anything is written.
    """
    plain = _plain(report, "report")
    out_dir.mkdir(parents=True, exist_ok=True)
    # The numbers first: a page that cannot be drawn must not cost them.
    disk.write_text(out_dir / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    disk.write_text(out_dir / "report.html", render_html(plain, history, samples))


def headline(report: Mapping[str, Any]) -> str | None:
    """The main result in a sentence, `PPO preferred over SFT in 83% ...`; None before any comparison.

    Where answers can be verified: `PPO right on 61% ... of 512 held-out prompts, SFT on 40% ...`.
    """
    policy, title = _policy(report)
    ours, sft = (_get(report, f"accuracy.{name}") for name in (policy, "sft"))
    if ours and sft:
        return f"{title} right on {_rate(ours)} of {ours['n']:,} held-out prompts, SFT on {_rate(sft)}"
    for name in ("sft", "base"):
        result = _get(report, f"win_rate.{policy}_vs_{name}")
        if result:
            return f"{title} preferred over {_title(name)} in {_rate(result)} of {result['n']:,} held-out prompts"
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
    policy, title = _policy(report)
    models, dpo = ("base", "sft", policy), policy == "dpo"
    rows, stages, shown = list(history), _stages(report), [_sample(sample, models) for sample in samples]
    columns = [name for name in models if any(name in (report.get(key) or {}) for key in BY_MODEL)]
    return environment.get_template("report.html.j2").render(
        policy=title,
        headline=headline(report),
        summary=_summary(report, rows),
        basis=_basis(report),
        comparisons=_comparisons(report),
        columns=[title if name == policy else _title(name) for name in columns],
        metrics=_metrics(report, columns),
        trust=_trust(report),
        sample_columns=[
            (name, title if name == policy else _title(name))
            for name in models
            if any(name in one["by_model"] for one in shown)
        ],
        samples=shown,
        stages=stages,
        costs=_costs(report, stages, rows),
        data=list((report.get("data") or {}).items()),
        actors=report.get("actors") or [],
        versions=list((report.get("versions") or {}).items()),
        seed=report.get("seed"),
        config=report.get("config"),
        win_plot=win_plot(_win_bars(report), title),
        accuracy_plot=accuracy_plot(*_accuracy_bars(report)),
        point="optimizer step" if dpo else "iteration",
        progress=preference_plots(rows) if dpo else progress_plots(rows),
        overoptimisation=None if dpo else overoptimisation_plot(rows),
        diagnostics=[] if dpo else diagnostic_plots(rows),
    )


# --- what the page says -----------------------------------------------------------------------------


def _summary(report: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    """What was made, in a sentence or two."""
    done, title = report.get("stages") or {}, _policy(report)[1]
    made = "A language model was"
    reward = "it" if "rm" in done else "its reward"
    texts = {
        "sft": "fine-tuned on demonstrations",
        "rm": "given a reward model trained on ranked responses",
        "ppo": f"optimised against {reward} with {title}{f' for {len(rows)} iterations' if rows else ''}",
        "dpo": "trained on ranked responses with DPO",
    }
    steps = [text for name, text in texts.items() if name in done]
    if not steps:
        return "What this run has measured so far."
    listed = steps[0] if len(steps) == 1 else f"{', '.join(steps[:-1])} and {steps[-1]}"
    return f"{made} {listed}."


def _basis(report: Mapping[str, Any]) -> str:
    """What the headline rests on."""
    judge = _get(report, "judge.is")
    who = f"The judge is {judge}. " if judge else ""
    ties = "" if report.get("accuracy") else "Ties count half. "
    return f"{who}{ties}Brackets are the 95% interval over prompts."


def _comparisons(report: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    for name in ("sft", "base"):
        result = _get(report, f"win_rate.{_policy(report)[0]}_vs_{name}")
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


def _win_bars(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (f"against {_title(name)}   {_rate(result)}", result)
        for name in ("base", "sft")
        if (result := _get(report, f"win_rate.{_policy(report)[0]}_vs_{name}")) is not None
    ]


def _accuracy_bars(report: Mapping[str, Any]) -> tuple[list[tuple[str, str, Mapping[str, Any]]], str]:
    """The bars of `accuracy_plot`, and what the policy gained in a sentence."""
    policy, title = _policy(report)
    found = report.get("accuracy") or {}
    bars = [(model, title if model == policy else _title(model), found[model])
            for model in ("base", "sft", policy) if model in found]
    gain = found.get(f"{policy}_minus_sft")
    if not gain:
        return bars, ""
    low, high = gain["ci95"]
    text = (f"{title} less SFT, paired by prompt: {100 * gain['difference']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}].")
    return bars, text.replace("-", "−")


def _metrics(report: Mapping[str, Any], columns: list[str]) -> list[dict[str, Any]]:
    """The rows of the main table: name, what it means, a cell per model, and the policy's change to SFT."""
    policy = _policy(report)[0]
    verified = report.get("accuracy") or {}
    rates = {name: 100 * verified[name]["rate"] for name in columns if name in verified}

    def row(key: str, name: str, hint: str, form: str, relative: bool) -> dict[str, Any] | None:
        values = rates if key == "accuracy" else report.get(key) or {}
        if not values:
            return None
        cells = [format(values[m], form).replace("-", "−") if m in values else "–" for m in columns]
        change = ""
        if "sft" in values and policy in values:
            gain = values[policy] - values["sft"]
            if not relative:  # the zero of a score is arbitrary, so a ratio of two would mean nothing
                change = f"{gain:+{form}}"
            elif values["sft"]:
                change = f"{gain / values['sft']:+.1%}"
        return {"name": name, "hint": hint, "cells": cells, "change": change.replace("-", "−")}

    kl = report.get("kl_per_sequence")
    cells = [{"sft": "0", policy: f"{kl:.1f}"}.get(m, "–") for m in columns] if kl is not None else []
    judge = "the task's verifier" if verified else "the judge"
    return _present(
        row("accuracy", "Right answers", "share of held-out prompts, %, and the change in points", ".1f", False),
        row("judge_score", "Judge score", f"mean score of {judge}; higher is better", ".2f", False),
        row(
            "rm_score",
            "Reward-model score",
            "mean score of the reward model; demonstrations score 0 on average",
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

    def interval(path: str) -> str:
        ci95 = _get(report, path)
        return f"95% interval {100 * ci95[0]:.1f} to {ci95[1]:.1%}; " if ci95 else ""

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
            "rm.val_accuracy",
            "Reward model",
            f"held-out pairs ordered as labelled; {interval('rm.ci95')}chance is 50%",
        ),
        fact(
            "dpo.val_accuracy",
            "Implicit reward of DPO",
            f"held-out pairs ordered as labelled; {interval('dpo.ci95')}chance is 50%",
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
        {"value": f"{np.median(speed):,.0f}", "name": f"tokens per second in {_policy(report)[1]} (median)"}
        if speed
        else None,
    )


def _sample(sample: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    by_model = {name: sample[name] for name in models if sample.get(name)}
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


def _policy(report: Mapping[str, Any]) -> tuple[str, str]:
    """(the policy's key in the report: the stage that made it; its name on the page: the algorithm's)."""
    policy = report.get("policy") or "ppo"
    return policy, _title(report.get("algorithm") or policy)


def _title(name: str) -> str:
    return _TITLES.get(name, name)


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


# --- parts ------------------------------------------------------------------------------------------


def _present(*parts: Any) -> list[Any]:
    return [part for part in parts if part is not None]


def _get(report: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


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
