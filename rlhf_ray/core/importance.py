"""Truncated importance correction for an engine and a trainer that disagree about the sampled tokens.

Tokens were sampled with the engine's probabilities and are trained on with the trainer's; in bfloat16 the two
differ. Each token is weighed by min(exp(old - sampled log-probability), cap), a constant in the loss (Yao et al.
2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training": truncated importance sampling).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.core.kl import safe_exp


@dataclass(frozen=True)
class ImportanceSums:
    """Sums over tokens, ready to be added up over ranks: weights, squared weights, tokens, tokens at the cap;
    and the largest ratio before the cap."""

    weights: float
    squares: float
    count: float
    capped: float
    largest: float


def importance_weights(old: Tensor, sampled: Tensor, mask: Tensor, cap: float) -> tuple[Tensor, ImportanceSums]:
    """(min(exp(old - sampled), cap), 0 outside the mask, detached; sums over the mask). All [T] or [N, L]."""
    ratio, _ = safe_exp(torch.where(mask, old - sampled, 0).detach())
    weights = torch.where(mask, ratio.clamp(max=cap), 0)
    w = weights[mask].double()
    return weights, ImportanceSums(
        weights=float(w.sum()), squares=float(w.square().sum()), count=float(w.numel()),
        capped=float((ratio[mask] > cap).sum()), largest=float(ratio[mask].max()) if w.numel() else 0.0,
    )


def effective_sample_size(weights: float, squares: float, count: float) -> float:
    """(sum of w)^2 / (n * sum of w^2), a share in (0, 1]: 1 when all weights are equal. NaN without tokens."""
    return weights * weights / (squares * count) if squares and count else float("nan")
