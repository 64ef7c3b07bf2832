"""output_dir is a URL: nothing of a machine is needed but what it has published."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from end_to_end.small import earlier_stages
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files  # noqa: F401 - files is a fixture
from end_to_end.test_resume import Kill, kill_everything, metrics, weights
from rlhf_ray.config.load import compose
from rlhf_ray.errors import UserError
from rlhf_ray.stages import lock, ppo
from rlhf_ray.storage import CACHE, local_root

PPO = [*(option for option in SMALL if not option.startswith("algorithm")), "stages=[ppo]", "roles.policy.ranks=1",
       "algorithm=reinforce_pp", "algorithm.minibatch_size=8", "algorithm.ema_decay=0.9", "ppo.iterations=6",
       "logging.wandb=disabled"]


def start(url: str, cache: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen([RLHF_RAY, "ppo", *PPO, f"output_dir={url}", *options], stdout=file, stderr=file,
                                text=True, start_new_session=True, env={**os.environ, CACHE: str(cache)})


@contextmanager
def node(cluster: Cluster, before: str) -> Iterator[int]:
    """One that has mounts of its own, made by `before`, and so a disk that nobody else sees. Its process id."""
    ray_start = f"ray start --block --address={cluster.address} --num-cpus=8 --object-store-memory={2**28}"
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", f"{before} && exec {ray_start}"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    try:
        deadline = time.monotonic() + 60
        while sum(n["Alive"] for n in ray.nodes()) < 2:
            assert time.monotonic() < deadline, "the node does not come up"
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)
        while sum(n["Alive"] for n in ray.nodes()) > 1:
            time.sleep(0.2)


def test_others_go_on_exactly(models, reward_model, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Killed, and its disk gone: the same run goes on where driver and actors are on two other machines, and comes to
    the weights and metrics of an undisturbed one. A node without room for a copy is named."""
    may = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if may.returncode:
        pytest.skip(f"mount namespaces are not permitted: {may.stderr.strip()}")
    options = [*files, f"model.path={models[0]}"]
    plain, there, log = tmp_path / "plain", tmp_path / "bucket/run", tmp_path / "log"
    for directory in (plain, there):
        earlier_stages(directory, models[0], reward_model)
    for stage in ("sft", "rm"):  # an object store has no links
        model = there / stage / "model"
        shutil.copytree(model.resolve(), tmp_path / stage)
        model.unlink()
        (tmp_path / stage).rename(model)
    url, first, second = f"file://{there}", tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv(CACHE, str(first))
    process = start(url, first, log, *options)
    Kill(3, 0.3).wait(process, local_root(url) / "ppo/metrics.jsonl")
    assert process.poll() is None, log.read_text()[-3000:]
    kill_everything(process)
    shutil.rmtree(first)

    monkeypatch.setenv(CACHE, str(second))
    monkeypatch.setattr(lock, "SILENCE_S", lock.BEAT_S + 1)
    second.mkdir()
    copy = local_root(url)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**28})
    try:
        cfg = compose([*PPO, f"output_dir={url}", *options])
        cfg.cluster.address = cluster.address
        ray.init(cluster.address, log_to_driver=False)
        with node(cluster, f"mount -t tmpfs -o ro tmpfs {second}"):
            with pytest.raises(UserError, match=f"^node .* cannot use output_dir={url}: cannot make its copy {second}"):
                ppo.run(cfg)
        with node(cluster, f"mount -t tmpfs tmpfs {second}") as pid:
            ppo.run(cfg)
            ppo.run(replace(cfg, output_dir=str(plain)))
            kept = subprocess.run(["nsenter", "-t", str(pid), "-m", "find", copy, "-name", "*.safetensors"],
                                  capture_output=True, text=True, check=True).stdout.splitlines()
    finally:
        ray.shutdown()
        cluster.shutdown()

    said = capsys.readouterr().out
    assert "going on after iteration" in said and "waiting 6 s for a sign of its life" in said
    assert metrics(there, "ppo") == metrics(plain, "ppo")
    assert weights(there, "ppo") == weights(plain, "ppo")
    assert {p.name for p in (there / "ppo/checkpoints").iterdir()} == {"step-00000005", "step-00000006"}
    assert not [p for p in there.rglob(".*") if p.is_file()]  # the lock is free
    assert not list(copy.rglob("*.safetensors"))  # the driver needs none, and no disk fills up
    kept_there = {str(Path(path).parent.relative_to(copy)) for path in kept} - {"sft/model", "rm/model", "ppo/model"}
    assert len(kept_there) <= 1 and all(name.startswith("ppo/checkpoints/") for name in kept_there)  # it was restored


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "file:///dev/null/run"])
def test_a_url_that_cannot_be_written_is_one_line_before_anything_starts(url, models, files, tmp_path):  # noqa: F811
    log, began = tmp_path / "log", time.monotonic()
    assert start(url, tmp_path, log, *files, f"model.path={models[0]}").wait(timeout=60) == 2
    (line,) = [text for text in log.read_text().splitlines() if not text.startswith("ppo: output_dir=")]
    assert line.startswith(f"rlhf-ray: error: output_dir: cannot write {url}/.probe-") and time.monotonic() - began < 30
