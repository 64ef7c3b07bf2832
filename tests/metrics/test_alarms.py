"""Every alarm on numbers made by hand, on healthy runs, and on a policy that is paid for length."""

import json
import math
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.schema import AlarmConfig, AlarmsConfig
from rlhf_ray.metrics import alarms
from rlhf_ray.metrics.alarms import Alarm, AlarmMonitor, replay, trend
from rlhf_ray.metrics.recorder import Recorder, read_history

HEALTHY = {
    "score": 1.6, "judge_score": 1.5, "kl_per_sequence": 3.5, "entropy": 2.3, "response_length": 21.0,
    "repeated_ngrams": 0.002, "equal_groups": 0.1, "explained_variance": 0.6, "policy_skipped_steps": 0.0,
    "critic_skipped_steps": 0.0, "policy_grad_norm": 1.2, "seconds": {"rollout": 1.5, "update": 2.9},
    "memory_gib": {"policy-0": 1.0, "generator-0": 2.0},
}


def lines(n: int, **series: Any) -> list[dict[str, Any]]:
    """n healthy iterations, 1 first; `series` are numbers, or functions of the iteration, in place of some of them."""
    return [HEALTHY | {"iteration": i} | {key: s(i) if callable(s) else s for key, s in series.items()}
            for i in range(1, n + 1)]


def rings(cfg: AlarmsConfig, history: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.iteration) for alarm in replay(cfg, history)]


def every_time(name: str, **numbers: Any) -> AlarmsConfig:
    """An alarm without cooldown, `numbers` on the section itself; the others off."""
    cfg = AlarmsConfig(**numbers)
    for other in ("kl", "entropy", "length", "repetition", "divergence", "nonfinite", "equal_groups", "memory"):
        alarm = getattr(cfg, other)
        alarm.action, alarm.cooldown = ("log", 0) if other == name else ("off", 0)
    return cfg


def test_healthy_iterations_ring_nothing():
    assert replay(AlarmsConfig(), lines(40)) == []


# alarm, the number's name, its value at the threshold, and just beyond; what the alarm reports
SIMPLE = [
    ("kl", "kl_per_sequence", 30.0, 30.5, 30.5),
    ("repetition", "repeated_ngrams", 0.15, 0.16, 0.16),
    ("nonfinite", "policy_skipped_steps", 0.0, 1.0, 1.0),
    ("nonfinite", "critic_skipped_steps", 0.0, 2.0, 2.0),
]


@pytest.mark.parametrize(("name", "key", "at", "beyond", "value"), SIMPLE)
def test_thresholds_on_one_number(name, key, at, beyond, value):
    assert replay(AlarmsConfig(), lines(1, **{key: at})) == []
    (alarm,) = replay(AlarmsConfig(), lines(1, **{key: beyond}))
    assert (alarm.name, alarm.value, alarm.action) == (name, value, "log")


def test_equal_groups_rings_at_its_threshold_and_not_where_there_are_no_groups():
    """All groups equal is a share of exactly 1, the threshold."""
    assert rings(AlarmsConfig(), lines(1, equal_groups=1.0)) == [("equal_groups", 1)]
    assert rings(AlarmsConfig(), lines(1, equal_groups=0.99)) == []
    history = lines(1)
    del history[0]["equal_groups"]
    assert rings(AlarmsConfig(), history) == []


def test_entropy_is_compared_with_its_mean_over_the_warm_up():
    """Warm-up 2.0 and 4.0 nats: mean 3.0, so 0.3 of it is 0.9. 0.8 / 3 = 0.267. In the warm-up nothing rings."""
    nats = {1: 4.0, 2: 2.0, 3: 0.95, 4: 0.8}
    (alarm,) = replay(every_time("entropy"), lines(4, entropy=nats.get))
    assert (alarm.name, alarm.iteration, alarm.value) == ("entropy", 4, pytest.approx(0.8 / 3))
    assert rings(every_time("entropy"), lines(2, entropy={1: 4.0, 2: 0.0}.get)) == []


