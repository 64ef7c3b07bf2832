"""Users' data: demonstrations, comparisons, prompts and plain text from JSONL, Parquet or the Hugging Face hub.

Every problem is one UserError that names file, line, key, and what is expected there.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray import disk
from rlhf_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Prompt:
    """What the model is asked. input: the optional second field of Alpaca-style data.

    metadata: what a reward source may know of the prompt and the model may not, such as the right answer: a JSON object
    as text, which hashes, with sorted keys, or "".
    """

    turns: Turns
    input: str | None = None
    metadata: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that people want."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Comparison:
    """Ranked responses: ranks[i] belongs to responses[i]; 1 is best, equal numbers are a tie."""

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    labeler: str


# -- reading -----------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line that is not blank."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)  # some editors write one
            try:
                line = raw.decode("utf-8")
                row = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            if row is None:
                continue
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.startswith("hf://"):
        from datasets import load_dataset

        name, _, split = source.removeprefix("hf://").partition(":")
        try:
            data = load_dataset(name, split=split or "train")
        except Exception as error:  # the hub has many ways to fail; all of them are the user's to mend
            raise UserError(f"cannot load the dataset {source}: {_first_line(error)}") from error
        yield from ((f"{source} row {i}", dict(row)) for i, row in enumerate(data))
    elif source.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(source).is_file():
            raise UserError(f"{source} does not exist")
        try:
            rows = pq.read_table(source).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{source}: not a Parquet file ({_first_line(error)})") from error
        yield from ((f"{source} row {i}", row) for i, row in enumerate(rows))
    elif source.endswith(".jsonl"):
        yield from read_jsonl(source)
    else:
        raise UserError(f"{source}: expected a .jsonl or .parquet file, or hf://NAME[:SPLIT]")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read(source: str, parse: Callable[[str, dict[str, Any]], T]) -> list[T]:
    items = [parse(where, row) for where, row in _rows(source)]
    if not items:
        raise UserError(f"{source} is empty: expected at least one row")
    return items


def read_demonstrations(source: str) -> list[Demonstration]:
    """Rows with `prompt` and `response`, with `instruction`, `input`, `output`, or with chat `messages`."""
    return _read(source, _demonstration)


def read_comparisons(source: str) -> list[Comparison]:
    """Rows with `prompt`, `responses` (two or more), `ranks` (1 is best, equal is a tie) and `labeler`.

    The prompt is given in any of the forms that `read_prompts` takes.
    """
    return _read(source, _comparison)


def read_prompts(source: str) -> list[Prompt]:
    """Rows with `prompt`, with `instruction` and `input`, or with `messages` that end with the user.

    Any of them may have `metadata`, an object.
    """
    return _read(source, _prompt)


def read_texts(source: str) -> list[str]:
    """Rows with `text`; or a .txt file whose documents are parted by blank lines."""
    if not source.endswith(".txt"):
        return _read(source, lambda where, row: _string(where, row, "text"))
    if not Path(source).is_file():
        raise UserError(f"{source} does not exist")
    raw = Path(source).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 ({error.reason})") from error
    # Lines end in \n or \r\n, and a blank line may hold spaces.
    documents = [d.strip() for d in re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))]
    documents = [d for d in documents if d]
    if not documents:
        raise UserError(f"{source} is empty: expected at least one document")
    return documents


# -- one row -----------------------------------------------------------------------------------------------------


def _string(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `{key}` must be a string that is not empty, got {value!r:.60}")
    return _encodable(where, key, value)


def _encodable(where: str, key: str, value: str) -> str:
    """JSON may hold half of a surrogate pair, which no tokenizer takes."""
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: `{key}` holds half of a surrogate pair, which is no character")
    return value


def _messages(where: str, row: dict[str, Any], last: str) -> Turns:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list that is not empty")
    turns = []
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: `messages[{i}]` needs a role of system, user or assistant")
        turns.append(Message(m["role"], _string(f"{where}: messages[{i}]", m, "content")))
    if turns[-1].role != last:
        raise UserError(f"{where}: the last of `messages` must be from the {last}, got {turns[-1].role}")
    return tuple(turns)


def _metadata(where: str, row: dict[str, Any]) -> str:
    value = row.get("metadata")
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise UserError(f'{where}: `metadata` must be an object such as {{"answer": "7"}}, got {value!r:.60}')
    try:
        return _encodable(where, "metadata", canonical_json(value))
    except (TypeError, ValueError) as error:  # a Parquet file may hold dates, and Python reads NaN from JSON
        raise UserError(f"{where}: `metadata` holds what JSON has no form for: {_first_line(error)}") from error


def _prompt(where: str, row: dict[str, Any]) -> Prompt:
    return replace(_asked(where, row), metadata=_metadata(where, row))


def _asked(where: str, row: dict[str, Any]) -> Prompt:
    if row.get("messages") is not None:
        return Prompt(_messages(where, row, "user"))
    if isinstance(row.get("prompt"), list):
        return Prompt(_messages(where, {"messages": row["prompt"]}, "user"))
    key = "prompt" if row.get("instruction") is None else "instruction"
    extra = row.get("input") or None
    if extra is not None and not isinstance(extra, str):
        raise UserError(f"{where}: `input` must be a string, got {extra!r:.60}")
    return Prompt((Message("user", _string(where, row, key)),), extra)


def _demonstration(where: str, row: dict[str, Any]) -> Demonstration:
    if row.get("messages") is not None:  # a Parquet column may be there and null
        turns = _messages(where, row, "assistant")
        if len(turns) < 2 or turns[-2].role != "user":
            raise UserError(f"{where}: `messages` needs a user's message before the last one, the assistant's")
        return Demonstration(Prompt(turns[:-1]), turns[-1].content)
    key = "response" if row.get("output") is None else "output"
    return Demonstration(_asked(where, row), _string(where, row, key))


def _comparison(where: str, row: dict[str, Any]) -> Comparison:
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{where}: `responses` must be a list of strings")
    if len(responses) < 2:
        raise UserError(f"{where}: `responses` needs at least two responses, got {len(responses)}")
    if not isinstance(ranks, list) or not all(type(r) is int and r >= 1 for r in ranks):
        raise UserError(f"{where}: `ranks` must be a list of whole numbers from 1 (best) on, got {ranks!r:.60}")
    if len(ranks) != len(responses):
        raise UserError(f"{where}: {len(responses)} `responses` but {len(ranks)} `ranks`: one rank for each response")
    labeler = "unknown" if row.get("labeler") is None else _string(where, row, "labeler")
    for r in responses:  # these may be empty: a model may say nothing
        _encodable(where, "responses", r)
    return Comparison(_prompt(where, row), tuple(responses), tuple(ranks), labeler)


# -- writing -----------------------------------------------------------------------------------------------------


def canonical_json(value: dict[str, Any]) -> str:
    """The one text of an object: sorted keys, no spaces. Raises TypeError or ValueError if JSON has no form for it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def comparison_row(c: Comparison) -> dict[str, Any]:
    """The row that `read_comparisons` reads back as `c`."""
    if len(c.prompt.turns) == 1 and c.prompt.turns[0].role == "user":
        prompt: Any = c.prompt.turns[0].content
    else:
        prompt = [{"role": m.role, "content": m.content} for m in c.prompt.turns]
    extra: dict[str, Any] = {"input": c.prompt.input} if c.prompt.input else {}
    if c.prompt.metadata:
        extra["metadata"] = json.loads(c.prompt.metadata)
    return {"prompt": prompt, **extra, "responses": list(c.responses), "ranks": list(c.ranks), "labeler": c.labeler}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows, or nothing. Raises UserError."""
    disk.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
