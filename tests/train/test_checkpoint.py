"""Checkpoints are whole or not there, whatever happens; a run goes on only from its own."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disks import Disk
from rlhf_ray import storage
from rlhf_ray.config.schema import CheckpointConfig, Config
from rlhf_ray.errors import UserError
from rlhf_ray.models.shards import SavedFile, Shards, write_tensors
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.identity import check_same_run, identity_of
from rlhf_ray.train.manifest import FORMAT

SHARD = "policy-00000-of-00001.safetensors"
PPO = ["seed", "model", "data", "rollout", "ppo", "roles"]  # of what stage ppo depends on


def checkpoints(directory: Path, keep_last: int = 2, best_metric: str | None = None) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(keep_last=keep_last, best_metric=best_metric), {"stage": "ppo"})


def write(directory: Path, step: int) -> list[SavedFile]:
    """What the actors do."""
    return [write_tensors(directory / f"{role}-00000-of-00001.safetensors",
                          {"w|weight": torch.full((50,), float(step))}, {"step": step})
            for role in ("policy", "critic")]


def save(c: Checkpoints, step: int, **metrics: float) -> Checkpoint:
    return c.commit(step, write(c.begin(step), step), {"step": step}, metrics)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    c = checkpoints(tmp_path / "checkpoints")
    assert c.newest() is None
    state = {"kl_coef": 0.1 + 0.2, "moments": [math.inf, -math.inf, 1e-320, 2**127], "rng": {"a": None, "ü": True}}
    c.commit(7, write(c.begin(7), 7), state, {"score": 0.5, "seconds": {"rollout": 1.0}})
    found = checkpoints(tmp_path / "checkpoints").newest()
    assert found is not None and found.step == 7
    assert (found.state, found.identity, found.manifest["metrics"]) == (state, {"stage": "ppo"}, {"score": 0.5})
    with Shards(found.directory, "policy") as shards:
        assert shards.whole("w", "weight", (50,)).tolist() == [7.0] * 50
    assert names(found.directory) == ["critic-00000-of-00001.safetensors", "manifest.json", SHARD]


def test_nan_survives_too(tmp_path: Path) -> None:
    c = checkpoints(tmp_path)
    c.commit(1, write(c.begin(1), 1), {"mean": math.nan}, {})
    found = c.newest()
    assert found is not None and math.isnan(found.state["mean"])


def change(path: Path, edit: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def flip(content: bytearray) -> None:
    content[-3] ^= 1


def flip_step(content: bytearray) -> None:
    content[content.index(b'"step": ') + 8] ^= 1


def another_format(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT - 1}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: os.truncate(d / SHARD, 100), f"{SHARD} has 100 bytes instead of "),
    "one byte": (lambda d: change(d / SHARD, flip), f"{SHARD}: checksum differs"),
    "deleted": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
    "no longer a file": (lambda d: ((d / SHARD).rename(d / "x"), (d / SHARD).symlink_to(SHARD)),
                         f"{SHARD} is unreadable: Too many levels of symbolic links"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "garbage manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff{"), "manifest.json is unreadable: "),
    "cut manifest": (lambda d: os.truncate(d / "manifest.json", 200), "manifest.json is unreadable: JSONDecodeError"),
    "another manifest": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is unreadable: TypeError"),
    "one digit of the manifest": (lambda d: change(d / "manifest.json", flip_step), "manifest.json: checksum differs"),
    "another format": (another_format,
                       f"manifest.json is of format {FORMAT - 1}, this version of rlhf_ray reads {FORMAT}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGE[name]
    c = checkpoints(tmp_path)
    first, second = save(c, 1), save(c, 2)
    damage(second.directory)
    found = c.newest()
    assert found is not None and found.step == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the checkpoint of step 2 is not whole: {second.directory}/") and message in line

    damage(first.directory)  # nothing whole is left
    with pytest.raises(UserError) as error:
        c.newest()
    assert message in str(error.value) and "resume=never" in str(error.value)
    assert str(second.directory) in str(error.value) and "\n" not in str(error.value)


def test_going_on_from_before_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    c = checkpoints(tmp_path, keep_last=1)
    for step in (1, 2, 4):
        save(checkpoints(tmp_path, keep_last=9), step)
    for step in (2, 4):
        (tmp_path / f"step-{step:08d}" / SHARD).unlink()
    assert (found := c.newest()) is not None and found.step == 1
    save(c, 2)
    assert names(tmp_path) == ["step-00000002"]  # 4 was of a run that is no more
    assert (found := c.newest()) is not None and found.step == 2


def test_a_damaged_one_takes_no_place_among_the_newest_and_the_best(tmp_path: Path) -> None:
    c = checkpoints(tmp_path, keep_last=2, best_metric="score")
    save(c, 1, score=0.0)
    (save(c, 2, score=9.0).directory / SHARD).unlink()
    assert (found := c.newest()) is not None and found.step == 1
    save(c, 3, score=1.0)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


class Killed(BaseException):
    """No handler of ours runs after it, as after kill -9."""


def test_killed_at_any_moment_the_old_or_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at the first, second, ... call that changes the disk, for a new step and for a step that is
    there already."""
    calls = {name: getattr(os, name) for name in ("mkdir", "rename", "fsync", "unlink", "rmdir")}
    for step in (2, 3):
        moment, ended = 0, False
        while not ended:
            directory = tmp_path / f"{step}-{moment}"
            c = checkpoints(directory, keep_last=1)
            save(checkpoints(directory, keep_last=2), 1)
            save(checkpoints(directory, keep_last=2), 2)
            left = moment
            for name, call in calls.items():
                def counted(*args: Any, call: Callable[..., Any] = call, **kwargs: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise Killed
                    left -= 1
                    return call(*args, **kwargs)
                monkeypatch.setattr(os, name, counted)
            try:
                save(c, step)
                ended = True
            except Killed:
                pass
            monkeypatch.undo()
            assert (found := c.newest()) is not None and found.step in (2, step)
            assert [n for n in names(directory) if n.startswith(".")] == []
            assert found.state == {"step": found.step}
            save(c, 5)
            assert names(directory) == ["step-00000005"]
            moment += 1
        assert moment > 10


def test_a_state_with_other_keys_is_of_another_version(tmp_path: Path) -> None:
    """What a mapping holds that is empty at the start are data: here the alarms that rang."""
    c, start = checkpoints(tmp_path), {"step": 0, "kl_coef": 0.1, "watch": {"position": 0, "rang": {}}, "ptx": None}
    state = {"step": 1, "kl_coef": 0.2, "watch": {"position": 9, "rang": {"kl": 1}}, "ptx": None}
    assert c.commit(1, write(c.begin(1), 1), state, {}).state_like(start) == state
    other = {"step": 2, "gone": {"a": 1}, "watch": {"position": 9, "rung": {}}, "ptx": None}
    with pytest.raises(UserError) as error:
        c.commit(2, write(c.begin(2), 2), other, {}).state_like(start)
    assert str(error.value) == (
        f"{tmp_path}/step-00000002 is of another version of rlhf_ray: it lacks kl_coef, watch.rang; this version does "
        "not know its gone, watch.rung; go on with the version that wrote it, or start over with resume=never")


def test_the_one_before_is_deleted_only_after_the_new_one_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = checkpoints(tmp_path, keep_last=1)
    save(c, 1)
    files = write(c.begin(2), 2)
    assert names(tmp_path) == [".step-00000002.tmp", "step-00000001"]

    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(UserError, match=r"cannot write the checkpoint of step 2 in .*: Input/output error; "):
            c.commit(2, files, {}, {})
    assert names(tmp_path) == ["step-00000001"]
    save(c, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_what_was_begun_can_be_dropped(tmp_path: Path) -> None:
    c = checkpoints(tmp_path)
    c.abandon(1)
    write(c.begin(1), 1)
    c.abandon(1)
    assert names(tmp_path) == []
    write(c.begin(1), 1)  # and nobody drops it
    assert names(c.begin(2)) == [] and names(tmp_path) == [".step-00000002.tmp"]


def test_files_must_be_there_as_announced(tmp_path: Path) -> None:
    c = checkpoints(tmp_path)
    files = write(c.begin(1), 1)
    (tmp_path / ".step-00000001.tmp" / SHARD).unlink()
    with pytest.raises(UserError, match=f"{SHARD} was written and is not there: output_dir must be a path that leads "):
        c.commit(1, files, {}, {})
    files = write(c.begin(1), 1)
    with pytest.raises(UserError, match=f"{SHARD} is there, and no actor of this run says that it wrote it"):
        c.commit(1, files[1:], {}, {})
    os.truncate(tmp_path / ".step-00000001.tmp" / SHARD, 9)
    with pytest.raises(UserError, match=f"{SHARD} was written with .* bytes and has 9: "):
        c.commit(1, files, {}, {})
    assert c.newest() is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    c = checkpoints(tmp_path, keep_last=2, best_metric="score")
    for step, score in enumerate([0.1, 0.9, math.nan, 0.3, 0.2, math.inf, -1.0, 0.0, 0.1], start=1):
        save(c, step, score=score)
        if step == 5:
            assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert names(tmp_path) == ["step-00000006", "step-00000008", "step-00000009"]


def test_a_metric_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    c = checkpoints(tmp_path, best_metric="reward")
    with pytest.raises(UserError, match=r"checkpoint.best_metric=reward: no such metric; there are entropy, score$"):
        save(c, 1, score=1.0, entropy=2.0)
    assert c.newest() is None
    save(c, 1)  # sft has no metrics, and best_metric is not about it


def test_never_deletes_all(tmp_path: Path) -> None:
    c = checkpoints(tmp_path)
    c.clear()
    save(c, 1)
    write(c.begin(2), 2)
    c.clear()
    assert c.newest() is None and names(tmp_path) == []


# -- at a URL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a run; this machine keeps its copy in `tmp_path/a`."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "a"))
    yield f"file://{tmp_path}/there/run"
    storage.renew()


def write_there(directory: Path, step: int) -> list[SavedFile]:
    """What the actors do, on nodes of their own."""
    files = write(directory, step)
    for file in files:
        storage.publish(directory / file.name)
    storage.settle()
    for file in files:
        (directory / file.name).unlink()
    return files


def save_there(url: str, step: int, keep_last: int = 2) -> Checkpoint:
    c = checkpoints(storage.local_root(url) / "ppo/checkpoints", keep_last)
    saved = c.commit(step, write_there(c.begin(step), step), {"step": step}, {})
    storage.settle()
    return saved


def newest_elsewhere(url: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint | None:
    with monkeypatch.context() as patch:
        patch.setenv(storage.CACHE, str(machine))
        found = checkpoints(storage.local_root(url) / "ppo/checkpoints").newest()
        if found:
            with Shards(found.directory, "policy") as shards:
                assert shards.whole("w", "weight", (50,)).tolist() == [found.step] * 50
        return found


def test_another_machine_finds_what_was_saved(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_elsewhere(url, tmp_path / "b", monkeypatch) is None
    for step in (1, 2, 3):
        save_there(url, step)
    there = tmp_path / "there/run/ppo/checkpoints"
    assert names(there) == ["step-00000002", "step-00000003"]
    assert names(there / "step-00000003") == ["critic-00000-of-00001.safetensors", "manifest.json", SHARD]
    assert (found := newest_elsewhere(url, tmp_path / "b", monkeypatch)) is not None and found.state == {"step": 3}
    save_there(url, 4)
    assert (found := newest_elsewhere(url, tmp_path / "b", monkeypatch)) is not None and found.step == 4
    assert names(storage.local_root(url) / "ppo/checkpoints/step-00000004") == ["manifest.json"]  # no disk fills up
    (there / "step-00000004" / SHARD).write_bytes(b"")
    assert (found := newest_elsewhere(url, tmp_path / "c", monkeypatch)) is not None and found.step == 3
    checkpoints(storage.local_root(url) / "ppo/checkpoints").clear()
    assert newest_elsewhere(url, tmp_path / "b", monkeypatch) is None


def test_the_numbers_up_to_a_checkpoint_are_there_before_it(url: str, tmp_path: Path) -> None:
    metrics = storage.local_root(url) / "ppo/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("1\n")
    save_there(url, 1)
    assert (tmp_path / "there/run/ppo/metrics.jsonl").read_text() == "1\n"


def test_killed_at_any_upload_the_old_or_the_new_one_is_whole_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is gone at the first, second, ... call that changes the URL, and another one goes on: for a new step,
    and for steps that are there already."""
    from fsspec.implementations.local import LocalFileSystem

    for step in (3, 2, 1):
        moment, ended = 0, False
        while not ended:
            run = f"{url}-{step}-{moment}"
            save_there(run, 1)
            save_there(run, 2)
            left = moment
            with monkeypatch.context() as patch:
                for name in ("put_file", "rm_file", "rm"):
                    def counted(*args: Any, call: Any = getattr(LocalFileSystem, name), **options: Any) -> Any:  # noqa: B008
                        nonlocal left
                        if left <= 0:
                            raise Killed
                        left -= 1
                        return call(*args, **options)
                    patch.setattr(LocalFileSystem, name, counted)
                try:
                    save_there(run, step, keep_last=1 if step == 3 else 2)
                    ended = True
                except Killed:
                    pass
            storage.renew()  # another process
            found = newest_elsewhere(run, tmp_path / "b", monkeypatch)
            assert found is not None and found.step in (1, 2, step)
            assert step != 3 or found.step != 1
            moment += 1
        assert moment > 3


def test_files_must_be_at_the_url_as_announced(url: str, tmp_path: Path) -> None:
    c = checkpoints(storage.local_root(url) / "ppo/checkpoints")
    files = write_there(c.begin(1), 1)
    (tmp_path / "there/run/ppo/checkpoints/step-00000001" / SHARD).unlink()
    with pytest.raises(UserError, match=f"^{url}/ppo/checkpoints/step-00000001/{SHARD} was written and is not there"):
        c.commit(1, files, {}, {})


def test_what_an_earlier_run_left_of_a_step_is_no_part_of_the_new_one(url: str, tmp_path: Path) -> None:
    c = checkpoints(storage.local_root(url) / "ppo/checkpoints")
    write_there(c.begin(1), 1)
    (tmp_path / "there/run/ppo/checkpoints/step-00000001/policy-00001-of-00002.safetensors").write_bytes(b"")
    save_there(url, 1)


# -- disks that cannot be written ----------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_that_says_so_and_costs_nothing(small_disk: Disk) -> None:
    c = checkpoints(small_disk.path / "checkpoints")
    save(c, 1)
    small_disk.fill(4096)
    with pytest.raises(UserError, match=r"No space left.*what was written before is as it was"):
        write(c.begin(2), 2)  # the actors are the first to notice
    c.abandon(2)

    small_disk.fill(2 * 4096)
    files = write(c.begin(2), 2)
    small_disk.fill()
    with pytest.raises(UserError) as error:
        c.commit(2, files, {"history": [0.5] * 1000}, {})
    assert str(error.value).startswith(
        f"cannot write the checkpoint of step 2 in {c.directory}: No space left on device; 0.00 GiB are free there; ")
    assert names(c.directory) == ["step-00000001"]
    assert (found := c.newest()) is not None and found.step == 1

    small_disk.empty()
    assert save(c, 2).step == 2


def test_a_read_only_disk_is_an_error_that_says_so(small_disk: Disk) -> None:
    c = checkpoints(small_disk.path / "checkpoints")
    save(c, 1)
    files = write(c.begin(2), 2)
    small_disk.forbid()
    for attempt in (lambda: c.commit(2, files, {}, {}), lambda: c.begin(2)):
        with pytest.raises(UserError, match=r"cannot write the checkpoint of step 2 in .*Read-only file system; "):
            attempt()
    with pytest.raises(UserError, match=r"cannot write /.*checkpoints: Read-only file system; "):
        c.clear()


# -- whose checkpoint it is ----------------------------------------------------------------------------------------


def identity(**changes: Any) -> dict[str, Any]:
    cfg = Config()
    cfg.model.path = "base"
    models = {"policy": "p1", "reward": "r1"}
    return json.loads(json.dumps(identity_of("ppo", cfg, "d1", models, {"rewards:mine": "f1"}))) | changes


def with_config(**values: Any) -> dict[str, Any]:
    """Keys with __ for dots."""
    now = identity()
    for key, value in values.items():
        *sections, name = key.split("__")
        section = now["config"]
        for part in sections:
            section = section[part]
        section[name] = value
    return now


def test_the_same_run_goes_on_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Config()
    cfg.model.path = "base"
    check_same_run(identity(), identity_of("ppo", cfg, "d1", {"policy": "p1", "reward": "r1"}, {"rewards:mine": "f1"}),
                   PPO)
    assert capsys.readouterr().out == ""
    assert identity()["versions"].keys() == {"python", "torch", "vllm", "deepspeed", "transformers", "ray", "numpy",
                                             "safetensors", "rlhf_ray"}


def test_what_does_not_touch_the_result_may_change() -> None:
    check_same_run(identity(), with_config(
        output_dir="elsewhere", resume="never", roles__policy__ranks=3, weight_sync__bucket_mib=1.0,
        cluster__address="auto", checkpoint__keep_last=9, ppo__iterations=99, sft__epochs=7,
        model__path="moved", data__texts="moved.txt"), PPO)  # what is in files is in fingerprints


def test_every_changed_key_gets_a_line() -> None:
    with pytest.raises(UserError) as error:
        check_same_run(identity(), with_config(
            rollout__temperature=0.7, ppo__policy_optimizer__lr=3e-4, data__template="none", roles__policy__ranks=3),
                       PPO)
    assert str(error.value).splitlines() == [
        "ppo: data.template was chat in the checkpoint, is none now",
        "ppo: rollout.temperature was 1.0 in the checkpoint, is 0.7 now",
        "ppo: ppo.policy_optimizer.lr was 0.0001 in the checkpoint, is 0.0003 now",
        "ppo: the checkpoint is of another run: set these back, start over with resume=never, or use another "
        "output_dir",
        "ppo: what may change when a run goes on: output_dir, roles, weight_sync, cluster, logging, alarms, "
        "checkpoint, eval, ppo.iterations, model.path, data.demonstrations, data.comparisons, data.compare_prompts, "
        "data.ppo_prompts, data.eval_prompts, data.texts, data.eval_texts",
    ]


def test_epochs_set_the_learning_rate_schedule_and_may_not_change() -> None:
    with pytest.raises(UserError, match=r"^ppo: sft.epochs was 1 in the checkpoint, is 7 now\n"):
        check_same_run(identity(), with_config(sft__epochs=7), ["sft", "roles.supervised"])


def test_other_data_and_models_are_named() -> None:
    with pytest.raises(UserError) as error:
        check_same_run(identity(), identity(data="d2", models={"policy": "p1", "reward": "r2"}), PPO)
    assert str(error.value).splitlines()[:2] == [
        "ppo: the data of the run changed: fingerprint was d1, is d2",
        "ppo: the model `reward` changed: fingerprint was r1, is r2"]


def test_other_versions_are_one_line_and_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    saved = identity(versions={"torch": "2.0", "ray": "2.1"})
    check_same_run(saved, identity(versions={"torch": "2.1", "ray": "2.2", "vllm": "1.0"}), PPO)
    assert capsys.readouterr().out == (
        "ppo: the checkpoint was made with other versions (torch 2.0, now 2.1; ray 2.1, now 2.2): results may differ "
        "in the last digits\n")


def test_a_reward_function_may_be_mended_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """What it raised may be why the run stands still. One that is new is a changed configuration."""
    check_same_run(identity(), identity(rewards={"rewards:mine": "f2", "rewards:new": "f3"}), PPO)
    assert capsys.readouterr().out == (
        "ppo: rewards:mine was edited since the checkpoint: from here on it scores as it says now\n")


def test_keys_of_another_version_of_rlhf_ray_are_passed_over() -> None:
    saved = identity()
    saved["config"]["rollout"]["gone"] = 1
    del saved["config"]["rollout"]["temperature"]
    check_same_run(saved, identity(), PPO)
