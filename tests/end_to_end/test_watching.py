"""A run on a cluster, watched from elsewhere: by its job's metadata and by `ray timeline`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from end_to_end.small import earlier_stages
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files  # noqa: F401 - files is a fixture
from rlhf_ray.cluster.group import free_port
from rlhf_ray.metrics.wire import from_json

RAY = str(Path(sys.executable).parent / "ray")
ITERATIONS = 12
JOB = "rlhf-watched"
TIMELINE = "import json, ray, sys; ray.init(sys.argv[1], log_to_driver=False); json.dump(ray.timeline(), sys.stdout)"


@dataclass
class Head:
    """A Ray of its own token. api: of its jobs; gcs: what drivers join."""

    api: str
    gcs: str
    token: str
    env: dict[str, str]

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**self.env, **env},
                              check=False)

    def job(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.api}/api/jobs/{JOB}", headers={"Authorization": f"Bearer {self.token}"},
                           trust_env=False)
        return answer.raise_for_status().json()


@pytest.fixture
def head() -> Iterator[Head]:
    ports = [free_port() for _ in range(4)]
    with tempfile.TemporaryDirectory(prefix="rlhf-", ignore_cleanup_errors=True) as directory:  # short, for sockets
        token = Path(directory) / "token"
        token.write_text("0123456789abcdef" * 2)
        # As on a node of its own: no address of another cluster.
        env = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "RAY_AUTH_MODE": "token",
               "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=8", "--object-store-memory=200000000",
             f"--temp-dir={directory}/ray", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
             f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            found = Head(f"http://127.0.0.1:{ports[1]}", f"{socket.gethostbyname(socket.gethostname())}:{ports[0]}",
                         token.read_text(), env)
            yield found
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(family, timeout=30)
            for member in alive:
                member.kill()


def page(text: str) -> str:
    """What is shown of ppo, but for bars that rounding may have moved by one."""
    return re.sub("[▁-█]", "", text[text.index("ppo  iteration"):])


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except httpx.HTTPError:
            found = None
        if found:
            return found
        assert time.monotonic() < end, what
        time.sleep(0.3)


def test_a_job_is_watched_from_elsewhere(head, models, reward_model, files, tmp_path):  # noqa: F811
    earlier_stages(tmp_path, models[0], reward_model)
    command = [RLHF_RAY, "ppo", *SMALL, *files, f"model.path={models[0]}", f"output_dir={tmp_path}", "stages=[ppo]",
               "cluster=join", f"cluster.address={head.gcs}", "roles.policy.ranks=1", f"ppo.iterations={ITERATIONS}"]
    submit = [RAY, "job", "submit", f"--address={head.api}", f"--submission-id={JOB}", "--no-wait",
              '--metadata-json={"run": "mine", "owner": "ann"}', "--", *command]

    def log() -> str:
        return "".join(p.read_text()[-3000:] for p in Path(head.env["RAY_AUTH_TOKEN_PATH"]).parent.glob(
            f"ray/session_latest/logs/job-driver-{JOB}.log"))

    until(lambda: head.run(*submit).returncode == 0, "the head never came")
    assert "it has told nothing yet" in head.run(RLHF_RAY, "watch", f"job:{JOB}", f"--address={head.api}").stdout
    seen: dict[str, dict[str, str]] = {}

    def ended() -> bool:
        job = head.job()
        metadata = job["metadata"]
        if metadata.get("progress", "").endswith(f"/{ITERATIONS}"):
            seen[metadata["progress"]] = metadata
        return job["status"] in ("SUCCEEDED", "FAILED")

    until(lambda: len(seen) > 1 or ended(), "it never began", 150)
    live = head.run(RLHF_RAY, "watch", f"job:{JOB}", f"--address={head.api}")
    until(ended, "it never ended", 150)
    assert head.job()["status"] == "SUCCEEDED", log()

    # The metadata: what was there stays, progress moves, and there is an end to its size.
    last = head.job()["metadata"]
    assert len(seen) > 2 and last["run"] == "mine" and last["owner"] == "ann"
    assert last["progress"] == f"ppo {ITERATIONS}/{ITERATIONS}" and {"score", "kl"} <= set(last)
    assert max(len(m["overview"].encode()) for m in seen.values()) < 16_000
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    told = from_json(last["overview"])
    assert told.stages[-1].series["score"] == pytest.approx([row["score"] for row in rows], rel=1e-5)

    # What is shown is what the files show.
    assert live.returncode == 0, live.stderr
    assert re.search(rf"job {JOB}: running, told \d+ s ago", live.stdout)
    assert re.search(rf"ppo  iteration \d+ of {ITERATIONS}, .* left", live.stdout)
    after = head.run(RLHF_RAY, "watch", f"job:{JOB}", f"--address={head.api}").stdout
    here = head.run(RLHF_RAY, "watch", str(tmp_path)).stdout
    assert after.splitlines()[1].startswith(f"job {JOB}: succeeded")
    assert page(after) == page(here)
    (*_, last_sample) = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    assert f"samples of iteration {ITERATIONS}: score, prompt, response\n" in after
    assert f"\n{last_sample['score']:.2f}  {last_sample['prompt'].strip()}" in after

    # The timeline: every phase of every iteration, and who worked in it.
    events = json.loads(head.run(sys.executable, "-c", TIMELINE, head.gcs).stdout)
    boxes = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "rlhf"}
    phases = ("rollout", "score", "advantages", "update", "weight_sync", "checkpoint")
    assert set(boxes) == {f"iteration {k}: {phase}" for k in range(1, ITERATIONS + 1) for phase in phases}
    work = {e["cat"].removeprefix("task::"): (e["ts"], e["ts"] + e["dur"])
            for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["cat"].startswith("task::")}  # the last of each
    assert {"generator-0 rollout", "reward-0 scores", "reference-0 logprobs", "policy-0 score", "policy-0 prepare",
            "critic-0 values", "policy-0 update", "critic-0 update", "policy-0 push", "reward-0 samples"} <= set(work)
    for task, phase in (("generator-0 rollout", "rollout"), ("policy-0 update", "update"),
                        ("policy-0 push", "weight_sync")):
        (begins, ends), inside = boxes[f"iteration {ITERATIONS}: {phase}"], work[task]
        assert begins <= inside[0] and inside[1] <= ends
    actors = [e["cat"] for e in events if e["name"] == "__init__"]
    assert any(re.fullmatch(r"task::policy-0\.\d+:PolicyLearner\.__init__", name) for name in actors)

    # Mistakes.
    (wrong := tmp_path / "token").write_text("f" * 32)
    for job, address, env, says in (
        (JOB, head.api, {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "oken"),
        ("nobody", head.api, {}, "nobody does not exist"),
        (JOB, f"http://127.0.0.1:{free_port()}", {}, "Failed to connect to Ray"),
    ):
        done = head.run(RLHF_RAY, "watch", f"job:{job}", f"--address={address}", **env)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"rlhf-ray: error: job {job}: asked {address}: ") and says in done.stderr
