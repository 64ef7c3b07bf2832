import math

import pytest
import torch

from rlhf_ray.core.masked import masked_mean, masked_sum, moments, whiten
from rlhf_ray.core.types import Moments

X = torch.tensor([1.0, math.nan, 3.0, 8.0])
MASK = torch.tensor([True, False, True, True])


def test_sum_and_mean_see_the_mask_only():
    """1 + 3 + 8 = 12; 12 / 3 = 4. The NaN is masked."""
    assert masked_sum(X, MASK).item() == 12
    assert masked_mean(X, MASK).item() == 4
    assert math.isnan(masked_mean(X, torch.zeros(4, dtype=torch.bool)).item())


def test_masked_values_get_no_gradient():
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    torch.testing.assert_close(x.grad, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]))


def test_moments_by_hand():
    """Squares 1 + 9 + 64 = 74; variance 74/3 - 16 = 26/3 = ((-3)^2 + (-1)^2 + 4^2) / 3 (population)."""
    m = moments(X, MASK)
    assert m == Moments(total=12, squares=74, count=3)
    assert m.mean == 4
    assert m.variance == pytest.approx(26 / 3)


def test_moments_are_summed_in_float64():
    """In float32, 2^24 + 1 + 1 stays 2^24."""
    x = torch.tensor([2.0**24, 1.0, 1.0])
    assert moments(x, torch.ones(3, dtype=torch.bool)).total == 2**24 + 2


def test_whitening_spans_all_ranks():
    """Each rank whitens its part with everybody's moments: the same as whitening the whole at once."""
    x = torch.tensor([[1.0, 5.0, 99.0], [2.0, 4.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    total = sum((moments(x[i], mask[i]) for i in range(2)), Moments())
    parts = torch.stack([whiten(x[i], mask[i], total) for i in range(2)])
    # by hand: {1, 5, 2, 4, 8}: mean 4, variance (9 + 1 + 4 + 0 + 16) / 5 = 6
    expected = torch.tensor([[-3.0, 1.0, 0.0], [-2.0, 0.0, 4.0]]) / math.sqrt(6)
    torch.testing.assert_close(parts, expected)


def test_equal_values_whiten_to_zero():
    x, mask = torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(whiten(x, mask, moments(x, mask)), torch.zeros(3))


def test_no_entries_is_an_error():
    with pytest.raises(ValueError, match="no entries"):
        _ = Moments().mean