def test_length_rings_in_both_directions():
    """Warm-up mean 20; with a factor of 1.6 the bounds are 32 and 20 / 2.56 = 7.8125."""
    tokens = {1: 18.0, 2: 22.0, 3: 31.9, 4: 32.1, 5: 7.9, 6: 7.8}
    longer, shorter = replay(every_time("length"), lines(6, response_length=tokens.get))
    assert (longer.iteration, longer.value) == (4, pytest.approx(1.605))
    assert (shorter.iteration, shorter.value) == (6, pytest.approx(0.39))
    assert "pays for" in longer.message and "saying little" in shorter.message
    (nothing,) = replay(every_time("length"), lines(3, response_length={1: 20.0, 2: 20.0, 3: 0.0}.get))
    assert nothing.value == 0


def test_a_number_that_is_not_finite_leaves_the_baseline_to_the_others():
    """Warm-up NaN and 20: the mean is 20. Warm-up without any number: silent for good."""
    tokens = {1: math.nan, 2: 20.0, 3: 33.0}
    assert rings(every_time("length"), lines(3, response_length=tokens.get)) == [("length", 3)]
    assert rings(every_time("length"), lines(3, response_length={1: None, 2: math.nan, 3: 99.0}.get)) == []


def test_slopes_by_hand():
    """x = 0 .. 3, y = 0, 2, 1, 3: dx = -1.5 .. 1.5, dy = -1.5, 0.5, -0.5, 1.5, slope = 4 / 5 = 0.8.

    Residuals dy - 0.8 dx = -0.3, 0.9, -0.9, 0.3: squares 1.8; standard error sqrt(1.8 / 2 / 5) = sqrt(0.18).
    """
    assert trend([0, 1, 2, 3], [0, 2, 1, 3]) == pytest.approx((0.8, 0.8 / math.sqrt(0.18)))
    assert trend([5, 6, 7, 8], [0, -2, -1, -3]) == pytest.approx((-0.8, -0.8 / math.sqrt(0.18)))


def test_slopes_without_noise_are_finite():
    """The standard error is at least 1e-9: a slope of 2 gives 2e9; constants, whatever their rounding, about 0."""
    assert trend([0, 1, 2, 3], [1, 3, 5, 7]) == pytest.approx((2, 2e9), rel=0.01)
    assert abs(trend(range(10), [0.1] * 10)[1]) < 1e-3
    assert trend(range(4), [0.0] * 4) == (0, 0)


UP = [0, 2, 1, 3]  # t = 0.8 / sqrt(0.18) = 1.886, see above


def scores(up: list[float], down: list[float]) -> list[dict[str, Any]]:
    return lines(len(up), score=lambda i: up[i - 1], judge_score=lambda i: -down[i - 1])


def test_divergence_needs_both_slopes_beyond_the_threshold():
    cfg = every_time("divergence", window=4)
    cfg.divergence.threshold = 1.88
    (alarm,) = replay(cfg, scores(UP, UP))
    assert (alarm.iteration, alarm.value) == (4, pytest.approx(1.8856, abs=1e-4))
    assert replay(cfg, scores(UP, [1, 1, 1, 1])) == []  # the judge stays
    assert replay(cfg, scores([1, 1, 1, 1], UP)) == []  # the score stays
    assert replay(cfg, scores([-y for y in UP], UP)) == []  # both fall
    assert replay(cfg, scores(UP, [-y for y in UP])) == []  # both rise
    cfg.divergence.threshold = 1.89
    assert replay(cfg, scores(UP, UP)) == []


def test_divergence_is_silent_until_the_window_is_full_and_without_a_judge():
    straight = [float(i) for i in range(12)]
    cfg = every_time("divergence")
    history = scores(straight, straight)
    assert [at for _, at in rings(cfg, history)] == [10, 11, 12]
    assert rings(cfg, [{k: v for k, v in line.items() if k != "judge_score"} for line in history]) == []
    history[5]["judge_score"] = None  # a hole in every window
    assert rings(cfg, history) == []


