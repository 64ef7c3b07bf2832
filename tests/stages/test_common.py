"""Where stages look for what the stages before them made, and how they tell models apart."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import Disk
from rlhf_ray import disk, storage
from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.stages.common import Paths, StageRecord, fingerprints, model_fingerprint, resumed, stage, stage_record


def test_a_stage_that_has_not_ended_well_is_asked_for(tmp_path: Path) -> None:
    """Its directory and its model alone do not do: the record is written last."""
    cfg = Config(output_dir=str(tmp_path))
    paths = Paths(cfg)
    paths.sft.mkdir(parents=True)
    with pytest.raises(UserError, match="no finished sft: run `rlhf-ray sft` first") as error:
        paths.require("sft")
    assert str(tmp_path / "sft") in str(error.value)
    assert stage_record(cfg, "sft") is None
    (tmp_path / "sft/stage.json").write_text('{"seconds": 1}')
    paths.require("sft")
    assert stage_record(cfg, "sft") == {"seconds": 1}
    with pytest.raises(UserError, match="no finished compare"):
        paths.require("compare")


def model_in(directory: Path, weights: bytes) -> str:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    return str(directory)


def test_a_copied_model_is_the_same_model(tmp_path: Path) -> None:
    original = model_in(tmp_path / "run", b"x" * (3 << 20))
    before = model_fingerprint(original)
    copied = str(shutil.copytree(original, tmp_path / "copy", copy_function=shutil.copy))
    os.utime(tmp_path / "copy" / "config.json", ns=(0, 1))
    assert model_fingerprint(copied) == before
    assert len(before) == 64 and str(tmp_path) not in before


@pytest.mark.parametrize("size", [1, 1 << 20, 3 << 20])
@pytest.mark.parametrize("place", [0, -1])
def test_other_weights_are_another_model(size: int, place: int, tmp_path: Path) -> None:
    weights = bytearray(size)
    before = model_fingerprint(model_in(tmp_path / "a", bytes(weights)))
    weights[place] = 1
    assert model_fingerprint(model_in(tmp_path / "b", bytes(weights))) != before
    assert model_fingerprint(model_in(tmp_path / "c", bytes(size + 1))) != before


def test_every_byte_counts(tmp_path: Path) -> None:
    """In the middle too: adapters that are merged into a model leave its embeddings and its last norm as they were."""
    prints = {model_fingerprint(model_in(tmp_path / str(i), bytes(20 << 20) + bytes([i]) + bytes(20 << 20)))
              for i in range(3)}
    assert len(prints) == 3


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    model = model_in(tmp_path / "a", b"1234")
    before = model_fingerprint(model)
    (tmp_path / "a/model.safetensors").write_bytes(b"1235")
    assert model_fingerprint(model) != before


def test_a_stage_whose_reward_function_was_edited_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = Config(output_dir=str(tmp_path / "run"), stages=["sft", "ppo"])
    cfg.model.path, cfg.reward.sources = "some/model", ["model", "my.rewards:brevity"]
    (tmp_path / "my").mkdir()
    seen = []
    for text in ("def brevity(p, r, m): ...", "def brevity(p, r, m): return [0.0] * len(r)"):
        (tmp_path / "my/rewards.py").write_text(text)
        seen.append(fingerprints(cfg))
    assert seen[0]["sft"] == seen[1]["sft"] and seen[0]["ppo"] != seen[1]["ppo"]


# -- going on ----------------------------------------------------------------------------------------------------


def finished(cfg: Config, step: int) -> Path:
    """A ppo stage, done with iteration `step`. Returns its checkpoint."""
    checkpoints, checkpoint = resumed(cfg, StageRecord("ppo"), {}, step)
    assert checkpoint is None
    checkpoints.begin(step)
    return checkpoints.commit(step, [], {}, {}).directory


@pytest.mark.parametrize(("iterations", "kl_coef", "why"), [
    (7, 0.1, None),
    (5, 0.1, "it was at step 5 of 5 already"),
    (7, 0.2, "algorithm.kl_coef was 0.1 in the checkpoint, is 0.2 now"),
])
def test_a_finished_stage_goes_further_or_starts_over_and_says_why(
    iterations: int, kl_coef: float, why: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Config(output_dir=str(tmp_path))
    cfg.algorithm.kl_coef, cfg.ppo.iterations = 0.1, 5
    saved = finished(cfg, 5)
    cfg.algorithm.kl_coef, cfg.ppo.iterations = kl_coef, iterations
    _, checkpoint = resumed(cfg, StageRecord("ppo", done_before=True), {}, iterations)
    said = capsys.readouterr().out
    assert (checkpoint is not None, saved.exists()) == (why is None, why is None)
    assert said == ("" if why is None else f"ppo had ended well and starts over, without its checkpoints: {why}\n")


def test_an_unfinished_stage_of_another_run_is_refused_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    cfg = Config(output_dir=str(tmp_path))
    saved = finished(cfg, 5)
    cfg.algorithm.kl_coef += 0.1
    with pytest.raises(UserError, match=r"^ppo: algorithm\.kl_coef was"):
        resumed(cfg, StageRecord("ppo"), {}, 9)
    assert saved.exists()


def test_a_model_of_the_hub_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_fingerprint("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"


@pytest.mark.parametrize("begun", [False, True])
def test_a_record_stays_until_what_it_tells_of_is_replaced(begun: bool, tmp_path: Path) -> None:
    cfg = Config(output_dir=str(tmp_path))
    cfg.model.path = "some/model"
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/stage.json").write_text('{"seconds": 3.0}')
    with pytest.raises(UserError), stage(cfg, "ppo") as record:
        assert stage_record(cfg, "ppo") is None  # it is under way
        record.started = begun
        raise UserError("rm has to run first")
    assert stage_record(cfg, "ppo") == (None if begun else {"seconds": 3.0})
    assert sorted(p.name for p in (tmp_path / "ppo").iterdir()) == ["config.yaml", *([] if begun else ["stage.json"])]


def test_a_full_disk_is_one_line_and_costs_no_record(tmp_path: Path, small_disk: Disk) -> None:
    cfg = Config(output_dir=str(small_disk.path / "run"))
    cfg.model.path, cfg.stages = "some/model", ["sft"]
    with stage(cfg, "sft") as record:
        record.add(loss=1.0)
    before = stage_record(cfg, "sft"), (Paths(cfg).stage("sft") / "config.yaml").read_text()
    small_disk.fill(4096)
    with pytest.raises(UserError, match=r"^cannot write .*/run/sft/config.yaml: No space left on device; "):
        with stage(cfg, "sft"):
            pass
    assert (stage_record(cfg, "sft"), (Paths(cfg).stage("sft") / "config.yaml").read_text()) == before
    small_disk.empty()
    with pytest.raises(UserError, match=r"^cannot write .*/run/sft/stage.json: No space left on device; "):
        with stage(cfg, "sft"):
            (Paths(cfg).stage("sft") / "checkpoints").mkdir()
            small_disk.fill()
    assert (Paths(cfg).stage("sft") / "checkpoints").exists()  # it is not done


def test_checkpoints_go_when_model_and_record_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, synced = Config(output_dir=str(tmp_path)), list[str]()
    cfg.model.path, real = "some/model", disk.sync

    def sync(path: Path) -> None:
        assert not checkpoints.parent.exists() or checkpoints.exists()
        synced.append(path.name)
        real(path)

    checkpoints = tmp_path / "sft/checkpoints"
    with stage(cfg, "sft"):
        checkpoints.mkdir()
        monkeypatch.setattr(disk, "sync", sync)
    assert synced == [".stage.json.tmp", "sft"] and not checkpoints.exists()


def test_nothing_is_kept_where_ray_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray job with a working directory runs in Ray's copy of it."""
    copy = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="output_dir=outputs/run would lie in the working directory of this Ray job"):
        Paths(Config(output_dir="outputs/run"))
    assert Paths(Config(output_dir=str(tmp_path / "run"))).root == tmp_path / "run"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "copies"))
    yield f"file://{tmp_path}/there/run"
    storage.renew()


