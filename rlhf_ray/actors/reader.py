"""A few responses as text, for people to read."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.cluster.role import Role
from rlhf_ray.core.types import RolloutBatch, SampleText

LONGEST = 2000  # characters of a prompt and of a response


class Reader(Role):
    """A role that has the tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def samples(
        self, rollout: RolloutBatch, rows: Sequence[int], weights: Sequence[float], *scores: np.ndarray
    ) -> list[SampleText]:
        """The responses at `rows` of a shard, with the weighted sum of their scores by each source, float32 [N].

        Of a longer text the last LONGEST characters of the prompt, and the first ones of the response.
        """
        ends = np.cumsum(rollout.lengths)
        return [self._sample(rollout, row, int(ends[row]),
                             sum(w * float(s[row]) for w, s in zip(weights, scores, strict=True))) for row in rows]

    def _sample(self, rollout: RolloutBatch, row: int, end: int, score: float) -> SampleText:
        start = end - int(rollout.lengths[row])
        middle = start + int(rollout.prompt_lengths[row])
        prompt, response = (str(self.tokenizer.decode(rollout.ids[a:b].tolist(), skip_special_tokens=True))
                            for a, b in ((start, middle), (middle, end)))
        return SampleText(int(rollout.positions[row]), prompt[-LONGEST:], response[:LONGEST], end - middle,
                          bool(rollout.truncated[row]), score)
