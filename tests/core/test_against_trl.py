"""Agreement with TRL 1.16, whose own code runs here on the same tensors: losses, their gradients, advantages.

TRL's trainers are built without their constructors, so that no model is needed: the method that would run the model
gives the log-probabilities of the test. Everything is float64, so that agreement means the same formula. Where the two
do not agree on purpose, a test at the end says where and why.
"""

import math
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.core.algorithms.dpo import dpo_loss
from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.core.experience import Assessment, Responses, assess
from rlhf_ray.core.importance import importance_weights
from rlhf_ray.core.kl import k3
from rlhf_ray.core.logprobs import token_logprobs
from rlhf_ray.core.losses import Clip, entropy_loss, kl_loss, policy_loss
from rlhf_ray.core.types import Moments, Shaping

F64 = torch.float64
LENGTHS = torch.tensor([6, 3, 1, 4, 2, 5])
MASK = torch.arange(6)[None] < LENGTHS[:, None]
N, LONGEST = len(LENGTHS), 8  # responses; the longest that one may be
NONE = (0,) * N


@pytest.fixture(scope="module")
def trl() -> Any:
    """The modules of TRL's trainers. Their import is slow, so a fixture pays for it, and not who collects the tests."""
    with mock.patch.dict(os.environ):
        try:
            from trl import import_utils

            with mock.patch.object(import_utils, "is_vllm_available", lambda *_, **__: False):  # half of the time
                from trl.trainer import dpo_trainer, grpo_trainer, rloo_trainer, utils
        except Exception as error:  # its lazy modules wrap whatever goes wrong
            pytest.skip(f"TRL cannot be imported: {error}")
    return SimpleNamespace(grpo=grpo_trainer, rloo=rloo_trainer, dpo=dpo_trainer, utils=utils)


def same(x: Any) -> Any:
    return x


def trainer(kind: type, **attributes: Any) -> Any:
    """An instance with these attributes, as its constructor would have set them."""
    made = object.__new__(kind)
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
                            is_main_process=True, gather=same, gather_for_metrics=same,
                            reduce=lambda x, reduction: x)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    vars(made).update({"accelerator": alone, "model": model, "aux_loss_enabled": False,
                       "_metrics": {"train": defaultdict(list)}, **attributes})
    return made


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Old, reference, sampling and current log-probabilities; ratios of about e^+-0.4, so that some are clipped.
OLD = -random(0, N, 6).abs() - 0.1
REF, SAMPLED, NEW = OLD + random(1, N, 6, scale=0.3), OLD + random(2, N, 6, scale=0.3), OLD + random(3, N, 6, scale=0.4)
ENTROPIES = random(4, N, 6).abs()
ADVANTAGES = random(5, N)


# -- GRPO's losses -------------------------------------------------------------------------------------------------


def grpo_loss(trl: Any, loss_type: str, new: Tensor = NEW, beta: float = 0.0, low: float = 0.2, high: float = 0.2,
              delta: float | None = None, importance: Tensor | None = None, entropy_coef: float = 0.0,
              advantages: Tensor = ADVANTAGES, mask: Tensor = MASK) -> tuple[Tensor, Tensor]:
    """(loss, its gradient by the log-probabilities) of TRL's GRPOTrainer."""
    x = new.clone().requires_grad_()
    made = trainer(
        trl.grpo.GRPOTrainer, beta=beta, loss_type=loss_type, epsilon_low=low, epsilon_high=high,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        use_vllm=importance is not None, vllm_importance_sampling_correction=True, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=entropy_coef > 0, use_adaptive_entropy=False,
        entropy_coef=entropy_coef, _get_per_token_logps_and_entropies=lambda *_, **__: (x, ENTROPIES, None),
    )
    ids = torch.zeros(N, 6, dtype=torch.int64)
    loss = made._compute_loss(None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": OLD, "ref_per_token_logps": REF,
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": importance,
    })
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# What TRL's loss types are called here: algorithms say it by `mean_over`.
MEANS = {"grpo": "responses", "dr_grpo": "limit", "bnpo": "tokens", "dapo": "tokens"}


