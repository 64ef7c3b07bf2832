"""What is done, and in which order, when actors are lost."""

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from rlhf_ray.errors import UserError
from train.fakes import Script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, monkeypatch, attempts=2)


RESTORE_3 = [f"restore {name} step-00000003" for name in ("policy-0", "policy-1", "critic-0")]


# -- who goes back -----------------------------------------------------------------------------------------------------


def test_a_lost_scorer_is_replaced_and_nobody_goes_back(script: Script) -> None:
    assert script.saved(3).heal("reward-0") is False
    assert script.notes == ["replace reward-0", "ready", "connect"]
    assert script.recovery.restarts == {"reward": 1}


def test_a_lost_learner_sets_its_group_up_anew_and_takes_all_learners_back(script: Script) -> None:
    assert script.saved(3).heal("policy-1") is True
    assert script.notes == ["replace policy-1, to be set up with its group", "set up policy", "ready", *RESTORE_3,
                            "roll back to 3", "connect"]
    (first, a), (second, b) = script.arguments["policy"]  # new ranks that meet anew, the rest as before
    assert [(r.rank, r.world_size, r.master_address, r.master_port) for r in (first, second)] == [
        (0, 2, "10.0.0.3", 1234), (1, 2, "10.0.0.3", 1234)]
    assert (a, b) == ("a", "b") and script.arguments["critic"] == [("rank 0", "c")]
    assert script.recovery.settled


def test_a_learner_that_waits_for_a_lost_one_is_replaced_too(script: Script) -> None:
    script.saved(3).waiting = ["policy-0", "critic-0"]  # nobody of the critic's own group is lost
    assert script.heal("policy-1") is True
    assert script.notes[:3] == ["replace policy-1, to be set up with its group",
                                "replace policy-0, to be set up with its group", "set up policy"]
    assert script.recovery.restarts == {"policy": 2}


def test_without_a_checkpoint_all_learners_begin_again(script: Script) -> None:
    assert script.heal("critic-0") is True
    assert script.notes == ["replace critic-0, to be set up with its group", "set up policy", "set up critic", "ready",
                            "roll back to the start", "connect"]


def test_a_loss_in_the_middle_of_an_update_takes_the_learners_back(script: Script) -> None:
    script.recovery.updating = True
    assert not script.recovery.settled
    assert script.saved(3).heal("reward-0") is True
    assert script.notes == ["replace reward-0", "ready", *RESTORE_3, "roll back to 3", "connect"]
    assert script.recovery.settled


@pytest.mark.parametrize(("gone", "back"), [("generator-0", False), ("policy-0", True)])
def test_learners_that_are_done_with_their_update_go_back_only_if_one_of_them_is_lost(
    script: Script, gone: str, back: bool
) -> None:
    script.recovery.updating = True
    assert script.saved(3).heal(gone, updated=True) is back
    assert ("roll back to 3" in script.notes) is back
    assert script.recovery.settled is back  # else the caller still has the iteration to end


def test_lost_objects_without_a_lost_actor_are_made_again(script: Script) -> None:
    assert script.heal() is False
    assert script.notes == ["ready", "connect"]


# -- what is not healed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad number"), UserError("reward: NaN")])
def test_an_error_that_no_loss_explains_is_raised_as_it_is(script: Script, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        script.heal(error=error)
    assert caught.value is error and script.notes == []


def test_what_the_user_has_to_mend_is_raised_even_where_actors_are_gone(script: Script) -> None:
    with pytest.raises(UserError, match="disk full"):
        script.heal("reward-0", error=UserError("disk full"))
    assert script.notes == []


def test_an_error_that_follows_from_a_loss_is_healed(script: Script) -> None:
    """A living rank says that its neighbour closed the connection."""
    assert script.saved(3).heal("policy-1", error=RuntimeError("connection closed by peer")) is True


def test_when_the_attempts_are_used_up_the_error_itself_is_raised(script: Script) -> None:
    last = ActorDiedError()
    script.heal("reward-0")
    script.heal("reward-0")
    with pytest.raises(ActorDiedError) as caught:
        script.heal("reward-0", error=last)
    assert caught.value is last and script.notes == []


def test_an_iteration_that_is_done_gives_the_attempts_back(script: Script) -> None:
    for step in range(1, 6):
        script.heal("reward-0")
        script.recovery.succeeded(step)
    assert script.recovery.restarts == {"reward": 5}


def test_but_not_one_that_was_done_before(script: Script) -> None:
    """What dies again and again after going back would otherwise never come to an end."""
    script.recovery.succeeded(3)
    with pytest.raises(ActorDiedError):
        for step in (1, 2, 3):
            script.heal("reward-0")
            script.recovery.succeeded(step)


def test_a_loss_during_the_rebuild_is_healed_too(script: Script) -> None:
    """First the reward model alone; while it comes up, a learner goes: now the learners go back."""
    script.saved(3).errors["ready"], script.losses = [ActorDiedError()], [["policy-0"]]
    assert script.heal("reward-0") is True
    assert script.notes == ["replace reward-0", "ready", "replace policy-0, to be set up with its group",
                            "set up policy", "ready", *RESTORE_3, "roll back to 3", "connect"]


def test_a_rebuild_that_failed_without_a_word_is_tried_again(script: Script) -> None:
    script.errors["ready"] = [RuntimeError()]
    assert script.heal("reward-0") is False
    assert script.notes == ["replace reward-0", "ready", "ready", "connect"]


def test_a_rebuild_that_was_cut_short_is_done_whole(script: Script) -> None:
    """A learner is lost, and while it comes up a reward model: the learners' group is still to be set up."""
    script.saved(3).errors["ready"], script.losses = [ActorDiedError()], [["reward-0"]]
    assert script.heal("policy-0") is True
    assert script.notes[3:] == ["replace reward-0", "set up policy", "ready", *RESTORE_3, "roll back to 3", "connect"]


def test_losses_during_the_rebuild_use_the_attempts_up(script: Script) -> None:
    errors = [ActorDiedError() for _ in range(2)]
    script.errors["ready"], script.losses = list(errors), [["reward-0"], ["reward-0"]]
    with pytest.raises(ActorDiedError) as caught:
        script.heal("reward-0")
    assert caught.value is errors[1]


# -- a checkpoint that is being written --------------------------------------------------------------------------------


def test_a_checkpoint_whose_writers_live_is_finished_and_gone_back_to(script: Script) -> None:
    script.saved(3).saver.save(4, {}, {})
    script.heal("critic-0")
    assert "roll back to 4" in script.notes


def test_a_checkpoint_whose_writer_was_lost_is_dropped(script: Script) -> None:
    script.saved(3).saver.save(4, {}, {})
    script.errors["write"] = [ActorDiedError()]
    script.heal("critic-0")
    assert "roll back to 3" in script.notes and script.saver.saved == 3
