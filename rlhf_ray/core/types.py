"""What moves between the roles: one frozen type per stage of life, every field with its shape.

All are ragged (see `core.ragged`): flat per-token arrays [T] over N sequences. Entry t of a per-token array
belongs to token t given the tokens before it. They travel through Ray's object store as numpy arrays and are
read there without a copy.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenDataset:
    """Supervised text: ids int32 [T], lengths int32 [N], in_loss bool [T] (the tokens that are learnt)."""

    ids: np.ndarray
    lengths: np.ndarray
    in_loss: np.ndarray


@dataclass(frozen=True)
class RankedDataset:
    """Ranked responses: ids int32 [T] (prompt + response), lengths int32 [N], ranks int32 [N] (1 is best, equal is
    a tie), groups int32 [N] (the number of the prompt, ascending)."""

    ids: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts: ids int32 [T], lengths int32 [N]."""

    ids: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class RolloutBatch:
    """What the engine sampled.

    ids int32 [T] prompt + response (EOS included where it was sampled); lengths, prompt_lengths int32 [N];
    sampled_logprobs float32 [T] as the engine saw them (0 on prompt tokens); truncated bool [N]: stopped by the
    length limit; prompt_index int64 [N] in the prompt set; seeds int64 [N]; version: the policy weights used.
    """

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    sampled_logprobs: np.ndarray
    truncated: np.ndarray
    prompt_index: np.ndarray
    seeds: np.ndarray
    version: int

    @property
    def in_response(self) -> np.ndarray:
        """bool [T]: tokens that the policy chose, from lengths alone (never from `ids != pad`)."""
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]
        place = np.arange(len(self.ids)) - np.repeat(starts, self.lengths)
        return place >= np.repeat(self.prompt_lengths, self.lengths)


@dataclass(frozen=True)
class TrainBatch:
    """A scored rollout batch with everything an update reads.

    ids, in_response, old_logprobs, advantages, values, returns: [T]; lengths int32 [N].
    """

    ids: np.ndarray
    lengths: np.ndarray
    in_response: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    values: np.ndarray
    returns: np.ndarray


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver learns of a shard: numbers only.

    positions int64 [N]: places of its rollouts in the whole batch; lengths int32 [N] tokens, prompt + response;
    response_tokens; truncated and empty rollouts (the empty ones are dropped); seconds since the shard before.
    """

    positions: np.ndarray
    lengths: np.ndarray
    response_tokens: int
    truncated: int
    empty: int
    seconds: float
