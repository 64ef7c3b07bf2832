"""What tells one algorithm from another. Everything else (rollout, scoring, clipping, KL, ptx, sync) they share.

An algorithm says three things: how scores become advantages, whose probability the ratio is of, and what the
sum of token losses is divided by. It turns rewards into advantages either per token (`TokenAdvantages`) or per
response (`GroupAdvantages`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

TokenAdvantages = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(rewards [N, L], values [N, L], mask [N, L], gamma, lam) -> (advantages, returns) [N, L]."""
GroupAdvantages = Callable[[Tensor, Tensor], Tensor]
"""(rewards float64 [N] of whole responses, groups int64 [N]) -> advantages float64 [N]; the whole batch at once."""


@dataclass(frozen=True)
class Algorithm:
    """critic: learns a value function beside the policy.

    whiten: advantages are normalised over the whole batch and all ranks: always, never, or as
    algorithm.whiten_advantages says.
    ratio: the probability ratio, and its clip, of a token or of the whole response.
    mean_over: what the sum of token losses is divided by: all `tokens` of the optimizer step; `responses`: first
    each response by its own length, then by their number; `limit`: the number of responses times the longest
    that one may be.
    """

    advantages: TokenAdvantages | None = None
    group_advantages: GroupAdvantages | None = None
    critic: bool = False
    whiten: Literal["always", "never", "option"] = "never"
    ratio: Literal["token", "response"] = "token"
    mean_over: Literal["tokens", "responses", "limit"] = "tokens"
