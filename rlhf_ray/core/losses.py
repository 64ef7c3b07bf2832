"""The losses. Each is a sum over this micro-batch divided by the denominator of the whole optimizer window.

The denominator counts the tokens (or prompts) of all micro-batches of all ranks, and the caller gives it
(`ranking_loss` leaves the division to the caller). So losses and gradients of micro-batches and ranks add up to
those of one big batch: an update depends neither on the micro-batch size, nor on accumulation, nor on the number
of ranks. Whoever averages gradients over ranks, as DeepSpeed does, has to be undone by a factor of the world size.

Per-token arguments have one common shape, [T] or [N, L]; masks are bool; entries outside the mask (or of weight
0), NaN too, have no effect. Every field but `loss` is a detached scalar: a plain sum over this micro-batch, ready to be
added up over micro-batches and ranks and divided once. A denominator <= 0 raises ValueError.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.core.kl import SOUND, k2, k3, safe_exp
from rlhf_ray.core.masked import masked_sum
from rlhf_ray.core.types import Moments


@dataclass(frozen=True)
class Clip:
    """The ratio counts within [1 - low, 1 + high]; dual (> 1): with A < 0 at most dual * |A| is lost."""

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """clip_count: tokens whose gradient the clip cut off;
    kl_k1_sum: sum of old - new log-probability (nats), the k1 estimate of KL(old || new);
    clamped_count: tokens whose log-ratio `safe_exp` clamped.
    """

    loss: Tensor
    clip_count: Tensor
    kl_k1_sum: Tensor
    clamped_count: Tensor


@dataclass(frozen=True)
class ValueLoss:
    """clip_count: tokens whose gradient the clip cut off; squared_error_sum: sum of (value - return)^2.
    """

    loss: Tensor
    clip_count: Tensor
    squared_error_sum: Tensor


@dataclass(frozen=True)
class RankingLoss:
    """correct: pairs whose preferred response got the higher reward, plus 0.5 per pair of equal rewards;
    pairs: all of them, without those tied in rank.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: Clip,
    denominator: float,
    responses: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: -sum of w * min(ratio * A, clip(ratio) * A).

    logprobs are those of the policy in training (with gradients); old_logprobs its own before the first update.
    weights float: 0 where a token does not count; elsewhere what algorithm and importance correction make of it.
    denominator: that of the optimizer window. responses int64 [T]: the number of each token's response, all
    arguments being flat; if given, the ratio and its clip are of the whole response, whose tokens must all be here.
    """
    mask = weights != 0  # NaN counts: a broken weight must break the step, not hide its token
    # masked before exp: where(mask, inf, 0) is 0, but its gradient is NaN
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    kl_k1_sum = -log_ratio.detach().sum()
    if responses is not None and responses.numel():
        whole = log_ratio.new_zeros(int(responses.max()) + 1).index_add(0, responses, log_ratio)
        log_ratio = torch.where(mask, whole[responses], 0)
    ratio, clamped_count = safe_exp(log_ratio)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    if clip.dual is not None:  # bounds what one token with A < 0 can do (Ye et al. 2020, arXiv 1912.09729, eq. 5)
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, clip.dual * advantages), surrogate)
    return PolicyLoss(
        loss=-masked_sum(weights * surrogate, mask) / _positive(denominator),
        clip_count=(mask & (surrogate != unclipped)).sum(),
        kl_k1_sum=kl_k1_sum,
        clamped_count=clamped_count,
    )


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, estimator: str, denominator: float
) -> tuple[Tensor, Tensor]:
    """(sum of w * estimate / denominator, tokens that `safe_exp` clamped). estimator: k2 or k3, see `core.kl`."""
    if estimator not in SOUND["loss"]:
        raise ValueError(f"{estimator} is not sound in a loss: {' or '.join(SOUND['loss'])}")
    mask = weights != 0  # NaN counts: a broken weight must break the step, not hide its token
    policy, reference = (torch.where(mask, x, 0) for x in (logprobs, ref_logprobs))
    if estimator == "k2":
        return masked_sum(weights * k2(policy, reference), mask) / _positive(denominator), mask.new_zeros(()).long()
    estimate, clamped = k3(policy, reference)
    return masked_sum(weights * estimate, mask) / _positive(denominator), clamped


def entropy_loss(entropies: Tensor, weights: Tensor, denominator: float) -> Tensor:
    """-sum of w * entropy / denominator: minimised, it keeps the policy from settling on few answers."""
    return -masked_sum(weights * entropies, weights != 0) / _positive(denominator)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float, denominator: float
) -> ValueLoss:
    """0.5 * max((V - R)^2, (clip(V, old V +- value_clip) - R)^2), as PPO2 of OpenAI Baselines has it.

    values are the critic's in training (with gradients); old_values its own before the first update.
    denominator: response tokens of the optimizer window.
    """
    values = torch.where(mask, values, 0)  # here too: else a NaN outside the mask gets into the gradient
    error, moved = (values - returns).square(), values - old_values
    clipped_error = (old_values + moved.clamp(-value_clip, value_clip) - returns).square()
    return ValueLoss(
        loss=0.5 * masked_sum(torch.maximum(error, clipped_error), mask) / _positive(denominator),
        clip_count=(mask & (moved.abs() > value_clip) & (clipped_error > error)).sum(),
        squared_error_sum=masked_sum(error.detach(), mask),
    )


def explained_variance(returns_moments: Moments, squared_error_sum: float) -> float:
    """1 - mean squared error / variance of the returns: 1 is perfect, 0 no better than their mean.

    NaN if the returns are all equal. Both arguments cover the same tokens, of all ranks. A constant error
    counts as an error here, unlike in 1 - Var(R - V) / Var(R).
    """
    variance = returns_moments.variance
    return 1 - squared_error_sum / returns_moments.count / variance if variance > 0 else math.nan


def lm_loss(logprobs: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Negative log-likelihood. denominator: trained tokens of the optimizer window."""
    return -masked_sum(logprobs, mask) / _positive(denominator)


def ranking_loss(rewards: Tensor, ranks: Tensor, groups: Tensor) -> RankingLoss:
    """K-wise reward-model loss, InstructGPT (Ouyang et al. 2022) eq. 1, summed over prompts.

    rewards [M]: one per response; ranks int [M]: smaller is better, equal is a tie; groups int [M]: the
    response's prompt. Per prompt with K responses here: -1 / C(K, 2) * sum of log sigmoid(r_i - r_j) over
    pairs with rank_i < rank_j. Tied pairs are left out of the sum; the divisor stays C(K, 2), so that a
    prompt with many ties weighs less. All K responses of a prompt must be in one call. To be divided by the
    prompts of the optimizer window.
    """
    same_prompt = groups[:, None] == groups[None, :]
    better, worse = (same_prompt & (ranks[:, None] < ranks[None, :])).nonzero(as_tuple=True)
    k = same_prompt.sum(dim=1)[better]
    margins = rewards.float()[better] - rewards.float()[worse]
    loss = -(logsigmoid(margins) * 2 / (k * (k - 1))).sum()
    correct = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    return RankingLoss(loss, correct.detach(), torch.full_like(correct, margins.numel()))


def _positive(denominator: float) -> float:
    if not denominator > 0:
        raise ValueError(f"the optimizer window has a denominator of {denominator}: nothing to train on")
    return denominator
