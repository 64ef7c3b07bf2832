"""Killed at any moment, the same command goes on as if nothing had happened. CHAOS_KILLS=20 makes it a long test."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from chaos.harness import CLOCKED, results
from end_to_end.small import earlier_stages, ppo_config, ray_processes
from end_to_end.test_pipeline import RLHF_RAY, SMALL, files, write_jsonl  # noqa: F401 - files is a fixture
from rlhf_ray.config.load import compose
from rlhf_ray.errors import UserError
from rlhf_ray.stages import compare, ppo
from rlhf_ray.train.supervised import SupervisedTrainer

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


def unfinished(checkpoints: Path) -> list[str]:
    """Checkpoints under way. (One that is being deleted has such a name, too, but newer ones are there.)"""
    newest = max((path.name for path in checkpoints.glob("step-*")), default="")
    return [path.name for path in checkpoints.glob(".step-*.tmp") if path.name[1:-4] > newest]


@dataclass
class Kill:
    """When this start has written a line of its own and all of them are so many, and `delay` seconds later, or, with
    `writing`, while a checkpoint is being written."""

    lines: int
    delay: float = 0.0
    signal: int = signal.SIGKILL
    writing: bool = False
    at: int = 0  # lines, when it struck

    def wait(self, process: subprocess.Popen[str], progress: Path) -> None:
        wanted = max(self.lines, lines(progress) + 1)  # what is there will be cut back to the newest checkpoint first
        while process.poll() is None and lines(progress) < wanted:
            time.sleep(0.02)
        time.sleep(self.delay)
        checkpoints = progress.parent / "checkpoints"
        while self.writing and process.poll() is None:
            if unfinished(checkpoints):
                process.send_signal(signal.SIGSTOP)  # the driver makes a checkpoint whole: this one stays as it is
                if unfinished(checkpoints):
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.002)
        self.at = lines(progress)


def interrupted(stage: str, out: Path, progress: Path, kills: list[Kill], *options: str,
                between: Callable[[int], None] = lambda i: None) -> None:
    """Run the stage to its end through these kills; progress: a file of the stage that grows by lines."""
    out.mkdir(parents=True, exist_ok=True)
    for i, kill in enumerate(kills):
        process = start(stage, out, *options)
        kill.wait(process, progress)
        assert process.poll() is None, (out / "log").read_text()[-3000:]
        if kill.signal == signal.SIGKILL:
            kill_everything(process)
            assert unfinished(progress.parent / "checkpoints") or not kill.writing
        else:
            before = ray_processes()
            process.send_signal(kill.signal)
            assert process.wait(timeout=120) == 143, (out / "log").read_text()[-3000:]
            time.sleep(2)
            assert not ray_processes() & before  # nothing of ours is left
        between(i)
    process = start(stage, out, *options)
    assert process.wait(timeout=600) == 0, (out / "log").read_text()[-3000:]


def metrics(out: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def weights(out: Path, stage: str) -> bytes:
    return (out / stage / "model/model.safetensors").read_bytes()


def test_ppo_goes_on_exactly(models, reward_model, files, tmp_path):  # noqa: F811
    """kill -9 of everything while a checkpoint is written, a SIGTERM, and a newest checkpoint that is damaged: same
    weights, same metrics."""
    iterations = max(12, 4 * KILLS)
    options = [*files, f"model.path={models[0]}", "roles.policy.ranks=1", f"ppo.iterations={iterations}",
               "algorithm.ema_decay=0.9", "algorithm.kl_target=2"]
    plain, out = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, out):
        earlier_stages(directory, models[0], reward_model)
    interrupted("ppo", plain, plain / "none", [], *options)
    rng = random.Random(0)
    kills = [Kill(n, rng.uniform(0, 0.6), writing=i % 4 == 0)
             for i, n in enumerate(sorted(rng.sample(range(1, iterations - 4), k=KILLS)))]
    kills[KILLS // 2] = Kill(kills[KILLS // 2].lines, signal=signal.SIGTERM)
    checkpoints = out / "ppo/checkpoints"

    def damage(i: int) -> None:
        if i == 1 and (found := sorted(checkpoints.glob("step-*/critic*"))):
            found[-1].write_bytes(found[-1].read_bytes()[:-1])

    interrupted("ppo", out, out / "ppo/metrics.jsonl", kills, *options, between=damage)
    log = (out / "log").read_text()
    assert "going on after iteration" in log and "bytes instead of" in log
    assert metrics(out, "ppo") == metrics(plain, "ppo")  # no line missing, none doubled, every prompt as it was
    assert (out / "ppo/samples.jsonl").read_bytes() == (plain / "ppo/samples.jsonl").read_bytes()
    assert weights(out, "ppo") == weights(plain, "ppo")
    assert not list(checkpoints.glob(".*"))
    results("resume", {
        "iterations": iterations, "kills": len(kills), "in_checkpoint_writes": sum(kill.writing for kill in kills),
        "moments": [{"iterations_done": k.at, "signal": signal.Signals(k.signal).name, "writing": k.writing}
                    for k in kills]})  # and whoever reads this knows that every resume was exact


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_supervised_stages_go_on_exactly(stage, ray_session, models, files, tmp_path, monkeypatch):  # noqa: F811
    """From what is on the disk in mid-run, which is what a kill leaves there; sft meets a SIGTERM, too."""
    plain, out = tmp_path / "plain", tmp_path / "killed"
    run, learn, terminated = importlib.import_module(f"rlhf_ray.stages.{stage}").run, SupervisedTrainer.learn, []

    def config(directory: Path):
        return compose([*SMALL, *files, f"model.path={models[0]}", f"stages=[{stage}]", f"output_dir={directory}",
                        "roles.supervised.ranks=1", "checkpoint.seconds=0", "logging.wandb=disabled",
                        "sft.epochs=3", "sft.batch_size=8", "sft.dropout=0.1", "rm.epochs=3", "dpo.epochs=3",
                        "dpo.prompts_per_batch=4"])

    def learning(self, units):
        if self.step == 3 and not out.exists():
            self.saver.finish()  # else files would be renamed while they are copied
            shutil.copytree(plain, out, symlinks=True)
        resumed = self.saver.checkpoints.directory.is_relative_to(out)
        if stage == "sft" and self.step == 6 and resumed and not terminated:
            terminated.append(self.step)
            os.kill(os.getpid(), signal.SIGTERM)
        learn(self, units)

    monkeypatch.setattr(SupervisedTrainer, "learn", learning)
    if stage != "sft":
        earlier_stages(plain, models[0], models[0])
        shutil.rmtree(plain / "rm")
        compare.run(config(plain))
    run(config(plain))
    assert sorted(p.name for p in (out / stage).iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    if stage == "sft":
        with pytest.raises(SystemExit, match="143"):
            run(config(out))
        assert terminated == [6] and lines(out / "sft/metrics.jsonl") == 7  # the step under way was ended first
    run(config(out))
    assert metrics(out, stage) == metrics(plain, stage) and len(metrics(out, stage)) > 7
    assert weights(out, stage) == weights(plain, stage)
    assert not (out / stage / "checkpoints").exists()  # done


def test_compare_samples_nothing_twice(models, files, tmp_path):  # noqa: F811
    prompts = write_jsonl(tmp_path / "many.jsonl", [{"prompt": f"tell of {i} and {i * i}"} for i in range(320)])
    options = [*files, f"model.path={models[0]}", "compare.ranker=people", "compare.prompts=320",
               f"data.compare_prompts={prompts}"]
    plain, out = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, out):
        earlier_stages(directory, models[0], models[0])
    interrupted("compare", plain, plain / "none", [], *options)
    interrupted("compare", out, out / "compare/answers.jsonl", [Kill(3), Kill(4, signal=signal.SIGTERM)], *options)
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
