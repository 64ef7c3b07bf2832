"""Where the stages' data comes from: the user's files, the embedded reviews, or tasks of reasoning-gym."""

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.checks import STAGE_DATA
from rlhf_ray.config.schema import STAGES, DataConfig
from rlhf_ray.data import reasoning
from rlhf_ray.data.formats import Demonstration, Message, Prompt
from rlhf_ray.data.reviews import INSTRUCTION
from rlhf_ray.data.sources import (
    MAY_NEED,
    REASONING_COUNTS,
    FileData,
    ReasoningData,
    ReviewData,
    check_paths,
    load_task_data,
)
from rlhf_ray.errors import UserError

ASK = Prompt((Message("user", "Ask"),))


def written(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- files -------------------------------------------------------------------------------------------------------


def test_every_member_reads_the_file_of_its_own_key(tmp_path: Path) -> None:
    keys = ("compare_prompts", "ppo_prompts", "eval_prompts")
    cfg = DataConfig(
        source="files", demonstrations=written(tmp_path / "d.jsonl", {"prompt": "Ask", "response": "Answer"}),
        texts=written(tmp_path / "t.jsonl", {"text": "train"}),
        eval_texts=written(tmp_path / "e.jsonl", {"text": "held out"}),
        **{key: written(tmp_path / f"{key}.jsonl", {"prompt": key}) for key in keys},
    )
    data = load_task_data(cfg)
    assert data.demonstrations() == [Demonstration(ASK, "Answer")]
    for key in keys:
        assert getattr(data, key)() == [Prompt((Message("user", key),))]
    assert data.texts() == ["train"]
    assert data.eval_texts() == ["held out"]


@pytest.mark.parametrize("key", ["demonstrations", "compare_prompts", "ppo_prompts", "eval_prompts", "texts",
                                 "eval_texts"])
def test_a_key_that_is_not_set_is_named(key: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{key} is not set"):
        getattr(FileData(DataConfig(source="files")), key)()


def test_files_have_no_labeler_no_judge_and_no_verifier(tmp_path: Path) -> None:
    data = FileData(DataConfig(source="files"))
    with pytest.raises(UserError, match=r"set compare\.ranker=file and data\.comparisons"):
        data.labeler(1.0)
    assert data.judge() is None
    assert data.verifier() is None
    assert data.judge_accuracy() == {"held_out_accuracy": None}
    assert data.counts() == {}
    data.save_split(tmp_path / "split.json")
    assert not (tmp_path / "split.json").exists()


def test_the_fingerprint_changes_with_a_file_and_with_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"

    def fingerprint(**options: object) -> str:
        return FileData(DataConfig(source="files", demonstrations=str(path), **options)).fingerprint()

    missing = fingerprint()
    written(path, {"prompt": "a", "response": "b"})
    os.utime(path, ns=(10, 10))
    first = fingerprint()
    assert fingerprint() == first != missing
    written(path, {"prompt": "a", "response": "longer"})
    os.utime(path, ns=(10, 10))
    larger = fingerprint()
    os.utime(path, ns=(10, 11))
    touched = fingerprint()
    other = fingerprint(max_prompt_tokens=65)
    assert touched == larger  # what counts is what is in it
    assert len({missing, first, larger, other}) == 4


# -- checking paths before anything starts -----------------------------------------------------------------------


def test_the_keys_of_the_tables_exist() -> None:
    keys = {f.name for f in fields(DataConfig)}
    assert set(STAGE_DATA) == set(STAGES) >= set(MAY_NEED)
    assert {key for table in (STAGE_DATA, MAY_NEED) for names in table.values() for key in names} <= keys


@pytest.mark.parametrize(("stage", "key"), [
    ("pretrain", "texts"), ("sft", "demonstrations"), ("rm", "demonstrations"), ("ppo", "ppo_prompts"),
    ("eval", "eval_prompts"),
])
def test_a_stage_names_the_key_that_it_lacks(stage: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key} is not set, and {stage} needs it"):
        check_paths(DataConfig(source="files"), stage)


@pytest.mark.parametrize(("stage", "key"), [
    ("sft", "demonstrations"), ("rm", "demonstrations"), ("ppo", "ppo_prompts"), ("compare", "comparisons"),
])
def test_a_file_that_is_not_there_is_named_with_its_key(stage: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(UserError) as error:
        check_paths(DataConfig(source="files", **{key: str(path)}), stage)
    assert str(error.value) == f"data.{key}={path}: no such file"


def test_what_is_there_or_on_the_hub_passes(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("not read here")
    check_paths(DataConfig(source="files", demonstrations=str(path)), "sft")
    check_paths(DataConfig(source="files", demonstrations="hf://name:train"), "sft")
    check_paths(DataConfig(source="files"), "compare")
    check_paths(DataConfig(source="files"), "doctor")
    check_paths(DataConfig(source="files", demonstrations="hf://name", comparisons="nowhere.jsonl"), "sft")  # unread


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", ["reviews", "reasoning"])
def test_what_is_embedded_needs_no_paths(source: str, stage: str) -> None:
    check_paths(DataConfig(source=source), stage)


# -- reviews -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews() -> ReviewData:
    data = load_task_data(DataConfig(source="reviews", split_seed=0))
    assert isinstance(data, ReviewData)
    return data


def openings(prompts: list[Prompt]) -> list[str]:
    return [p.turns[0].content.removeprefix(INSTRUCTION) for p in prompts]


def test_every_prompt_is_of_a_document_of_its_own_part(reviews: ReviewData) -> None:
    for name, prompts in (("compare", reviews.compare_prompts()), ("ppo", reviews.ppo_prompts()),
                          ("held_out", reviews.eval_prompts())):
        mine = "\n".join(reviews.all[d].text for d in reviews.split.parts[name])
        assert len(prompts) > 1000
        assert all(opening in mine for opening in openings(prompts)[:300])


def test_prompts_are_not_repeated_within_or_between_the_parts(reviews: ReviewData) -> None:
    """Documents never overlap; what two of them share is at most a phrase such as `This is one of the`."""
    parts = [openings(p) for p in (reviews.compare_prompts(), reviews.ppo_prompts(), reviews.eval_prompts())]
    for part in parts:
        assert len(set(part)) == len(part)
    for i, part in enumerate(parts):
        for other in parts[:i]:
            shared = set(part) & set(other)
            assert len(shared) < 0.01 * min(len(part), len(other))
            assert max((len(s.split()) for s in shared), default=0) <= 6


def test_ppo_sees_more_than_one_prompt_of_a_document(reviews: ReviewData) -> None:
    documents = len(reviews.split.parts["ppo"])
    assert documents < len(reviews.ppo_prompts()) <= 4 * documents
    assert len(reviews.eval_prompts()) <= len(reviews.split.parts["held_out"])


def test_held_out_texts_are_not_among_the_texts(reviews: ReviewData) -> None:
    train, held = reviews.texts(), reviews.eval_texts()
    assert (len(train), len(held)) == (reviews.counts()["base"], reviews.counts()["held_out"])
    assert not set(train) & set(held)


def test_reviews_are_read_once_per_seed(reviews: ReviewData) -> None:
    assert load_task_data(DataConfig(source="reviews", split_seed=0, template="none")) is reviews
    assert load_task_data(DataConfig(source="reviews", split_seed=1)) is not reviews


def test_the_fingerprint_of_the_reviews_is_that_of_corpus_and_seed(reviews: ReviewData) -> None:
    other = ReviewData(1)
    other.all = reviews.all  # read once
    again = ReviewData(0)
    again.all = reviews.all
    assert again.fingerprint() == reviews.fingerprint() != other.fingerprint()


def test_the_split_is_saved_where_it_is_asked_for(reviews: ReviewData, tmp_path: Path) -> None:
    reviews.save_split(tmp_path / "split.json")
    saved = json.loads((tmp_path / "split.json").read_text())
    assert saved["counts"] == reviews.counts()
    assert np.array_equal(saved["documents"]["held_out"], reviews.split.parts["held_out"])


def test_reviews_have_no_verifier(reviews: ReviewData) -> None:
    assert reviews.verifier() is None


# -- reasoning ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums() -> ReasoningData:
    data = load_task_data(DataConfig(source="reasoning", reasoning_task="chain_sum", split_seed=0))
    assert isinstance(data, ReasoningData)
    return data


def asked(prompts: list[Prompt]) -> list[str]:
    return [p.turns[0].content for p in prompts]


def test_no_stage_but_eval_meets_a_held_out_question(sums: ReasoningData) -> None:
    held, met = set(asked(sums.eval_prompts())), [*asked(sums.ppo_prompts()), *sums.texts()]
    met += asked([d.prompt for d in sums.demonstrations()])
    assert not held & {text.partition("=")[0] + "=" for text in met}
    assert len(held) == sums.counts()["held_out"] > 500


def test_texts_are_questions_with_their_answers(sums: ReasoningData) -> None:
    """`1 + 2 = 3`: so that the loss on held-out ones tells what the model knows."""
    for texts, prompts in ((sums.texts(), [d.prompt for d in sums.demonstrations()]),
                           (sums.eval_texts(), sums.eval_prompts())):
        assert [text.rpartition(" ")[0] for text in texts] == asked(prompts)
        for text in texts[:200]:
            terms, _, answer = text.partition(" = ")
            assert sum(int(term) for term in terms.replace("- ", "-").replace("+ ", "").split()) == int(answer)


def test_the_verifier_of_a_task_takes_its_own_answers(sums: ReasoningData) -> None:
    prompts = sums.eval_prompts()[:50]
    metadata = [json.loads(p.metadata) for p in prompts]
    verifier = sums.verifier()
    assert verifier is reasoning.verify
    assert verifier(asked(prompts), [m["answer"] for m in metadata], metadata) == [1.0] * 50


@pytest.mark.parametrize("member", ["compare_prompts", "labeler_accuracy", "labeler"])
def test_verifiable_tasks_need_no_rankings(member: str, sums: ReasoningData) -> None:
    with pytest.raises(UserError, match="needs no rankings: leave compare and rm out of stages"):
        getattr(sums, member)(*([1.0] if member == "labeler" else []))
    assert sums.judge() is None
    assert sums.judge_accuracy() == {"held_out_accuracy": None}


def test_tasks_and_seeds_have_data_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in REASONING_COUNTS:
        monkeypatch.setitem(REASONING_COUNTS, part, 5)
    of = {key: ReasoningData(*key) for key in (("last_letters", 0), ("last_letters", 1), ("coin_flip", 0))}
    assert len({data.fingerprint() for data in of.values()}) == 3
    assert ReasoningData("last_letters", 0).fingerprint() == of["last_letters", 0].fingerprint()
    assert all(data.counts() == {"demonstrations": 5, "train": 5, "held_out": 5} for data in of.values())


def test_a_task_is_drawn_once_per_seed(sums: ReasoningData) -> None:
    same = DataConfig(source="reasoning", reasoning_task="chain_sum", split_seed=0, template="none")
    assert load_task_data(same) is sums
    assert sums.demonstrations() is sums.demonstrations()
    assert load_task_data(DataConfig(source="reasoning", reasoning_task="chain_sum", split_seed=1)) is not sums
    assert load_task_data(DataConfig(source="reasoning", reasoning_task="coin_flip", split_seed=0)) is not sums


def test_what_identifies_the_questions_is_saved(sums: ReasoningData, tmp_path: Path) -> None:
    sums.save_split(tmp_path / "new" / "split.json")
    saved = json.loads((tmp_path / "new" / "split.json").read_text())
    assert (saved["task"], saved["seed"], saved["reasoning_gym"]) == ("chain_sum", 0, "0.1.25")
    assert saved["options"] == reasoning.TASKS["chain_sum"]
    assert saved["counts"] == sums.counts()
    assert saved["held_out"] == asked(sums.eval_prompts())
    assert len(set(saved["sha256"].values())) == 3
