import pytest
import torch

from rlhf_ray.core.matmul import times_transposed


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(*shape, generator=g).to(dtype), torch.randn(4, shape[-1], generator=g).to(dtype)
    torch.testing.assert_close(times_transposed(a, b), a @ b.T)


def test_views_of_transposes_are_taken_as_they_are() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 17, generator=g), torch.randn(17, 5, generator=g)
    torch.testing.assert_close(times_transposed(a, b.T), a @ b)
    torch.testing.assert_close(times_transposed(a.T, torch.randn(33, 6, generator=g).T).shape, torch.Size([17, 6]))


def test_float32_is_float32() -> None:
    """No bfloat16 or tf32 in between: as close to the product in float64 as float32 comes."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 512, generator=g), torch.randn(32, 512, generator=g)
    exact = a.double() @ b.double().T
    assert (times_transposed(a, b) - exact).abs().max() < 3 * (a @ b.T - exact).abs().max() + 1e-5