def test_divergence_looks_at_the_last_window_only():
    """20 good iterations, then the judge turns: after 10 more the window holds nothing but its fall."""
    history = lines(30, score=lambda i: 0.1 * i, judge_score=lambda i: 0.1 * i if i <= 20 else 4 - 0.1 * i)
    found = [at for _, at in rings(every_time("divergence"), history)]
    assert found[0] in range(25, 30) and found[-1] == 30


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, None, np.float32("nan")])
def test_numbers_that_are_not_finite(broken):
    (alarm,) = replay(AlarmsConfig(), lines(1, policy_loss=broken, seconds={"rollout": 1.0, "update": broken}))
    assert (alarm.name, alarm.value) == ("nonfinite", 2)
    assert "seconds.update, policy_loss (none may be)" in alarm.message
    assert replay(AlarmsConfig(), lines(1, explained_variance=broken)) == []


def test_skipped_steps_are_tolerated_up_to_the_threshold_with_the_norm_that_belongs_to_them():
    """A skipped step has a gradient norm that is not finite; without the count the norm itself rings."""
    cfg = AlarmsConfig(nonfinite=AlarmConfig(threshold=1.0))
    assert rings(cfg, lines(1, policy_skipped_steps=1.0, policy_grad_norm=math.inf)) == []
    assert rings(cfg, lines(1, policy_skipped_steps=2.0, policy_grad_norm=math.inf)) == [("nonfinite", 1)]
    uncounted = lines(1, critic_grad_norm=math.inf)
    del uncounted[0]["critic_skipped_steps"]
    assert rings(cfg, uncounted) == [("nonfinite", 1)]


def test_a_skipped_step_of_two_losses_is_one_finding():
    """The norms of both parts are not finite then, and are not told instead of the fault."""
    norms = {"policy_grad_norm": math.inf, "rl_grad_norm": math.nan, "ptx_grad_norm": math.nan}
    (alarm,) = replay(AlarmsConfig(), lines(1, policy_skipped_steps=1.0, policy_fault="1 of 20", **norms))
    assert alarm.value == 1 and "1 of 20" in alarm.message
    (alarm,) = replay(AlarmsConfig(), lines(1, policy_skipped_steps=0.0, **norms))
    assert "ptx_grad_norm, rl_grad_norm" in alarm.message or "rl_grad_norm, ptx_grad_norm" in alarm.message


def test_skipped_steps_say_which_gradients_were_not_finite():
    skipped = lines(1, critic_skipped_steps=1.0, critic_fault="3 of 20 parameters, and backwards first layers.1 (norm)")
    (alarm,) = replay(AlarmsConfig(), skipped)
    assert "gradients were not finite, of 3 of 20 parameters, and backwards first layers.1 (norm); lower " \
        "ppo.critic_optimizer.lr" in alarm.message


def gib(*held: dict[str, float] | None) -> list[dict[str, Any]]:
    """An iteration per entry: resident memory by actor."""
    return lines(len(held), memory_gib=lambda i: held[i - 1])


def test_memory_is_compared_with_the_end_of_the_warm_up_actor_by_actor():
    """policy-0: 1.0 then, so 1.5 is the limit, and 1.75 is 1.75 times; what loading took before does not count.
    generator-0: 2.0, limit 3.0; it grows by more GiB, but only 1.625 times; critic-0 had not made room for its first
    update before. In the warm-up nothing rings."""
    (alarm,) = replay(every_time("memory"), gib(
        {"policy-0": 4.0, "generator-0": 2.0, "critic-0": 0.5}, {"policy-0": 1.0, "generator-0": 2.0, "critic-0": 0.9},
        {"policy-0": 1.5, "generator-0": 3.0, "critic-0": 0.9},
        {"policy-0": 1.75, "generator-0": 3.25, "critic-0": 0.9}))
    assert (alarm.name, alarm.iteration, alarm.value) == ("memory", 4, 1.75)
    assert alarm.message.startswith("policy-0 holds 1.75 GiB, 1.75 times what it held after the warm-up")


