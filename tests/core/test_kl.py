import math

import torch

from rlhf_ray.core.kl import k1, k2, k3, safe_exp

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