def our_loss(loss_type: str, clip: Clip, new: Tensor = NEW, beta: float = 0.0, importance: Tensor | None = None,
             entropy_coef: float = 0.0, advantages: Tensor = ADVANTAGES, mask: Tensor = MASK) -> tuple[Tensor, Tensor]:
    x, lengths = new.clone().requires_grad_(), mask.sum(1, keepdim=True)
    responses = float((lengths > 0).sum())
    denominator = {"responses": responses, "limit": responses * LONGEST, "tokens": float(mask.sum())}[MEANS[loss_type]]
    factor = torch.where(mask, 1 / lengths.double() if MEANS[loss_type] == "responses" else 1.0, 0.0)
    weights = factor if importance is None else factor * importance
    loss = policy_loss(x, OLD, advantages[:, None].expand(N, 6), weights, clip, denominator).loss
    loss = loss + beta * kl_loss(x, REF, factor, "k3", denominator)[0]
    loss = loss + entropy_coef * entropy_loss(ENTROPIES, factor, denominator)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("options", [
    {}, {"beta": 0.04}, {"low": 0.1, "high": 0.4}, {"low": 0.1, "high": 0.4, "beta": 1.0},
], ids=str)
@pytest.mark.parametrize("loss_type", MEANS)
def test_losses_and_gradients(trl, loss_type, options):
    """With k3 in the loss, and with a wider clip upwards."""
    theirs = grpo_loss(trl, loss_type, **options)
    clip = Clip(options.get("low", 0.2), options.get("high", 0.2))
    torch.testing.assert_close(our_loss(loss_type, clip, beta=options.get("beta", 0.0)), theirs, rtol=1e-12, atol=1e-12)
    clipped = theirs[1][MASK] == 0
    assert 0 < clipped.sum() < len(clipped) or "beta" in options
    assert not theirs[1][~MASK].any()


def test_the_means_are_those_of_the_algorithms():
    assert (ALGORITHMS["grpo"].mean_over, ALGORITHMS["dr_grpo"].mean_over) == (MEANS["grpo"], MEANS["dr_grpo"])
    assert {ALGORITHMS[name].mean_over for name in ("ppo", "reinforce_pp")} == {MEANS["dapo"]}


@pytest.mark.parametrize("loss_type", MEANS)
def test_importance_correction_of_the_loss(trl, loss_type):
    """It weighs the surrogate, not the KL term."""
    importance, _ = importance_weights(OLD, SAMPLED, MASK, 1.2)
    theirs = grpo_loss(trl, loss_type, beta=0.1, importance=importance)
    torch.testing.assert_close(our_loss(loss_type, Clip(0.2, 0.2), beta=0.1, importance=importance), theirs, rtol=1e-12,
                               atol=1e-12)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus_of_a_token_mean(trl, loss_type):
    theirs = grpo_loss(trl, loss_type, entropy_coef=0.3)
    torch.testing.assert_close(our_loss(loss_type, Clip(0.2, 0.2), entropy_coef=0.3), theirs, rtol=1e-12, atol=1e-12)


FAR = OLD + random(6, N, 6, scale=1.5)  # ratios up to about e^3


@pytest.mark.parametrize("dual", [1.2, 1.5, 3.0])
def test_dual_clip_is_their_delta_from_one_plus_epsilon_high_on(trl, dual):
    """There the ratio with A < 0 is the only one that either of them bounds further: both lose at most dual * |A|."""
    theirs = grpo_loss(trl, "bnpo", FAR, delta=dual)
    ours = our_loss("bnpo", Clip(0.2, 0.2, dual), FAR)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours[0] != our_loss("bnpo", Clip(0.2, 0.2), FAR)[0]


def test_k3_is_their_kl(trl):
    """The term alone, beta 1, is the difference between the losses with and without."""
    with_kl, without = grpo_loss(trl, "bnpo", beta=1.0)[0], grpo_loss(trl, "bnpo", beta=0.0)[0]
    estimate, clamped = k3(NEW, REF)
    torch.testing.assert_close(estimate[MASK].mean(), with_kl - without)
    assert clamped.item() == 0


# -- from rewards to advantages ------------------------------------------------------------------------------------


