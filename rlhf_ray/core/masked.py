"""Sums, means and whitening over the entries that a mask leaves in.

Statistics travel between ranks as sums and counts (`Moments`): a mean of means would weigh ranks, not tokens.
"""


import torch
from torch import Tensor

from rlhf_ray.core.types import Moments


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask (bool, same shape) is True: scalar. Other entries, NaN too, have no effect."""
    return torch.where(mask, x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask (bool, same shape) is True: scalar. NaN if there are none."""
    return masked_sum(x, mask) / mask.sum()


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of x where mask (bool, same shape) is True, summed in float64."""
    chosen = x.detach()[mask].double()
    return Moments(float(chosen.sum()), float(chosen.square().sum()), float(chosen.numel()))


def whiten(x: Tensor, mask: Tensor, moments: Moments) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) where mask (bool, same shape) is True, 0 elsewhere; the dtype of x.

    `moments` are those of the whole batch on all ranks, not of this x. Raises ValueError if they are empty.
    """
    scaled = (x.double() - moments.mean) / (moments.variance + 1e-8) ** 0.5
    return torch.where(mask, scaled, 0).to(x.dtype)
