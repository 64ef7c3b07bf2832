"""Log-probabilities of given tokens without ever holding [tokens, vocabulary]."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from.

    hidden [T, H]: hidden[t] is the state that *predicts* targets[t] (see `predictors`); weight [V, H];
    targets int64 [T]. Logits are hidden @ weight.T / temperature; the softmax is float32.

    Returns (log-probabilities float32 [T], in nats, with gradients; entropies float32 [T], in nats, with gradients
    only if entropy_grad: mostly they are a diagnostic). Tokens are taken `chunk_size` at a time, and the backward
    pass computes each chunk's logits again, so that at most [chunk_size, V] exists. T may be 0; the result still
    hangs on the graph, as ZeRO-3 needs on a rank that has nothing to do. Raises ValueError for a temperature or
    chunk_size <= 0.
    """
    if temperature <= 0 or chunk_size <= 0:
        raise ValueError(f"temperature ({temperature}) and chunk_size ({chunk_size}) must be positive")
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logprobs, entropies = [], []
    for start in range(0, max(1, len(targets)), chunk_size):
        args = (hidden[start : start + chunk_size], weight, targets[start : start + chunk_size], temperature,
                entropy_grad)
        if needs_grad:  # nothing here is random, so there is no random state to preserve
            chunk = checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk(*args)
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).float() / temperature
    log_normalizer = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        probabilities = torch.softmax(logits, dim=-1)
        # p = 0 for a logit of -inf, where p * logit would be NaN; the limit of p log p is 0
        entropies = log_normalizer - (probabilities * logits.where(probabilities > 0, 0)).sum(-1)
    return logprobs, entropies


def predictors(hidden: Tensor) -> Tensor:
    """Hidden states [R, L, H] to the states that predict each token [R, L, H]: shifted right, zeros first.

    Entry t is hidden[:, t - 1], what the model knew before token t. In packed rows the entry of a sequence's
    first token is the last state of its neighbour: meaningless, mask it.
    """
    return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