def generated(module: Any, kind: str, scores: Tensor, truncated: tuple[int, ...], **attributes: Any) -> dict[str, Any]:
    """What TRL hands to the loss after a generation of N responses, N / 2 of each prompt; scores [N, sources].

    Token 1 is EOS; truncated responses end without.
    """
    ids = [[0]] * N, [[7] * (n - 1) + [7 if cut else 1] for n, cut in zip(LENGTHS.tolist(), truncated, strict=True)]
    per_source = {f"{i}": [] for i in range(scores.shape[1])}
    passes = iter([OLD, REF])
    made = trainer(
        getattr(module, kind), environment_factories=None, environments=None, tools=[], pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0), eos_token_ids=[1], mask_truncated_completions=any(truncated),
        args=SimpleNamespace(per_device_train_batch_size=N, gradient_checkpointing_kwargs=None, report_to=[],
                             steps_per_generation=1, gradient_accumulation_steps=1),
        state=SimpleNamespace(global_step=1), num_iterations=1, ref_model=object(),
        num_generations=N // 2, reward_func_names=list(per_source), reward_funcs=list(per_source),
        _logs={"prompt": [], "completion": [], "rewards": per_source, "advantages": [], "extra": {}},
        _pending_extra_logs={}, _pending_metrics={}, _calculate_rewards=lambda *_: scores,
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(passes), None, None), **attributes,
    )
    texts, sampled = [""] * N, [row[mask].tolist() for row, mask in zip(SAMPLED, MASK, strict=True)]
    made._generate = lambda _: (*ids, None, texts, sampled, {}, None, []) if kind == "GRPOTrainer" else (*ids, texts)
    with mock.patch.object(module, "gather", same, create=True), mock.patch.object(module, "gather_object", same):
        return made._generate_and_score_completions([{"prompt": ""}] * N)


def grpo_generated(trl: Any, scores: Tensor, truncated: tuple[int, ...] = NONE, **changed: Any) -> dict[str, Any]:
    return generated(trl.grpo, "GRPOTrainer", scores, truncated, **{
        "use_vllm": True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_mode": "token_truncate", "beta": 0.1,
        "reward_weights": torch.ones(scores.shape[1], dtype=F64), "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize", "log_multimodal": False, **changed})


def rloo_generated(trl: Any, scores: Tensor, beta: float) -> dict[str, Any]:
    return generated(trl.rloo, "RLOOTrainer", scores, NONE, beta=beta, reward_clip_range=None,
                     normalize_advantages=False, reward_weights=torch.ones(scores.shape[1], dtype=F64))


