"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. There x ~ q and
r = p(x) / q(x); here q is the policy and p the reference, so log r = ref_logprobs - logprobs. All in nats.

- k1 = -log r: unbiased, may be negative. For the reward (InstructGPT, eq. 2) and for reports.
- k2 = (log r)^2 / 2: biased, never negative. For a loss: its expected gradient is that of
  KL(policy || reference).
- k3 = r - 1 - log r: unbiased, never negative, low variance. For a loss (GRPO: DeepSeekMath, eq. 4), where
  its expected gradient is that of the other direction, KL(reference || policy).

k1 does not belong in a loss: its gradient is the score function, which is 0 in expectation. In the reward it is
the only one: there the policy gradient multiplies the estimate with the score function, and of the three only
k1 then gives the gradient of KL(policy || reference) (k3's r adds that of the other direction, negated; k2's is
not a divergence's at all). `SOUND` says so, and configurations that break it are refused. All of it holds for
tokens sampled from the very policy that gave `logprobs`.
"""

from torch import Tensor

SOUND = {"reward": ("k1",), "loss": ("k2", "k3")}  # algorithm.kl_in -> the values of algorithm.kl_estimator

LOG_RATIO_LIMIT = 20.0  # e^20 = 4.9e8: far beyond any useful ratio, far from float32's overflow at e^88


def safe_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the log-ratio clamped to +-20, and how many entries were clamped (int64 scalar).

    A clamped entry passes no gradient. NaN stays NaN, so that the step is seen to be broken.
    """
    clamped = (log_ratio.detach().abs() > LOG_RATIO_LIMIT).sum()
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), clamped


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r, the shape of the arguments. For the reward, never for a loss."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2, the shape of the arguments. For a loss."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """r - 1 - log r, the shape of the arguments, and how many entries `safe_exp` clamped. For a loss."""
    log_r = ref_logprobs - logprobs
    ratio, clamped = safe_exp(log_r)
    return ratio - 1 - log_r, clamped


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The next beta of an adaptive penalty (Ziegler et al. 2019, section 2.2, with the step of OpenAI's code).

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon): kl and target in nats per response, samples
    are the responses of this iteration; to be called once per iteration. Never negative: a batch larger than the
    horizon counts as one horizon.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coef * (1 + error * min(1.0, samples / horizon))
