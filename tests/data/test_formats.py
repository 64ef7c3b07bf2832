"""Users' files: what is read, and that every problem names the file, the line and the key."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.data.formats import (
    Comparison,
    Demonstration,
    Message,
    Prompt,
    comparison_row,
    read_comparisons,
    read_demonstrations,
    read_jsonl,
    read_prompts,
    read_texts,
    write_jsonl,
)
from rlhf_ray.errors import UserError

ASK = Prompt((Message("user", "Ask"),))


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("row", "wanted"), [
    ({"prompt": "Ask", "response": "Answer"}, Demonstration(ASK, "Answer")),
    ({"instruction": "Ask", "input": "with this", "output": "Answer"},
     Demonstration(Prompt(ASK.turns, "with this"), "Answer")),
    ({"instruction": "Ask", "input": "", "output": "Answer"}, Demonstration(ASK, "Answer")),
    ({"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Ask"},
                   {"role": "assistant", "content": "Answer"}]},
     Demonstration(Prompt((Message("system", "Be brief"), Message("user", "Ask"))), "Answer")),
])
def test_demonstrations_in_every_form(row: dict[str, Any], wanted: Demonstration, tmp_path: Path) -> None:
    assert read_demonstrations(lines(tmp_path / "d.jsonl", row)) == [wanted]


def test_prompts_are_text_or_messages_that_end_with_the_user(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "Ask"}, {"messages": [{"role": "user", "content": "Ask"}]})
    assert read_prompts(path) == [ASK, ASK]


def test_the_metadata_of_a_prompt_is_kept_as_one_text_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", '{"prompt": "Ask", "metadata": {"b": [1, null], "a": {"d": "ö", "c": true}}}',
                 '{"messages": [{"role": "user", "content": "Ask"}], "metadata": {"a": {"c": true, "d": "ö"}, "b": '
                 '[1, null]}}', {"prompt": "Ask", "metadata": {}}, {"prompt": "Ask", "metadata": None})
    first, second, empty, none = read_prompts(path)
    assert first.metadata == '{"a":{"c":true,"d":"ö"},"b":[1,null]}'
    assert first == second == Prompt(ASK.turns, metadata=first.metadata)
    assert {first: 1}[second] == 1  # hashes
    assert (empty.metadata, none.metadata) == ("{}", "")
    assert none == ASK != first


def test_demonstrations_leave_metadata_aside(tmp_path: Path) -> None:
    """Nothing reads theirs, and other people's data have a column of that name with anything in it."""
    path = lines(tmp_path / "d.jsonl", {"prompt": "Ask", "response": "Answer", "metadata": "from the web"})
    assert read_demonstrations(path) == [Demonstration(ASK, "Answer")]


