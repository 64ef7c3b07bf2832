"""When a checkpoint is copied, written and there: `Saver` of train/recovery.py."""

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.errors import UserError
from train.fakes import Script

SNAPSHOT = ["snapshot policy-0", "snapshot policy-1", "snapshot critic-0"]


def writing(step: int) -> list[str]:
    return [f"write {name} .step-0000000{step}.tmp" for name in ("policy-0", "policy-1", "critic-0")]


def newest(script: Script) -> tuple[int, dict[str, int]] | None:
    found = script.checkpoints.newest()
    return found and (found.step, found.state)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, monkeypatch)


def test_all_copy_before_one_writes_and_it_is_there_when_all_have_written(script: Script) -> None:
    script.saver.save(1, {"kl": 5}, {"score": 0.5})
    assert script.notes == [*SNAPSHOT, *writing(1)]
    assert script.saver.saved == 1
    script.slow = True
    script.saver.poll()
    assert not (script.checkpoints.directory / "step-00000001").exists()
    script.slow = False
    script.saver.poll()
    assert newest(script) == (1, {"kl": 5})


def test_one_is_finished_before_the_next_begins(script: Script) -> None:
    script.slow = True
    script.saver.save(1, {}, {})
    script.saver.save(2, {}, {})
    assert [p.name for p in sorted(script.checkpoints.directory.iterdir())] == [".step-00000002.tmp", "step-00000001"]
    script.saver.finish()
    assert newest(script) == (2, {})


def test_with_nothing_to_do_nothing_is_done(script: Script) -> None:
    script.saver.poll()
    script.saver.finish()
    assert (script.notes, script.saver.saved) == ([], 0)


def test_one_that_fails_is_no_checkpoint_and_may_be_saved_again(script: Script) -> None:
    script.saver.save(1, {}, {})
    script.errors["write"] = [ActorDiedError()]
    with pytest.raises(ActorDiedError):
        script.saver.finish()
    assert list(script.checkpoints.directory.iterdir()) == [] and script.saver.saved == 0
    script.saver.finish()  # it was raised once
    script.saver.save(1, {}, {})
    script.saver.finish()
    assert newest(script) == (1, {})


def test_what_cannot_be_copied_was_not_saved(script: Script) -> None:
    script.saved(1).errors["snapshot"] = [ActorDiedError()]
    with pytest.raises(ActorDiedError):
        script.saver.save(2, {}, {})
    assert script.saver.saved == 1 and newest(script) == (1, {"step": 1})


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError("writing did not answer within 1 s")])
def test_giving_up_drops_what_the_lost_cannot_finish(script: Script, error: Exception) -> None:
    script.saved(1).saver.save(2, {}, {})
    script.errors["write"] = [error]
    script.saver.give_up()
    assert newest(script) == (1, {"step": 1})


def test_giving_up_finishes_what_can_be_and_tells_of_a_full_disk(script: Script) -> None:
    script.saver.save(1, {}, {})
    script.saver.give_up()
    assert newest(script) == (1, {})
    script.saver.save(2, {}, {})
    script.errors["write"] = [UserError("disk full")]
    with pytest.raises(UserError, match="disk full"):
        script.saver.give_up()
