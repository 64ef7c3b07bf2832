"""The two kinds of network that the learners and scorers run, as thin wrappers around Hugging Face models.

Both read packed rows (see `core.ragged`). DeepSpeed wraps these modules whole, so every parameter that a
forward pass touches belongs to a child module that is *called*: that is what ZeRO-3's hooks rely on.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.core.logprobs import token_logprobs
from rlhf_ray.core.ragged import PackedRows


class LogprobHead(nn.Module):
    """Takes the place of `lm_head`: from hidden states to log-probabilities, never holding [tokens, vocabulary]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> Tensor:
        # One tensor, for before a module's backward pass DeepSpeed's hook runs once for each tensor that has gradients:
        # ranks whose losses use entropies, or do not, would gather a tied weight more often, or less.
        return torch.stack(token_logprobs(hidden, self.weight, targets, temperature, entropy_grad))


class ScalarHead(nn.Module):
    """Takes the place of `score`: one float32 number per state, whatever the dtype of the model."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class CausalLM(nn.Module):
    """A language model that answers with the log-probability of given tokens."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model
        self.model.lm_head = LogprobHead(model.get_output_embeddings().weight)

    def forward(self, rows: PackedRows, wanted: Tensor, temperature: float, entropy_grad: bool = False) -> Tensor:
        """wanted bool [R, L] -> float32 [2, wanted.sum()]: log-probabilities, entropies.

        The entry of a token is log p(token | those before it in its sequence), logits divided by `temperature`.
        The first token of a sequence has nothing before it: its entry is meaningless, do not want it.
        """
        found: Tensor = self.model.lm_head(
            rows.before(_hidden_states(self.model, rows))[wanted], rows.ids[wanted], temperature, entropy_grad)
        return found


class ScalarModel(nn.Module):
    """A model with a scalar head (`score`): reward model and critic.

    `shift` is subtracted from what the head says: the reward bias that was stored with the reward model.
    """

    def __init__(self, model: Any, shift: float = 0.0):
        super().__init__()
        self.model: Any = model
        self.model.score = ScalarHead(model.score.weight)
        self.shift = shift

    def forward(self, rows: PackedRows) -> Tensor:
        """float32 [R, L]: the head's output after reading each token. `rows.before` of it are values: entry t is what
        was predicted before token t was chosen."""
        scores: Tensor = self.model.score(_hidden_states(self.model, rows))
        return scores - self.shift


def layer_classes(module: nn.Module) -> list[str]:
    """Names of the classes of a model's layers: of what gradient checkpointing computes again as a whole."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return sorted({type(part).__name__ for part in module.modules() if isinstance(part, GradientCheckpointingLayer)})


def where_broken(names: Sequence[str], total: int) -> str:
    """Of `total` parameters those whose gradients are not finite, in the model's order, for a person: how many, and the
    last layer with any, to which the backward pass came first."""
    if not names:
        return "no parameter by itself: their norm is not finite"
    layer = re.match(r".*?\.\d+\.", names[-1])
    if layer is None:
        return f"{len(names)} of {total} parameters, and backwards first {names[-1]}"
    group = [name.removeprefix(layer[0]) for name in names if name.startswith(layer[0])]
    more = f" and {len(group) - 3} more" if len(group) > 3 else ""
    return f"{len(names)} of {total} parameters, and backwards first {layer[0][:-1]} ({', '.join(group[:3])}{more})"


def _hidden_states(model: Any, rows: PackedRows) -> Tensor:
    states: Tensor = model.base_model(input_ids=rows.ids, position_ids=rows.positions, attention_mask=rows.visible(),
                                      use_cache=False).last_hidden_state
    return states
