"""What counts as a response."""

import numpy as np

from rlhf_ray.core.types import RolloutBatch

EOS = 1


def rollout(ids: list[list[int]], prompt_lengths: list[int]) -> RolloutBatch:
    lengths = np.array([len(x) for x in ids], dtype=np.int32)
    n, total = len(ids), int(lengths.sum())
    return RolloutBatch(
        ids=np.concatenate([np.array(x, dtype=np.int32) for x in ids]), lengths=lengths,
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32), sampled_logprobs=np.zeros(total, dtype=np.float32),
        truncated=np.zeros(n, dtype=bool), prompt_index=np.arange(n), positions=np.arange(n), seeds=np.arange(n),
        version=1)


def test_a_sampled_eos_is_an_action() -> None:
    """[5 6 | 7 EOS] and [5 | EOS]: the end is part of the response, also where it is all of it."""
    batch = rollout([[5, 6, 7, EOS], [5, EOS]], [2, 1])
    assert batch.in_response.tolist() == [False, False, True, True, False, True]


def test_the_mask_comes_from_lengths_never_from_ids() -> None:
    """Pad is EOS in many tokenizers: neither one in the prompt, nor one sampled early, changes what is the response."""
    batch = rollout([[EOS, 5, EOS, 8, EOS], [EOS, EOS, EOS]], [3, 2])
    assert batch.in_response.tolist() == [False, False, False, True, True, False, False, True]
