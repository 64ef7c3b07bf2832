"""Jobs on a real Ray head with a token: submitted, followed, refused, stopped, and gone on with."""

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors, list_placement_groups

from end_to_end.small import earlier_stages
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files  # noqa: F401 - files is a fixture
from rlhf_ray.cluster.group import free_port

ROOT = Path(__file__).parents[2]
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
         "runtime-env-agent-port", "ray-client-server-port")


@dataclass
class Head:
    """A Ray head of our own. env: of whoever may use it."""

    address: str
    env: dict[str, str]
    run: list[str] = field(default_factory=list)  # overrides of a small run of ppo

    def submit(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([RLHF_RAY, "submit", "--address", self.address, *words], cwd=cwd, env=self.env | env,
                              text=True, capture_output=True, timeout=400, check=False)

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    ports = {name: free_port() for name in PORTS}
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    env = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temp, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=8",
             f"--object-store-memory={2**28}", f"--temp-dir={temp}", "--dashboard-host=127.0.0.1",
             *(f"--{name}={port}" for name, port in ports.items())],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, env[name])
        from ray._raylet import Config

        Config.initialize("")  # this process sends the token, too
        head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", env)
        try:
            wait_for(lambda: answers(head), 60)
            yield head
        finally:
            process.terminate()
            process.wait(30)
    Config.initialize("")


def answers(head: Head) -> bool:
    try:
        return bool(head.client().get_version())
    except ConnectionError:
        return False


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.3)


@pytest.fixture
def ppo(models, reward_model, files, tmp_path) -> tuple[list[str], Path]:  # noqa: F811
    """Overrides of a small run of the ppo stage, and its directory, where the stages before it are done."""
    out = tmp_path / "run"
    earlier_stages(out, models[0], reward_model)
    return [*SMALL, *files, f"model.path={models[0]}", "roles.policy.ranks=1", "stages=[ppo]", f"output_dir={out}"], out


def test_a_job_is_followed_to_its_end(head, ppo, tmp_path):
    """From a directory with files of one's own, which go along; output_dir is relative to it."""
    overrides, out = ppo
    (tmp_path / "rewards.py").write_text("def brevity(prompts, responses, metadata):\n"
                                         "    return [-float(len(r)) for r in responses]\n")
    (tmp_path / "tell.jsonl").write_text("".join(json.dumps({"prompt": f"tell {i}"}) + "\n" for i in range(20)))
    (tmp_path / ".gitignore").write_text("*.jsonl\n")
    done = head.submit("ppo", *overrides, "output_dir=run", "data.ppo_prompts=tell.jsonl",
                       "reward.sources=[model,rewards:brevity]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"output_dir={out}" in done.stdout and "ppo done in" in done.stdout
    assert len((out / "ppo/metrics.jsonl").read_text().splitlines()) == 2
    job, = head.client().list_jobs()
    assert job.submission_id.startswith("rlhf-ppo-run-") and job.status == "SUCCEEDED"
    assert {"stage": "ppo", "run": "run"}.items() <= job.metadata.items()


def test_the_exit_status_is_the_drivers(head, ppo, tmp_path):
    done = head.submit("ppo", *ppo[0], "output_dir=elsewhere", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/elsewhere/sft has no finished sft" in done.stdout
    assert done.stdout.endswith(": failed with exit status 2\n")


@pytest.mark.parametrize(("words", "env", "says"), [
    ([], {"RAY_AUTH_TOKEN": "f" * 64}, "the cluster refuses the token"),
    ([], {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "the cluster asks for a token"),
    ([], {"RAY_AUTH_MODE": "disabled"}, "the cluster asks for a token: set RAY_AUTH_MODE=token"),
    (["roles.policy.gpus=1", "roles.generator.gpus=1"], {}, "gpus: 2 wanted, 0 offered"),
    (["roles.policy.cpus=9"], {}, "no room for 1 of 1 policy: 9 cpus"),
])
def test_what_is_wrong_is_said_before_anything_is_sent(head, ppo, tmp_path, words, env, says):
    before = head.client().list_jobs()
    done = head.submit("ppo", *ppo[0], *words, cwd=tmp_path, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert head.client().list_jobs() == before


def test_a_job_that_is_stopped_saves_leaves_nothing_and_goes_on(head, ppo, tmp_path):
    """By `ray job submit` as it stands; stopped with Ctrl-C and an answer; then the same command."""
    overrides, out = ppo
    metrics = out / "ppo/metrics.jsonl"
    screen, terminal = pty.openpty()
    process = subprocess.Popen([RLHF_RAY, "submit", "--address", head.address, "ppo", *overrides, "ppo.iterations=99"],
                               cwd=tmp_path, env=head.env, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 200)
        process.send_signal(signal.SIGINT)
        os.write(screen, b"s\n")
        assert process.wait(120) == 143, os.read(screen, 100_000).decode()
    finally:
        process.kill()
        shown = os.read(screen, 100_000).decode()
        os.close(screen)
    assert "only stop watching (w)?" in shown
    saved = len(metrics.read_text().splitlines())
    assert (out / f"ppo/checkpoints/step-{saved:06d}").is_dir() or list((out / "ppo/checkpoints").iterdir())
    assert not [a for a in list_actors(head.address) if a.state != "DEAD"]
    assert not [g for g in list_placement_groups(head.address) if g.state != "REMOVED"]
    done = subprocess.run(["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "rlhf-ray",
                           "ppo", *overrides, f"ppo.iterations={saved + 2}"], cwd=tmp_path, env=head.env, text=True,
                          capture_output=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"going on after iteration {saved} of {saved + 2}" in done.stdout
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [*range(1, saved + 3)]


def test_a_plain_job_must_not_write_where_ray_deletes(head, ppo, tmp_path):
    done = subprocess.run(["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "rlhf-ray",
                           "ppo", *ppo[0], "output_dir=run"], cwd=tmp_path, env=head.env, text=True,
                          capture_output=True, timeout=400, check=False)
    assert done.returncode == 1
    assert "output_dir=run would lie in the working directory of this Ray job" in done.stdout
