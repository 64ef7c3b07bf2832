"""The state of a run from its files: running, paused, failed, killed, finished, gone back."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from metrics.runs import NOW, begun, done, iteration, jsonl, lock, post_mortem, running, sample, text
from rlhf_ray.metrics.overview import (
    Actor,
    Overview,
    RunFiles,
    Sample,
    Saved,
    Stage,
    memory_of,
    newest_checkpoint,
    pace,
)
from rlhf_ray.stages.lock import locked


def stage(overview: Overview, name: str) -> Stage:
    return next(s for s in overview.stages if s.name == name)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_running_run(tmp_path: Path) -> None:
    seen = RunFiles(running(tmp_path)).read(NOW)
    assert seen.holder and seen.holder.pid == os.getpid() and seen.holder.alive
    assert seen.holder.command == "rlhf-ray pipeline output_dir=runs/a"
    assert [(s.name, s.state, s.step) for s in seen.stages] == [
        ("sft", "done", 10), ("compare", "done", 0), ("rm", "done", 10), ("ppo", "running", 12),
        ("eval", "waiting", 0)]
    sft, rm, ppo = (stage(seen, name) for name in ("sft", "rm", "ppo"))
    assert sft.seconds == 83.2 and sft.series["loss"][-1] == 4.0 and set(sft.series["accuracy"]) == {None}
    assert rm.series["accuracy"][-1] == 0.75
    assert (ppo.seconds, ppo.age_s, ppo.saved) == (125, 3, Saved(11, 7))
    assert ppo.series["score"] == [k / 10 for k in range(1, 13)]
    p = seen.policy
    assert p and (p.total, p.step_s, p.eta_s) == (40, 4.0, 112.0)  # 28 iterations of 4 s
    assert p.phases == {"rollout": 1.0, "update": 3.0}
    assert (p.restarts, p.rang, p.alarms, p.samples, p.paused) == (0, 0, [], [], None)


def test_pace_is_the_median_of_the_last_iterations(tmp_path: Path) -> None:
    """Of ten: five of 2 s, four of 4 s, one of 90 s for a replaced actor make 3 s; older ones do not count."""
    run, times = running(tmp_path), [50.0, 50.0, *[2.0] * 5, *[4.0] * 4, 90.0]
    jsonl(run / "ppo/metrics.jsonl", [iteration(k + 1, seconds={"rollout": s}) for k, s in enumerate(times)])
    p = RunFiles(run).read(NOW).policy
    assert p and (p.step_s, p.eta_s) == (3.0, 84.0)
    assert p.phases == {"rollout": pytest.approx(11.6)}  # (5 x 2 + 4 x 4 + 90) / 10
    assert pace([1, 2, 9], 10) == (2, 20)
    assert pace([1.0], -3) == (1.0, 0.0)
    assert pace([], 5) == (None, None)


def test_what_grows_is_seen(tmp_path: Path) -> None:
    files = RunFiles(running(tmp_path))
    before, sizes = files.read(NOW), files.sizes()
    with (tmp_path / "ppo/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 13, "score": 9.0}\n{"iteration": 14, "sc')
    assert files.sizes() != sizes
    after = files.read(NOW)
    assert (stage(before, "ppo").step, stage(after, "ppo").step) == (12, 13)
    assert stage(after, "ppo").series["score"][-1] == 9.0
    assert after.policy and after.policy.memory == [] and after.policy.restarts is None  # of a line without them


@pytest.mark.parametrize("written", [3, {"policy": 2, "generator": 1, "judge": 0}])  # before it was by role, and now
def test_replaced_actors_are_those_of_all_roles(written: Any, tmp_path: Path) -> None:
    run = running(tmp_path)
    jsonl(run / "ppo/metrics.jsonl", [iteration(1, restarts=written)])
    p = RunFiles(run).read(NOW).policy
    assert p and p.restarts == 3


def test_a_run_that_went_back(tmp_path: Path) -> None:
    """Three iterations are undone; the alarms of those with them."""
    run = running(tmp_path)
    rings = [{"name": "kl", "iteration": k, "value": 31.0, "threshold": 30.0, "action": "log", "message": f"high {k}"}
             for k in (4, 11)]
    jsonl(run / "ppo/alarms.jsonl", rings)
    files = RunFiles(run)
    seen = files.read(NOW)
    assert seen.policy and [a.iteration for a in seen.policy.alarms] == [4, 11]
    jsonl(run / "ppo/metrics.jsonl", [iteration(k) for k in range(1, 10)])
    jsonl(run / "ppo/alarms.jsonl", rings[:1])
    seen = files.read(NOW)
    assert stage(seen, "ppo").step == 9
    assert seen.policy and [(a.name, a.message) for a in seen.policy.alarms] == [("kl", "high 4")]


def test_the_newest_alarms_and_samples(tmp_path: Path) -> None:
    """Three alarms at most, of five; the samples of the last iteration that has any."""
    run = running(tmp_path)
    jsonl(run / "ppo/alarms.jsonl", [{"name": "kl", "iteration": k, "action": "log", "message": ""} for k in range(5)])
    jsonl(run / "ppo/samples.jsonl", [sample(11, "a", "b"), sample(12, "c", "d"), sample(12, "e", "f", score=None)])
    p = RunFiles(run).read(NOW).policy
    assert p and p.rang == 5 and [a.iteration for a in p.alarms] == [2, 3, 4]
    assert p.samples == [Sample(12, "c", "d", 1.5, 7), Sample(12, "e", "f", None, 7)]
    text(run / "ppo/samples.jsonl", '{"iteration": 12, "prompt": "c"}\n')
    p = RunFiles(run).read(NOW).policy
    assert p and p.samples == []  # of another version


def test_a_paused_run(tmp_path: Path) -> None:
    text(running(tmp_path) / "ppo/PAUSED", "iteration 12\nKL is 31\nentropy is 0.1\n")
    p = RunFiles(tmp_path).read(NOW).policy
    assert p and p.paused == "iteration 12: KL is 31: entropy is 0.1"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    """A post-mortem of an earlier attempt does not make this one a failure."""
    run = running(tmp_path)
    early = post_mortem(run, "ppo", "20270115-070000", "old\n", 3600)
    assert stage(RunFiles(run).read(NOW), "ppo").state == "running"
    late = post_mortem(run, "ppo", "20270115-080500", "The kernel killed\npolicy-0.\n", 10)
    text(run / ".lock", "")
    seen = RunFiles(run).read(NOW)
    ppo = stage(seen, "ppo")
    assert (ppo.state, ppo.why, ppo.post_mortems) == ("failed", "The kernel killed policy-0.", [early, late])
    assert seen.holder is None
    assert seen.policy and seen.policy.step_s == 4.0 and seen.policy.eta_s is None
    begun(run, "ppo", 5)  # the same command again
    lock(run, os.getpid(), 6)
    assert stage(RunFiles(run).read(NOW), "ppo").state == "running"


def test_how_an_unfinished_stage_ended(tmp_path: Path, dead: int) -> None:
    run = running(tmp_path)
    text(run / ".lock", "")  # let go: interrupted, or stopped by an error of one line
    assert stage(RunFiles(run).read(NOW), "ppo").state == "stopped"
    lock(run, dead, 600)  # not let go
    seen = RunFiles(run).read(NOW)
    assert stage(seen, "ppo").state == "killed"
    assert seen.holder and seen.holder.alive is False
    lock(run, dead, 600, host="node-7.example")  # whose processes cannot be seen from here
    seen = RunFiles(run).read(NOW)
    assert stage(seen, "ppo").state == "running"
    assert seen.holder and seen.holder.alive is None
    lock(run, os.getpid(), 0)  # a new command that has not come to ppo yet
    assert stage(RunFiles(run).read(NOW), "ppo").state == "stopped"
    lock(run, os.getpid(), 10**9)  # another process of that number: this one is younger than the lock
    assert RunFiles(run).read(NOW).holder.alive is False  # type: ignore[union-attr]


def test_to_look_does_not_keep_a_run_from_its_lock(tmp_path: Path) -> None:
    running(tmp_path)
    files = RunFiles(tmp_path)
    files.read(NOW)
    with locked(tmp_path):
        holder = files.read(NOW).holder
        assert holder and holder.pid == os.getpid() and holder.alive


def test_a_finished_run(tmp_path: Path) -> None:
    run = running(tmp_path)
    text(run / ".lock", "")
    done(run, "ppo", 177.0)
    done(run, "eval", 70.0)
    seen = RunFiles(run).read(NOW)
    assert {s.state for s in seen.stages} == {"done"}
    assert stage(seen, "ppo").seconds == 177.0
    assert seen.policy and seen.policy.eta_s is None


def test_what_is_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    run = running(tmp_path)
    text(run / "ppo/config.yaml", "ppo: {iterations: 4", 100)
    files = RunFiles(run)
    seen = files.read(NOW)
    assert seen.policy and seen.policy.total is None and seen.policy.eta_s is None
    begun(run, "ppo", 99, iterations=20)
    seen = files.read(NOW)
    assert seen.policy and seen.policy.total == 20
    text(run / ".lock", '{"pid": 1')
    assert files.read(NOW).holder is None


def test_memory_grows_over_its_least_in_the_warm_up() -> None:
    rows = [{"policy-0": 2.2, "critic-0": 1.0}, {"policy-0": 2.0, "critic-0": 1.0}, {"policy-0": 3.0, "judge-0": 1.0}]
    assert memory_of(rows, 2) == [Actor("policy-0", 3.0, 0.5), Actor("judge-0", 1.0, None)]
    assert memory_of(rows[:2], 2)[0] == Actor("policy-0", 2.0, None)  # not over yet
    assert memory_of([], 2) == []


def test_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none", NOW) is None
    text(tmp_path / "step-00000009/manifest.json", "{}", 30)
    text(tmp_path / "step-00000010/manifest.json", "{}", -5)  # a clock that is ahead
    (tmp_path / "step-00000011").mkdir()  # is being deleted
    (tmp_path / "step-x").mkdir()
    assert newest_checkpoint(tmp_path, NOW) == Saved(10, 0.0)


def test_is_it_a_run(tmp_path: Path) -> None:
    assert not RunFiles(tmp_path / "none").exist()
    (tmp_path / "sft").mkdir()
    assert not RunFiles(tmp_path).exist()
    begun(tmp_path, "sft", 0)
    assert RunFiles(tmp_path).exist()
