"""Log-probabilities of given tokens without ever holding [tokens, vocabulary], unless that is small."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ray.core.matmul import times_transposed

# Of float32 logits: in a processor's reach; on a GPU few chunks, each of which adds to the gradient of all of `weight`.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from.

    hidden [T, H]: hidden[t] is the state that *predicts* targets[t] (see `PackedRows.before`); weight [V, H];
    targets int64 [T]. Logits are hidden @ weight.T / temperature; the softmax is float32.

    Returns (log-probabilities float32 [T], in nats, with gradients; entropies float32 [T], in nats, with gradients
    only if entropy_grad: mostly they are a diagnostic). Tokens are taken `chunk_size` at a time (without: as many as
    have CHUNK_BYTES of logits), and the backward pass computes each chunk's logits again, so that at most
    [chunk_size, V] exists; the logits of a single chunk are kept for it instead. T may be 0; the result still hangs on
    the graph, as ZeRO-3 needs on a rank that has nothing to do. Raises ValueError for a temperature or chunk_size <= 0.
    """
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(weight)))
    if temperature <= 0 or chunk_size <= 0:
        raise ValueError(f"temperature ({temperature}) and chunk_size ({chunk_size}) must be positive")
    keep = len(targets) <= chunk_size
    chunks = [_Chunk.apply(hidden[start : start + chunk_size], weight, targets[start : start + chunk_size], temperature,
                           entropy_grad, keep)
              for start in range(0, max(1, len(targets)), chunk_size)]
    return torch.cat([logprobs for logprobs, _ in chunks]), torch.cat([entropies for _, entropies in chunks])


class _Chunk(torch.autograd.Function):
    """By hand, because autograd would hold [T, V] several times over, and walk through it three times as often.

    With logits l = h W' / tau, probabilities p and entropy H: d log p(y) / dl = onehot(y) - p and
    dH / dl = -p (l - E[l]), where E[l] = sum of p l = log normalizer - H.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy_grad: bool, keep: bool
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logits = _logits(hidden, weight, temperature, ctx.dtype)
        top = logits.amax(-1, keepdim=True)
        exponentials = (logits - top).exp_()
        total = exponentials.sum(-1)
        log_normalizer = total.log() + top.squeeze(-1)
        entropies = log_normalizer - torch.linalg.vecdot(exponentials, logits) / total
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
        ctx.temperature, ctx.entropy_grad = temperature, entropy_grad
        ctx.save_for_backward(hidden, weight, targets, log_normalizer, entropies, logits if keep else None)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logprobs: Tensor, to_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_normalizer, entropies, logits = ctx.saved_tensors
        if logits is None:
            logits = _logits(hidden, weight, ctx.temperature, ctx.dtype)
        gradient = (logits - log_normalizer[:, None]).exp_()  # the probabilities, so far
        pull = to_logprobs[:, None]
        if ctx.entropy_grad:
            pull = pull + to_entropies[:, None] * (logits - (log_normalizer - entropies)[:, None])
        gradient.mul_(pull).neg_()
        gradient.scatter_add_(-1, targets[:, None], to_logprobs[:, None])
        gradient = gradient.div_(ctx.temperature).to(ctx.dtype)
        to_hidden = to_weight = None
        if ctx.needs_input_grad[0]:
            to_hidden = times_transposed(gradient, weight.to(ctx.dtype).T).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = times_transposed(gradient.T, hidden.to(ctx.dtype).T).to(weight.dtype)
        return to_hidden, to_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """float32 [T, V], a new tensor. What has probability 0 has a finite logit: 0 times it is 0."""
    logits = times_transposed(hidden.to(dtype), weight.to(dtype)).float()
    if temperature != 1:
        logits.div_(temperature)
    return logits.clamp_(min=torch.finfo(torch.float32).min)
