"""From scored responses to advantages, for any algorithm.

Two steps. `assess` looks at the whole batch, one row per response, and is computed alike on every rank: what became of
the scores, which responses count, the advantages of groups, and the numbers to log. `token_advantages` spreads the
result over the tokens of one shard.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.core.algorithms.groups import equal_groups
from rlhf_ray.core.algorithms.spec import Algorithm
from rlhf_ray.core.masked import moments
from rlhf_ray.core.rewards import combine, shape_scores, token_rewards
from rlhf_ray.core.types import Moments, Shaping


@dataclass(frozen=True)
class Responses:
    """One entry per response, everything float64 [N] but `scores` [S, N], one row per reward source.

    positions: places in the whole batch; truncated: 1 or 0; tokens: length; kl: k1 towards the reference, summed
    over the response, nats.
    """

    positions: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    scores: np.ndarray

    def table(self) -> np.ndarray:
        """One row per response: [N, 4 + S]."""
        return np.stack([self.positions, self.truncated, self.tokens, self.kl, *self.scores], axis=1).astype(float)

    @staticmethod
    def from_table(table: np.ndarray) -> "Responses":
        """In the order of positions, so that sums do not depend on who computed which response."""
        columns = table[np.argsort(table[:, 0])].T
        return Responses(columns[0], columns[1], columns[2], columns[3], columns[4:])


@dataclass(frozen=True)
class Assessment:
    """shaped float64 [N], kept bool [N], advantages float64 [N] or None (they are per token), in the order of
    positions; numbers: to be logged; seen: moments of the raw scores of this batch."""

    positions: np.ndarray
    shaped: Tensor
    kept: Tensor
    advantages: Tensor | None
    numbers: dict[str, float]
    seen: Moments

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Where the responses at these positions are: int64 [n]."""
        return np.searchsorted(self.positions, positions)


def assess(
    responses: Responses, algorithm: Algorithm, weights: list[float], shaping: Shaping, kl_coef: float,
    group_size: int, seen: Moments,
) -> Assessment:
    """weights [S] of the sources; kl_coef: 0 if KL is not in the reward; seen: of the iterations before this one."""
    sources, tokens, kl = (torch.as_tensor(x) for x in (responses.scores, responses.tokens, responses.kl))
    raw = combine(sources, torch.tensor(weights, dtype=torch.float64))
    truncated = torch.as_tensor(responses.truncated) > 0
    counted = ~truncated if shaping.truncated == "drop" else torch.ones_like(truncated)
    now = moments(raw, counted)
    numbers = {"truncated": float(truncated.double().mean()), "response_length": float(tokens.mean())}
    advantages = None if algorithm.group_advantages is None else torch.zeros_like(raw)
    if not now.count:
        return Assessment(responses.positions, raw, counted, advantages, numbers, now)
    shaped = shape_scores(raw, truncated, tokens, seen + now, shaping)
    kept = shaped.kept
    rewards = shaped.scores - kl_coef * kl
    groups = torch.as_tensor(responses.positions.astype(np.int64)) // group_size
    numbers |= {
        "score": now.mean, "score_std": now.variance**0.5, "reward": float(rewards[kept].mean()),
        "kl_per_sequence": float(kl[kept].mean()), "kl_per_token": float(kl[kept].sum() / tokens[kept].sum()),
        "dropped": float((~kept).sum()),
    }
    if len(sources) > 1:
        numbers |= {f"score_{i}": float(row[kept].mean()) for i, row in enumerate(sources, start=1)}
    if shaping.clip is not None:
        numbers["score_clip_fraction"] = shaped.clip_fraction
    if group_size > 1 and len(same := equal_groups(shaped.scores[kept], groups[kept])):
        numbers["equal_groups"] = float(same.double().mean())
    if algorithm.group_advantages is not None and advantages is not None:
        advantages[kept] = algorithm.group_advantages(rewards[kept], groups[kept])
    return Assessment(responses.positions, shaped.scores, kept, advantages, numbers, now)


def token_advantages(
    algorithm: Algorithm, assessment: Assessment, rows: np.ndarray, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, mask), each [N, L], of the responses at `rows` of the assessment.

    kl, values [N, L]; mask bool [N, L]: response tokens; the mask that comes back is False on responses left out.
    kl_coef: 0 if KL is not in the reward.
    """
    kept = mask & assessment.kept[rows][:, None]
    if assessment.advantages is not None:
        whole = assessment.advantages[rows].to(kl.dtype)[:, None]
        return torch.where(kept, whole, 0), torch.zeros_like(kl), kept
    assert algorithm.advantages is not None
    rewards = token_rewards(assessment.shaped[rows].to(kl.dtype), kl, mask, kl_coef)
    advantages, returns = algorithm.advantages(rewards, values, mask, gamma, lam)
    return torch.where(kept, advantages, 0), returns, kept
