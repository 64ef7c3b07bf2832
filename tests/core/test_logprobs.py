import math

import pytest
import torch

from rlhf_ray.core import logprobs as module
from rlhf_ray.core.logprobs import token_logprobs


def inputs(tokens: int = 11, width: int = 6, vocabulary: int = 17):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=g, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=g), torch.randn(tokens, generator=g)


def test_by_hand():
    """H = 1, weight = (0, log 2, log 5), state 1: probabilities 1/8, 2/8, 5/8.

    With temperature 0.5 the logits double: weights 1, 4, 25 of 30.
    """
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([1 / 8, 2 / 8, 5 / 8]).log())
    by_hand = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    torch.testing.assert_close(entropy, torch.full((3,), by_hand))
    sharper, _ = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), 0.5)
    torch.testing.assert_close(sharper, torch.tensor([1 / 30, 4 / 30, 25 / 30]).log())


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 1024])
def test_chunks_change_nothing(chunk_size):
    """Values and gradients are those of log_softmax over the whole [T, V] matrix."""
    hidden, weight, targets, upstream = inputs()
    whole = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1)
    expected = whole.gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))

    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.7, chunk_size=chunk_size)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1).detach())
    assert not entropy.requires_grad
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected_grads)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, weight, targets, 0.7, chunk_size=chunk_size)[0], expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_entropies_have_gradients_if_asked_for(chunk_size):
    """Those of -sum of p log p over the whole matrix, alone and mixed with the log-probabilities' own."""
    hidden, weight, targets, upstream = inputs()
    whole = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1)
    expected = -(whole.exp() * whole).sum(-1)
    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.7, entropy_grad=True, chunk_size=chunk_size)
    torch.testing.assert_close(entropy, expected)
    for ours, theirs in ((entropy, expected), (entropy + logprobs, expected + whole.gather(1, targets[:, None])[:, 0])):
        grads = torch.autograd.grad((ours * upstream).sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad((theirs * upstream).sum(), (hidden, weight),
                                                              retain_graph=True))


def test_gradient_of_the_entropy_by_hand():
    """H = 1, state 1, so weight = logits z: probabilities (1/8, 2/8, 5/8), and dH/dz_i = -p_i * (log p_i + H).

    A certain choice has gradient 0, also where the other logit is -inf.
    """
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    logits = p.log()[:, None].requires_grad_()
    _, entropy = token_logprobs(torch.ones(1, 1), logits, torch.tensor([0]), 1.0, entropy_grad=True)
    entropy.sum().backward()
    h = -(p * p.log()).sum()
    torch.testing.assert_close(logits.grad[:, 0], -p * (p.log() + h))
    certain = torch.tensor([[0.0], [-math.inf]], requires_grad=True)
    _, entropy = token_logprobs(torch.ones(1, 1), certain, torch.tensor([0]), 1.0, entropy_grad=True)
    entropy.sum().backward()
    torch.testing.assert_close(certain.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_no_logits_outlive_their_chunk(entropy_grad):
    """What autograd keeps until the backward pass must not grow with the vocabulary."""
    hidden, weight, targets, _ = inputs(vocabulary=1000)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, targets, 1.0, entropy_grad, chunk_size=4)
    own = {hidden.numel(), weight.numel()}
    assert max((n for n in saved if n not in own), default=0) < 1000


def test_chunks_are_no_larger_than_asked(monkeypatch):
    """In the backward pass neither. A single chunk's logits are kept, and not computed again."""
    sizes = []
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda h, *rest: sizes.append(len(h)) or logits(h, *rest))
    hidden, weight, targets, _ = inputs()
    token_logprobs(hidden, weight, targets, 1.0, chunk_size=4)[0].sum().backward()
    assert sizes == [4, 4, 3, 3, 4, 4]
    sizes.clear()
    token_logprobs(hidden, weight, targets, 1.0, chunk_size=11)[0].sum().backward()
    assert sizes == [11]
    sizes.clear()
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 6 * 17 * 4)  # six tokens of a vocabulary of 17
    token_logprobs(hidden.detach(), weight.detach(), targets, 1.0)
    assert sizes == [6, 5]


def test_autocast_is_that_of_the_forward_pass():
    """The products are bfloat16, in the backward pass too; gradients have the dtype of what they belong to."""
    hidden, weight, targets, upstream = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets, 1.0)
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected, _ = token_logprobs(*low, targets, 1.0)
    torch.testing.assert_close(logprobs, expected)
    for grad, theirs in zip(grads, torch.autograd.grad((expected * upstream).sum(), low), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, theirs.float())


def test_softmax_is_float32_for_bfloat16_models():
    hidden, weight, targets, _ = inputs()
    low = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logprobs, entropy = token_logprobs(*low, targets, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = torch.log_softmax((low[0] @ low[1].T).float(), -1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_entropy_of_a_certain_choice_is_zero():
    """A logit of -inf has probability 0 and adds nothing, not NaN."""
    weight = torch.tensor([[0.0], [-math.inf]])
    logprobs, entropy = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), 1.0)
    assert logprobs.item() == entropy.item() == 0


def test_no_tokens_still_give_a_backward_pass():
    hidden, weight, targets, _ = inputs(tokens=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(("temperature", "chunk_size"), [(0.0, 4), (1.0, 0)])
def test_bad_arguments(temperature, chunk_size):
    hidden, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match="must be positive"):
        token_logprobs(hidden, weight, targets, temperature, chunk_size=chunk_size)
