"""report.json and report.html from complete, partial and hostile input."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_ray.evaluation.report import render_html, write_report
from rlhf_ray.evaluation.schema import validate_report

HEADLINE = "PPO preferred over SFT in 83% [79, 87] of 512 held-out prompts"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def complete_report() -> dict:
    def by_model(base, sft, ppo):
        return {"base": base, "sft": sft, "ppo": ppo}

    def result(wins, ties, losses, ci95):
        n = wins + ties + losses
        return {
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "rate": (wins + ties / 2) / n,
            "ci95": ci95,
            "n": n,
        }

    stages = {"sft": 61.2, "compare": 48.9, "rm": 55.0, "ppo": 318.4, "eval": 41.7}
    roles = ("generator", "reward", "reference", "policy", "policy", "critic")
    return {
        "policy": "ppo",
        "algorithm": "ppo",
        "total_seconds": 541.3,
        "stages": {name: {"seconds": seconds} for name, seconds in stages.items()},
        "peak_rss_gib": 7.42,
        "judge": {"held_out_accuracy": 0.874},
        "labeler": {"held_out_accuracy": 0.869, "self_agreement": 0.741, "noise_ceiling": 0.853},
        "rm": {"val_accuracy": 0.712, "ci95": (0.689, 0.735)},
        "win_rate": {
            "ppo_vs_sft": result(412, 26, 74, [0.794, 0.866]),
            "ppo_vs_base": result(440, 18, 54, [0.850, 0.906]),
        },
        "judge_score": by_model(-0.12, 0.31, 2.06),
        "rm_score": by_model(-0.44, -0.02, 1.38),
        "distinct_2": by_model(0.642, 0.631, 0.548),
        "held_out_loss": by_model(3.912, 3.958, 4.041),
        "mean_length": by_model(44.1, 38.7, 37.2),
        "kl_per_sequence": 9.6,
        "actors": [
            {"role": role, "class": role.title(), "node": "127.0.0.1", "pid": 4100 + i}
            for i, role in enumerate(roles)
        ],
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "ray": "2.60.0",
            "vllm": "0.32.0",
            "deepspeed": "0.19.8",
            "transformers": "5.19.0",
            "rlhf_ray": "0.1.0",
        },
        "seed": 0,
        "config": "model:\n  path: rlhf_ray/base\nalgorithm:\n  kl_coef: 0.02\n  clip_ratio: 0.2\n",
        "data": {
            "base_texts": 12_000,
            "demonstrations": 4_000,
            "compare_prompts": 1_000,
            "ppo_prompts": 5_120,
        },
    }


def history(iterations: int = 40) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    for i in range(1, iterations + 1):
        t = i / iterations
        row = {
            "iteration": i,
            "score": 1.4 * (1 - np.exp(-3 * t)) + rng.normal(0, 0.06),
            "kl_per_sequence": 10 * t + rng.normal(0, 0.2),
            "kl_per_token": 0.27 * t,
            "entropy": 3.4 - 0.5 * t,
            "response_length": 38 + rng.normal(0, 1),
            "policy_loss": rng.normal(-0.01, 0.004),
            "value_loss": 0.4 * np.exp(-2 * t) + 0.1,
            "clip_fraction": 0.04 + 0.02 * t,
            "value_clip_fraction": 0.1 * (1 - t),
            "explained_variance": 0.7 - np.exp(-4 * t),
            "ptx_loss": 3.96 + 0.05 * t,
            "policy_grad_norm": 1.1,
            "critic_grad_norm": 2.0,
            "mismatch": 0.002,
            "tokens_per_second": 900 + 10 * t,
            "seconds": {
                "rollout": 2.1,
                "score": 0.9,
                "update": 4.4 + rng.normal(0, 0.2),
                "weight_sync": 0.2,
                "other": 0.1,
            },
        }
        if i % 2:
            row["judge_score"] = 0.3 + 2.0 * (1 - np.exp(-3 * t)) - 0.5 * t**3 + rng.normal(0, 0.08)
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def samples(count: int = 6) -> list[dict]:
    one = {
        "prompt": "This film was directed by somebody who",
        "base": {"text": " has been in the film industry and the plot is a little too long.", "judge": -0.41},
        "sft": {"text": " knows his way around a camera, but the script is dull.", "judge": -1.2},
        "ppo": {
            "text": " clearly loves these people; it is warm, funny and beautifully acted.",
            "judge": 2.87,
        },
    }
    return [copy.deepcopy(one) for _ in range(count)]


def dpo_report() -> dict:
    """As stage dpo leaves it: no reward model, a policy of its own name."""
    report = complete_report() | {"policy": "dpo", "algorithm": "dpo", "rm": None, "rm_score": None}
    report["dpo"] = {"val_accuracy": 0.661, "ci95": [0.63, 0.69]}
    report["win_rate"] = {key.replace("ppo", "dpo"): value for key, value in report["win_rate"].items()}
    for key in ("judge_score", "distinct_2", "held_out_loss", "mean_length"):
        report[key]["dpo"] = report[key].pop("ppo")
    report["stages"] = {name: {"seconds": 60.0} for name in ("sft", "compare", "dpo", "eval")}
    return report


def dpo_history(steps: int = 30) -> list[dict]:
    return [{"step": i, "loss": 0.69 - 0.002 * i, "accuracy": 0.5 + 0.004 * i, "margin": 0.01 * i, "pairs": 96.0,
             "margin_sum": 0.96 * i, "correct": 50.0, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.5 * i}
            for i in range(1, steps + 1)]


def verified_report() -> dict:
    """GRPO on a task whose answers can be checked: neither labeler nor reward model."""
    def share(right, ci95):
        return {"right": right, "n": 512, "rate": right / 512, "ci95": ci95}

    gain = {"gained": 130, "lost": 20, "n": 512, "difference": 110 / 512, "ci95": [0.17, 0.26]}
    return complete_report() | {
        "stages": {name: {"seconds": 60.0} for name in ("sft", "ppo", "eval")},
        "algorithm": "grpo", "rm": None, "rm_score": None, "labeler": None,
        "judge": {"held_out_accuracy": None, "is": "the task's verifier, which checks every answer"},
        "accuracy": {"base": share(10, [0.01, 0.035]), "sft": share(205, [0.36, 0.44]), "ppo": share(315, [0.57, 0.66]),
                     "ppo_minus_sft": gain},
    }


class Page(HTMLParser):
    """Checks that tags close in order; collects tags and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_write_report(tmp_path):
    write_report(complete_report(), history(), samples(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    saved = json.loads((tmp_path / "report.json").read_text())
    validate_report(saved)
    assert saved["rm"]["ci95"] == [0.689, 0.735]
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert HEADLINE in text
    assert re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)) is None
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "img", "object", "embed"}
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) == 10
    assert all(len(attributes["aria-label"]) > 40 and attributes["role"] == "img" for attributes in plots)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "+2.1%" in text  # held-out loss, 4.041 / 3.958 - 1
    assert len(text) < 1_000_000


