import pytest
import torch
from torch import nn

from rlhf_ray.models.linear import Linear, speed_up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (0, 8)])
def test_outputs_and_gradients_are_those_of_a_plain_layer(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 5, bias=bias)
    fast = nn.Linear(8, 5, bias=bias)
    fast.load_state_dict(plain.state_dict())
    speed_up(nn.Sequential(fast))
    assert type(fast) is Linear
    results = []
    x, upstream = torch.randn(*shape), torch.randn(*shape[:-1], 5)
    for layer in (plain, fast):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        output = layer(own)
        output.backward(upstream)
        results.append([output, own.grad, *[p.grad for p in layer.parameters()]])
    torch.testing.assert_close(*results)


def test_other_dtypes_and_autocast_are_left_to_torch() -> None:
    layer = nn.Linear(8, 5)
    speed_up(layer)
    assert type(layer) is Linear
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    assert layer.bfloat16()(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_only_plain_layers_are_taken_over() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2), nn.Embedding(3, 2))
    speed_up(model)
    assert type(model[0]) is Own
