"""Which stages a change makes stale: those that read what changed, and all after them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.core.packing import NodeResources
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.common import DEPENDS, fingerprints
from rlhf_ray.stages.pipeline import done_stages, look_ahead


def config() -> Config:
    return Config(stages=["sft", "compare", "rm", "ppo", "eval"])  # data.source=files, none named: nothing is read


def stale(change: Callable[[Config], None]) -> list[str]:
    """The stages whose fingerprint a change alters."""
    cfg = config()
    change(cfg)
    before, after = fingerprints(config()), fingerprints(cfg)
    return [name for name in before if before[name] != after[name]]


def at(key: str, value: object) -> Callable[[Config], None]:
    def change(cfg: Config) -> None:
        *path, last = key.split(".")
        part: object = cfg
        for name in path:
            part = getattr(part, name)
        assert getattr(part, last) != value
        setattr(part, last, value)

    return change


def test_nothing_changes_by_itself() -> None:
    assert stale(lambda cfg: None) == []
    assert list(fingerprints(config())) == ["sft", "compare", "rm", "ppo", "eval"]
    assert len(set(fingerprints(config()).values())) == 5


ALL = ["sft", "compare", "rm", "ppo", "eval"]


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("seed", 1, ALL),
    ("model.path", "another/model", ALL),
    ("data.template", "none", ALL),
    ("data.demonstrations", "d.jsonl", ALL),
    ("data.comparisons", "c.jsonl", ["compare", "rm", "ppo", "eval"]),  # people ranked what sft wrote: sft stays
    ("data.ppo_prompts", "p.jsonl", ["ppo", "eval"]),
    ("data.eval_texts", "t.txt", ["eval"]),
    ("sft.optimizer.lr", 0.5, ALL),
    ("roles.supervised.ranks", 3, ALL),
    ("compare.prompts", 7, ["compare", "rm", "ppo", "eval"]),
    ("roles.generator.replicas", 3, ["compare", "rm", "ppo", "eval"]),
    ("rm.epochs", 2, ["rm", "ppo", "eval"]),
    ("algorithm.kl_coef", 0.5, ["ppo", "eval"]),
    ("ppo.iterations", 1, ["ppo", "eval"]),
    ("reward.clip", 5.0, ["ppo", "eval"]),
    ("rollout.temperature", 0.5, ["ppo", "eval"]),
    ("roles.policy.ranks", 2, ["ppo", "eval"]),
    ("eval.prompts", 7, ["eval"]),
    ("logging.wandb", "disabled", []),
    ("output_dir", "elsewhere", []),
    ("cluster.dashboard", True, []),
])
def test_a_change_makes_its_stage_and_all_after_it_stale(key: str, value: object, wanted: list[str]) -> None:
    assert stale(at(key, value)) == wanted


def test_dpo_depends_on_the_rankings_and_its_own_options_and_not_on_those_of_ppo() -> None:
    def with_dpo(change: Callable[[Config], None]) -> dict[str, str]:
        cfg = Config(stages=["sft", "compare", "dpo", "eval"])
        change(cfg)
        return fingerprints(cfg)

    before = with_dpo(lambda cfg: None)
    for key, value, wanted in (("dpo.beta", 0.5, {"dpo", "eval"}), ("compare.prompts", 7, {"compare", "dpo", "eval"}),
                               ("rm.epochs", 2, set()), ("ppo.iterations", 1, set()), ("eval.policy", "dpo", {"eval"})):
        after = with_dpo(at(key, value))
        assert {name for name in before if before[name] != after[name]} == wanted, key


def test_a_pretrain_stage_makes_all_after_it_stale() -> None:
    whole = Config(stages=list(STAGES))
    other = Config(stages=list(STAGES))
    other.pretrain.epochs = 9.0
    before, after = fingerprints(whole), fingerprints(other)
    assert all(before[name] != after[name] for name in STAGES)
    assert before["sft"] != fingerprints(config())["sft"]  # with another base


def test_another_file_makes_all_stale(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    cfg = config()
    cfg.data.demonstrations = str(path)
    path.write_text("one")
    before = fingerprints(cfg)
    path.write_text("another")
    assert all(before[name] != after for name, after in fingerprints(cfg).items())


def test_another_base_model_in_the_same_place_makes_all_stale(tmp_path: Path) -> None:
    """Other weights of the same size and time are told by what is in them, and a new file by its name."""
    cfg = config()
    cfg.model.path = str(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    os.utime(weights, ns=(0, 1))
    found = [fingerprints(cfg)]
    weights.write_text("two")
    os.utime(weights, ns=(0, 1))
    found.append(fingerprints(cfg))
    weights.write_text("three")
    os.utime(weights, ns=(0, 1))
    found.append(fingerprints(cfg))
    (tmp_path / "config.json").write_text("{}")
    found.append(fingerprints(cfg))
    assert found[-1] == fingerprints(cfg)
    for name in ALL:
        assert len({f[name] for f in found}) == 4


def test_the_same_base_model_elsewhere_changes_nothing(tmp_path: Path) -> None:
    """As when it came along with a job: every cluster unpacks it somewhere else."""
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights")
        cfg = config()
        cfg.model.path = str(tmp_path / name)
        found.append(fingerprints(cfg))
    assert found[0] == found[1]


def test_done_stages_end_before_the_first_that_is_not(tmp_path: Path) -> None:
    cfg = config()
    cfg.output_dir = str(tmp_path)
    wanted = fingerprints(cfg)

    def record(name: str, fingerprint: str | None) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "stage.json").write_text(json.dumps({"fingerprint": fingerprint}))

    assert done_stages(cfg) == []
    for name in ("sft", "compare", "ppo", "eval"):
        record(name, wanted[name])
    assert done_stages(cfg) == ["sft", "compare"]  # rm has no record
    record("rm", wanted["sft"])
    assert done_stages(cfg) == ["sft", "compare"]  # nor one of this configuration
    record("rm", wanted["rm"])
    assert done_stages(cfg) == ALL
    cfg.ppo.iterations += 1
    assert done_stages(cfg) == ["sft", "compare", "rm"]
    record("sft", None)
    assert done_stages(cfg) == []


def test_every_stage_depends_on_the_configuration_of_its_own_name() -> None:
    assert set(DEPENDS) == set(STAGES)
    for name, sections in DEPENDS.items():
        assert {"seed", "model", "data", name} <= set(sections)


def test_every_node_that_any_stage_may_use_is_looked_at_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sft needs CPUs, ppo a GPU too; the head has neither."""
    looked: list[tuple[set[str], Path]] = []
    monkeypatch.setattr(pipeline, "nodes", lambda: {
        "head": NodeResources("h", 0), "cpu": NodeResources("c", 4), "gpu": NodeResources("g", 0.5, 1)})
    monkeypatch.setattr(pipeline, "check_nodes", lambda nodes, directory, timeout_s: looked.append((nodes, directory)))
    cfg = Config(output_dir=str(tmp_path))
    cfg.roles.generator.cpus, cfg.roles.generator.gpus = 0.5, 1.0
    cfg.data.source = "files"  # so there is no judge, which would fit anywhere
    look_ahead(cfg, ["sft", "ppo"])
    assert not looked  # a Ray of its own
    cfg.cluster.address = "10.0.0.1:6379"
    look_ahead(cfg, ["sft", "ppo"])
    look_ahead(cfg, ["sft"])
    assert looked == [({"cpu", "gpu"}, tmp_path), ({"cpu"}, tmp_path)]