def test_the_model_of_a_url_is_known_without_fetching_it(url: str, tmp_path: Path) -> None:
    (tmp_path / "there/run/sft").mkdir(parents=True)
    model = model_in(tmp_path / "there/run/sft/model", b"x" * (3 << 20))
    paths = Paths(Config(output_dir=url))
    assert model_fingerprint(str(paths.sft)) == model_fingerprint(model)
    assert not paths.sft.exists()


def test_a_record_at_a_url_goes_when_the_stage_begins_and_comes_with_its_end(url: str, tmp_path: Path) -> None:
    """Whoever looks there never takes an unfinished stage for a finished one."""
    cfg, there = Config(output_dir=url), tmp_path / "there/run"
    cfg.model.path = "some/model"
    for _ in range(2):
        with stage(cfg, "sft") as record:
            storage.settle()
            assert not (there / "sft/stage.json").exists() and (there / "sft/config.yaml").exists()
            record.add(loss=1.0)
            (Paths(cfg).stage("sft") / "metrics.jsonl").write_text("1\n")
            (Paths(cfg).stage("sft") / "checkpoints/step-00000001").mkdir(parents=True)
            (there / "sft/checkpoints/step-00000001").mkdir(parents=True)
            (there / "sft/checkpoints/step-00000001/policy.safetensors").write_text("")
        assert (there / "sft/metrics.jsonl").read_text() == "1\n"
        assert json.loads((there / "sft/stage.json").read_text())["loss"] == 1.0
        assert not (there / "sft/checkpoints").exists()
    with pytest.raises(UserError), stage(cfg, "sft"):
        raise UserError("compare has to run first")
    assert json.loads((there / "sft/stage.json").read_text())["loss"] == 1.0


def test_what_a_stage_that_failed_has_left_is_at_the_url(url: str, tmp_path: Path) -> None:
    cfg = Config(output_dir=url)
    with pytest.raises(ZeroDivisionError), stage(cfg, "ppo"):
        (Paths(cfg).stage("ppo") / "post_mortem-1/logs").mkdir(parents=True)
        (Paths(cfg).stage("ppo") / "post_mortem-1/logs/policy-0.log").write_text("here")
        raise ZeroDivisionError
    assert (tmp_path / "there/run/ppo/post_mortem-1/logs/policy-0.log").read_text() == "here"
