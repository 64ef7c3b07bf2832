"""When a checkpoint is copied, written and there: `Saver` of train/recovery.py."""

import time
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.errors import UserError
from rlhf_ray.train import recovery
from train.fakes import Script


def asked(what: str, step: int) -> list[str]:
    return [f"{what} {name} .step-0000000{step}.tmp" for name in ("policy-0", "policy-1", "critic-0")]


def newest(script: Script) -> tuple[int, dict[str, int]] | None:
    found = script.checkpoints.newest()
    return found and (found.step, found.state)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, monkeypatch)


def test_all_copy_before_one_writes_and_it_is_there_when_all_have_written(script: Script) -> None:
    """Whatever the loop is at then, a pause of hours, say: nobody has to ask."""
    script.written.clear()
    script.saver.save(1, {"kl": 5}, {"score": 0.5})
    assert script.notes == [*asked("snapshot", 1), *asked("write", 1)]
    assert script.saver.saved == 1
    script.saver.poll()  # it does not wait
    directory = script.checkpoints.directory / "step-00000001"
    assert not directory.exists()
    script.written.set()
    deadline = time.monotonic() + 10
    while not directory.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    script.saver.finish()
    assert newest(script) == (1, {"kl": 5})


def test_one_is_finished_before_the_next_begins(script: Script) -> None:
    script.saver.save(1, {}, {})
    script.saver.save(2, {}, {})
    script.saver.finish()
    script.written.clear()
    script.saver.save(3, {}, {})
    assert [p.name for p in sorted(script.checkpoints.directory.iterdir())] == [
        ".step-00000003.tmp", "step-00000001", "step-00000002"]
    script.written.set()
    script.saver.finish()
    assert newest(script) == (3, {})


def test_what_went_wrong_is_told_as_soon_as_somebody_looks(script: Script) -> None:
    script.errors["write"] = [UserError("disk full")]
    script.saver.save(1, {}, {})
    with pytest.raises(UserError, match="disk full"):
        for _ in range(1000):
            script.saver.poll()
            time.sleep(0.01)
    script.saver.poll()  # once


def test_without_a_file_of_every_rank_it_is_no_checkpoint(script: Script) -> None:
    """All that is there was announced, and yet a rank could never be restored from it."""
    script.silent = ["policy-1"]
    script.saver.save(1, {}, {})
    with pytest.raises(RuntimeError, match=r"checkpoint 1 lacks policy-00001-of-00002\.safetensors"):
        script.saver.finish()
    assert list(script.checkpoints.directory.iterdir()) == []


def test_who_is_interrupted_while_waiting_for_it_can_wait_again(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it is being written: it is finished before the run ends."""
    script.saver.save(1, {}, {})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recovery, "wait_for", interrupted)
        script.saver.finish()
    script.saver.last(lambda: None)
    assert newest(script) == (1, {})


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_with_nothing_to_do_nothing_is_done(script: Script) -> None:
    script.saver.poll()
    script.saver.finish()
    assert (script.notes, script.saver.saved) == ([], 0)


def test_one_that_fails_is_no_checkpoint_and_may_be_saved_again(script: Script) -> None:
    script.errors["write"] = [ActorDiedError()]
    script.saver.save(1, {}, {})
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
    script.saved(1).errors["write"] = [error]
    script.saver.save(2, {}, {})
    script.saver.give_up()
    assert newest(script) == (1, {"step": 1})


def test_giving_up_finishes_what_can_be_and_tells_of_a_full_disk(script: Script) -> None:
    script.saver.save(1, {}, {})
    script.saver.give_up()
    assert newest(script) == (1, {})
    script.errors["write"] = [UserError("disk full")]
    script.saver.save(2, {}, {})
    with pytest.raises(UserError, match="disk full"):
        script.saver.give_up()
