import math

import pytest
import torch

from rlhf_ray.config import checks
from rlhf_ray.core.kl import SOUND, adapted_kl_coef, k1, k2, k3, safe_exp

POLICY = torch.tensor([0.5, 0.25, 0.25])
REFERENCE = torch.tensor([0.25, 0.25, 0.5])
# KL(policy || reference) = 0.5 log 2 + 0 + 0.25 log(1/2) = 0.25 log 2, and by symmetry so is the reverse.
KL = 0.25 * math.log(2)


def test_values_by_hand():
    """log r = log(ref / policy) = (-log 2, 0, log 2); k3 = (0.5 - 1 + log 2, 0, 2 - 1 - log 2)."""
    log2 = math.log(2)
    p, q = POLICY.log(), REFERENCE.log()
    torch.testing.assert_close(k1(p, q), torch.tensor([log2, 0, -log2]))
    torch.testing.assert_close(k2(p, q), torch.tensor([log2**2 / 2, 0, log2**2 / 2]))
    torch.testing.assert_close(k3(p, q)[0], torch.tensor([log2 - 0.5, 0, 1 - log2]))


def test_k1_and_k3_are_unbiased():
    """Exact expectation under the policy; of k3: 0.5 (log 2 - 0.5) + 0.25 (1 - log 2) = 0.25 log 2."""
    p, q = POLICY.log(), REFERENCE.log()
    for estimate in (k1(p, q), k3(p, q)[0]):
        assert math.isclose((POLICY * estimate).sum().item(), KL, rel_tol=1e-6)


def expected_gradient(estimator) -> torch.Tensor:
    """Sum over x of policy(x) * d estimate(x) / d logits: what a loss on samples does on average."""
    logits = POLICY.log().requires_grad_()
    estimate = estimator(torch.log_softmax(logits, 0), REFERENCE.log())
    return torch.autograd.grad((POLICY * estimate).sum(), logits)[0]


def test_expected_gradients_are_those_that_the_module_states():
    """k1: none. k2: of KL(policy || ref), p_i (log p_i/q_i - KL). k3: of KL(ref || policy), p - q."""
    torch.testing.assert_close(expected_gradient(k1), torch.zeros(3))
    torch.testing.assert_close(expected_gradient(k2), POLICY * ((POLICY / REFERENCE).log() - KL))
    torch.testing.assert_close(expected_gradient(lambda p, q: k3(p, q)[0]), POLICY - REFERENCE)


def test_safe_exp_clamps_and_counts():
    """-21, 25 and 1000 are beyond 20; 20 itself is not."""
    log_ratio = torch.tensor([-21.0, 0.0, 20.0, 25.0, 1000.0], requires_grad=True)
    ratio, clamped = safe_exp(log_ratio)
    assert clamped.item() == 3
    torch.testing.assert_close(ratio, torch.tensor([-20.0, 0.0, 20.0, 20.0, 20.0]).exp())
    ratio.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, 1.0, math.exp(20), 0.0, 0.0]))


def test_safe_exp_does_not_hide_nan():
    assert safe_exp(torch.tensor([math.nan]))[0].isnan().all()


def test_k3_stays_finite_and_reports_it():
    estimate, clamped = k3(torch.tensor([-500.0, -1.0]), torch.tensor([0.0, -1.0]))
    assert estimate.isfinite().all() and clamped.item() == 1


def reward_gradient(estimator) -> torch.Tensor:
    """Sum over x of policy(x) * estimate(x) * d log policy(x) / d logits: REINFORCE with the estimate as its cost."""
    logits = POLICY.log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    cost = estimator(logprobs, REFERENCE.log()).detach()
    return torch.autograd.grad((POLICY * cost * logprobs).sum(), logits)[0]


def test_only_k1_is_sound_in_the_reward_and_only_k2_and_k3_in_the_loss():
    """k1 as a cost gives the gradient of KL(policy || ref), p_i (log p_i/q_i - KL); k2 and k3 give others.

    In a loss k1 has no gradient at all, as a test above says.
    """
    assert SOUND == {"reward": ("k1",), "loss": ("k2", "k3")}
    right = POLICY * ((POLICY / REFERENCE).log() - KL)
    torch.testing.assert_close(reward_gradient(k1), right)
    for unsound in (k2, lambda p, q: k3(p, q)[0]):
        assert (reward_gradient(unsound) - right).abs().max() > 0.05


def test_the_configuration_refuses_by_the_same_table():
    assert checks.SOUND == SOUND


@pytest.mark.parametrize(
    ("kl", "samples", "expected"),
    [
        (11.0, 500, 0.1005),  # error 0.1, 500 of 10,000 samples: 0.1 * (1 + 0.1 * 0.05)
        (12.0, 500, 0.101),  # error 0.2
        (300.0, 500, 0.101),  # clipped to 0.2
        (9.5, 1000, 0.0995),  # error -0.05
        (0.0, 500, 0.099),  # clipped to -0.2
        (-3.0, 500, 0.099),  # k1 of few samples may be negative
        (10.0, 500, 0.1),
        (300.0, 10_000, 0.12),
        (300.0, 70_000, 0.12),  # no more than one horizon at once
        (0.0, 70_000, 0.08),  # and so never negative
    ],
)
def test_adaptive_coefficient_by_hand(kl, samples, expected):
    """Coefficient 0.1, target 10 nats, horizon 10,000 responses."""
    assert adapted_kl_coef(0.1, kl, 10.0, samples, 10_000) == pytest.approx(expected, rel=1e-12)


def test_adaptive_coefficient_counts_samples_not_calls():
    """Two iterations of 50 responses move it (nearly) as one of 100: 1.01^2 = 1.0201 and 1.02."""
    twice = adapted_kl_coef(adapted_kl_coef(1.0, 99.0, 1.0, 50, 1000), 99.0, 1.0, 50, 1000)
    assert twice == pytest.approx(1.0201)
    assert adapted_kl_coef(1.0, 99.0, 1.0, 100, 1000) == pytest.approx(1.02)
