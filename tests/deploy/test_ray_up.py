"""deploy/ray-up.yaml is what Ray's own cluster launcher takes."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "deploy" / "ray-up.yaml"
CLOUD: dict[str, Any] = yaml.safe_load(FILE.read_text())


def own_machines() -> dict[str, Any]:
    """As the comment at the head of the file says."""
    lines = re.findall(r"^#   (provider: .+|auth: .+)$", FILE.read_text(), re.MULTILINE)
    config = {**CLOUD, **yaml.safe_load("\n".join(lines))}
    for key in ("available_node_types", "head_node_type", "max_workers"):
        del config[key]
    return config


@pytest.mark.parametrize("config", [CLOUD, own_machines()], ids=["cloud", "own machines"])
def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_token_is_a_file_and_the_image_that_of_the_manifests() -> None:
    assert "/home/ray/.ray/auth_token" in CLOUD["file_mounts"]
    assert "--env=RAY_AUTH_MODE=token" in CLOUD["docker"]["run_options"]
    gpu = (FILE.parent / "kuberay" / "raycluster-gpu.yaml").read_text()
    assert CLOUD["docker"]["image"].removeprefix("REGISTRY/") in gpu


def test_the_nodes_hold_the_roles_of_the_gpu_job() -> None:
    kinds = CLOUD["available_node_types"]
    assert kinds["generators"]["resources"] == {"CPU": 0} == kinds["head"]["resources"]
    assert kinds["learners"]["min_workers"] == 1 and kinds["generators"]["min_workers"] == 0
