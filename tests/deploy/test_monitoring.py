"""deploy/monitoring: rules and dashboard speak of gauges that exist, and Prometheus' own tool accepts the files.

Whether a Prometheus finds data for all of them: end_to_end/test_monitoring.py.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.metrics.gauges import PREFIX, RUN, TABLE, UNITS

DIRECTORY = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((DIRECTORY / "rlhf.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())["groups"][0]["rules"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
BY_NAME = {PREFIX + measure.name: measure for measure in TABLE.values()}

# What is shown or said of each expression: the unit on the axis (None: a rule), and the text that names labels.
Shown = tuple[str, str | None, str]
EXPRESSIONS: list[Shown] = [
    *((target["expr"], panel["fieldConfig"]["defaults"]["unit"], target["legendFormat"])
      for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *((rule["expr"], None, rule["annotations"]["summary"]) for rule in RULES),
]


def names(expression: str) -> list[str]:
    return re.findall(r"\b\w*rlhf_[a-z_]+", expression)


@pytest.mark.parametrize(("expression", "unit", "text"), EXPRESSIONS, ids=[e for e, _, _ in EXPRESSIONS])
def test_names_labels_and_units_are_those_of_the_table(expression: str, unit: str | None, text: str) -> None:
    used = names(expression)
    assert used and set(used) <= set(BY_NAME)
    kept = {label for by in re.findall(r"\bby \(([^)]*)\)", expression) for label in by.split(", ")}
    chosen = set(re.findall(r"[{,]\s*(\w+)=", expression))
    told = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text))
    for name in used:
        assert kept | chosen <= {RUN, *BY_NAME[name].labels}
    assert told <= kept
    if unit is not None:
        assert {UNITS[BY_NAME[name].unit] for name in used} == {unit}


def test_the_dashboard_is_what_its_list_makes_of_the_table() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", DIRECTORY / "dashboard.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.dashboard() == DASHBOARD, "python deploy/monitoring/dashboard.py"
    assert all(len({TABLE[key].unit for key in keys}) == 1 for keys in module.PANELS.values())
    variable = DASHBOARD["templating"]["list"][1]
    assert variable["query"] == f"label_values({names(variable['query'])[0]}, {RUN})"
    assert set(names(variable["query"])) <= set(BY_NAME)


def test_thresholds_are_those_of_the_run() -> None:
    found = {rule["alert"]: rule["expr"] for rule in RULES}
    assert len(found) == len(RULES) and all(name.startswith("Rlhf") for name in found)
    cfg = compose(["experiment=hf_8gpu"])
    assert found["RlhfKlAboveBudget"].endswith(f" > {Config().alarms.kl.threshold:g}")
    assert f" > {Config().alarms.memory.threshold:g} * " in found["RlhfMemoryGrows"]
    assert found["RlhfMismatchAboveGate"].endswith(f" > {cfg.weight_sync.max_mismatch:g}")


def test_prometheus_reads_the_file_that_ray_writes_and_the_rules() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert all((DIRECTORY / file).is_file() for file in PROMETHEUS["rule_files"])


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH (https://prometheus.io/download)")
    result = subprocess.run([promtool, "check", "config", DIRECTORY / "prometheus.yml"], capture_output=True, text=True)
    assert result.returncode == 0 and f"{len(RULES)} rules found" in result.stdout, result.stdout + result.stderr
