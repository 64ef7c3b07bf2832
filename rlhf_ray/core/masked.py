"""Sums, means and whitening over the entries that a mask leaves in.

Statistics travel between ranks as sums and counts (`Moments`): a mean of means would weigh ranks, not tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask (bool, same shape) is True: scalar. Other entries, NaN too, have no effect."""
    return torch.where(mask, x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask (bool, same shape) is True: scalar. NaN if there are none."""
    return masked_sum(x, mask) / mask.sum()


@dataclass(frozen=True)
class Moments:
    """Sum, sum of squares and number of entries; adding two gives the moments of both sets together.

    `mean` and `variance` raise ValueError if there are no entries.
    """

    total: float = 0.0
    squares: float = 0.0
    count: float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def mean(self) -> float:
        if self.count <= 0:
            raise ValueError("moments of no entries: the mask is False everywhere, on all ranks")
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Population variance: divided by count, not count - 1, so that one entry has 0, not NaN."""
        mean = self.mean
        return max(0.0, self.squares / self.count - mean * mean)  # rounding may leave a tiny negative number


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
