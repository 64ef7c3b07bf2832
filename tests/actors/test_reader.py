"""A few responses as text."""

import numpy as np
import pytest

from rlhf_ray.actors.reader import LONGEST, Reader
from rlhf_ray.config.load import asset_dir
from rlhf_ray.core.types import RolloutBatch, SampleText
from rlhf_ray.models.hub import load_tokenizer


def rollout(reader: Reader, texts: list[tuple[str, str]]) -> RolloutBatch:
    """Prompts and responses, at places 5, 6, ... of the batch; only the first response comes to its end."""
    t = reader.tokenizer
    prompts = [t(prompt).input_ids for prompt, _ in texts]
    bodies = [t(response).input_ids + [t.eos_token_id] * (i == 0) for i, (_, response) in enumerate(texts)]
    lengths = np.array([len(p) + len(b) for p, b in zip(prompts, bodies, strict=True)], dtype=np.int32)
    return RolloutBatch(
        ids=np.concatenate([p + b for p, b in zip(prompts, bodies, strict=True)]).astype(np.int32), lengths=lengths,
        prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int32),
        sampled_logprobs=np.zeros(lengths.sum(), dtype=np.float32), truncated=np.arange(len(texts)) > 0,
        prompt_index=np.arange(len(texts)), positions=5 + np.arange(len(texts)), seeds=np.arange(len(texts)), version=1)


@pytest.fixture(scope="module")
def reader() -> Reader:
    made = Reader()
    made.tokenizer = load_tokenizer(asset_dir("reviews_base"))
    return made


def test_prompt_and_response_are_told_apart_and_special_tokens_are_no_text(reader: Reader) -> None:
    """Score: 2 x 0.5 + 10 x 0.25 = 3.5 for the first, 2 x 1 + 10 x 0.5 = 7 for the third."""
    batch = rollout(reader, [("Tell me.", " A good film"), ("No", " one"), ("And?", " A bad")])
    scores = [np.array(s, dtype=np.float32) for s in ([0.5, 9, 1], [0.25, 9, 0.5])]
    tokens = (batch.lengths - batch.prompt_lengths).tolist()
    assert reader.samples(batch, [0, 2], [2.0, 10.0], *scores) == [
        SampleText(5, "Tell me.", " A good film", tokens[0], False, 3.5),
        SampleText(7, "And?", " A bad", tokens[2], True, 7.0)]


def test_long_texts_are_cut_where_it_matters_least(reader: Reader) -> None:
    batch = rollout(reader, [("first " * 999 + "question", "answer" + " last" * 999)])
    (sample,) = reader.samples(batch, [0], [1.0], np.zeros(1, dtype=np.float32))
    assert len(sample.prompt) == len(sample.response) == LONGEST
    assert sample.prompt.endswith("question") and sample.response.startswith("answer")
