"""The manifests of deploy/kuberay are what KubeRay's own schemas allow, and what they start fits into them."""

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_ray.config.checks import STAGE_ROLES, stages_of, validate
from rlhf_ray.config.load import compose
from rlhf_ray.core.packing import NodeResources, shortfall

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay"))
DEVICES = ("cpu", "gpu")
LOCK = {device: (ROOT / "requirements" / f"{device}.txt").read_text() for device in DEVICES}
GIB = {"Gi": 2**30, "Mi": 2**20}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())


def pods(cluster: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(group, pod, its only container) of the head and of every group of workers."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [(g, g["template"]["spec"], *g["template"]["spec"]["containers"]) for g in groups]


def size(quantity: str) -> int:
    return int(quantity[:-2]) * GIB[quantity[-2:]]


def strict(schema: Any) -> Any:
    """A schema of Kubernetes as JSON Schema that says no to unknown fields, which Kubernetes drops without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: strict(value) for key, value in schema.items() if key not in ("description", "format")}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    missing = [name for name in ("rayclusters", "rayjobs") if not (CRDS / f"ray.io_{name}.yaml").is_file()]
    if missing:
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}: set KUBERAY_CRDS to a directory that has them")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for name in ("rayclusters", "rayjobs"):
        crd = yaml.load((CRDS / f"ray.io_{name}.yaml").read_text(), loader)["spec"]
        version, = (v for v in crd["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # ObjectMeta is Kubernetes' own
        found[crd["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found


def errors(validators: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    return [f"{e.json_path}: {e.message[:200]}" for e in validators[manifest["kind"]].iter_errors(manifest)]


@pytest.mark.parametrize("name", [f"{kind}-{device}" for kind in ("rayjob", "raycluster") for device in DEVICES])
def test_kuberay_takes_the_manifest(validators: dict[str, Any], name: str) -> None:
    assert errors(validators, load(name)) == []


def test_the_validator_sees_what_kubernetes_would_drop_or_refuse(validators: dict[str, Any]) -> None:
    manifest = load("raycluster-cpu")
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["shm"] = "1Gi"
    manifest["spec"]["authOptions"]["mode"] = "password"
    manifest["spec"]["workerGroupSpecs"][0]["minReplicas"] = "one"
    del manifest["spec"]["workerGroupSpecs"][1]["groupName"]
    text = "\n".join(errors(validators, manifest))
    assert all(word in text for word in ("'shm' was unexpected", "'password'", "'one'", "'groupName' is a required"))


@pytest.mark.parametrize("device", DEVICES)
def test_job_and_cluster_are_the_same_cluster(device: str) -> None:
    assert load(f"rayjob-{device}")["spec"]["rayClusterSpec"] == load(f"raycluster-{device}")["spec"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_job_is_a_valid_command_whose_roles_fit(device: str) -> None:
    from rlhf_ray.train.roles import layout_of

    job = load(f"rayjob-{device}")["spec"]
    program, stage, *overrides = shlex.split(job["entrypoint"])
    assert program == "rlhf-ray"
    cfg = compose(overrides)
    validate(cfg, stage)
    assert cfg.cluster.address == "auto" and cfg.cluster.autoscaling and cfg.resume == "auto"
    assert cfg.output_dir.startswith("/outputs/")
    nodes = [
        NodeResources(f"{group['groupName']}-{i}",
                      float(group["rayStartParams"].get("num-cpus", container["resources"]["limits"]["cpu"])),
                      float(container["resources"]["limits"].get("nvidia.com/gpu", 0)))
        for group, _, container in pods(job["rayClusterSpec"])[1:] for i in range(group["maxReplicas"])
    ]
    for name in stages_of(cfg, stage):
        assert shortfall(layout_of(cfg, STAGE_ROLES[name]), nodes) is None, name
    generators = job["rayClusterSpec"]["workerGroupSpecs"][-1]
    assert generators["groupName"] == "generators" and generators["minReplicas"] < generators["maxReplicas"]
    assert cfg.roles.generator.replicas <= generators["maxReplicas"]
    if device == "cpu":  # as many cores as threads
        assert cfg.roles.generator.threads <= int(pods(job["rayClusterSpec"])[-1][2]["resources"]["limits"]["cpu"])


@pytest.mark.parametrize("device", DEVICES)
def test_versions_are_those_of_the_lock(device: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cluster = load(f"raycluster-{device}")["spec"]
    assert f"\nray=={cluster['rayVersion']}\n" in LOCK[device]
    suffix = {"cpu": "cpu", "gpu": "cuda"}[device]
    assert {container["image"] for *_, container in pods(cluster)} == {f"rlhf-ray:{version}-{suffix}"}
    assert (ROOT / "deploy" / "docker" / f"{suffix}.Dockerfile").is_file()


@pytest.mark.parametrize("device", DEVICES)
def test_every_pod_has_a_token_probes_limits_shared_memory_outputs_and_time_to_end(device: str) -> None:
    cluster = load(f"raycluster-{device}")["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rlhf-ray-token"}
    assert cluster["enableInTreeAutoscaling"]
    claim = load("outputs")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group, pod, container in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["readinessProbe"] and container["livenessProbe"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits and {"cpu", "memory"} <= limits.keys()
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/usr/local/bin/drain"]
        stop, = (int(e["value"]) for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert stop < pod["terminationGracePeriodSeconds"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/outputs"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        # What is in shared memory counts as memory of the container.
        assert int(group["rayStartParams"]["object-store-memory"]) <= size(shm["sizeLimit"]) < size(limits["memory"])


def test_pods_wait_for_learners_and_for_nothing_of_rays_own() -> None:
    """deploy/docker/drain.sh finds processes by their titles, which Ray makes from the names of classes and,
    while they work, from those that `Group.submit` gives to their calls."""
    from ray._private import ray_constants

    from rlhf_ray.actors.learners import CriticLearner
    from rlhf_ray.actors.policy import PolicyLearner
    from rlhf_ray.actors.supervised import SupervisedLearner
    from rlhf_ray.cluster.group import Group

    pattern = re.search(r"pgrep -f '(.+?)'", (ROOT / "deploy" / "docker" / "drain.sh").read_text())
    assert pattern
    wait_for = re.compile(pattern[1])
    for learner, role in ((PolicyLearner, "policy"), (CriticLearner, "critic"), (SupervisedLearner, "supervised")):
        assert wait_for.search(f"ray::{learner.__name__}")
        assert wait_for.search(f"ray::{Group(role, [None], 1.0).names[0]} update")
    assert wait_for.search("/opt/venv/bin/python /opt/venv/bin/rlhf-ray pipeline experiment=quickstart")
    own = [value for name, value in vars(ray_constants).items() if "PROCESS_TYPE" in name and isinstance(value, str)]
    assert "ray::DashboardAgent" in own
    assert not any(wait_for.search(title) for title in own)
