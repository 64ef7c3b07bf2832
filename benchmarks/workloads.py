"""Work of a known size: random models, 64 prompts of exactly 32 tokens, responses of exactly 64. The two largest
models, which are meant for GPUs, have 256 prompts of 128 tokens and responses of 256.

No response ends early, for the tokenizer's end-of-sequence token is one that the model does not have. `varying` models
have it, and were trained for a moment on lines of random words whose lengths are long-tailed: so are their responses,
about 28 tokens on average and 64 at most.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.models.tiny import EOS, USER, train_tokenizer

RESPONSES, PROMPT, RESPONSE = 64, 32, 64  # a batch; tokens
_NEVER = "<|never|>"


@dataclass(frozen=True)
class Shape:
    """Of a Llama whose head is not tied to its embeddings, unless it is large."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool = False
    responses: int = RESPONSES
    prompt: int = PROMPT
    response: int = RESPONSE

    @property
    def length(self) -> int:
        return self.prompt + self.response


SHAPES = {
    "W1": Shape(512, 128, 384, 4, 4),  # 1M parameters
    "W2": Shape(4096, 384, 1536, 10, 6),  # 27M
    "M125": Shape(32000, 768, 2304, 13, 12, tied=True),  # 125M
    "M500": Shape(32000, 1280, 3840, 22, 20, tied=True, responses=256, prompt=128, response=256),  # 510M
    "M1300": Shape(32000, 2048, 5632, 24, 16, tied=True, responses=256, prompt=128, response=256),  # 1.3G
}


def make(name: str, root: Path) -> Path:
    """The directory of a workload: `sft/model`, `rm/model` and prompts, made once."""
    directory, shape = root / name, SHAPES[name]
    if (directory / "rm/stage.json").is_file():
        return directory
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in ("a", "e", "i", "o", "u", "an", "er", "ol")]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(12_000)})
    rng.shuffle(words)
    often = [1 / (i + 20) for i in range(len(words))]
    vocab = min(shape.vocab, 4096)  # a larger one would need more text; the model's is what costs time
    tokenizer = train_tokenizer((" ".join(rng.choices(words, often, k=40)) for _ in range(6000)), vocab)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=2048, tie_word_embeddings=shape.tied, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None, pad_token_id=0)
    prompts: list[str] = []
    while len(prompts) < 4 * shape.responses:
        said = " ".join(rng.choices(words, often, k=2 * shape.prompt))
        text = tokenizer.decode(tokenizer(said)["input_ids"][: shape.prompt - 1])
        if len(tokenizer(text)["input_ids"]) == shape.prompt - 1:  # <|bos|> comes before it
            prompts.append(text)
    never_ends(tokenizer, shape.vocab)
    # The reward model reads the end-of-sequence token behind a response that was cut.
    scalar = LlamaConfig(**{**config.to_dict(), "num_labels": 1, "vocab_size": shape.vocab + 1})
    for stage, kind, of in (("sft", LlamaForCausalLM, config), ("rm", LlamaForSequenceClassification, scalar)):
        torch.manual_seed(0)
        kind(of).save_pretrained(directory / stage / "model")
        tokenizer.save_pretrained(directory / stage / "model")
        (directory / stage / "stage.json").write_text("{}")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return directory


def never_ends(tokenizer: PreTrainedTokenizerFast, vocab: int) -> None:
    """Give the tokenizer an end that a model of `vocab` tokens cannot say."""
    tokenizer.add_tokens([f"<|unused {i}|>" for i in range(len(tokenizer), vocab)] + [_NEVER])
    tokenizer.eos_token = tokenizer.pad_token = _NEVER
    assert tokenizer.eos_token_id == vocab


def make_varying(name: str, root: Path) -> Path:
    """The directory of a workload whose responses end by themselves: `sft/model`, `rm/model` and prompts."""
    directory = root / f"{name}-varying"
    if (directory / "rm/stage.json").is_file():
        return directory
    plain = make(name, root)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plain / "sft/model")
    tokenizer.eos_token, tokenizer.pad_token = EOS, USER
    end, rng = tokenizer.eos_token_id, random.Random(1)
    texts = [json.loads(line)["prompt"] for line in (plain / "prompts.jsonl").read_text().splitlines()]
    model = LlamaForCausalLM.from_pretrained(plain / "sft/model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        rows = [[tokenizer.bos_token_id, *tokenizer(rng.choice(texts))["input_ids"]] for _ in range(16)]
        lengths = [min(RESPONSE - 1, 1 + int(rng.lognormvariate(2.4, 0.8))) for _ in rows]
        spoken = [[*row, *rng.choices(row[1:], k=n), end, *[0] * (RESPONSE - 1 - n)]
                  for row, n in zip(rows, lengths, strict=True)]
        ids = torch.tensor(spoken)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < PROMPT, -100)
        for row, n in zip(labels, lengths, strict=True):
            row[PROMPT + n + 1 :] = -100
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scorer = LlamaForSequenceClassification(LlamaConfig(**{**model.config.to_dict(), "num_labels": 1}))
    (directory / "prompts.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (directory / "prompts.jsonl").write_bytes((plain / "prompts.jsonl").read_bytes())
    for stage, trained in (("sft", model), ("rm", scorer)):
        trained.save_pretrained(directory / stage / "model")
        tokenizer.save_pretrained(directory / stage / "model")
        (directory / stage / "stage.json").write_text("{}")
    return directory


def config(name: str, workload: Path, output_dir: Path, algorithm: str = "ppo", iterations: int = 5,
           overrides: tuple[str, ...] = ()) -> Config:
    """One ppo stage on a workload: one optimizer step on a batch, float32, micro-batches of eight sequences."""
    shape = SHAPES[name]
    cfg = compose([
        "experiment=null", "data=files", f"algorithm={algorithm}", f"output_dir={output_dir}", "resume=never",
        f"model.path={workload / 'sft/model'}", f"model.max_length={shape.length}", "data.template=none",
        f"data.ppo_prompts={workload / 'prompts.jsonl'}", f"data.max_prompt_tokens={shape.prompt}",
        f"rollout.batch_size={shape.responses}", f"rollout.max_response_tokens={shape.response}",
        f"algorithm.minibatch_size={shape.responses}", "algorithm.ppo_epochs=1", f"ppo.iterations={iterations}",
        "checkpoint.iterations=1000000", "ppo.policy_optimizer.lr=1e-6", "ppo.critic_optimizer.lr=1e-6",
        *[f"roles.{role}.micro_batch_tokens={8 * shape.length}"
          for role in ("policy", "critic", "reward", "reference")],
        *overrides,
    ])
    output_dir.mkdir(parents=True, exist_ok=True)
    for stage in ("sft", "rm"):
        if not (output_dir / stage).exists():
            (output_dir / stage).symlink_to((workload / stage).resolve())
    return cfg
