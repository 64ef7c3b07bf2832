"""deploy/monitoring with a real Prometheus beside a real Ray: every panel and every rule finds data while a run runs, a
driver that is killed is noticed, and the dashboard outlives Ray's head.

Of the expressions only times are shortened: windows to 2 minutes, what is compared with the past to 5 seconds ago.
When rules ring, with their own times: deploy/test_monitoring.py.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray.dashboard.modules.metrics.metrics_head import GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR

from deploy.test_monitoring import DIRECTORY, EXPRESSIONS, PROMETHEUS, RULES
from end_to_end.small import earlier_stages, ppo_config, until
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.metrics.gauges import PREFIX, RUN, SUPERVISED, TABLE
from rlhf_ray.stages import dpo, ppo
from rlhf_ray.train import supervised
from rlhf_ray.train.ppo import PPOTrainer

ROOT = Path(__file__).parents[2]
ITERATION, RUNNING = (PREFIX + TABLE[key].name for key in ("iteration", "running"))
SUPERVISED_RUNNING = PREFIX + SUPERVISED["running"].name


def session_directory() -> Path:
    """Of this process's Ray."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


class Prometheus:
    """A server that reads deploy's own files, with the endpoints of this process's Ray, every second."""

    def __init__(self, program: str, directory: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        text = (DIRECTORY / "prometheus.yml").read_text().replace("10s", "1s")
        listed = PROMETHEUS["scrape_configs"][0]["file_sd_configs"][0]["files"][0]
        (directory / "prometheus.yml").write_text(text.replace(listed, str(session_directory() / Path(listed).name)))
        shutil.copy(DIRECTORY / "alerts.yml", directory)
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [program, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
                 f"--web.listen-address={address}"], stdout=log, stderr=log)
        self._client = httpx.Client(base_url=f"http://{address}/api/v1/", trust_env=False)

    def ask(self, expression: str) -> list[Any]:
        """What it finds now; nothing while it is starting."""
        try:
            answer = self._client.get("query", params={"query": expression}).json()
        except httpx.TransportError:
            assert self.process.poll() is None, self.log.read_text()
            return []
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def rules(self) -> list[tuple[str, str]]:
        """(name, health) of every rule."""
        groups = self._client.get("rules").json()["data"]["groups"]
        return [(rule["name"], rule["health"]) for group in groups for rule in group["rules"]]

    def close(self) -> None:
        self._client.close()
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the README has the dashboard copied to, before Ray's head starts."""
    directory = tmp_path_factory.mktemp("dashboards")
    shutil.copy(DIRECTORY / "rlhf.json", directory)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR, str(directory))
        yield directory


