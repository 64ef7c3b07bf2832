"""The networks on packed rows against plain Hugging Face on one sequence at a time.

Covers lines 8 (the reward model reads the last real token by length), 11 (temperature divides the logits) and 13
(the softmax is whole) of the rules in tests/README.md.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_ray.core.ragged import PackedRows, offsets, pack
from rlhf_ray.models.modules import CausalLM, ScalarHead, ScalarModel, where_broken

LENGTHS = np.array([9, 3, 6, 2, 5], dtype=np.int32)
IDS = np.random.default_rng(0).integers(0, 64, size=int(LENGTHS.sum())).astype(np.int32)
STARTS = offsets(LENGTHS)
HAS_PREDICTOR = np.array([place > 0 for n in LENGTHS for place in range(n)])  # all but the first tokens
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tied: bool = False) -> LlamaForCausalLM:
    """A random model whose distributions are far from uniform, so that a wrong position or state shows."""
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, tie_word_embeddings=tied, initializer_range=0.3)
    return LlamaForCausalLM(config).float().eval()


def scalar() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1, initializer_range=0.3)).float().eval()


def sequences(ids: np.ndarray = IDS) -> list[torch.Tensor]:
    return [torch.as_tensor(ids[a:b], dtype=torch.int64) for a, b in pairwise(STARTS)]


def plain_logprobs(model: Any, temperature: float) -> torch.Tensor:
    """log p of every token but the first of its sequence, in flat order, by Hugging Face and log_softmax alone."""
    found = []
    for sequence in sequences():
        logits = model(input_ids=sequence[None]).logits[0, :-1] / temperature
        found.append(torch.log_softmax(logits, dim=-1).gather(1, sequence[1:, None]).squeeze(1))
    return torch.cat(found)


def packed_logprobs(module: CausalLM, batches: list[PackedRows], temperature: float, ids: np.ndarray = IDS) -> Any:
    """The same numbers from packed rows; also the entropies."""
    logprobs, entropies = torch.zeros(len(ids)), torch.zeros(len(ids))
    for rows in batches:
        wanted = rows.pick(HAS_PREDICTOR, False)
        some, entropy = module(rows, wanted, temperature)
        logprobs = logprobs.index_put((rows.index[wanted],), some)
        entropies = entropies.index_put((rows.index[wanted],), entropy)
    return logprobs[HAS_PREDICTOR], entropies[HAS_PREDICTOR]


ONE_ROW, TWO_ROWS = (64, 64), (16, 32)
ONE_BY_ONE = (9, 9)
LAYOUTS = pytest.mark.parametrize("layout", [ONE_ROW, TWO_ROWS, ONE_BY_ONE])


@LAYOUTS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_are_those_of_each_sequence_alone(layout: tuple[int, int], temperature: float) -> None:
    model = llama()
    with torch.no_grad():
        expected = plain_logprobs(model, temperature)
        found, _ = packed_logprobs(CausalLM(model), pack(IDS, LENGTHS, *layout), temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_layouts_above_differ() -> None:
    """25 tokens in one row; or rows of 16 with 9 + 3 and 6 + 5 + 2; or rows of 9, one at a time."""
    assert [[tuple(b.ids.shape) for b in pack(IDS, LENGTHS, *layout)] for layout in (ONE_ROW, TWO_ROWS)] == [
        [(1, 25)], [(2, 13)]]
    assert len(pack(IDS, LENGTHS, *ONE_BY_ONE)) > 1


def test_rows_end_to_end_have_the_same_logprobs() -> None:
    """One row of 2 x 13 with an empty place between; variable-length attention kernels need it so."""
    module = CausalLM(llama())
    usual, flat = (pack(IDS, LENGTHS, *TWO_ROWS, one_row=one_row) for one_row in (False, True))
    assert [tuple(b.ids.shape) for b in (*usual, *flat)] == [(2, 13), (1, 26)]
    with torch.no_grad():
        (expected, entropies), (found, flat_entropies) = (packed_logprobs(module, b, 0.7) for b in (usual, flat))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(flat_entropies, entropies, atol=1e-5, rtol=0)


@LAYOUTS
@pytest.mark.parametrize("tied", [False, True])
def test_packed_gradients_are_those_of_each_sequence_alone(layout: tuple[int, int], tied: bool) -> None:
    model = llama(tied)
    weights = torch.randn(int(HAS_PREDICTOR.sum()), generator=torch.Generator().manual_seed(2))
    (plain_logprobs(model, 0.7) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (packed_logprobs(CausalLM(model), pack(IDS, LENGTHS, *layout), 0.7)[0] * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    assert ("lm_head.weight" in found) is not tied
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 1e-3, name
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_a_neighbour_in_the_row_does_not_leak() -> None:
    """Another first sequence of the same length: the others' log-probabilities and scores stay what they were."""
    changed = IDS.copy()
    changed[:9] = (changed[:9] + 1) % 64
    module, value_module = CausalLM(llama()), ScalarModel(scalar())
    others = np.repeat([False, True, True, True, True], LENGTHS)
    with torch.no_grad():
        numbers = []
        for ids in (IDS, changed):
            (rows,) = pack(ids, LENGTHS, *ONE_ROW)
            assert rows.index[0, 0] == 0  # the longest sequence comes first: all others could see it
            outputs = value_module(rows)
            scores = torch.zeros(len(ids))
            scores[rows.index[rows.filled]] = outputs[rows.filled]
            numbers.append((packed_logprobs(module, [rows], 1.0, ids)[0], scores))
    (before, scores_before), (after, scores_after) = numbers
    theirs = others[HAS_PREDICTOR]
    torch.testing.assert_close(after[theirs], before[theirs], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores_after[others], scores_before[others], atol=1e-6, rtol=0)
    assert (after[~theirs] - before[~theirs]).abs().min() > 1e-3  # and the changed one did change
    assert (scores_after[~others] - scores_before[~others]).abs().min() > 1e-4