def judged(algorithm: str, scores: Tensor, kl_coef: float = 0.0, truncated: tuple[int, ...] = NONE,
           weights: tuple[float, ...] | None = None) -> Assessment:
    kl = torch.where(MASK, OLD - REF, 0).sum(1)
    responses = Responses(np.arange(N, dtype=float), np.array(truncated, dtype=float), LENGTHS.double().numpy(),
                          kl.numpy(), scores.T.numpy())
    return assess(responses, ALGORITHMS[algorithm], list(weights or [1.0] * scores.shape[1]), Shaping("drop"), kl_coef,
                 N // 2, Moments())


SCORES = torch.tensor([[1.0, 2.0, 6.0, 0.5, 0.5, 0.5]], dtype=F64).T  # the second group is equal


@pytest.mark.parametrize(("name", "scale"), [("grpo", "group"), ("dr_grpo", "none")])
def test_advantages_in_groups(trl, name, scale):
    for scores in (SCORES, random(7, N, 1)):
        theirs = grpo_generated(trl, scores, scale_rewards=scale)["advantages"]
        torch.testing.assert_close(judged(name, scores).advantages, theirs, rtol=1e-12, atol=1e-12)


def test_two_weighted_sources(trl):
    scores = random(8, N, 2)
    theirs = grpo_generated(trl, scores, reward_weights=torch.tensor([1.0, 0.1], dtype=F64))["advantages"]
    torch.testing.assert_close(judged("grpo", scores, weights=(1.0, 0.1)).advantages, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left_out", [(0, 1, 0, 0, 0, 0), (1, 1, 0, 0, 0, 1)])
def test_responses_left_out_of_a_group(trl, left_out):
    """Theirs have no score (NaN), ours are truncated and dropped. Of two groups one may have a lone response left."""
    scores = random(9, N, 1)
    missing = scores.masked_fill(torch.tensor(left_out, dtype=torch.bool)[:, None], math.nan)
    for name, theirs in (
        ("grpo", grpo_generated(trl, missing)), ("dr_grpo", grpo_generated(trl, missing, scale_rewards="none")),
        ("rloo", rloo_generated(trl, missing, beta=0.0)),
    ):
        ours = judged(name, scores, truncated=left_out).advantages
        torch.testing.assert_close(ours, theirs["advantages"], rtol=1e-12, atol=1e-12)


def test_importance_ratios(trl):
    theirs = grpo_generated(trl, SCORES)["importance_sampling_ratio"]
    ours, sums = importance_weights(OLD, SAMPLED, MASK, 1.2)
    torch.testing.assert_close(ours[MASK], theirs[MASK], rtol=1e-6, atol=0)  # they read the sampled ones as float32
    assert 0 < sums.capped < sums.count


# -- RLOO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rloo_from_scores_to_gradient(trl, beta):
    """KL (k1, summed over the response) in the reward, the others of the group as baseline, one ratio per response."""
    theirs = rloo_generated(trl, SCORES, beta)
    advantages = judged("rloo", SCORES, beta).advantages
    torch.testing.assert_close(advantages, theirs["advantages"], rtol=1e-12, atol=1e-12)
    new = OLD + (NEW - OLD) / 3  # some responses are clipped, some are not
    x, y = new.clone().requires_grad_(), new.clone().requires_grad_()
    made = trainer(trl.rloo.RLOOTrainer, epsilon_low=0.2, epsilon_high=0.3,
                   _get_per_token_logps_and_entropies=lambda *_, **__: (x, ENTROPIES, None))
    loss = made._compute_loss(None, theirs)
    responses = torch.arange(N).repeat_interleave(LENGTHS)  # of the tokens, flat
    out = policy_loss(y[MASK], OLD[MASK], advantages[responses], (1 / LENGTHS.double())[responses], Clip(0.2, 0.3), N,
                      responses)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    loss.backward()
    out.loss.backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
    clipped = int(out.clip_count)
    assert 0 < clipped < LENGTHS.sum()


# -- DPO -----------------------------------------------------------------------------------------------------------


def their_dpo(trl: Any, logps: Tensor, reference: Tensor, beta: float, loss_type: str = "sigmoid",
              smoothing: float = 0.0) -> tuple[Tensor, dict[str, list[float]]]:
    """logps [2 B, L] per token, the preferred ones first; reference [2 B]."""
    pairs, length = len(logps) // 2, logps.shape[1]
    outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > 0)
    made = trainer(
        trl.dpo.DPOTrainer, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing, use_weighting=False,
        _total_train_tokens=0, _tp_size=1,
    )
    ids = torch.ones(2 * pairs, length + 1, dtype=torch.int64)
    loss = made._compute_loss(lambda **_: outputs, {
        "input_ids": ids, "attention_mask": ids, "completion_mask": ids, "ref_chosen_logps": reference[:pairs],
        "ref_rejected_logps": reference[pairs:],
    }, return_outputs=False)
    return loss, made._metrics["train"]


RANKS, PAIRS = torch.tensor([1] * 5 + [2] * 5), torch.arange(5).repeat(2)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(trl, beta):
    """Pairs, as they have them; their loss is a mean over pairs, ours a sum, to be divided by the prompts."""
    x, reference = random(10, 10, 7).requires_grad_(), random(11, 10, scale=3)
    theirs, metrics = their_dpo(trl, x, reference, beta)
    ours = dpo_loss(x.sum(1), reference, RANKS, PAIRS, beta)
    torch.testing.assert_close(ours.loss / 5, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours.loss / 5, x), torch.autograd.grad(theirs, x), rtol=1e-12,
                               atol=1e-12)
    assert (ours.correct / ours.pairs).item() == pytest.approx(metrics["rewards/accuracies"][0])
    assert (ours.margin_sum / ours.pairs).item() == pytest.approx(metrics["rewards/margins"][0])


def test_label_smoothing_of_dpo(trl):
    """Their `sigmoid` has none; their `aot` has the same smoothing, and is DPO where there is one pair only."""
    x, reference = random(12, 2, 7).requires_grad_(), random(13, 2)
    theirs, _ = their_dpo(trl, x, reference, 0.5, "aot", smoothing=0.2)
    ours = dpo_loss(x.sum(1), reference, torch.tensor([1, 2]), torch.zeros(2), 0.5, 0.2).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), rtol=1e-12, atol=1e-12)


# -- log-probabilities ---------------------------------------------------------------------------------------------


