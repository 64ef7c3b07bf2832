"""The command line from outside: exit status, one-line errors, and nothing heavy before a stage runs."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray import cli
from rlhf_ray.cluster import interruption
from rlhf_ray.errors import UserError
from rlhf_ray.stages.doctor import torch_companions

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
EXPERIMENTS = ["quickstart", "hf_8gpu", "instructgpt"]


def python(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], env=ENV, cwd=cwd, text=True, capture_output=True, timeout=60,
                          check=False)


def rlhf_ray(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "rlhf_ray.cli", *argv, cwd=cwd)


@pytest.mark.parametrize("argv", [["--help"], ["ppo", "--help"], ["--version"], ["ppo", "--cfg", "job"],
                                  ["ppo", "zz=1"], ["ppo", "seed=-1"]])
def test_nothing_heavy_is_imported(argv: list[str]) -> None:
    code = (f"import sys; from rlhf_ray import cli; cli.main({argv!r}); heavy = {{'torch', 'ray', 'vllm', "
            "'transformers', 'deepspeed', 'sklearn', 'datasets', 'numpy'}; assert not heavy & set(sys.modules)")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_does_without_hydra_and_lists_everything() -> None:
    code = ("import sys; from rlhf_ray import cli; cli.main(['--help']); "
            "assert not {'hydra', 'omegaconf', 'yaml', 'rich'} & set(sys.modules)")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for word in (*cli.STAGES, *EXPERIMENTS, "--cfg job"):
        assert word in done.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_cfg_job(experiment: str, tmp_path: Path) -> None:
    """Works from any directory, and with the option before or after the overrides."""
    done = rlhf_ray("--cfg", "job", "ppo", f"experiment={experiment}", "seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nseed: 3\n" in done.stdout
    assert f"output_dir: outputs/{experiment}" in done.stdout
    assert rlhf_ray("ppo", f"experiment={experiment}", "--cfg=job", "seed=3").stdout == done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argv", "says"), [
    (["pppo"], "unknown stage 'pppo'; stages are pretrain, sft"),
    (["ppo", "--multirrun"], "unknown option --multirrun"),
    (["ppo", "--cfg", "all"], "invalid choice: 'all'"),
    (["ppo", "algorithm.klcoef=1"], "did you mean algorithm.kl_coef?"),
    (["ppo", "algorithm.kl_coef=-1"], "algorithm.kl_coef=-1.0: must be >= 0"),
    (["ppo", "experiment=none"], "there are hf_8gpu, instructgpt, quickstart"),
    (["ppo", "weight_sync.backend=ipc", "roles.generator.gpus=1", "roles.policy.gpus=1"], "cluster.placement=separate"),
    (["sft", "model.path=./nowhere"], "model.path=./nowhere: no model there"),
    (["ppo", "--config-dir", "nowhere"], "no such directory"),
])
def test_one_line_and_status_2(argv: list[str], says: str, tmp_path: Path) -> None:
    done = rlhf_ray(*argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("rlhf-ray: error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_data_file(tmp_path: Path) -> None:
    pytest.importorskip("rlhf_ray.data.sources")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    done = rlhf_ray("sft", "data=files", "data.demonstrations=nowhere.jsonl", "model.path=./model", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "nowhere.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_stage_prints_help() -> None:
    done = rlhf_ray()
    assert done.returncode == 2
    assert "usage: rlhf-ray" in done.stderr


class Stage:
    """In place of a stage's module."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def run(self, cfg: object) -> None:
        if self.error is not None:
            raise self.error


class Wrapped(UserError):
    """As Ray raises it on the driver: an instance of the actor's error, whose text is a traceback."""

    cause = UserError("prompt 3: empty")


@pytest.mark.parametrize(("error", "status", "says"), [
    (None, 0, ""),
    (UserError("a.jsonl:3: no prompt"), 2, "rlhf-ray: error: a.jsonl:3: no prompt\n"),
    (Wrapped("ray::Actor.run() ...\nTraceback"), 2, "rlhf-ray: error: prompt 3: empty\n"),
    (KeyboardInterrupt(), 130, "rlhf-ray: interrupted\n"),
])
def test_how_a_stage_ends(error: BaseException | None, status: int, says: str, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.doctor", Stage(error))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == says


def test_sigterm_is_143_whatever_ray_made_of_it(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    def run(cfg: object) -> None:
        with suppress(SystemExit):
            interruption.terminate(signal.SIGTERM)
        raise SystemExit(1)  # as it comes out of ray.wait

    monkeypatch.setattr(interruption, "_came", [])
    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.doctor", SimpleNamespace(run=run))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main(["doctor"]) == 143
    assert capsys.readouterr().err == "rlhf-ray: terminated\n"


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("a bug")])
def test_other_errors_pass_through(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_came", [])
    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.doctor", Stage(error))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_let_the_stage_clean_up(number: int, status: int) -> None:
    code = """if True:
        import sys, time, types
        from rlhf_ray import cli
        def run(cfg):
            try:
                print("running", flush=True)
                time.sleep(30)
            finally:
                print("cleaned up", flush=True)
        sys.modules["rlhf_ray.stages.doctor"] = types.SimpleNamespace(run=run)
        sys.exit(cli.main(["doctor"]))
    """
    with subprocess.Popen([sys.executable, "-c", code], env=ENV, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out == "cleaned up\n"
    assert len(err.splitlines()) == 1


def test_doctor_runs_and_asks_for_what_the_configuration_needs(tmp_path: Path) -> None:
    here = rlhf_ray("doctor", cwd=tmp_path)
    assert "torch" in here.stdout
    assert here.returncode == ("fail" in here.stdout), here.stdout
    many = rlhf_ray("doctor", "roles.policy.ranks=999", "roles.policy.gpus=1", cwd=tmp_path)
    assert many.returncode == 1
    assert "fail" in many.stdout
    assert many.stderr == ""


def test_doctor_finds_cuda_companions_of_a_cpu_torch() -> None:
    (check,) = torch_companions("2.13.0+cpu", {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu", "torchcodec": None})
    assert check.status == "fail"
    assert "pip uninstall -y torchvision" in check.todo
    assert "torchaudio" not in check.todo
    assert not list(torch_companions("2.13.0", {"torchvision": "0.28.0"}))


@pytest.mark.parametrize("stage", ["sft", "ppo", "eval"])
def test_wandbs_key_is_checked_before_a_stage_that_logs_there(stage: str, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise UserError("no API key")

    monkeypatch.setattr("rlhf_ray.metrics.wandb_run.check_online", refused)
    assert cli.main([stage, "logging.wandb=online"]) == 2
    assert capsys.readouterr().err == "rlhf-ray: error: no API key\n"
