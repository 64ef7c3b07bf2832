"""deploy/monitoring: rules and dashboard speak of gauges that exist, Prometheus' own tool accepts the files, and every
rule rings when it should.

Whether a Prometheus finds data for all of them: end_to_end/test_monitoring.py.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.dashboard.modules.metrics.metrics_head import GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR

from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.metrics.gauges import PREFIX, RUN, SUPERVISED, TABLE, UNITS, Measure

DIRECTORY = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((DIRECTORY / "rlhf.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())["groups"][0]["rules"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
BY_NAME = {PREFIX + measure.name: measure for table in (TABLE, SUPERVISED) for measure in table.values()}

# What is shown or said of each expression: the unit on the axis (None: a rule), and the text that names labels.
Shown = tuple[str, str | None, str]
EXPRESSIONS: list[Shown] = [
    *((target["expr"], panel["fieldConfig"]["defaults"]["unit"], target["legendFormat"])
      for panel in DASHBOARD["panels"] if panel["type"] != "row" for target in panel["targets"]),
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
    for table, panels in module.ROWS.values():
        assert all(len({table[key].unit for key in keys}) == 1 for keys in panels.values())


def test_the_runs_to_choose_from_are_all_that_have_begun() -> None:
    chosen = re.fullmatch(rf'label_values\(\{{__name__=~"(.+)"\}}, {RUN}\)',
                          DASHBOARD["templating"]["list"][1]["query"])
    assert chosen
    assert {BY_NAME[name].key for name in BY_NAME if re.fullmatch(chosen[1], name)} == {"running"}
    assert all(re.fullmatch(chosen[1], PREFIX + table["running"].name) for table in (TABLE, SUPERVISED))


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


def test_readme_names_what_ray_reads_and_every_rule() -> None:
    readme = (DIRECTORY.parent / "README.md").read_text()
    assert f"{GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR}=" in readme
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"`(Rlhf\w+)`", readme))


def test_the_pod_monitor_asks_every_pod_of_ray() -> None:
    """What of it Kubernetes cannot check: KubeRay puts this label on each pod of a cluster, and opens this port where
    a manifest does not."""
    monitor = yaml.safe_load((DIRECTORY / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert set(monitor) == {"apiVersion", "kind", "metadata", "spec"} and monitor["metadata"]["name"]
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "interval": PROMETHEUS["global"]["scrape_interval"]}


# --- when a rule rings: series made up minute by minute, with the rules' own windows ---

Minutes = list[float] | np.ndarray
GONE = float("nan")  # the driver has ended, and Ray has dropped its series


def drawn(measure: Measure, values: Minutes, driver: str = "a", **labels: str) -> dict[str, str]:
    """One series of run `mine` for promtool, a value a minute."""
    tags = {RUN: "mine", "WorkerId": driver, **labels}
    assert set(labels) == set(measure.labels)
    return {"series": f"{PREFIX}{measure.name}{{{', '.join(f'{k}={json.dumps(v)}' for k, v in tags.items())}}}",
            "values": " ".join("stale" if np.isnan(v) else f"{v:g}" for v in values)}


def running(*parts: tuple[float, int], driver: str = "a") -> dict[str, str]:
    """The gauge `running` of ppo: (value, minutes) one after the other."""
    return drawn(TABLE["running"], held(*parts), driver)


def held(*parts: tuple[float, int]) -> list[float]:
    return [value for value, minutes in parts for _ in range(minutes)]


def noisy(values: Minutes, sigma: float) -> np.ndarray:
    return np.asarray(values) + np.random.default_rng(0).normal(0, sigma, len(values))


def score(values: Minutes, deviation: float) -> list[dict[str, str]]:
    """Of responses that are so far apart."""
    return [drawn(TABLE["score"], values), drawn(TABLE["score_std"], [deviation] * len(values))]


LONG = 6 * 60
RISE = 2 - 2 * np.exp(-np.arange(LONG) / 120)  # to 2 points, most of it in the first two hours
PEAK = np.concatenate([np.linspace(0, 2, 180), np.linspace(2, 0, 240)])  # up in 3 hours, down by half a point an hour

# What happens: the series, and at which minutes which rules ring; no other does.
Case = tuple[list[dict[str, str]], dict[int, set[str]]]
CASES: dict[str, Case] = {
    "an iteration takes more than half an hour": (
        [running((1, 60)), drawn(TABLE["iteration"], held((6, 5), (7, 40), (8, 15)))],
        {34: set(), 35: {"RlhfStalled"}, 44: {"RlhfStalled"}, 45: set()}),
    "the first is never done": (
        [running((1, 40)), drawn(TABLE["iteration"], held((0, 40)))],
        {29: set(), 30: {"RlhfStalled"}}),
    "a second driver gets no further than the first": (
        [running((1, 15), (GONE, 25)), drawn(TABLE["iteration"], held((7, 15), (GONE, 25))),
         running((GONE, 18), (1, 22), driver="b"), drawn(TABLE["iteration"], held((GONE, 18), (7, 22)), "b")],
        {29: set(), 30: {"RlhfStalled"}}),
    "it has ended, and its process lives on": (
        [running((1, 10), (0, 50)), drawn(TABLE["iteration"], held((7, 60)))], {45: set()}),
    "a driver is killed": (
        [running((1, 40), (GONE, 60))],
        {39: set(), 44: set(), 45: {"RlhfVanished"}, 68: {"RlhfVanished"}, 70: set()}),
    "a driver ends": ([running((1, 40), (0, 1), (GONE, 60))], {t: set() for t in range(40, 80)}),
    "another goes on at once": (
        [running((1, 40), (GONE, 60)), running((GONE, 44), (1, 56), driver="b")], {t: set() for t in range(40, 80)}),
    "another goes on, and ends": (
        [running((1, 40), (GONE, 60)), running((GONE, 44), (1, 5), (0, 1), (GONE, 50), driver="b")],
        {t: set() for t in range(40, 80)}),
    "one driver after the other is killed": (
        [running((GONE, 10 * k), (1, 8), (GONE, 60), driver=str(k)) for k in range(4)],
        {27: set(), 31: {"RlhfRestartLoop"}}),
    "three actors of each of two roles within an hour": (
        [drawn(TABLE["restarts"], held((0, 20), (1, 10), (2, 10), (3, 60)), role=role) for role in ("policy", "judge")],
        {35: set(), 60: {"RlhfRestartLoop"}}),
    "five actors of a role": (
        [drawn(TABLE["restarts"], held((0, 20), (5, 60)), role="policy")], {t: set() for t in range(0, 80, 5)}),
    "a supervised step takes more than half an hour": (
        [drawn(SUPERVISED["running"], held((1, 60)), stage="sft"),
         drawn(SUPERVISED["step"], held((0, 40), (1, 20)), stage="sft")],
        {29: set(), 30: {"RlhfSupervisedStalled sft"}, 40: set()}),
    "the driver of rm is killed after sft has ended": (
        [drawn(SUPERVISED["running"], held((1, 20), (0, 25), (GONE, 40)), stage="sft"),
         drawn(SUPERVISED["running"], held((GONE, 21), (1, 24), (GONE, 40)), stage="rm")],
        {49: set(), 50: {"RlhfSupervisedVanished rm"}, 73: {"RlhfSupervisedVanished rm"}, 75: set()}),
    "the score rises, with noise": (score(noisy(RISE, 0.25), 1.0), {t: set() for t in range(0, LONG, 15)}),
    "it stays, with noise": (score(noisy(np.zeros(LONG), 0.25), 1.0), {t: set() for t in range(0, LONG, 15)}),
    "it falls by less than responses are apart": (score(noisy(PEAK / 5, 0.05), 1.0),
                                                  {t: set() for t in range(0, len(PEAK), 15)}),
    "it rises and falls": (
        score(noisy(PEAK, 0.25), 1.0),
        {180: set(), 240: set(), 300: {"RlhfRewardFalling"}, 400: {"RlhfRewardFalling"}}),
    "it falls, a tenth as far, and responses are a tenth as far apart": (
        score(noisy(PEAK, 0.25) / 10 - 7, 0.1), {240: set(), 300: {"RlhfRewardFalling"}}),
    "the judge falls while the score rises": (
        [*score(RISE, 1.0), drawn(TABLE["judge_score"], -RISE)], {59: set(), 65: {"RlhfScoreUpJudgeDown"}}),
    "both rise": ([*score(RISE, 1.0), drawn(TABLE["judge_score"], RISE)], {t: set() for t in range(0, LONG, 15)}),
    "KL": ([drawn(TABLE["kl_per_sequence"], [30, 30, 31])], {1: set(), 2: {"RlhfKlAboveBudget"}}),
    "mismatch": ([drawn(TABLE["mismatch"], [0.05, 0.05, 0.06])], {1: set(), 2: {"RlhfMismatchAboveGate"}}),
    "memory": (
        [drawn(TABLE["memory_gib"], held((2, 60), (3.1, 60)), role="policy", rank="0"),
         drawn(TABLE["memory_gib"], held((2, 60), (2.9, 60)), role="policy", rank="1")],
        {60: set(), 89: set(), 90: {"RlhfMemoryGrows"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_rings_when_it_should_and_no_other(case: str, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH (https://prometheus.io/download)")
    series, expected = CASES[case]
    ringing = 'count by (alertname, stage) (ALERTS{alertstate="firing", run="mine"})'

    def sample(name: str) -> dict[str, Any]:
        alert, _, stage = name.partition(" ")
        return {"labels": f'{{alertname="{alert}"' + (f', stage="{stage}"' if stage else "") + "}", "value": 1}

    (tmp_path / "test.yml").write_text(yaml.safe_dump({
        "rule_files": [str(DIRECTORY / "alerts.yml")], "evaluation_interval": "1m" if max(expected) < 120 else "5m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [
            {"expr": ringing, "eval_time": f"{minute}m", "exp_samples": [sample(name) for name in names]}
            for minute, names in expected.items()]}]}))
    result = subprocess.run([promtool, "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_rule_has_a_case_in_which_it_rings() -> None:
    rung = {name.split()[0] for _, expected in CASES.values() for some in expected.values() for name in some}
    assert rung == {rule["alert"] for rule in RULES}
