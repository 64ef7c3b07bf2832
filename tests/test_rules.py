"""The table of rules in tests/README.md names tests that exist, one or more for each of the 45 rules."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_rule_is_there_once() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 46))


@pytest.mark.parametrize(("number", "tests"), [(number, tests) for number, _, tests in ROWS])
def test_its_tests_exist(number: str, tests: str) -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", tests)
    assert named, f"rule {number} names no test"
    for file, name in named:
        source = (HERE / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(" if name else r"^def test_", source, re.MULTILINE), f"{file}::{name}"