def test_memory_of_an_actor_that_was_restarted_counts_from_the_first_warm_up():
    """2.0 GiB at first, 0.5 in a new process: what it grows to is compared with 2.0, so 3.0 is silent, 3.5 is not."""
    held = gib(*({"policy-0": x} for x in (2.0, 2.0, 0.5, 3.0, 3.5)))
    assert rings(every_time("memory"), held) == [("memory", 5)]


def test_memory_without_a_baseline_is_silent():
    """None was recorded; not in the warm-up, or in one iteration of it only; an actor that came later."""
    cfg = every_time("memory")
    history = gib({}, {}, {"policy-0": 9.0})
    assert rings(cfg, history) == []
    del history[2]["memory_gib"]
    assert rings(cfg, history) == []
    assert rings(cfg, gib({}, {"policy-0": 1.0}, {"policy-0": 1.75})) == [("memory", 3)]
    assert rings(cfg, gib({"policy-0": 1.0}, {"policy-0": 1.0}, {"policy-0": 1.0, "judge-0": 9.0})) == []


def test_what_is_absent_is_silent():
    assert replay(AlarmsConfig(), [{"iteration": i} for i in range(1, 20)]) == []


def test_cooldown():
    """Silent for 2 further iterations after each ring."""
    cfg = AlarmsConfig(kl=AlarmConfig(threshold=10.0, cooldown=2))
    high = lines(8, kl_per_sequence=20.0)
    assert rings(cfg, high) == [("kl", 1), ("kl", 4), ("kl", 7)]
    cfg.kl.cooldown = 0
    assert [at for _, at in rings(cfg, high)] == list(range(1, 9))


def test_off_never_rings_and_the_action_is_handed_on():
    cfg = AlarmsConfig(kl=AlarmConfig(10.0, "off"), repetition=AlarmConfig(0.1, "stop"))
    assert [(a.name, a.action, a.threshold) for a in replay(cfg, lines(1, kl_per_sequence=99.0, repeated_ngrams=0.5))
            ] == [("repetition", "stop", 0.1)]


def test_messages_say_what_and_what_to_do():
    """One line each, with the key of the threshold and a key to turn."""
    straight = [float(i) for i in range(10)]
    history = scores(straight, straight)
    history[-1] |= {"kl_per_sequence": 60.0, "entropy": 0.1, "response_length": 48.0, "repeated_ngrams": 0.4,
                    "policy_skipped_steps": 3.0, "equal_groups": 1.0, "memory_gib": {"policy-0": 1.6}}
    found = replay(AlarmsConfig(), history)
    names = ["kl", "entropy", "length", "repetition", "divergence", "nonfinite", "equal_groups", "memory"]
    assert [alarm.name for alarm in found] == names
    for alarm in found:
        assert f"alarms.{alarm.name}.threshold={alarm.threshold:g}" in alarm.message
        assert ": " in alarm.message and "; " in alarm.message and "\n" not in alarm.message
        json.dumps(vars(alarm), allow_nan=False)
    assert found[0].message.startswith("KL from the reference is 60 nats per response")


def test_every_alarm_of_the_configuration_is_watched():
    configured = {name for name, value in vars(AlarmsConfig()).items() if isinstance(value, AlarmConfig)}
    assert all(callable(getattr(alarms, name)) for name in configured)
    assert configured == {"kl", "entropy", "length", "repetition", "divergence", "nonfinite", "equal_groups",
                          "memory"}


@pytest.mark.parametrize("cut", [1, 5, 12, 20])
def test_a_restored_monitor_goes_on_as_if_nothing_had_happened(cut):
    """Through JSON, at every stage: in the warm-up, before the window is full, within a cooldown."""
    cfg = AlarmsConfig()
    history = hacking(25)
    monitor, found = AlarmMonitor(cfg), []
    for line in history:
        if line["iteration"] == cut:
            state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
            monitor = AlarmMonitor(cfg)
            monitor.load_state_dict(state)
        found += monitor.check(line["iteration"], line)
    assert found == replay(cfg, history) != []


