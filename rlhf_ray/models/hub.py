"""Loading and saving Hugging Face models and tokenizers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_ray import disk, storage
from rlhf_ray.config.schema import ModelConfig
from rlhf_ray.core.ragged import PackedRows, pack
from rlhf_ray.errors import UserError
from rlhf_ray.models.light import import_transformers
from rlhf_ray.models.linear import speed_up

import_transformers()
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()  # our own bars say what is going on

SCORE_SHIFT = "score_shift"  # in config.json: subtracted from the scalar head's output (InstructGPT 3.5, reward bias)


def _found(path: str, weights: bool = True) -> str:
    """A local directory must hold a model; anything else is a hub name, left to transformers."""
    storage.fetch(Path(path), lambda name: weights or not name.endswith(".safetensors"))
    if (path.startswith((".", "/", "~")) or Path(path).exists()) and not (Path(path) / "config.json").is_file():
        raise UserError(f"no model in {path!r}: expected a directory with config.json; set model.path or run the "
                        "stage that makes it")
    return path


def _load(kind: str, path: str, cfg: ModelConfig, dropout: float, **options: Any) -> Any:
    try:
        import transformers

        model = getattr(transformers, kind).from_pretrained(
            _found(path), dtype=getattr(torch, cfg.dtype), attn_implementation=cfg.attn_implementation, **options
        )
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {path!r}: {str(error).splitlines()[0]}; set model.path to a "
                        "Hugging Face directory or a name that this machine can download") from error
    # In the modules, not in the config: what is saved later keeps the model's own values.
    for module in model.modules():
        rates = [n for n, v in vars(module).items() if type(v) in (int, float) and n.endswith(("dropout", "layerdrop"))]
        for name in ["p"] if isinstance(module, nn.Dropout) else rates:
            # ranks that skip different layers would wait for each other's gathers for ever
            setattr(module, name, 0.0 if name == "layerdrop" else dropout)
    speed_up(model)
    # PyTorch's first choice on Hopper and Blackwell. Its gradients are not always finite: not with masks, which packed
    # rows have (pytorch issue 196678), and perhaps not in large batches without.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if cfg.gradient_checkpointing:  # takes effect in training mode only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_causal_lm(path: str, cfg: ModelConfig, dropout: float = 0.0) -> Any:
    """A Hugging Face causal language model; `dropout` replaces whatever dropout it came with, train mode included."""
    return _load("AutoModelForCausalLM", path, cfg, dropout)


def load_scalar_model(path: str, cfg: ModelConfig) -> Any:
    """A sequence-classification model with one output; a head that `path` lacks starts at zero.

    (A zero head makes the first scores 0 for all, so that no random direction is learnt from.)
    """
    config = AutoConfig.from_pretrained(_found(path))
    fresh = "ForCausalLM" in "".join(config.architectures or [])
    model = _load("AutoModelForSequenceClassification", path, cfg, 0.0, num_labels=1)
    if fresh:
        nn.init.zeros_(model.score.weight)
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises UserError if there is none, or if it has no end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(_found(path, weights=False))
    except OSError as error:
        raise UserError(f"no tokenizer in {path!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path!r} has no eos_token: responses could never end; set one there")
    return tokenizer


def check_same_tokenizer(policy: str, other: str) -> None:
    """Raise UserError unless two models read the same token ids alike: vocabulary, special tokens."""
    a, b = load_tokenizer(policy), load_tokenizer(other)
    x, y = a.get_vocab(), b.get_vocab()
    different = sorted(t for t in x.keys() | y.keys() if x.get(t) != y.get(t))
    if different or (a.eos_token_id, a.bos_token_id) != (b.eos_token_id, b.bos_token_id):
        what = f"{len(different)} tokens differ, {different[0]!r} for one" if different else "bos or eos differ"
        raise UserError(f"the tokenizers in {policy!r} and {other!r} are not the same ({what}), but the roles exchange "
                        "token ids: train both models with one tokenizer, or give the rewards through a function or "
                        "a service (reward.sources), which read text")


def score_shift(path: str) -> float:
    """The reward bias stored with a reward model, 0.0 if none is."""
    return float(json.loads((Path(path) / "config.json").read_text()).get(SCORE_SHIFT, 0.0))


@dataclass(frozen=True)
class Packer:
    """Sequences to micro-batches, as a model's attention can tell them apart: see `core.ragged.pack`.

    one_row: only in micro-batches of one row. shares_prompts: also where responses share their prompt, for which every
    layer's attention must take a mask.
    """

    row_length: int
    one_row: bool
    shares_prompts: bool

    @staticmethod
    def of(model: Any, cfg: ModelConfig) -> "Packer":
        config, masks = model.config.get_text_config(), cfg.attn_implementation == "sdpa"
        everywhere = not getattr(config, "sliding_window", None) \
            and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        return Packer(cfg.max_length, not masks, masks and everywhere)

    def __call__(
        self, ids: np.ndarray, lengths: np.ndarray, tokens: int, prompts: np.ndarray | None = None
    ) -> list[PackedRows]:
        """Flat ids [T] to micro-batches of at most `tokens` places. prompts [N]: so many first tokens of each sequence
        are its prompt."""
        return pack(ids, lengths, self.row_length, tokens, self.one_row, prompts if self.shares_prompts else None)


def save_model(
    model: Any, weights: Iterable[tuple[str, Tensor]], tokenizer: PreTrainedTokenizerBase, path: Path,
    dtype: str, readme: str | None = None, **config: Any,
) -> None:
    """Write a Hugging Face directory, whole or not at all; it is on the disk when this returns. Raises UserError.

    readme: its README.md, if it is to have one. `config` goes into config.json.
    """
    state = {name: tensor.detach().to("cpu", getattr(torch, dtype)).clone() for name, tensor in weights}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    saved = model.config.to_diff_dict() | {"dtype": dtype, "architectures": [type(model).__name__]} | config
    with disk.replacing(path) as fresh:
        save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(saved, indent=2, default=str) + "\n")
        # safetensors writes for the owner alone; whoever serves the model may be somebody else
        (fresh / "model.safetensors").chmod((fresh / "config.json").stat().st_mode & 0o777)
        try:
            tokenizer.save_pretrained(fresh)
        except Exception as error:  # of a full disk tokenizers says no more than that
            raise OSError(str(error)) from error
        if readme is not None:
            (fresh / "README.md").write_text(readme, encoding="utf-8")
