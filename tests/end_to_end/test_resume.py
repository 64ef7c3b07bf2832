"""Killed at any moment, the same command goes on as if nothing had happened. CHAOS_KILLS=20 makes it a long test."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from chaos.harness import CLOCKED
from end_to_end.small import earlier_stages, ppo_config, ray_processes
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files, write_jsonl  # noqa: F401 - files is a fixture
from rlhf_ray.errors import UserError
from rlhf_ray.stages import ppo

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))


def start(stage: str, out: Path, *options: str) -> subprocess.Popen[str]:
    with (out / "log").open("a") as log:
        return subprocess.Popen([RLHF_RAY, stage, *SMALL, f"stages=[{stage}]", f"output_dir={out}", *options],
                                stdout=log, stderr=log, text=True, start_new_session=True)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_everything(process: subprocess.Popen[str]) -> None:
    """Driver, Ray, every actor: as when a machine loses its power."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


def run_until(progress: Path, count: int, delay: float, process: subprocess.Popen[str]) -> bool:
    """Whether the process still runs when `progress` has so many lines, and a moment later."""
    while process.poll() is None and lines(progress) < count:
        time.sleep(0.02)
    time.sleep(delay)
    return process.poll() is None


def interrupted(stage: str, out: Path, progress: Path, moments: list[tuple[int, float, int]], *options: str,
                between: object = None) -> None:
    """Run the stage to its end through kills at (lines of progress, seconds after them, signal)."""
    out.mkdir(parents=True, exist_ok=True)
    for i, (count, delay, number) in enumerate(moments):
        process = start(stage, out, *options)
        if not run_until(progress, count, delay, process):
            assert process.returncode == 0, (out / "log").read_text()[-3000:]
            continue
        if number == signal.SIGKILL:
            kill_everything(process)
        else:
            before = ray_processes()
            process.send_signal(number)
            assert process.wait(timeout=120) == 143, (out / "log").read_text()[-3000:]
            time.sleep(2)
            assert not ray_processes() & before  # nothing of ours is left
        if callable(between):
            between(i)
    process = start(stage, out, *options)
    assert process.wait(timeout=600) == 0, (out / "log").read_text()[-3000:]


def metrics(out: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def weights(out: Path, stage: str) -> bytes:
    return (out / stage / "model/model.safetensors").read_bytes()


def test_ppo_goes_on_exactly(models, reward_model, files, tmp_path):  # noqa: F811
    """kill -9 of everything, a SIGTERM, and a newest checkpoint that is damaged: same weights, same metrics."""
    iterations = max(12, 2 * KILLS)
    options = [*files, f"model.path={models[0]}", "roles.policy.ranks=1", f"ppo.iterations={iterations}",
               "algorithm.ema_decay=0.9", "algorithm.kl_target=2"]
    plain, out = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, out):
        earlier_stages(directory, models[0], reward_model)
    interrupted("ppo", plain, plain / "none", [], *options)
    rng = random.Random(0)
    counts = sorted(rng.choices(range(1, iterations), k=KILLS))
    moments = [(n, rng.uniform(0, 0.6), signal.SIGKILL) for n in counts]
    moments[KILLS // 2] = (*moments[KILLS // 2][:2], signal.SIGTERM)
    checkpoints = out / "ppo/checkpoints"

    def damage(i: int) -> None:
        if i == 1 and (found := sorted(checkpoints.glob("step-*/critic*"))):
            found[-1].write_bytes(found[-1].read_bytes()[:-1])

    interrupted("ppo", out, out / "ppo/metrics.jsonl", moments, *options, between=damage)
    log = (out / "log").read_text()
    assert "going on after iteration" in log and "bytes instead of" in log
    assert metrics(out, "ppo") == metrics(plain, "ppo")  # no line missing, none doubled, every prompt as it was
    assert (out / "ppo/samples.jsonl").read_bytes() == (plain / "ppo/samples.jsonl").read_bytes()
    assert weights(out, "ppo") == weights(plain, "ppo")


def test_sft_goes_on_exactly(models, files, tmp_path):  # noqa: F811
    options = [*files, f"model.path={models[0]}", "roles.supervised.ranks=1", "sft.epochs=12", "sft.batch_size=8",
               "sft.dropout=0.1", "checkpoint.seconds=0"]
    plain, out = tmp_path / "plain", tmp_path / "killed"
    interrupted("sft", plain, plain / "none", [], *options)
    interrupted("sft", out, out / "sft/metrics.jsonl", [(3, 0.1, signal.SIGKILL), (20, 0.0, signal.SIGTERM)], *options)
    assert metrics(out, "sft") == metrics(plain, "sft")
    assert weights(out, "sft") == weights(plain, "sft")
    assert not (out / "sft/checkpoints").exists()  # done


def test_compare_samples_nothing_twice(models, files, tmp_path):  # noqa: F811
    prompts = write_jsonl(tmp_path / "many.jsonl", [{"prompt": f"tell of {i} and {i * i}"} for i in range(320)])
    options = [*files, f"model.path={models[0]}", "compare.ranker=people", "compare.prompts=320",
               f"data.compare_prompts={prompts}"]
    plain, out = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, out):
        earlier_stages(directory, models[0], models[0])
    interrupted("compare", plain, plain / "none", [], *options)
    interrupted("compare", out, out / "compare/answers.jsonl", [(3, 0.0, signal.SIGKILL)], *options)
    assert (out / "compare/to_rank.jsonl").read_bytes() == (plain / "compare/to_rank.jsonl").read_bytes()
    assert not list((out / "compare").glob("answers*"))


def test_a_changed_configuration_is_refused_and_more_ranks_are_not(ray_session, models, reward_model, tmp_path):
    def config(iterations: int):
        cfg = ppo_config(tmp_path, models[0], "ppo")
        cfg.ppo.iterations = iterations
        return cfg

    earlier_stages(tmp_path, models[0], reward_model)
    ppo.run(config(3))
    (tmp_path / "ppo/stage.json").unlink()  # as if it had been cut off
    changed = config(6)
    changed.rollout.temperature, changed.algorithm.kl_coef = 0.5, 0.7
    with pytest.raises(UserError) as refused:
        ppo.run(changed)
    assert "rollout.temperature was" in str(refused.value) and "algorithm.kl_coef was" in str(refused.value)
    assert "resume=never" in str(refused.value)
    more = config(6)
    more.roles.policy.ranks = more.roles.critic.ranks = 2  # the shards of one rank, cut for two
    ppo.run(more)
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    one = tmp_path / "one"
    whole = ppo_config(one, models[0], "ppo")
    whole.ppo.iterations = 6
    earlier_stages(one, models[0], reward_model)
    ppo.run(whole)
    expected = [json.loads(line) for line in (one / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [r["score"] for r in rows] == pytest.approx([r["score"] for r in expected], rel=5e-3, abs=2e-3)