def test_metadata_of_parquet_may_hold_what_json_does_not(tmp_path: Path) -> None:
    rows = [{"prompt": "Ask", "metadata": {"day": date(2024, 2, 29)}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet row 0: `metadata` holds what JSON has no form for: .*date"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Ask"}\r\n\n  \n{"prompt": "Ask"}')
    assert read_prompts(str(path)) == [ASK, ASK]
    assert [where for where, _ in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


def test_parquet_is_read_as_jsonl_is_and_null_columns_do_not_count(tmp_path: Path) -> None:
    rows = [{"prompt": "Ask", "response": "Answer", "messages": None, "output": None, "input": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read_demonstrations(str(tmp_path / "d.parquet")) == [Demonstration(ASK, "Answer")]


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("one\r\ntwo\r\n \r\n\r\nthrée\n".encode())
    assert read_texts(str(tmp_path / "t.txt")) == ["one\ntwo", "thrée"]
    assert read_texts(lines(tmp_path / "t.jsonl", {"text": "one"})) == ["one"]


@pytest.mark.parametrize("prompt", [
    ASK, Prompt(ASK.turns, "with this"), Prompt(ASK.turns, "with this", '{"a":[1,"ö"]}'),
    Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "c"))),
])
def test_comparisons_come_back_as_they_were_written(prompt: Prompt, tmp_path: Path) -> None:
    c = Comparison(prompt, ("good", "", "bad\nö"), (1, 1, 2), "anna")  # a model may say nothing
    write_jsonl(tmp_path / "new" / "c.jsonl", [comparison_row(c)])
    assert read_comparisons(str(tmp_path / "new" / "c.jsonl")) == [c]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n'


PAIR = {"prompt": "Ask", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(("reader", "row", "says"), [
    (read_prompts, "{", "not JSON"),
    (read_prompts, "[1]", "expected a JSON object, got list"),
    (read_prompts, {}, "`prompt` must be a string that is not empty, got None"),
    (read_prompts, {"prompt": " "}, "`prompt` must be a string that is not empty"),
    (read_prompts, {"prompt": 3}, "`prompt` must be a string"),
    (read_prompts, {"prompt": "a", "input": 3}, "`input` must be a string"),
    (read_prompts, {"prompt": "half \ud83d"}, "`prompt` holds half of a surrogate pair"),
    (read_prompts, {"prompt": "a", "metadata": "7"}, '`metadata` must be an object such as {"answer": "7"}'),
    (read_prompts, {"prompt": "a", "metadata": [{}]}, "`metadata` must be an object"),
    (read_prompts, {"prompt": "a", "metadata": 0}, "`metadata` must be an object"),
    (read_prompts, {"messages": [{"role": "user", "content": "x"}], "metadata": False}, "`metadata` must be an object"),
    (read_prompts, '{"prompt": "a", "metadata": {"x": NaN}}', "`metadata` holds what JSON has no form for"),
    (read_prompts, {"prompt": "a", "metadata": {"x": "\ud83d"}}, "`metadata` holds half of a surrogate pair"),
    (read_comparisons, PAIR | {"metadata": "7"}, "`metadata` must be an object"),
    (read_prompts, {"messages": []}, "`messages` must be a list that is not empty"),
    (read_prompts, {"messages": [{"role": "bot", "content": "x"}]}, "`messages[0]` needs a role"),
    (read_prompts, {"messages": [{"role": "assistant", "content": "x"}]}, "must be from the user, got assistant"),
    (read_demonstrations, {"prompt": "a"}, "`response` must be a string"),
    (read_demonstrations, {"prompt": "a", "response": ""}, "`response` must be a string that is not empty"),
    (read_demonstrations, {"messages": [{"role": "user", "content": "x"}]}, "must be from the assistant, got user"),
    (read_demonstrations, {"messages": [{"role": "assistant", "content": "x"}]}, "needs a user's message before"),
    (read_comparisons, PAIR | {"responses": "ab"}, "`responses` must be a list of strings"),
    (read_comparisons, PAIR | {"responses": ["a"], "ranks": [1]}, "at least two responses, got 1"),
    (read_comparisons, PAIR | {"ranks": [1]}, "2 `responses` but 1 `ranks`"),
    (read_comparisons, PAIR | {"ranks": [0, 1]}, "`ranks` must be a list of whole numbers from 1"),
    (read_comparisons, PAIR | {"ranks": [1.5, 1]}, "`ranks` must be a list of whole numbers"),
    (read_comparisons, PAIR | {"ranks": [True, 2]}, "`ranks` must be a list of whole numbers"),
    (read_comparisons, PAIR | {"labeler": 7}, "`labeler` must be a string"),
    (read_texts, {"prompt": "a"}, "`text` must be a string"),
])
def test_a_bad_line_is_named(reader: Callable[[str], list[Any]], row: object, says: str, tmp_path: Path) -> None:
    good = PAIR | {"response": "Answer", "text": "text", "labeler": "anna"}
    path = lines(tmp_path / "x.jsonl", good, "", row)
    with pytest.raises(UserError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.txt"):
        path = tmp_path / name
        path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
        with pytest.raises(UserError, match=rf"{name}:2: not UTF-8"):
            read_texts(str(path))


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.txt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist"):
        read_texts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_no_rows_at_all(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(UserError, match=f"{name} is empty"):
        read_texts(str(tmp_path / name))


def test_neither_jsonl_nor_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UserError, match=r"x\.parquet: not a Parquet file"):
        read_prompts(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"x\.csv: expected a \.jsonl or \.parquet file, or hf://"):
        read_prompts("x.csv")


def test_a_row_of_parquet_is_named_by_number(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet row 1: `prompt`"):
        read_prompts(str(tmp_path / "x.parquet"))
