"""The model card of an exported model: what it is, what was measured, how to load it, and what nobody looked at.

It is for publishing: no path of this machine, no address of a service.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.reward_sources import SERVICE
from rlhf_ray.data.templates import ALPACA
from rlhf_ray.evaluation.schema import BY_MODEL

MARK = "rlhf_ray"  # the tag by which we know a card of ours
WHAT = {
    "pretrain": "a base model, trained on plain text",
    "sft": "supervised fine-tuning on demonstrations",
    "rm": "a reward model, trained on rankings of responses",
    "ppo": "trained against rewards, with a KL penalty towards the SFT model",
    "dpo": "trained on rankings of responses directly (DPO)",
}
TAGS = {"rm": "reward-model"}
RANKERS = {"simulated": "a simulated labeler, not people", "people": "people", "file": "whoever wrote data.comparisons"}
# The sections of the configuration that say how each stage's model came about.
SECTIONS = {"pretrain": ["pretrain"], "sft": ["sft"], "rm": ["compare", "rm"],
            "ppo": ["rollout", "reward", "algorithm", "ppo"], "dpo": ["compare", "dpo"]}
NUMBERS = {
    "pretrain": ["held_out_loss", "held_out_perplexity", "tokens", "epochs"],
    "sft": ["val_loss", "demonstrations", "tokens"],
    "rm": ["val_accuracy", "ci95", "val_loss", "val_pairs", "val_prompts", "score_shift"],
    "ppo": ["iterations"],
    "dpo": ["val_accuracy", "ci95", "val_loss", "val_pairs", "val_prompts"],
}
IN_TRAINING = ["score", "judge_score", "kl_per_sequence", "entropy", "response_length"]  # of ppo's last iteration


@dataclass(frozen=True)
class Origin:
    """Where a model comes from. config: of the run when it was trained, as plain values; data: fingerprint.

    versions: of packages, `when` they were looked at; dtype: of the exported weights; step: of the checkpoint, or None;
    record: what the stage recorded, if it is finished; metrics: of the last iteration of ppo; report: report.json, if
    it is about this very model.
    """

    stage: str
    config: Mapping[str, Any]
    data: str
    versions: Mapping[str, str]
    when: str
    dtype: str
    step: int | None = None
    record: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None


def is_ours(card: str) -> bool:
    """Whether a README.md was written by `card`."""
    front, end, _ = card.partition("\n---\n")
    return front.startswith("---\n") and bool(end) and f"- {MARK}" in front.splitlines()


def card(origin: Origin) -> str:
    """README.md of the exported model: Markdown, with YAML in front for the Hugging Face hub."""
    base, algorithm = _base(origin.config), _algorithm(origin)
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if origin.stage == "rm" else "text-generation",
        "tags": list(dict.fromkeys([MARK, "rlhf", TAGS.get(origin.stage, origin.stage), algorithm])),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {base or 'A new model'}, stage {origin.stage}",
        _facts(origin, base, algorithm), _measured(origin), "\n\n".join(_loading(origin)), _configuration(origin),
        _limits(origin),
    ]
    return "\n\n".join(parts) + "\n"


def _base(config: Mapping[str, Any]) -> str | None:
    """Name of the base model, of a local one only the last part of its path; None if the run made its own."""
    if "pretrain" in config["stages"] and config["pretrain"]["init"] == "scratch":
        return None
    path = str(config["model"]["path"])
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
    return Path(path).name if local else path


def _algorithm(origin: Origin) -> str:
    return str(origin.config["algorithm"]["name"]) if origin.stage == "ppo" else TAGS.get(origin.stage, origin.stage)


def _facts(origin: Origin, base: str | None, algorithm: str) -> str:
    data, step = origin.config["data"], "" if origin.step is None else f", checkpoint of step {origin.step}"
    source = data["source"] + (f" ({data['reasoning_task']})" if data["source"] == "reasoning" else "")
    rows = {
        "base model": base or "none: trained from scratch",
        "stage": f"{origin.stage}: {WHAT[origin.stage]}{step}",
        **({"algorithm": algorithm} if origin.stage == "ppo" else {}),
        **({"rankings by": RANKERS[origin.config["compare"]["ranker"]]} if _ranked(origin) else {}),
        "data": f"{source}, fingerprint `{origin.data}`",
        "seed": origin.config["seed"],
        "weights": origin.dtype,
        f"versions when {origin.when}": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
    }
    return _table(("", ""), rows.items()) + "\n\nMade and described by `rlhf-ray export`."


def _ranked(origin: Origin) -> bool:
    """Whether rankings of responses had a part in this model."""
    return origin.stage in ("rm", "dpo") or (origin.stage == "ppo" and "model" in origin.config["reward"]["sources"])


def _measured(origin: Origin) -> str:
    numbers = {k: v for k in NUMBERS[origin.stage] if (v := (origin.record or {}).get(k)) is not None}
    numbers |= {f"{k}, last iteration": v for k in IN_TRAINING if (v := (origin.metrics or {}).get(k)) is not None}
    text = "## Measured\n\n" + (_table(("", ""), numbers.items()) if numbers else "Nothing was recorded.")
    report = origin.report
    if origin.stage not in ("ppo", "dpo"):
        return text
    if report is None:
        return text + "\n\nThis model was not evaluated on held-out prompts."
    wins = {
        name.replace("_vs_", " preferred over "):
            f"{w['rate']:.1%} [{w['ci95'][0]:.1%}, {w['ci95'][1]:.1%}], n = {w['n']} ({w['wins']} wins, {w['ties']} "
            f"ties, {w['losses']} losses)" for name, w in report["win_rate"].items()}
    wins |= {f"right answers, {name}": f"{a['rate']:.1%} [{a['ci95'][0]:.1%}, {a['ci95'][1]:.1%}], n = {a['n']}"
             for name, a in (report.get("accuracy") or {}).items() if "rate" in a}
    wins["KL from the SFT model, nats per response"] = _shown(report["kl_per_sequence"])
    models = list(report["judge_score"])
    each = {key: [_shown(report[key][m]) for m in models] for key in BY_MODEL if report.get(key)}
    held_out = report["judge"].get("held_out_accuracy")
    return "\n\n".join([
        text,
        f"On held-out prompts, judged by {report['judge'].get('is', 'a judge')}"
        + (f", right on {held_out:.1%} of human labels it had not seen" if held_out is not None else "")
        + "; 95% intervals:",
        _table(("", ""), wins.items()), _table(("", *models), ((k, *v) for k, v in each.items())),
    ])


def _loading(origin: Origin) -> Iterator[str]:
    template, rollout = origin.config["data"]["template"], origin.config["rollout"]
    yield "## Loading"
    if origin.stage == "pretrain":
        yield "A base model: it goes on with text, and knows no prompts."
        prompt = '(tokenizer.bos_token or "") + "Once"'
    elif template == "chat":
        yield "Prompts go through the chat template of the tokenizer, which writes its own beginning of the sequence."
        prompt = ('tokenizer.apply_chat_template(\n    [{"role": "user", "content": "..."}], tokenize=False, '
                  "add_generation_prompt=True)")
    elif template == "alpaca":
        yield "Prompts have Alpaca's form; one with an input has `### Input:` and the input after the instruction."
        prompt = f'(tokenizer.bos_token or "") + {ALPACA!r}.format(instruction="...")'
    else:
        yield "Prompts are read as they are, after the token that begins a sequence, if there is one."
        prompt = '(tokenizer.bos_token or "") + "..."'
    kind = "AutoModelForSequenceClassification" if origin.stage == "rm" else "AutoModelForCausalLM"
    yield f"""```python
import torch
from transformers import {kind}, AutoTokenizer

path = "."  # this directory
tokenizer, model = AutoTokenizer.from_pretrained(path), {kind}.from_pretrained(path)
prompt = {prompt}
ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]"""
    if origin.stage == "rm":
        yield """response = tokenizer("...", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
with torch.no_grad():
    score = float(model(torch.tensor([ids + response])).logits[0, 0]) - model.config.score_shift
```

