"""Rankings as tokens, and how well scores order them. Covers lines 9 (same template and EOS as in rollouts), 24 (the
demonstrations that set the reward bias) and 37 (groups, ties) of the rules in tests/README.md."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import RankedDataset
from rlhf_ray.data.formats import Comparison, Demonstration, Message, Prompt
from rlhf_ray.errors import UserError
from rlhf_ray.models.tiny import train_tokenizer
from rlhf_ray.stages.rm import encode, held_out_accuracy, pair_counts, prompt_keys

BOS, EOS, USER, ASSISTANT = range(4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([], 260)  # special tokens and bytes: a letter is a token


def config(max_length: int = 64) -> Config:
    cfg = Config()
    cfg.model.max_length = max_length
    return cfg


def prompt(text: str) -> Prompt:
    return Prompt((Message("user", text),))


def comparison(text: str, *responses: str, ranks: tuple[int, ...]) -> Comparison:
    return Comparison(prompt(text), responses, ranks, "anna")


def test_ranked_groups_come_first_and_then_every_demonstration_alone(tokenizer: Any) -> None:
    a, b, c, d, e = (tokenizer.convert_tokens_to_ids(x) for x in "abcde")
    both = [comparison("a", "b", "cd", ranks=(2, 1)), comparison("b", "c", "", "d", ranks=(1, 3, 1))]
    data, kept = encode(
        both,
        [Demonstration(prompt("e"), "a"), Demonstration(prompt("d"), "b")], config(), tokenizer,
    )
    assert kept == both
    assert data.groups.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert data.ranks.tolist() == [2, 1, 1, 3, 1, 1, 1]
    assert data.lengths.tolist() == [6, 7, 6, 5, 6, 6, 6]
    assert data.ids.tolist() == [
        BOS, USER, a, ASSISTANT, b, EOS, BOS, USER, a, ASSISTANT, c, d, EOS,
        BOS, USER, b, ASSISTANT, c, EOS, BOS, USER, b, ASSISTANT, EOS, BOS, USER, b, ASSISTANT, d, EOS,
        BOS, USER, e, ASSISTANT, a, EOS, BOS, USER, d, ASSISTANT, b, EOS,
    ]
    assert data.prompt_lengths.tolist() == [4] * 7
    assert {x.dtype for x in (data.ids, data.lengths, data.ranks, data.groups, data.prompt_lengths)} == {
        np.dtype(np.int32)}


def test_responses_are_told_from_prompts_by_length(tokenizer: Any) -> None:
    """BOS, user, the letters and assistant are prompt; the response's letters and its EOS are not. An empty response is
    its EOS alone."""
    data, _ = encode([comparison("ab", "ab", "", ranks=(1, 2)), comparison("a", "b", "c", ranks=(1, 2))], [], config(),
                     tokenizer)
    assert data.prompt_lengths.tolist() == [5, 5, 4, 4]
    assert data.in_response.tolist() == ([False] * 5 + [True] * 3 + [False] * 5 + [True]
                                         + ([False] * 4 + [True] * 2) * 2)


def test_without_demonstrations_there_are_the_comparisons_alone(tokenizer: Any) -> None:
    """As dpo reads them: no score is shifted there."""
    both = [comparison("a", "b", "c", ranks=(1, 2))] * 2
    data, kept = encode(both, [], config(), tokenizer)
    assert kept == both
    assert data.groups.tolist() == [0, 0, 1, 1]


def test_a_comparison_with_one_response_too_long_is_left_out_whole_and_counted(tokenizer: Any) -> None:
    """A group is all of its pairs. Numbers stay without a gap, as they say which group is which."""
    first, last = comparison("a", "b", "c", ranks=(1, 2)), comparison("d", "b", "c", ranks=(1, 2))
    data, kept = encode(
        [first, comparison("a", "b", "cde", ranks=(1, 2)), last],
        [Demonstration(prompt("a"), "bcd"), Demonstration(prompt("a"), "b")], config(max_length=7), tokenizer,
    )
    assert kept == [first, last]  # the groups 0 and 1
    assert data.groups.tolist() == [0, 0, 1, 1, 2]


def test_too_few_comparisons_left(tokenizer: Any) -> None:
    """One group cannot be split into training and validation."""
    both = [comparison("a", "b", "c", ranks=(1, 2)), comparison("a", "b", "cde", ranks=(1, 2))]
    with pytest.raises(UserError, match=r"1 of 2 comparisons fit model\.max_length=7"):
        encode(both, [], config(max_length=7), tokenizer)


def test_no_demonstration_fits(tokenizer: Any) -> None:
    """Then nothing is left to set the reward bias by."""
    both = [comparison("a", "b", "c", ranks=(1, 2))] * 2
    with pytest.raises(UserError, match=r"no demonstration fits model\.max_length=7"):
        encode(both, [Demonstration(prompt("a"), "bcd")], config(max_length=7), tokenizer)


def test_labelers_of_one_prompt_share_a_key() -> None:
    anna, ben = comparison("a", "b", "c", ranks=(1, 2)), Comparison(prompt("a"), ("x", "y"), (2, 1), "ben")
    keys = prompt_keys([anna, comparison("b", "b", "c", ranks=(1, 2)), ben, comparison("c", "b", "c", ranks=(1, 2))])
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 3
    longer = Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "a")))
    assert len(set(prompt_keys([anna, Comparison(longer, ("b", "c"), (1, 2), "anna")]).tolist())) == 2


# -- accuracy ----------------------------------------------------------------------------------------------------


def ranked(ranks: list[int], groups: list[int]) -> RankedDataset:
    n = len(ranks)
    return RankedDataset(np.zeros(n, np.int32), np.ones(n, np.int32), np.array(ranks, np.int32),
                         np.array(groups, np.int32), np.zeros(n, np.int32))


def test_pairs_by_hand() -> None:
    """Ranks 1, 2, 3 and scores 5, 1, 2: 1-2 right, 1-3 right, 2-3 wrong."""
    correct, total = pair_counts(ranked([1, 2, 3], [0, 0, 0]), np.array([0]), np.array([5.0, 1.0, 2.0]))
    assert correct.tolist() == [2]
    assert total.tolist() == [3]


def test_ties_of_the_labeler_are_no_pairs_and_equal_scores_are_half_right() -> None:
    """Ranks 1, 1, 2 and scores 3, 7, 3: the tied pair is none; 3 against 3 is half, 7 against 3 is right."""
    correct, total = pair_counts(ranked([1, 1, 2], [0, 0, 0]), np.array([0]), np.array([3.0, 7.0, 3.0]))
    assert correct.tolist() == [1.5]
    assert total.tolist() == [2]


def test_every_prompt_is_counted_for_itself_and_only_those_asked_for() -> None:
    """Scores are not compared between prompts: the worst of group 2 scores above the best of group 0."""
    data = ranked([1, 2, 1, 2, 2, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    scores = np.array([1.0, 0.0, 0.0, 1.0, 8.0, 9.0, 5.0, 6.0])
    correct, total = pair_counts(data, np.array([2, 0, 3]), scores)
    assert correct.tolist() == [1, 1, 0]  # group 3 is all one tie
    assert total.tolist() == [1, 1, 0]
    correct, total = pair_counts(data, np.array([1]), scores)
    assert (correct.tolist(), total.tolist()) == ([0], [1])


def test_held_out_accuracy_leaves_prompts_of_ties_out_and_names_the_key_where_all_tie() -> None:
    """Groups 0 (1 of 1 right), 1 (0 of 1) and 2 (a tie, no pair): 1 of 2."""
    data, scores = ranked([1, 2, 1, 2, 1, 1], [0, 0, 1, 1, 2, 2]), np.array([1.0, 0.0, 0.0, 1.0, 5.0, 6.0])
    accuracy, (low, high), pairs = held_out_accuracy(data, np.array([0, 1, 2]), scores, 0, "dpo.val_fraction")
    assert (accuracy, pairs) == (0.5, 2)
    assert low < 0.5 < high
    with pytest.raises(UserError, match=r"all their ranks are ties; .* raise dpo\.val_fraction"):
        held_out_accuracy(data, np.array([2]), scores, 0, "dpo.val_fraction")
