"""Every rollout samples from a random stream of its own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import TaskCancelledError

from rlhf_ray.actors import generator as module
from rlhf_ray.actors.generator import Generator, RayEngines, sample_seed
from rlhf_ray.core.ragged import offsets
from rlhf_ray.core.types import PromptSet, Sample
from rlhf_ray.engines.generation import Response


def test_no_two_samples_share_a_seed() -> None:
    """Nor do neighbours (step 1, position 2) and (step 2, position 1)."""
    seeds = [sample_seed(0, step, position) for step in range(50) for position in range(100)]
    assert len(set(seeds)) == 5000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_seed_is_a_matter_of_run_step_and_position() -> None:
    assert sample_seed(3, 5, 7) == sample_seed(3, 5, 7)
    assert isinstance(sample_seed(3, 5, 7), int)
    assert len({sample_seed(*at) for at in ((3, 5, 7), (5, 3, 7), (3, 7, 5), (4, 5, 7), (7, 5, 3))}) == 5


# -- from responses to a shard --------------------------------------------------------------------------------------


def shard(*responses: tuple[int, list[int], bool]) -> list[Any]:
    """What a generator makes of (index, response ids, truncated), for prompts [9 9] and [8], positions 10, 11, ..."""
    generator = Generator()
    generator.prompts = PromptSet(np.array([9, 9, 8], dtype=np.int32), np.array([2, 1], dtype=np.int32))
    generator.starts = offsets(generator.prompts.lengths)
    generator.engine = SimpleNamespace(version=4)  # type: ignore[assignment]
    samples = [Sample(position=10 + i, prompt_index=i % 2, seed=100 + i) for i in range(4)]
    finished = [Response(i, np.array(ids, dtype=np.int32), np.full(len(ids), -0.5, np.float32), cut)
                for i, ids, cut in responses]
    return list(generator._shard(samples, finished, 2.0))


def test_a_shard_by_hand() -> None:
    """Whatever finished first, rollouts stand in the order of their positions; repeated 3-grams are counted."""
    batch, info = shard((1, [5, 5, 5, 5], True), (0, [7, 1], False))
    assert batch.ids.tolist() == [9, 9, 7, 1, 8, 5, 5, 5, 5]
    assert (batch.lengths.tolist(), batch.prompt_lengths.tolist()) == ([4, 5], [2, 1])
    assert batch.in_response.tolist() == [False] * 2 + [True] * 2 + [False] + [True] * 4
    assert batch.sampled_logprobs.tolist() == [0, 0, -0.5, -0.5, 0, -0.5, -0.5, -0.5, -0.5]
    assert (batch.truncated.tolist(), batch.positions.tolist()) == ([False, True], [10, 11])
    assert batch.seeds.tolist() == [100, 101]
    assert (info.response_tokens, info.truncated, info.empty, info.repeated, info.ngrams) == (6, 1, 0, 1, 2)
    assert batch.version == 4


def test_empty_responses_are_dropped_and_counted() -> None:
    batch, info = shard((0, [], False), (2, [7], False))
    assert batch.positions.tolist() == [12]
    assert info.empty == 1
    assert shard((0, [], False), (3, [], False)) == []  # nothing is left to train on


# -- calls that nobody wants any more, or that nobody answers ---------------------------------------------------------


def test_a_call_that_was_cancelled_ends_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine asks before each of its steps."""
    cancelled = iter([False, True])
    monkeypatch.setattr(module, "ray", SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(
        is_canceled=lambda: next(cancelled))))

    def sample(requests: Any, temperature: float, max_tokens: int, before_step: Any) -> Any:
        before_step()
        yield Response(0, np.array([7], dtype=np.int32), np.zeros(1, np.float32), False)
        before_step()

    generator = Generator()
    generator.engine = SimpleNamespace(sample=sample)  # type: ignore[assignment]
    responses = generator._sample([], 1.0, 8)
    assert next(responses).index == 0
    with pytest.raises(TaskCancelledError):
        next(responses)


def test_a_sync_has_one_deadline_for_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the learners does so for 100 s; a generator is late after 90 s, be it in the last call."""
    clock, waits = iter([0.0, 5.0, 1000.0, 1000.0, 1050.0, 1095.0]), []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(module, "wait", lambda refs, timeout_s, what: waits.append(timeout_s) or [])
    engines = RayEngines([], 1, 100.0)
    engines.init([])
    engines.start()
    engines.update({})
    assert engines.finish(2, 0) == []
    assert waits == [85.0, 90.0, 40.0, 0.0]


class Actor:
    """A generator of one worker that says, whatever it is asked to hold, that it holds this version and digest."""

    def __init__(self, version: int, digest: int):
        self.finish_weight_update = SimpleNamespace(remote=lambda asked: (version, [digest]))


def test_what_engines_hold_is_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wait", lambda answers, timeout_s, what: answers)
    assert RayEngines([Actor(7, 99), Actor(7, 99)], 1, 60.0).finish(7, 99) == [7, 7]
    with pytest.raises(RuntimeError, match=r"generator 1 holds version 6 with digests \[99\]\. The weights did not"):
        RayEngines([Actor(7, 99), Actor(6, 99)], 1, 60.0).finish(7, 99)