def test_page_is_reproducible():
    assert render_html(complete_report(), history(), samples()) == render_html(
        complete_report(), history(), samples()
    )


@pytest.mark.parametrize("make", [complete_report, dpo_report, verified_report])
def test_missing_parts_are_left_out(make):
    for key in make():
        report = make()
        del report[key]
        Page(render_html(report, [], samples()))


def test_a_dpo_policy_has_its_own_name_and_figures():
    report, said = dpo_report(), samples()
    for one in said:
        one["dpo"] = one.pop("ppo")
    validate_report(report, policy="dpo")
    text = render_html(report, dpo_history(), said)
    page = Page(text)
    assert HEADLINE.replace("PPO", "DPO") in text
    assert "PPO" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert "fine-tuned on demonstrations and trained on ranked responses with DPO." in text
    assert "How DPO went" in text and "One point per optimizer step." in text and "66.1%" in text
    assert "Reward-model score" not in text and "Over-optimisation" not in text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 3  # who is preferred, loss, order of the pairs
    assert text.count("clearly loves these people") == 6


@pytest.mark.parametrize(("algorithm", "title"), [
    ("grpo", "GRPO"), ("dr_grpo", "Dr. GRPO"), ("rloo", "RLOO"), ("reinforce_pp", "REINFORCE++")])
def test_the_page_names_the_algorithm_and_the_numbers_the_stage(algorithm, title):
    report = complete_report() | {"algorithm": algorithm}
    validate_report(report)
    text = render_html(report, history(), samples())
    Page(text)
    assert HEADLINE.replace("PPO", title) in text
    for words in (f"How {title} went", f"{title} vs SFT", f"against it with {title} for 40 iterations"):
        assert words in text
    assert "PPO" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_right_answers_are_the_headline_where_they_can_be_verified():
    report = verified_report()
    validate_report(report)
    text = render_html(report, [], samples())
    page = Page(text)
    assert "GRPO right on 62% [57, 66] of 512 held-out prompts, SFT on 40% [36, 44]" in text
    assert "The judge is the task&#39;s verifier, which checks every answer. Brackets are" in text
    assert "GRPO less SFT, paired by prompt: +21.5 points [+17.0, +26.0]." in text
    assert "<td class=\"num\">+21.5</td>" in text  # 100 * (315 - 205) / 512, in the table
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2  # right answers, who is preferred
    assert "fine-tuned on demonstrations and optimised against its reward with GRPO." in text


