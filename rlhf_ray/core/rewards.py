"""From one score per response to one reward per token.

Scores go through `shape_scores` first, KL is added last: score clipping never touches the penalty. N responses,
left-aligned and padded to L tokens; mask bool [N, L] is True on response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.core.types import Moments, Shaping


@dataclass(frozen=True)
class ShapedScores:
    """scores float64 [N]; kept bool [N]: False where the response is left out of the update and of all statistics;
    clip_fraction: share of the kept scores that were clipped."""

    scores: Tensor
    kept: Tensor
    clip_fraction: float


def combine(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over sources: [S, N], [S] -> float64 [N]."""
    return weights.double() @ scores.double()


def shape_scores(scores: Tensor, truncated: Tensor, lengths: Tensor, seen: Moments, how: Shaping) -> ShapedScores:
    """Normalise, clip, then the policies for truncated and for long responses, in this order.

    scores [N] as the sources gave them; truncated bool [N]: cut at the length limit; lengths int [N]: response
    tokens; seen: moments of the kept scores of the run so far, this batch included.
    The truncation penalty takes the score's place; the overlong penalty (DAPO, Yu et al. 2025, arXiv 2503.14476,
    eq. 13) is added: 0 up to max_tokens - overlong_tokens, then falling linearly to -overlong_penalty.
    """
    kept = ~truncated if how.truncated == "drop" else torch.ones_like(truncated)
    shaped = scores.double()
    if how.normalize:
        shaped = (shaped - seen.mean) / (seen.variance + 1e-8) ** 0.5
    clipped = torch.zeros_like(kept)
    if how.clip is not None:
        clipped = (shaped.abs() > how.clip) & kept
        shaped = shaped.clamp(-how.clip, how.clip)
    if how.truncated == "penalty":
        shaped = torch.where(truncated, how.truncation_penalty, shaped)
    if how.overlong_tokens:
        over = (lengths - (how.max_tokens - how.overlong_tokens)).clamp(0, how.overlong_tokens)
        shaped = shaped - how.overlong_penalty * over / how.overlong_tokens
    return ShapedScores(shaped, kept, float(clipped.sum()) / max(1, int(kept.sum())))


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl on every response token, plus the score on the last one: [N, L], 0 outside the mask.

    scores [N]; kl [N, L] in nats, k1 of the old policy against the reference. InstructGPT (Ouyang et al.
    2022), eq. 2, spread over tokens: for gamma = 1 the rewards of a row add up to score - kl_coef *
    log(policy / ref). Raises ValueError if a response has no token, for its score would be lost.
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError(f"responses without a token: rows {(~mask.any(dim=1)).nonzero().flatten().tolist()}")
    # the token of the mask at which the running count is complete
    last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    penalties = torch.where(mask, -kl_coef * kl, 0)
    return torch.where(last, penalties + scores[:, None], penalties)
