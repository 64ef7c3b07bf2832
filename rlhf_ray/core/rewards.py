"""From one score per response to one reward per token.

N responses, left-aligned and padded to L tokens; mask bool [N, L] is True on response tokens.
"""

import torch
from torch import Tensor


def apply_truncation(scores: Tensor, truncated: Tensor, penalty: float | None) -> Tensor:
    """Scores [N] with `penalty` in the place of those of truncated (bool [N]) responses; None: as they are.

    Truncated: cut at the length limit. The penalty takes the score's place, it is not added to it.
    """
    return scores if penalty is None else torch.where(truncated, penalty, scores)


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