Higher is better, and demonstrations score 0 on average: `score_shift` in config.json is what they scored before. One
text at a time: the score is read off its last token, which ends the response."""
        return
    temperature, most = rollout["temperature"], rollout["max_response_tokens"]
    yield f"""output = model.generate(torch.tensor([ids]), do_sample=True, temperature={temperature}, top_k=0,
                        max_new_tokens={most})
print(tokenizer.decode(output[0, len(ids):], skip_special_tokens=True))
```"""
    yield f"""In vLLM, with `ids` as above:

```python
from vllm import LLM, SamplingParams

params = SamplingParams(temperature={temperature}, max_tokens={most})
print(LLM(path).generate([{{"prompt_token_ids": ids}}], params)[0].outputs[0].text)
```"""


def _configuration(origin: Origin) -> str:
    c = origin.config
    kept = {"model": {k: c["model"][k] for k in ("dtype", "max_length")},
            "data": {k: v for k, v in c["data"].items() if v is not None},
            **{name: c[name] for name in SECTIONS[origin.stage]}}
    return f"## Configuration\n\n```yaml\n{yaml.safe_dump(_public(kept), sort_keys=False)}```"


def _limits(origin: Origin) -> str:
    lines = ["No evaluation of safety, bias or truthfulness was made."]
    if origin.stage == "ppo":
        lines.append("It was trained to raise a score, which stands for what is wanted and is not the same: where the "
                     "two part, the model follows the score.")
    if origin.stage == "rm":
        lines.append("It was fitted to responses of one SFT model: what it says of others' is a guess, and a policy "
                     "trained against it will find its mistakes.")
    if _ranked(origin) and origin.config["compare"]["ranker"] == "simulated":
        lines.append("No person ranked anything: the preferences are those of a simulated labeler.")
    lines.append("It has what its base model and its data have taught it, with their licences; none is claimed here.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _public(value: Any) -> Any:
    """Without directories of this machine and addresses of services."""
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str) and value.startswith(SERVICE):
        return "a service"
    return Path(value).name if isinstance(value, str) and "/" in value and not value.startswith("hf://") else value


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_shown(cell) for cell in line)} |" for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
