"""The journal of finished parts: what a kill leaves behind is used, and nothing else is."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.data.journal import Journal
from rlhf_ray.errors import UserError

HEADER = {"prompts": "abc", "per_prompt": 2, "temperature": 0.1, "seed": 3, "model": "naïve"}
PARTS = {
    4: [np.array([1, 2, 3], np.int32), np.array([], np.int32)],  # parts finish in any order; a response may be empty
    0: [np.array([2**31 - 1], np.int32), np.array([0], np.int32)],
}


def written(path: Path) -> bytes:
    with Journal(path, HEADER) as journal:
        for first, responses in PARTS.items():
            journal.add(first, responses)
    return path.read_bytes()


def plain(parts: dict[int, list[np.ndarray]]) -> dict[int, list[list[int]]]:
    assert all(r.dtype == np.int32 and r.ndim == 1 for responses in parts.values() for r in responses)
    return {first: [r.tolist() for r in responses] for first, responses in parts.items()}


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "answers.jsonl"  # the directory is made
    before = written(path)
    with Journal(path, dict(reversed(HEADER.items()))) as journal:
        assert plain(journal.parts) == plain(PARTS)
    assert path.read_bytes() == before


def test_a_part_is_on_disk_and_known_as_soon_as_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path, HEADER) as journal:
        assert journal.parts == {}
        assert len(path.read_bytes().splitlines()) == 1
        journal.add(0, PARTS[0])
        assert plain(journal.parts) == plain({0: PARTS[0]})
        assert json.loads(path.read_bytes().splitlines()[1]) == {"first": 0, "ids": [[2**31 - 1], [0]]}


def test_killed_at_any_byte_it_goes_on_with_the_whole_lines(tmp_path: Path) -> None:
    """After every possible torn write: the parts before are there, and the file ends as if nothing had happened."""
    path = tmp_path / "answers.jsonl"
    whole = written(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends) - 1  # the header is no part
        with Journal(path, HEADER) as journal:
            assert plain(journal.parts) == plain(dict(list(PARTS.items())[: max(kept, 0)])), size
            for first, responses in PARTS.items():
                if first not in journal.parts:
                    journal.add(first, responses)
        assert path.read_bytes() == whole, size


@pytest.mark.parametrize("change", [{"seed": 4}, {"model": "another"}, {"temperature": 0.1000001}, {"more": None}])
def test_what_was_asked_otherwise_is_not_used(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    written(path)
    with Journal(path, HEADER | change) as journal:
        assert journal.parts == {}
        journal.add(0, PARTS[0])
    with Journal(path, HEADER | change) as journal:
        assert plain(journal.parts) == plain({0: PARTS[0]})
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", [b"\n", b"null\n", b"{}\n", b"[]\n", b"\x00\x00\n", b"\xff\n",
                                  b'{"first": 8, "ids": 5}\n', b'{"first": 8, "ids": [["a"]]}\n',
                                  b'{"first": 8, "ids": [[4294967296]]}\n'])
def test_from_a_damaged_line_on_nothing_is_used(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    header, first, second = written(path).splitlines(keepends=True)
    path.write_bytes(header + first + line + second)
    with Journal(path, HEADER) as journal:
        assert plain(journal.parts) == plain({4: PARTS[4]})
    assert path.read_bytes() == header + first


def test_another_file_of_that_name_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"\x93NUMPY\x00\n\xff\n")
    assert written(path) == written(tmp_path / "fresh.jsonl")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*inside: File exists; "):
        Journal(tmp_path / "answers.jsonl" / "inside", HEADER)