def test_iterations_that_a_resumed_run_repeats_count_once():
    """1 to 6, then again from 3 on: the first 3 to 6 are forgotten, and so is what they rang."""
    cfg = every_time("length")
    cfg.length.cooldown = 9
    first = lines(6, response_length={1: 20.0, 2: 20.0, 3: 20.0, 4: 99.0, 5: 99.0, 6: 99.0}.get)
    again = lines(6, response_length={3: 20.0, 4: 20.0, 5: 99.0, 6: 99.0}.get)[2:]
    assert rings(cfg, first + again) == [("length", 4), ("length", 5)]


def test_replay_of_what_the_recorder_wrote_rings_as_the_run_did(tmp_path, capsys):
    """NaN and infinity come back as null."""
    history = hacking(20)
    history[6]["policy_loss"], history[14]["value_loss"] = math.nan, math.inf
    history[8]["explained_variance"] = math.nan
    live: list[Alarm] = []
    monitor = AlarmMonitor(AlarmsConfig())
    with Recorder(tmp_path, "disabled", "project", {}) as recorder:
        for line in history:
            values = {key: value for key, value in line.items() if key != "iteration"}
            recorder.log(line["iteration"], values)
            live += monitor.check(line["iteration"], values)
    assert replay(AlarmsConfig(), read_history(tmp_path)) == live
    assert [a.iteration for a in live if a.name == "nonfinite"] == [7, 15]


def hacking(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """A policy that is paid for length: 20 tokens to its limit of 48, by repeating itself; score up, judge down."""
    rng = np.random.default_rng(seed)

    def grown(i: int) -> float:  # 0 to 1
        return 1 - math.exp(-(i - 1) / 6)

    return lines(n, response_length=lambda i: min(48.0, 20 + 30 * grown(i) + rng.normal(0, 1)),
                 repeated_ngrams=lambda i: 0.002 + 0.4 * grown(i) ** 2, entropy=lambda i: 2.6 - 1.5 * grown(i),
                 kl_per_sequence=lambda i: 20 * grown(i), score=lambda i: 3 * grown(i) + rng.normal(0, 0.1),
                 judge_score=lambda i: -1.0 * grown(i) + rng.normal(0, 0.15))


@pytest.mark.parametrize("seed", range(5))
def test_reward_hacking_by_length_is_caught_within_its_first_iterations(seed):
    """Length: 1.6 x about 22 = 36 tokens, at grown = 0.53, i = 5.5. Repetition 0.15 at grown = 0.61, i = 6.6.
    Divergence as soon as its window of 10 is full, or soon after."""
    at: dict[str, int] = {}
    for name, iteration in rings(AlarmsConfig(), hacking(16, seed)):
        at.setdefault(name, iteration)
    assert at.keys() == {"length", "repetition", "divergence"}
    assert at["length"] <= 9 and at["repetition"] == 7 and 10 <= at["divergence"] <= 13


def test_a_run_that_learns_and_levels_off_is_silent():
    """30 runs of 40 iterations with the noise of real ones: score and judge of a batch move together (0.85), lengths
    between 19 and 29 tokens, entropy down by a sixth."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        shared = rng.normal(0, 1, 41)
        own = rng.normal(0, 1, 41)
        history = lines(
            40, score=lambda i, s=shared: 1.5 * (1 - math.exp(-i / 5)) + 0.1 * s[i],
            judge_score=lambda i, s=shared, o=own: 1.5 * (1 - math.exp(-i / 5)) + 0.15 * (0.85 * s[i] + 0.53 * o[i]),
            response_length=lambda i, r=rng: r.uniform(19, 29), entropy=lambda i: 2.65 - 0.01 * i,
        )
        assert replay(AlarmsConfig(), history) == []
