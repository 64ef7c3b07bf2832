"""deploy/monitoring with a real Prometheus beside a real Ray: every panel and every rule finds data.

Of the expressions only times are shortened: windows to 2 minutes, what is compared with the past to 5 seconds ago.
"""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from deploy.test_monitoring import DIRECTORY, EXPRESSIONS, PROMETHEUS, RULES
from end_to_end.small import earlier_stages, ppo_config, until
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.load import compose
from rlhf_ray.config.schema import Config
from rlhf_ray.metrics.gauges import PREFIX, RUN, TABLE, Gauges
from rlhf_ray.stages import ppo

ITERATION, RESTARTS, RUNNING = (PREFIX + TABLE[key].name for key in ("iteration", "restarts", "running"))


class Prometheus:
    """A server that reads deploy's own files, with the endpoints of this process's Ray, every second."""

    def __init__(self, program: str, directory: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        session_dir = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        text = (DIRECTORY / "prometheus.yml").read_text().replace("10s", "1s")
        listed = PROMETHEUS["scrape_configs"][0]["file_sd_configs"][0]["files"][0]
        (directory / "prometheus.yml").write_text(text.replace(listed, str(session_dir / Path(listed).name)))
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
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
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
    return re.sub(r"offset \w+", "offset 5s", re.sub(r"\[\w+\]", "[2m]", expression)).replace("$run", run)


def test_a_live_run_feeds_every_panel_and_every_rule(prometheus, models, reward_model, tmp_path):
    """PPO-ptx with its KL in the loss, pairs of responses and a judge: it measures all that is shown.

    Of the rules, whose thresholds such a run does not cross, what they compare is there.
    """
    run = tmp_path / "live"
    cfg = ppo_config(run, models[0], "ppo_ptx")
    cfg.data = compose(["experiment=null", "data=reviews"]).data  # whose judge is known
    cfg.model.max_length, cfg.data.max_prompt_tokens = 256, 200
    cfg.algorithm.kl_in, cfg.algorithm.kl_estimator, cfg.ppo.iterations = "loss", "k3", 5
    cfg.rollout.samples_per_prompt = 2
    earlier_stages(run, models[0], reward_model)
    ppo.run(cfg)
    until(lambda: prometheus.ask(f"{ITERATION}{{run='live'}} == 5 and {RUNNING} == 0"), "the last iteration never came")
    time.sleep(6)  # a few scrapes more
    for expression, _, _ in EXPRESSIONS:
        compared = re.sub(r"(==|<|>) ", r"\1 bool ", short(expression, "live"))  # 0 or 1, and not nothing or 1
        assert {result["metric"][RUN] for result in prometheus.ask(compared)} == {"live"}, expression


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


def test_every_rule_rings(prometheus):
    """The iteration stands still, restarts, KL, mismatch, score and memory go up, the judge goes down.

    Nothing is waited for (`for` is no part of an expression).
    """
    gauges, still = Gauges("bad"), {"iteration": 7.0, "running": 1.0}
    gauges.set(values(1.0, **still))
    until(lambda: prometheus.ask(f"{RESTARTS}{{run='bad'}} == 1"), "the gauges never came")
    gauges.set(values(100.0, **still, judge_score=-100.0))
    until(lambda: prometheus.ask(f"{RESTARTS}{{run='bad'}} == 100"), "the second values never came")
    time.sleep(6)
    for rule in RULES:
        assert [r["metric"][RUN] for r in prometheus.ask(short(rule["expr"], "bad"))] == ["bad"], rule["alert"]
    expected = [(rule["alert"], "ok") for rule in RULES]
    until(lambda: prometheus.rules() == expected, "a rule is missing or cannot be evaluated")
