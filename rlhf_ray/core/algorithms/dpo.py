"""DPO (Rafailov et al. 2023, "Direct Preference Optimization", arXiv 2305.18290, eq. 7): no reward model, no sampling.

    h_i = beta * (log pi(y_i | x) - log pi_ref(y_i | x))        the implicit reward of response i (eq. 5, but for log Z)
    loss = -(1 - e) * log sigmoid(h_w - h_l) - e * log sigmoid(h_l - h_w)        w preferred over l

e, label_smoothing, is the chance that a label is the wrong way round: conservative DPO (Mitchell 2023, "A note on
DPO with noisy preferences & relationship to IPO"); 0 is DPO. It bounds the margin that a pair asks for, at
log((1 - e) / e). A prompt with K ranked responses gives all its pairs, weighted as in `core.losses.ranking_loss`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class DPOLoss:
    """Sums over this micro-batch; all but `loss` are detached scalars.

    correct: pairs whose preferred response has the higher implicit reward, plus 0.5 per pair of equal ones; pairs: all
    of them, without those tied in rank; margin_sum: sum of h_w - h_l over the pairs, in the reward's unit.
    """

    loss: Tensor
    correct: Tensor
    pairs: Tensor
    margin_sum: Tensor


def implicit_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """h = beta * (logps - ref_logps), up to a constant of the prompt: [M], at least float32."""
    precise = torch.promote_types(logps.dtype, torch.float32)
    return beta * (logps.to(precise) - ref_logps.to(precise))


def dpo_loss(
    logps: Tensor, ref_logps: Tensor, ranks: Tensor, groups: Tensor, beta: float, label_smoothing: float = 0.0
) -> DPOLoss:
    """The loss above, K-wise and summed over prompts; to be divided by the prompts of the optimizer window.

    logps [M]: summed log-probability of each response, in nats, with gradients; ref_logps [M]: the reference's, without
    any; ranks int [M]: smaller is better, equal is a tie; groups int [M]: the response's prompt. Per prompt with K
    responses here: 1 / C(K, 2) * sum over pairs with rank_i < rank_j. Tied pairs are left out of the sum; the divisor
    stays C(K, 2), so that a prompt with many ties weighs less. All K responses of a prompt must be in one call: each is
    passed forward once, whatever the number of its pairs. A prompt of one response, or of ties only, has no pair and
    adds 0, with a graph. Raises ValueError unless beta > 0 and 0 <= label_smoothing < 0.5.
    """
    if not (beta > 0 and 0 <= label_smoothing < 0.5):
        raise ValueError(f"DPO needs beta > 0 and 0 <= label_smoothing < 0.5, got {beta} and {label_smoothing}")
    same_prompt = groups[:, None] == groups[None, :]
    better, worse = (same_prompt & (ranks[:, None] < ranks[None, :])).nonzero(as_tuple=True)
    k = same_prompt.sum(dim=1)[better]
    rewards = implicit_rewards(logps, ref_logps.detach(), beta)
    margins = rewards[better] - rewards[worse]
    terms = (1 - label_smoothing) * logsigmoid(margins) + label_smoothing * logsigmoid(-margins)
    correct = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    return DPOLoss(
        loss=-(terms * 2 / (k * (k - 1))).sum(),
        correct=correct.detach(),
        pairs=torch.full_like(correct, margins.numel()),
        margin_sum=margins.detach().sum(),
    )