def test_a_token_does_not_see_what_comes_after_it() -> None:
    changed = IDS.copy()
    changed[8] = (changed[8] + 1) % 64  # the last token of the first sequence
    module = CausalLM(llama())
    with torch.no_grad():
        before, after = (packed_logprobs(module, pack(ids, LENGTHS, *ONE_ROW), 1.0, ids)[0] for ids in (IDS, changed))
    torch.testing.assert_close(after[:7], before[:7], atol=1e-6, rtol=0)
    assert abs(after[7] - before[7]) > 1e-3


def test_entropies_are_those_of_the_whole_distribution_at_that_temperature() -> None:
    model = llama()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=s[None]).logits[0, :-1] for s in sequences()]) / 0.7
        _, entropies = packed_logprobs(CausalLM(model), pack(IDS, LENGTHS, *ONE_ROW), 0.7)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=0)


def test_the_wrapper_keeps_hugging_faces_names_for_the_parameters() -> None:
    """Weights are saved and sent under these names."""
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in CausalLM(model).named_parameters()] == [f"model.{name}" for name in names]
    assert names[-1] == "lm_head.weight"


# -- scores and values -------------------------------------------------------------------------------------------


def test_the_score_is_that_of_the_last_real_token_however_it_is_padded() -> None:
    """Packed, padded on the right and padded on the left: what Hugging Face says of the sequence alone."""
    model = scalar()
    head = model.score  # the wrapper puts its own in its place
    module = ScalarModel(model)
    (rows,) = pack(IDS, LENGTHS, *ONE_ROW)
    with torch.no_grad():
        packed = torch.zeros(len(IDS))
        packed[rows.index[rows.filled]] = module(rows)[rows.filled]
        for i, sequence in enumerate(sequences()):
            n = len(sequence)
            expected = head(model.model(input_ids=sequence[None]).last_hidden_state)[0, -1, 0]
            right, left = (torch.zeros((1, n + 4), dtype=torch.int64) for _ in range(2))
            right[0, :n], left[0, -n:] = sequence, sequence
            right_at, left_at = torch.zeros_like(right), torch.zeros_like(left)
            right_at[0, :n] = left_at[0, -n:] = torch.arange(n)
            after, before = (module(PackedRows(ids, at, at)) for ids, at in ((right, right_at), (left, left_at)))
            for score in (packed[STARTS[i + 1] - 1], after[0, n - 1], before[0, -1]):
                torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_the_head_reads_a_low_precision_model_in_float32() -> None:
    """By hand: weights 1 and 2^-9 on states 1 and 1 are 1 + 2^-9, which bfloat16 rounds to 1."""
    head = ScalarHead(torch.nn.Parameter(torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)))
    found = head(torch.ones((1, 3, 2), dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1 + 2.0**-9] * 3]
    assert isinstance(ScalarModel(scalar()).model.score, ScalarHead)


def test_the_shift_is_taken_off_every_score() -> None:
    model = scalar()
    (rows,) = pack(IDS, LENGTHS, *ONE_ROW)
    with torch.no_grad():
        raw, shifted = (ScalarModel(model, shift)(rows) for shift in (0.0, 1.5))
    assert raw.dtype == torch.float32
    assert raw.shape == rows.ids.shape
    torch.testing.assert_close(shifted, raw - 1.5)


