"""What moves between the roles: one frozen type per stage of life, every field with its shape. No torch: who only
passes them on need not import it.

Batches are ragged (see `core.ragged`): flat per-token arrays [T] over N sequences. Entry t of a per-token array
belongs to token t given the tokens before it. They travel through Ray's object store as numpy arrays and are
read there without a copy.
"""

from dataclasses import dataclass
from typing import Any

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
    a tie), groups int32 [N] (the number of the prompt, ascending), prompt_lengths int32 [N] (tokens of it in ids)."""

    ids: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray
    groups: np.ndarray
    prompt_lengths: np.ndarray

    @property
    def in_response(self) -> np.ndarray:
        """bool [T]: the response's tokens, its end among them, from lengths alone."""
        return _behind(self.prompt_lengths, self.lengths)


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
    length limit; prompt_index int64 [N] in the prompt set; positions int64 [N]: places in the whole batch; seeds
    int64 [N]; version: the policy weights used.
    """

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    sampled_logprobs: np.ndarray
    truncated: np.ndarray
    prompt_index: np.ndarray
    positions: np.ndarray
    seeds: np.ndarray
    version: int

    @property
    def in_response(self) -> np.ndarray:
        """bool [T]: tokens that the policy chose, from lengths alone (never from `ids != pad`)."""
        return _behind(self.prompt_lengths, self.lengths)


@dataclass(frozen=True)
class PolicyBatch:
    """A scored rollout batch with everything a policy update reads.

    ids, in_response, old_logprobs, ref_logprobs, advantages, weights: [T]; lengths int32 [N]. in_response is False on
    responses that are left out of the update; weights float32: the importance correction, 1 without one.
    """

    ids: np.ndarray
    lengths: np.ndarray
    in_response: np.ndarray
    old_logprobs: np.ndarray
    ref_logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class CriticBatch:
    """What a critic update reads: ids, in_response, values, returns: [T]; lengths int32 [N]."""

    ids: np.ndarray
    lengths: np.ndarray
    in_response: np.ndarray
    values: np.ndarray
    returns: np.ndarray


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver learns of a shard: numbers only.

    positions int64 [N]: places of its rollouts in the whole batch; lengths int32 [N] tokens, prompt + response;
    response_tokens; truncated and empty rollouts (the empty ones are dropped); repeated of all `ngrams` 3-grams of
    token ids occurred before in the same response; seconds since the shard before; version: the policy weights used.
    """

    positions: np.ndarray
    lengths: np.ndarray
    response_tokens: int
    truncated: int
    empty: int
    repeated: int
    ngrams: int
    seconds: float
    version: int

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class PromptTexts:
    """What a reward function may read of the prompt set: texts and metadata, N each, in its order.

    metadata is the JSON text of an object, "" for none: text is cheap to send and holds nothing that runs.
    """

    texts: tuple[str, ...]
    metadata: tuple[str, ...]


@dataclass(frozen=True)
class SampleText:
    """A response for people to read. position: its place in the batch; tokens of the response; truncated: stopped by
    the length limit; score: the weighted sum of all reward sources."""

    position: int
    prompt: str
    response: str
    tokens: int
    truncated: bool
    score: float


@dataclass(frozen=True)
class Sample:
    """One rollout to make. position: its place in the whole batch; seed: of its own random stream."""

    position: int
    prompt_index: int
    seed: int


@dataclass(frozen=True)
class ScoredShard:
    """References to one shard's arrays: rollout, and per rollout or per token what each role made of it."""

    rollout: Any  # -> RolloutBatch
    scores: tuple[Any, ...]  # one per reward source, each -> float32 [N]
    ref_logprobs: Any  # -> float32 [T]
    old_logprobs: Any = None  # -> float32 [T]; None where the update computes them itself
    values: Any = None  # -> float32 [T], None without a critic


@dataclass(frozen=True)
class Window:
    """One optimizer step of one rank: rollout numbers (places in the concatenated shards), ptx block numbers."""

    rollouts: np.ndarray
    ptx: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Sum, sum of squares and number of entries; adding two gives the moments of both sets together.

    `mean` and `variance` raise ValueError if there are no entries.
    """

    total: float = 0.0
    squares: float = 0.0
    count: float = 0.0

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def mean(self) -> float:
        if self.count <= 0:
            raise ValueError("moments of no entries: the mask is False everywhere, on all ranks")
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Population variance: divided by count, not count - 1, so that one entry has 0, not NaN."""
        mean = self.mean
        return max(0.0, self.squares / self.count - mean * mean)  # rounding may leave a tiny negative number


@dataclass(frozen=True)
class Shaping:
    """What becomes of scores before KL is added; see RewardConfig for each field.

    truncated: score, penalty or drop; max_tokens: the longest response that may be.
    """

    truncated: str = "score"
    truncation_penalty: float = -1.0
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0
    normalize: bool = False
    clip: float | None = None
    max_tokens: int = 0


def _behind(prompt_lengths: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool [T]: which tokens of N sequences end to end come after their prompts."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1]
    place = np.arange(int(np.sum(lengths))) - np.repeat(starts, lengths)
    return place >= np.repeat(prompt_lengths, lengths)