@pytest.fixture(scope="module")
def prometheus(dashboards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on PATH (https://prometheus.io/download)")
    cfg = Config()
    cfg.cluster.num_cpus, cfg.cluster.dashboard = 8, True  # the dashboard's process writes the list of endpoints
    with session(cfg):
        server = Prometheus(program, tmp_path_factory.mktemp("prometheus"))
        try:
            yield server
        finally:
            server.close()


def short(expression: str, run: str) -> str:
    """With short times, for one run."""
    expression = re.sub(r"\[\w+:\w+\]", "[2m:5s]", re.sub(r"\[\w+\]", "[2m]", expression))
    return re.sub(r"offset \w+", "offset 5s", expression).replace("$run", run)


def parts(expression: str) -> list[str]:
    """What `and`, `or` and `unless` connect, outside of parentheses; a comparison is 0 or 1, and not nothing or 1."""
    return re.split(r"\b(?:and|or|unless)\b(?![^()]*\))", re.sub(r"(==|<|>) ", r"\1 bool ", expression))


def test_a_live_run_feeds_every_panel_and_every_rule(prometheus, models, reward_model, tmp_path, monkeypatch):
    """DPO, and PPO-ptx with its KL in the loss, pairs of responses and a judge: they measure all that is shown.

    They are asked about after their first step and between two iterations. Of the rules, whose thresholds such a run
    does not cross, what they compare is there.
    """
    learn, advance = supervised.SupervisedTrainer.learn, PPOTrainer.advance
    asked = [part for expression, _, _ in EXPRESSIONS for part in parts(short(expression, "live"))]

    def answers(running: str, about: list[str]) -> None:
        def without_data() -> list[str]:
            return [part for part in about if {"live"} != {
                found["metric"][RUN] for found in prometheus.ask(f"({part}) and on ({RUN}) {running} == 1")}]

        until(lambda: not without_data(), lambda: f"no data: {without_data()}")

    def learning(trainer: supervised.SupervisedTrainer, units: Any) -> None:
        learn(trainer, units)
        if trainer.step == 1:
            answers(SUPERVISED_RUNNING, [part for part in asked if "_supervised_" in part])

    def advancing(trainer: PPOTrainer) -> None:
        advance(trainer)
        if trainer.step == 2:
            answers(RUNNING, [part for part in asked if "_supervised_" not in part])

    monkeypatch.setattr(supervised.SupervisedTrainer, "learn", learning)
    monkeypatch.setattr(PPOTrainer, "advance", advancing)
    run = tmp_path / "live"
    cfg = ppo_config(run, models[0], "ppo_ptx")
    cfg.data = compose(["experiment=null", "data=reviews"]).data  # whose judge is known
    cfg.model.max_length, cfg.data.max_prompt_tokens = 256, 200
    cfg.algorithm.kl_in, cfg.algorithm.kl_estimator, cfg.ppo.iterations = "loss", "k3", 3
    cfg.rollout.samples_per_prompt = 2
    earlier_stages(run, models[0], reward_model)
    (run / "compare").mkdir()
    (run / "compare/stage.json").write_text("{}")
    (run / "compare/comparisons.jsonl").write_text("".join(json.dumps(
        {"prompt": f"tell of {k}", "responses": ["a film", "a war"], "ranks": [1, 2], "labeler": "ann"}) + "\n"
        for k in range(8)))
    dpo.run(cfg)
    ppo.run(cfg)
    until(lambda: prometheus.ask(f"{ITERATION}{{run='live'}} == 3 and {RUNNING} == 0"), "the last iteration never came")
    assert prometheus.rules() == [(rule["alert"], "ok") for rule in RULES]


def test_a_driver_that_is_killed_rings_and_one_that_ends_does_not(prometheus, tmp_path):
    """Nothing is waited for (`for` is no part of an expression)."""
    code = ("import sys; from pathlib import Path; import ray; from rlhf_ray.metrics.recorder import Recorder\n"
            "ray.init(sys.argv[1], log_to_driver=False)\n"
            "with Recorder(Path(sys.argv[2]) / 'ppo', 'disabled', '', {}):\n"
            "    sys.stdin.read()\n")
    address = ray.get_runtime_context().gcs_address
    drivers = {name: subprocess.Popen([sys.executable, "-c", code, address, tmp_path / name], cwd=ROOT,
                                      stdin=subprocess.PIPE) for name in ("killed", "ended")}
    seen = f"{RUNNING}{{run=~'killed|ended'}}"
    try:
        until(lambda: len(prometheus.ask(f"{seen} == 1")) == 2, "the drivers never came")
        drivers["killed"].kill()
        drivers["ended"].communicate()
        until(lambda: not prometheus.ask(seen), "Ray never dropped their gauges")
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.wait()
    (vanished,) = [rule["expr"] for rule in RULES if rule["alert"] == "RlhfVanished"]
    assert [found["metric"][RUN] for found in prometheus.ask(short(vanished, ""))] == ["killed"]


def test_the_dashboard_outlives_the_head(prometheus, dashboards):
    """It was there before this Ray began, which has put its own beside it and told Grafana where they all are."""
    assert (dashboards / "rlhf.json").read_bytes() == (DIRECTORY / "rlhf.json").read_bytes()
    grafana = session_directory() / "metrics/grafana"
    until(lambda: (grafana / "provisioning/dashboards/default.yml").is_file(), "Ray wrote nothing for Grafana")
    until(lambda: len(list(dashboards.iterdir())) > 1, "Ray's own dashboards never came")
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/default.yml").read_text())["providers"]
    assert provider["options"]["path"] == str(dashboards) and provider["folder"] == "Ray"
