"""deploy/monitoring: rules and dashboard speak of gauges that exist, and a Prometheus finds data for all of them."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.metrics.gauges import PREFIX, RUN, TABLE, UNITS, Gauges

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


# --- a real Prometheus beside a real Ray ---


def values(number: float, **other: float) -> dict[str, Any]:
    """metrics.jsonl's values with every key of the table, `number` everywhere but in `other`."""
    found: dict[str, Any] = {}
    for key, measure in TABLE.items():
        value = other.get(key, number)
        if "#" in key:
            found[key.replace("#", "1")] = value
        else:
            found[key] = {"policy-0": value} if measure.labels else value
    return found


def until(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


@pytest.mark.timeout(300)
def test_every_expression_finds_data(tmp_path: Path) -> None:
    """Everything rings: the iteration stands still, restarts, KL, mismatch, score and memory go up, the judge down.

    Only times are shortened: windows to 2 minutes, what is compared with the past to 5 seconds ago. Nothing is waited
    for (`for` is no part of an expression).
    """
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not on PATH (https://prometheus.io/download)")
    cfg = Config()
    cfg.cluster.num_cpus, cfg.cluster.dashboard = 1, True  # the dashboard's process writes the list of endpoints
    with session(cfg), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        session_dir = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        text = (DIRECTORY / "prometheus.yml").read_text().replace("10s", "1s")
        listed = PROMETHEUS["scrape_configs"][0]["file_sd_configs"][0]["files"][0]
        (tmp_path / "prometheus.yml").write_text(text.replace(listed, str(session_dir / Path(listed).name)))
        shutil.copy(DIRECTORY / "alerts.yml", tmp_path)
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen(
                [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                 f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1/", trust_env=False) as client:

                def ask(expression: str) -> list[Any]:
                    try:
                        answer = client.get("query", params={"query": expression}).json()
                    except httpx.TransportError:  # it is starting
                        assert server.poll() is None, (tmp_path / "log").read_text()
                        return []
                    assert answer["status"] == "success", answer
                    return answer["data"]["result"]

                gauges, restarts = Gauges("mine"), PREFIX + TABLE["restarts"].name
                still = {"iteration": 7.0, "running": 1.0}
                gauges.set(values(1.0, **still))
                until(lambda: ask(f"{restarts} == 1"), "the gauges never came")
                gauges.set(values(100.0, **still, judge_score=-100.0))
                until(lambda: ask(f"{restarts} == 100"), "the second values never came")
                time.sleep(6)  # a few scrapes more
                for expression, _, _ in EXPRESSIONS:
                    short = re.sub(r"offset \w+", "offset 5s", re.sub(r"\[\w+\]", "[2m]", expression))
                    found = ask(short.replace("$run", "mine"))
                    assert [result["metric"][RUN] for result in found] == ["mine"], expression

                def rules() -> list[tuple[str, str]]:
                    groups = client.get("rules").json()["data"]["groups"]
                    return [(rule["name"], rule["health"]) for group in groups for rule in group["rules"]]

                expected = [(rule["alert"], "ok") for rule in RULES]
                until(lambda: rules() == expected, "a rule is missing or cannot be evaluated")
        finally:
            server.terminate()
            server.wait(timeout=30)
