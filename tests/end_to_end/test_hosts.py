"""Three hosts, a real Ray with tokens, `ray job submit`; the power of one host is cut in mid-run.

Beside test_node_loss.py, which needs no root: nodes with addresses, names and process numbers of their own, so that
what only works within one machine fails; the job API; and a node that says nothing when it goes, not even that its
connections are closed.

HOSTS_QUICKSTART names the output_dir of a finished quickstart: then its ppo stage is run, not a tiny one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from end_to_end.hosts import Host, NotAllowed, network
from end_to_end.small import earlier_stages, until
from end_to_end.test_pipeline import SMALL, files  # noqa: F401 - files is a fixture

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
API = "http://127.0.0.1:8265"
OBJECTS = 8076  # the port where a node's object store answers the others
START = ("ray", "start", "--block", "--num-cpus=4", f"--object-store-memory={2**28}", "--disable-usage-stats",
         f"--object-manager-port={OBJECTS}")
AT_WORK = {"policy": "PolicyLearner", "critic": "CriticLearner", "generator": "Generator", "reward": "RewardModel",
           "reference": "ReferenceModel"}
ROLES = set(AT_WORK.values())


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    """A cluster of three, the head first, of 4 CPU slots each. It gives a silent node up after 6 s, not a minute, and
    sends no array inside an answer, however small: what is read elsewhere goes from object store to object store."""
    token = tmp_path / "token"
    token.write_text(os.urandom(32).hex())
    for name, value in (("AUTH_MODE", "token"), ("AUTH_TOKEN_PATH", token), ("health_check_period_ms", 1000),
                        ("health_check_timeout_ms", 2000), ("health_check_failure_threshold", 3),
                        ("max_direct_call_object_size", 100)):
        monkeypatch.setenv(f"RAY_{name}", str(value))
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    try:
        with network(["head", "alpha", "beta"], tmp_path) as made:
            head = made[0]
            for host in made:
                place = (f"--node-ip-address={host.address}", "--head") if host is head else (
                    f"--address={head.address}:6379",)
                file = tmp_path / f"{host.name}.log"
                with file.open("w") as log:
                    subprocess.Popen(host.command(*START, *place), stdout=log, stderr=log)
                if host is not made[1]:  # the workers start side by side
                    until(lambda file=file: "runtime started" in file.read_text(), f"{file}: Ray does not start")
            yield made
    except NotAllowed as why:
        pytest.skip(f"namespaces are not allowed: {why}")


def roles(host: Host) -> dict[str, list[int]]:
    """Process numbers of the actors on a host, by class: idle they have its name, at work that of their role."""
    found = [(int(pid), AT_WORK.get(name, name))
             for pid, name in re.findall(r"(\d+) ray::(\w+)", host.run("ps", "-eo", "pid,args"))]
    return {name: [pid for pid, other in found if other == name] for _, name in found if name in ROLES}


def crossed(hosts: list[Host]) -> tuple[dict[tuple[str, int], int], int]:
    """Bytes from one host to another so far: what each generator (host, pid) got from a policy learner, and what all
    object stores got from each other."""
    policies, generators = ({(h.address, pid) for h in hosts for pid in roles(h).get(name, ())}
                            for name in ("PolicyLearner", "Generator"))
    seen = [(h.address, c) for h in hosts for c in h.connections() if c.here[0] != c.there[0]]
    of_policies = {c.here for host, c in seen if (host, c.pid) in policies}
    weights: dict[tuple[str, int], int] = defaultdict(int)
    for host, c in seen:
        if (host, c.pid) in generators and c.there in of_policies:
            weights[host, c.pid] += c.received
    return weights, sum(c.received for _, c in seen if OBJECTS in (c.here[1], c.there[1]))


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "ppo/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def prepared(run: Path, small: list[str], models: list[str], reward_model: str) -> list[str]:
    """As if the stages before ppo had been; returns what ppo has to be told."""
    if before := os.environ.get("HOSTS_QUICKSTART"):
        for stage in ("sft", "rm"):
            shutil.copytree(Path(before) / stage, run / stage)
        return ["ppo.iterations=20"]
    earlier_stages(run, models[0], reward_model)
    return [*(o for o in SMALL if o != "cluster=local"), *small, "stages=[ppo]", f"model.path={models[0]}",
            "ppo.iterations=20", "cluster.attempts=2"]


def test_roles_spread_over_hosts_and_one_host_falls_silent(hosts, models, reward_model, files, tmp_path):  # noqa: F811
    head, run = hosts[0], tmp_path / "run"
    stranger = subprocess.run(head.command(sys.executable, "-c", f"import httpx; print(httpx.get('{API}/api/jobs/'))"),
                              capture_output=True, text=True)
    assert "401" in stranger.stdout, stranger

    options = prepared(run, files, models, reward_model)
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen(head.command(
            "ray", "job", "submit", "--address", API, "--working-dir", str(CHECKOUT), "--", "rlhf-ray", "ppo", *options,
            f"output_dir={run}", "cluster=join", "cluster.strategy=SPREAD", "roles.generator.replicas=2",
        ), stdout=log, stderr=log)

    def told() -> str:
        return (tmp_path / "job.log").read_text()[-4000:]

    until(lambda: job.poll() is not None or len(rows(run)) >= 2, told, 240)
    before, (_, stored) = len(rows(run)), crossed(hosts)
    until(lambda: job.poll() is not None or len(rows(run)) >= before + 2, told, 60)
    done = len(rows(run))
    assert job.poll() is None, told()
    where = {host.name: roles(host) for host in hosts}
    assert all(where.values()), where  # a role on every host
    synced, stored_later = crossed(hosts)
    size = 4 * sum(weight.numel() for weight in load_file(run / "sft/model/model.safetensors").values())
    print(where, dict(synced), size, stored, stored_later)
    assert synced and min(synced.values()) >= (done + 1) * size  # one push before the first iteration
    # No host has all who read what both generators made: of every batch, at least the ids and log-probabilities of one
    # generator's responses go to another's object store.
    responses = sum(row["response_length"] * 16 for row in rows(run)[before:done])
    assert stored_later - stored >= responses / 2 * 8 > 0

    # A worker with a policy rank; one without a generator, if there is: nobody else says then that the host is gone.
    lost = min((h for h in hosts[1:] if "PolicyLearner" in where[h.name]), key=lambda h: "Generator" in where[h.name])
    lost.off()
    assert job.wait(timeout=500) == 0, told()
    assert [row["iteration"] for row in rows(run)] == list(range(1, 21)), told()
    record = json.loads((run / "ppo/stage.json").read_text())
    assert {actor["node"] for actor in record["actors"]} == {host.address for host in hosts}
    waiting = "Generator" not in where[lost.name]  # the other rank, for the lost one, in the middle of a collective
    assert record["restarts"]["policy"] in ((2,) if waiting else (1, 2)), told()
    assert not any(roles(host) for host in hosts if host is not lost)
