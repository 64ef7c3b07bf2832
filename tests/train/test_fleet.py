"""Generators come and go at a weight sync. The actors are names here; `up` are those that have come up, `down` those
that fail while they do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster.health import Member
from rlhf_ray.train.fleet import WANTED, Fleet


class Cast:
    """Two generators work at first."""

    def __init__(self) -> None:
        self.cfg = SimpleNamespace(attempts=2)
        self.working, self.coming, self.up, self.down = {0: "g0", 1: "g1"}, dict[int, str](), set[int](), set[int]()
        self.made = 2

    def group(self, role: str) -> Any:
        return _Group(self.working)

    def seats(self, role: str) -> dict[int, bool]:
        return dict.fromkeys(self.working, True) | dict.fromkeys(self.coming, False)

    def recruit(self, role: str, i: int) -> None:
        self.coming[i] = f"g{self.made}"
        self.made += 1

    def replace(self, member: Member) -> None:
        self.down.discard(member.index)
        self.recruit(member.role, member.index)

    def enlist(self, role: str) -> list[int]:
        joined = [i for i in self.coming if i in self.up]
        self.working |= {i: self.coming.pop(i) for i in joined}
        return joined

    def fallen(self, role: str) -> list[Member]:
        return [Member(role, i, "", None, gone="died", words="why") for i in self.coming if i in self.down]

    def dismiss(self, role: str, i: int) -> None:
        self.working.pop(i, None)
        self.coming.pop(i, None)


class _Group:
    def __init__(self, working: dict[int, str]):
        self.actors = [working[i] for i in sorted(working)]

    def __len__(self) -> int:
        return len(self.actors)


@pytest.fixture
def cast() -> Cast:
    return Cast()


@pytest.fixture
def fleet(cast: Any, tmp_path: Path) -> Fleet:
    return Fleet(cast, 2, tmp_path)


def wish(directory: Path, number: object) -> None:
    (directory / WANTED).write_text(f"{number}\n")


def test_without_a_wish_all_stays(fleet: Fleet, cast: Cast) -> None:
    assert not fleet.gather()
    assert (cast.working, cast.coming) == ({0: "g0", 1: "g1"}, {})


def test_one_more_joins_at_the_sync_after_it_has_come_up(fleet: Fleet, cast: Cast, tmp_path: Path) -> None:
    wish(tmp_path, 3)
    assert not fleet.gather() and cast.coming == {2: "g2"}
    assert not fleet.gather()
    cast.up = {2}
    assert fleet.gather() and list(cast.working) == [0, 1, 2]
    assert not fleet.gather()


def test_one_fewer_leaves_and_the_first_stays(fleet: Fleet, cast: Cast, tmp_path: Path) -> None:
    wish(tmp_path, 1)
    assert fleet.gather() and cast.working == {0: "g0"}
    wish(tmp_path, 0)
    assert not fleet.gather() and fleet.wanted == 1


def test_who_is_still_coming_up_leaves_first_and_the_last_that_works_never(fleet: Fleet, cast: Cast, tmp_path: Path
                                                                           ) -> None:
    cast.working, cast.coming = {1: "g1"}, {0: "g2"}
    wish(tmp_path, 1)
    assert not fleet.gather()
    assert (cast.working, cast.coming) == ({1: "g1"}, {})


def test_one_that_was_lost_is_back_in_its_place(fleet: Fleet, cast: Cast) -> None:
    cast.working, cast.coming, cast.up = {1: "g1"}, {0: "g2"}, {0}
    assert fleet.gather() and cast.group("generator").actors == ["g2", "g1"]


def test_who_cannot_come_up_is_tried_attempts_times_and_the_run_goes_on_without(
    fleet: Fleet, cast: Cast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish(tmp_path, 3)
    fleet.gather()
    for _ in range(4):
        cast.down = {2}
        assert not fleet.gather()
    assert cast.made == 5 and not cast.coming  # the first and two more
    assert "why" in capsys.readouterr().out
    wish(tmp_path, 4)
    fleet.gather()
    assert list(cast.coming) == [2, 3]


def test_a_wish_that_cannot_be_read_changes_nothing(fleet: Fleet, cast: Cast, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    wish(tmp_path, "many")
    assert not fleet.gather() and fleet.wanted == 2
    assert "unreadable" in capsys.readouterr().out


def test_a_checkpoint_knows_how_many_were_wanted(fleet: Fleet, cast: Cast) -> None:
    fleet.load_state_dict({"wanted": 3})
    fleet.gather()
    assert fleet.state_dict() == {"wanted": 3} and list(cast.coming) == [2]