def test_log_probabilities_and_entropies_at_a_temperature(trl):
    hidden, weight = random(14, 9, 5).float().requires_grad_(), random(15, 31, 5).float()
    targets, upstream = torch.arange(9) * 3, random(16, 2, 9).float()
    logprobs, entropies = token_logprobs(hidden, weight, targets, 0.7, entropy_grad=True, chunk_size=4)
    logits = hidden @ weight.T / 0.7
    theirs = trl.utils.selective_log_softmax(logits, targets), trl.utils.entropy_from_logits(logits)
    torch.testing.assert_close((logprobs, entropies), theirs)
    gradients = [torch.autograd.grad((torch.stack(out) * upstream).sum(), hidden)
                 for out in ((logprobs, entropies), theirs)]
    torch.testing.assert_close(*gradients)


# -- where the two differ, on purpose ------------------------------------------------------------------------------


def test_a_delta_below_one_plus_epsilon_high_is_another_thing(trl):
    """TRL's delta caps the ratio itself, before the clip; dual clip bounds what A < 0 can lose, after it.

    delta 1.1 < 1.2 = 1 + epsilon_high. With A > 0 theirs narrows the clip to 1.1, ours leaves it at 1.2. With A < 0
    theirs counts max(min(r, 1.1), clip(r)), at most 1.2 and not 1.1: the cap has no effect on what is lost, ours has.
    """
    ratio_two = OLD + math.log(2)
    for a, theirs_at, ours_at in ((1.0, 1.1, 1.2), (-1.0, 1.2, 1.1)):
        advantages = torch.full((N,), a, dtype=F64)
        theirs, _ = grpo_loss(trl, "bnpo", ratio_two, delta=1.1, advantages=advantages)
        ours, _ = our_loss("bnpo", Clip(0.2, 0.2, 1.1), ratio_two, advantages=advantages)
        assert theirs.item() == pytest.approx(-a * theirs_at)
        assert ours.item() == pytest.approx(-a * ours_at)


def test_wild_ratios_are_clamped_here_and_not_there(trl):
    """A log-ratio of 30 and A < 0: they lose e^30, we e^20 without a gradient, and it is counted."""
    theirs = grpo_loss(trl, "bnpo", OLD + 30, advantages=-torch.ones(N, dtype=F64))
    ours = our_loss("bnpo", Clip(0.2, 0.2), OLD + 30, advantages=-torch.ones(N, dtype=F64))
    assert theirs[0].item() == pytest.approx(math.exp(30))
    assert ours[0].item() == pytest.approx(math.exp(20))
    assert theirs[1][MASK].all() and not ours[1].any()


def test_their_entropy_bonus_is_a_token_mean_whatever_the_loss(trl):
    """Ours goes through the mean of the algorithm, like every other term: of GRPO, first over each response."""
    with_bonus, without = (grpo_loss(trl, "grpo", entropy_coef=coef)[0] for coef in (1.0, 0.0))
    torch.testing.assert_close(without - with_bonus, ENTROPIES[MASK].mean())
    with_bonus, without = (our_loss("grpo", Clip(0.2, 0.2), entropy_coef=coef)[0] for coef in (1.0, 0.0))
    by_response = torch.where(MASK, ENTROPIES, 0).sum(1) / LENGTHS
    torch.testing.assert_close(without - with_bonus, by_response.mean())


def test_their_masked_truncated_responses_stay_in_the_statistics(trl):
    """mask_truncated_completions takes a response out of the sum, but neither out of its group's mean and deviation nor
    out of the number that the loss is divided by. reward.truncated=drop takes it out of all three."""
    scores, truncated = random(17, N, 1), (0, 1, 0, 0, 0, 0)
    generated = grpo_generated(trl, scores, truncated)
    theirs, ours = generated["advantages"], judged("grpo", scores, truncated=truncated)
    torch.testing.assert_close(theirs, judged("grpo", scores).advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.advantages[3:], theirs[3:], rtol=1e-12, atol=1e-12)
    assert (ours.advantages - theirs)[:3].abs().min() > 0.01

    mask = MASK & ours.kept[:, None]
    assert torch.equal(generated["completion_mask"], mask.long())
    for loss_type, share in (("grpo", 5 / 6), ("dr_grpo", 5 / 6), ("bnpo", 1)):
        loss, gradient = our_loss(loss_type, Clip(0.2, 0.2), beta=0.1, mask=mask)
        torch.testing.assert_close((loss * share, gradient * share), grpo_loss(trl, loss_type, beta=0.1, mask=mask),
                                   rtol=1e-12, atol=1e-12)
