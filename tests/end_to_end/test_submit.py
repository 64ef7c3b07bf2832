"""Jobs on a real Ray head with a token: submitted, followed, refused, stopped, gone on with, waiting for each other."""

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray._raylet import AuthenticationTokenLoader, Config
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors, list_nodes, list_placement_groups

from end_to_end.small import earlier_stages
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files  # noqa: F401 - files is a fixture
from rlhf_ray.cluster.runtime import free_port

ROOT = Path(__file__).parents[2]
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
         "runtime-env-agent-port", "ray-client-server-port")


@dataclass
class Head:
    """A Ray head of our own. env: of whoever may use it."""

    address: str
    gcs: str
    env: dict[str, str]

    def submit(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        return self._run([RLHF_RAY, "submit", "--address", self.address, *words], cwd, env)

    def ray_job_submit(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Ray's own command, which does not find the token by itself."""
        return self._run(["ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", "rlhf-ray",
                          *words], cwd, {"RAY_AUTH_MODE": "token"})

    def start_node(self, before: str) -> subprocess.Popen[bytes]:
        """A node with mounts of its own. before: for a shell."""
        ports = " ".join(f"--{name}={free_port()}" for name in PORTS[2:-1])
        return subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f"{before} && exec ray start --block --address={self.gcs} --num-cpus=2 "
             f"--object-store-memory={2**27} {ports}"],
            env=self.env | {"RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _run(self, command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=cwd, env=self.env | env, text=True, capture_output=True, timeout=400,
                              check=False)

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    ports = {name: free_port() for name in PORTS}
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {
        "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temp, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=8",
             f"--object-store-memory={2**28}", f"--temp-dir={temp}", "--dashboard-host=127.0.0.1",
             *(f"--{name}={port}" for name, port in ports.items())],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        patch.setenv("RAY_AUTH_MODE", "token")  # this process asks the cluster, too
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        forget_the_token()
        head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}", env)
        try:
            wait_for(lambda: answers(head), 60)
            yield head
        finally:
            process.terminate()
            process.wait(30)
    forget_the_token()


def forget_the_token() -> None:
    """Ray keeps the first token and the first mode that a process had."""
    AuthenticationTokenLoader.instance().reset_cache()
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


def test_a_job_is_followed_and_its_exit_status_handed_back(head, ppo, tmp_path):
    """output_dir is relative to where one is."""
    done = head.submit("compare", *ppo[0], "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\ncompare: output_dir={tmp_path}/run\n" in done.stdout and "compare done in" in done.stdout
    assert (tmp_path / "run/compare/comparisons.jsonl").is_file()
    job, = head.client().list_jobs()
    assert job.submission_id.startswith("rlhf-compare-run-") and job.status == "SUCCEEDED"
    assert {"stage": "compare", "run": "run"}.items() <= job.metadata.items()
    done = head.submit("ppo", *ppo[0], "output_dir=elsewhere", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/elsewhere/sft has no finished sft" in done.stdout
    assert done.stdout.endswith(": failed with exit status 2\n")


@pytest.mark.parametrize(("words", "env", "says"), [
    ([], {"RAY_AUTH_TOKEN": "f" * 64}, "the cluster refuses the token"),
    ([], {"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "the cluster asks for a token: copy ~/.ray/auth_token"),
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
    """With files of one's own; stopped with Ctrl-C and an answer; then the same by `ray job submit` as it stands."""
    overrides, out = ppo
    (tmp_path / "rewards.py").write_text("def brevity(prompts, responses, metadata):\n"
                                         "    return [-float(len(r)) for r in responses]\n")
    (tmp_path / "tell.jsonl").write_text("".join(json.dumps({"prompt": f"tell {i}"}) + "\n" for i in range(20)))
    overrides += ["reward.sources=[model,rewards:brevity]", "data.ppo_prompts=tell.jsonl"]
    metrics, (screen, terminal) = out / "ppo/metrics.jsonl", pty.openpty()
    process = subprocess.Popen([RLHF_RAY, "submit", "--address", head.address, "ppo", *overrides, "ppo.iterations=99"],
                               cwd=tmp_path, env=head.env, stdin=terminal, stdout=terminal, stderr=terminal)
    try:
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 200)
        process.send_signal(signal.SIGINT)
        os.write(screen, b"s\n")
        assert process.wait(120) == 143
    finally:
        process.kill()
        os.close(terminal)
        os.close(screen)
    saved = len(metrics.read_text().splitlines())
    assert saved < 99
    assert_nothing_is_left(head)
    done = head.ray_job_submit("ppo", *overrides, f"ppo.iterations={saved + 2}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"going on after iteration {saved}\n" in done.stdout
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [*range(1, saved + 3)]


def test_jobs_of_a_sweep_wait_for_each_other(head, ppo, tmp_path):
    """Each takes all of the head's slots."""
    done = head.submit("-m", "sft", *ppo[0], "seed=1,2", "roles.supervised.ranks=1", "roles.supervised.cpus=8",
                       "output_dir=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for variant in ("seed=1", "seed=2"):
        assert f"{variant}: succeeded" in done.stdout
        assert (tmp_path / "runs" / variant / "sft/stage.json").is_file()
    assert_nothing_is_left(head)


def test_nodes_that_lack_something_are_named_and_nothing_is_left(head, ppo, tmp_path):
    """Other mounts make other machines of this one: no package, no DeepSpeed, no shared directory, none to write to."""
    overrides, out = ppo
    may = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if may.returncode:
        pytest.skip(f"mount namespaces are not permitted: {may.stderr.strip()}")
    installed = subprocess.run([sys.executable, "-c", "import rlhf_ray; print(rlhf_ray.__path__[0])"], cwd="/",
                               env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=True)
    packages = " ".join({str(ROOT / "rlhf_ray"), installed.stdout.strip()})  # from both it can be imported here
    deepspeed, = Path(sys.prefix).glob("lib/python*/site-packages/deepspeed-*.dist-info")
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for before in (f"for package in {packages}; do mount -t tmpfs tmpfs $package; done",
                       f"mount -t tmpfs tmpfs {deepspeed}", f"mount -t tmpfs tmpfs {out}",
                       f"mount --bind {out} {out} && mount -o remount,ro,bind {out}"):
            nodes.append(head.start_node(before))
            # One after the other: nodes that start at once on one machine are in each other's way.
            wait_for(lambda: sum(node.state == "ALIVE" for node in list_nodes(head.address)) == len(nodes) + 1, 60)
        done = head.submit("sft", *overrides, "roles.supervised.ranks=5", "cluster.strategy=STRICT_SPREAD", cwd=out)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(30)
    assert done.returncode == 2, done.stdout[-3000:]
    for says in ("has no rlhf_ray: install it there", "has other packages than the driver: no deepspeed (",
                 "does not share output_dir", "cannot write to output_dir, "):
        lines = [line for line in done.stdout.splitlines() if says in line]
        assert len(lines) == 1 and lines[0].startswith("rlhf-ray: error: node "), done.stdout
    assert_nothing_is_left(head)
    assert not list((out / "sft").glob(".seen*"))


def assert_nothing_is_left(head):
    assert not [a.class_name for a in list_actors(head.address) if a.state != "DEAD"]
    assert not [g.placement_group_id for g in list_placement_groups(head.address) if g.state != "REMOVED"]
