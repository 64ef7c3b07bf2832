"""Composing: overrides win, and a wrong one is a UserError that names the key."""

from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.load import compose, config_fingerprint, describe, to_yaml
from rlhf_ray.config.schema import STAGES, Config
from rlhf_ray.errors import UserError


def test_defaults_are_the_schemas() -> None:
    cfg, schema = compose(["experiment=null"]), Config()
    assert cfg.data.source == "reviews"
    cfg.data.source = schema.data.source
    assert cfg == schema


def test_overrides_win_and_have_the_types_of_the_schema() -> None:
    cfg = compose(["sft.optimizer.lr=1e-3", "cluster=join", "stages=[sft]", "data.texts=hf://name:train",
                   "sft.max_examples=7", "eval.baselines=[]"])
    assert cfg.sft.optimizer.lr == 1e-3
    assert cfg.cluster.address == "auto"
    assert cfg.stages == ["sft"]
    assert cfg.data.texts == "hf://name:train"
    assert cfg.sft.max_examples == 7
    assert cfg.eval.baselines == []
    assert isinstance(cfg, Config)
    assert type(cfg.stages) is list


def test_asset_path_becomes_a_directory_of_the_package() -> None:
    path = Path(compose(["model.path=assets://reviews_base"]).model.path)
    assert path.parts[-3:] == ("rlhf_ray", "assets", "reviews_base")


def test_extra_dirs_add_recipes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
    assert compose(["experiment=mine"], [tmp_path]).seed == 5
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsft:\n  batchsize: 5\n")
    with pytest.raises(UserError, match=r"In 'experiment/mine': unknown key 'sft.batchsize'; did you mean sft.batch_"):
        compose(["experiment=mine"], [tmp_path])
    (tmp_path / "experiment" / "mine.yaml").write_text("seed: [\n")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        compose(["experiment=mine"], [tmp_path])
    with pytest.raises(UserError, match="no such directory"):
        compose([], [tmp_path / "absent"])


@pytest.mark.parametrize(("override", "says"), [
    ("algorithm.klcoef=1", "did you mean algorithm.kl_coef?"),
    ("+lr=1", "did you mean "),
    ("algorithm.lr=1", ".optimizer.lr or "),
    ("zzz=1", "unknown key 'zzz'"),
    ("hydra.run.dir=x", "unknown key 'hydra.run.dir'"),
    ("model={pth: 3}", "did you mean model.path?"),
    ("seed=abc", "seed: Value 'abc' of type 'str' could not be converted to Integer (int: seed of everything random)"),
    ("seed", "is not KEY=VALUE"),
    ("stages=[sft", "is not KEY=VALUE"),
    ("seed=1,2", "one run takes one"),
    ("~seed", "cannot be removed"),
    ("roles=null", "roles: "),
    ("data={source: files}", "no such data; there are files, reasoning, reviews"),
    ("experiment=hf8gpu", "there are hf_8gpu, instructgpt, quickstart, reasoning, reviews_base; did you mean hf_8gpu?"),
    ("data=web", "data=web: no such data; there are files, reasoning, reviews"),
    ("model.path=${nope}", "model.path: Interpolation key 'nope' not found"),
    ("output_dir=s3://key:secret@bucket/run", "output_dir=s3://... carries a password"),
])
def test_bad_overrides(override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        compose([override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_is_the_whole_configuration() -> None:
    tree = yaml.safe_load(to_yaml(compose(["sft.optimizer.lr=3e-4"])))
    assert tree["sft"]["optimizer"]["lr"] == 3e-4
    assert list(tree)[:5] == ["output_dir", "seed", "resume", "stages", "model"]


def test_describe_covers_every_key() -> None:
    options = {option.key: option for option in describe()}
    assert all(option.help for option in options.values())
    assert options["algorithm.clip_ratio"] == ("algorithm.clip_ratio", "float", 0.2,
                                               "PPO clip range of the policy ratio, downwards; upwards too unless "
                                               "clip_ratio_high", "> 0, < 1")
    assert options["sft.max_examples"].type == "int | None"
    assert options["stages"].type == "list[str]"
    assert options["stages"].limits == " | ".join(STAGES)


def test_fingerprint_sees_its_sections_only() -> None:
    a, b = compose([]), compose(["ppo.iterations=3"])
    assert config_fingerprint(a, ["model", "sft", "seed"]) == config_fingerprint(b, ["model", "sft", "seed"])
    assert config_fingerprint(a, ["ppo"]) != config_fingerprint(b, ["ppo"])
    assert config_fingerprint(a, ["roles.policy"]) != config_fingerprint(a, ["roles.critic"])
    assert len(config_fingerprint(a, [])) == 64