def test_values_of_packed_rows_do_not_depend_on_the_token_they_are_for() -> None:
    """The value of token t reads tokens before t: it is the score of the sequence that ends at t - 1."""
    module = ScalarModel(scalar())
    (rows,) = pack(IDS, LENGTHS, *ONE_ROW)
    with torch.no_grad():
        values = torch.zeros(len(IDS))
        values[rows.index[rows.filled]] = rows.before(module(rows))[rows.filled]
        for start, sequence in zip(STARTS, sequences(), strict=False):
            for t in range(1, len(sequence)):
                (prefix,) = pack(sequence[:t].numpy(), np.array([t]), t, t)
                alone = module(prefix)[0, -1]
                torch.testing.assert_close(values[start + t], alone, atol=1e-5, rtol=0)


def test_gradients_of_the_values_reach_head_and_body() -> None:
    module = ScalarModel(scalar())
    (rows,) = pack(IDS, LENGTHS, *ONE_ROW)
    module(rows)[rows.filled].square().sum().backward()
    without = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without


# Three responses of 4, 1 and 6 tokens to a prompt of 5, between them one to another prompt, and that one alone.
SHARED = [[1, 2, 3, 4, 5, 11, 12, 13, 14], [1, 2, 3, 9, 21, 22], [1, 2, 3, 4, 5, 15], [1, 2, 3, 9],
          [1, 2, 3, 4, 5, 11, 12, 16, 17, 18, 19]]
SHARED_IDS, SHARED_LENGTHS = np.concatenate(SHARED).astype(np.int32), np.array([len(s) for s in SHARED])
PROMPTS = np.array([5, 4, 5, 4, 5])
IN_RESPONSE = np.concatenate([np.arange(n) >= p for n, p in zip(SHARED_LENGTHS, PROMPTS, strict=True)])


def shared(together: bool) -> list[PackedRows]:
    return pack(SHARED_IDS, SHARED_LENGTHS, 32, 64, prompts=PROMPTS if together else None)


def responses(outputs: list[torch.Tensor], batches: list[PackedRows]) -> torch.Tensor:
    """What rectangles [R, L] say of response tokens, in flat order."""
    flat = torch.zeros(len(SHARED_IDS))
    for output, rows in zip(outputs, batches, strict=True):
        flat = flat.index_put((rows.index[rows.filled],), output[rows.filled])
    return flat[torch.as_tensor(IN_RESPONSE)]


def test_responses_that_share_their_prompt_are_what_they_are_alone() -> None:
    """26 tokens instead of 36: log-probabilities, entropies, scores, values, and the gradients of all parameters."""
    assert [sum(int(rows.filled.sum()) for rows in shared(together)) for together in (True, False)] == [26, 36]
    found = []
    for together in (True, False):
        batches, module, value_module = shared(together), CausalLM(llama()), ScalarModel(scalar())
        wanted = [rows.pick(IN_RESPONSE, False) for rows in batches]
        both = [module(rows, w, 0.7) for rows, w in zip(batches, wanted, strict=True)]
        logprobs, entropies = (responses([torch.zeros(w.shape).masked_scatter(w, pair[k])
                                          for pair, w in zip(both, wanted, strict=True)], batches) for k in (0, 1))
        outputs = [value_module(rows) for rows in batches]
        scores = responses(outputs, batches)
        values = responses([rows.before(o) for o, rows in zip(outputs, batches, strict=True)], batches)
        weights = torch.arange(1.0, len(logprobs) + 1)
        ((logprobs * weights).sum() + (scores * weights).sum() + (values * weights).sum()).backward()
        gradients = [p.grad for m in (module, value_module) for p in m.parameters()]
        found.append([logprobs, entropies, scores, values, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=2e-4)  # gradients are up to a hundred


LAST_LAYER = ["model.layers.11.self_attn.q_proj.weight", "model.layers.11.input_layernorm.weight"]


@pytest.mark.parametrize(("names", "said"), [
    ([], "no parameter by itself: their norm is not finite"),
    (["model.embed_tokens.weight"], "1 of 20 parameters, and backwards first model.embed_tokens.weight"),
    (["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", *LAST_LAYER],
     "4 of 20 parameters, and backwards first model.layers.11 (self_attn.q_proj.weight, input_layernorm.weight)"),
    ([f"h.0.{name}" for name in "abcde"], "5 of 20 parameters, and backwards first h.0 (a, b, c and 2 more)"),
    ([*LAST_LAYER, "model.norm.weight"], "3 of 20 parameters, and backwards first model.norm.weight"),
])
def test_the_last_layer_with_broken_gradients_is_named(names, said):
    assert where_broken(names, 20) == said
