"""Statistics over groups: the responses to one prompt."""

import torch
from torch import Tensor


def group_mean(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of its group, size of its group) for each entry: float64 [N], float64 [N]. groups int64 [N], >= 0."""
    count = torch.zeros(_number(groups), dtype=torch.float64).index_add(0, groups, torch.ones_like(x))
    total = torch.zeros_like(count).index_add(0, groups, x)
    return (total / count.clamp(min=1))[groups], count[groups]


def equal_groups(x: Tensor, groups: Tensor) -> Tensor:
    """bool [number of groups with two or more members]: all members are equal, and so teach nothing."""
    low = torch.full((_number(groups),), torch.inf, dtype=x.dtype).scatter_reduce(0, groups, x, "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, groups, x, "amax")
    count = torch.bincount(groups, minlength=len(low))
    return (low == high)[count >= 2]


def _number(groups: Tensor) -> int:
    return int(groups.max()) + 1 if len(groups) else 0