def test_what_the_headline_rests_on_is_said_as_it_is():
    report = complete_report()
    assert "Ties count half. Brackets are the 95% interval over prompts." in render_html(report, [], [])
    report["judge"]["is"] = "the reward model itself: not independent of training"
    assert "The judge is the reward model itself: not independent of training. Ties" in render_html(report, [], [])


def test_almost_nothing():
    Page(render_html({}, [], []))
    Page(
        render_html(
            {"stages": {"sft": {"seconds": 3.0}}}, [{"iteration": 1, "score": None}], [{"prompt": "a"}]
        )
    )
    Page(render_html(complete_report(), [{"iteration": 1, "score": 0.1, "kl_per_sequence": 0.0}], []))
    report = complete_report()
    del report["win_rate"]["ppo_vs_sft"], report["judge_score"]["base"]
    assert "PPO preferred over Base" in render_html(report, [], [])


def test_text_is_escaped():
    hostile = samples(1)
    hostile[0]["prompt"] = hostile[0]["ppo"]["text"] = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    report = complete_report()
    report["config"] = report["actors"][0]["role"] = "</pre><script>alert(2)</script>"
    text = render_html(report, history(3), hostile)
    assert not {"script", "img"} & {tag for tag, _ in Page(text).tags}
    assert "&lt;script&gt;alert(1)" in text


def test_non_finite_numbers_are_refused_and_nothing_is_written(tmp_path):
    report = complete_report()
    report["held_out_loss"]["ppo"] = np.float32("nan")
    with pytest.raises(ValueError, match=r"held_out_loss\.ppo"):
        write_report(report, [], [], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_report(tmp_path):
    write_report(complete_report(), [], [], tmp_path)
    before = (tmp_path / "report.json").read_text()
    report = complete_report()
    report["versions"]["torch"] = object()
    with pytest.raises(TypeError):
        write_report(report, [], [], tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}.{key}" if path else key)
    elif path != "actors":
        yield path


REQUIRED = [p for p in leaves(complete_report()) if not p.startswith(("config", "data", "versions."))]


@pytest.mark.parametrize("path", [*REQUIRED, "actors", "versions", "actors.2.pid", "actors.0.role"])
def test_validate_names_what_is_missing(path):
    report = complete_report()
    validate_report(report)
    *parents, last = path.split(".")
    at = report
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    del at[last]
    if path.startswith("stages."):
        path = path.removesuffix(".seconds")
    with pytest.raises(ValueError, match=re.escape(path)):
        validate_report(report)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("total_seconds", "1"),
        ("seed", 1.5),
        ("seed", True),
        ("stages", {}),
        ("actors", []),
        ("versions", None),
        ("kl_per_sequence", float("nan")),
        ("config", 3),
        ("data", []),
        ("policy", "dpo"),
        ("algorithm", None),
        ("rm", 0.7),
        ("rm_score", None),
        ("labeler", 0.7),
        ("dpo", {}),
        ("accuracy", {}),
    ],
)
def test_validate_names_what_is_of_the_wrong_type(path, value):
    with pytest.raises(ValueError, match=path):
        validate_report(complete_report() | {path: value})


def test_validate_allows_people_as_labelers_and_fewer_baselines():
    report = complete_report() | {"labeler": None}
    del report["win_rate"]["ppo_vs_base"]
    for key in ("judge_score", "rm_score", "distinct_2", "held_out_loss", "mean_length"):
        del report[key]["base"]
    validate_report(report, baselines=["sft"])
    with pytest.raises(ValueError, match="ppo_vs_base"):
        validate_report(report)
    Page(render_html(report, [], []))


def test_validate_allows_a_run_without_a_reward_model_but_no_scores_of_none():
    validate_report(verified_report())
    with pytest.raises(ValueError, match="rm_score must be null, as rm is"):
        validate_report(verified_report() | {"rm_score": {"base": 0.0, "sft": 0.0, "ppo": 1.0}})
    report = verified_report()
    del report["rm"]
    with pytest.raises(ValueError, match="report lacks rm"):
        validate_report(report)


@pytest.mark.parametrize("path", ["ppo", "sft.rate", "base.ci95", "ppo.right", "ppo_minus_sft.difference",
                                  "ppo_minus_sft.gained", "ppo_minus_sft"])
def test_validate_names_what_accuracy_lacks(path):
    report = copy.deepcopy(verified_report())
    *parents, last = ["accuracy", *path.split(".")]
    at = report
    for key in parents:
        at = at[key]
    del at[last]
    with pytest.raises(ValueError, match=re.escape(f"accuracy.{path}")):
        validate_report(report)


def test_validate_wants_the_keys_of_the_judged_policy():
    with pytest.raises(ValueError, match="policy"):
        validate_report(complete_report(), policy="dpo")
    with pytest.raises(ValueError, match="dpo_vs_base"):
        validate_report(complete_report() | {"policy": "dpo"}, policy="dpo")
