"""The console script, from a user's files or from the embedded reviews to a report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from end_to_end.small import TEXTS, WORDS, ray_processes
from rlhf_ray.evaluation.schema import validate_report

RLHF_RAY = str(Path(sys.executable).parent / "rlhf-ray")
SMALL = [
    "experiment=null", "cluster=local", "roles.policy.ranks=2", "model.max_length=64", "data.max_prompt_tokens=24",
    "rollout.max_response_tokens=16", "compare.max_response_tokens=16", "rollout.batch_size=16",
    "algorithm=ppo_ptx", "algorithm.minibatch_size=8", "algorithm.ptx_coef=0.5", "algorithm.ptx_blocks=4",
    "ppo.iterations=2", "rm.prompts_per_batch=4", "eval.prompts=16", "eval.loss_blocks=8",
    "roles.generator.shard_size=8",
]


def rlhf_ray(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RLHF_RAY, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A user's data, every documented kind of row among it, as overrides."""
    d = tmp_path_factory.mktemp("data")
    prompts = [{"prompt": f"tell of {WORDS[i % 20]} and {WORDS[i % 7]}"} for i in range(40)]
    demonstrations = [p | {"response": " ".join(WORDS[i % 9 : i % 9 + 5])} for i, p in enumerate(prompts)]
    demonstrations.append({"messages": [{"role": "user", "content": "sing"},
                                        {"role": "assistant", "content": "a song"}]})
    demonstrations.append({"instruction": "cry", "input": "", "output": "boo"})
    comparisons = [
        p | {"responses": [f"{a} film", f"{b} war", "a story", "a story"], "ranks": [1, 2, 3, 3], "labeler": "ann"}
        for p, a, b in zip(prompts, WORDS, WORDS[5:], strict=False)
    ]
    (d / "texts.txt").write_text("\n\n".join(TEXTS))
    return [
        "data.source=files",
        f"data.demonstrations={write_jsonl(d / 'demonstrations.jsonl', demonstrations)}",
        f"data.comparisons={write_jsonl(d / 'comparisons.jsonl', comparisons)}",
        f"data.ppo_prompts={write_jsonl(d / 'prompts.jsonl', prompts)}",
        f"data.eval_prompts={write_jsonl(d / 'eval.jsonl', prompts)}",
        f"data.texts={d / 'texts.txt'}", f"data.eval_texts={d / 'texts.txt'}", "compare.ranker=file",
    ]


def test_all_six_stages_on_a_users_own_files(files, tmp_path):
    """pretrain, sft, compare with people's rankings, rm, ppo, eval; then nothing to do; then only what changed."""
    out, before = tmp_path / "run", ray_processes()
    command = ["pipeline", *SMALL, *files, f"output_dir={out}", "pretrain.vocab_size=320", "pretrain.hidden_size=64",
               "pretrain.num_layers=2", "pretrain.num_heads=2", "pretrain.intermediate_size=128",
               "pretrain.block_length=32", "roles.generator.replicas=2"]
    done = rlhf_ray(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ray_processes() <= before  # nothing of ours is left
    report = json.loads((out / "report.json").read_text())
    validate_report(report)
    assert report["labeler"] is None and report["judge"]["held_out_accuracy"] is None
    roles = {a["role"] for a in report["actors"] if a["stage"] == "ppo"}
    assert roles == {"generator", "reward", "reference", "policy", "critic"}
    pids = [a["pid"] for a in report["actors"] if a["stage"] == "ppo"]
    assert len(set(pids)) == len(pids) == 2 + 1 + 1 + 2 + 1  # every one a process of its own
    history = [json.loads(line) for line in (out / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [h["iteration"] for h in history] == [1, 2]
    assert [h["weight_version"] for h in history] == [2, 3]
    assert all(h["mismatch"] < 1e-4 for h in history)
    assert abs(history[0]["kl_per_sequence"]) < 1e-3  # the policy starts as the reference
    # What was made loads as plain Hugging Face models.
    model = AutoModelForCausalLM.from_pretrained(out / "ppo/model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out / "ppo/model")) == 320
    html = (out / "report.html").read_text()
    assert "<svg" in html and "<script" not in html

    # wandb, offline: one run, which ppo began and to which eval added the report.
    runs, name = list(out.glob("ppo/wandb/offline-run-*")), (out / "ppo/wandb_id").read_text()
    assert len(runs) == 2 and all(run.name.endswith(name) for run in runs)
    (page,) = out.glob("ppo/wandb/offline-run-*/files/media/html/*.html")
    assert "<svg" in page.read_text() and list(out.glob("ppo/wandb/offline-run-*/files/media/table/samples_*"))

    again = rlhf_ray(*command)
    assert again.returncode == 0
    assert "done before and unchanged: pretrain, sft, compare, rm, ppo, eval" in again.stdout
    changed = rlhf_ray(*command, "eval.prompts=12")
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert "done before and unchanged: pretrain, sft, compare, rm, ppo\n" in changed.stdout
    assert json.loads((out / "report.json").read_text())["win_rate"]["ppo_vs_sft"]["n"] == 12


def test_the_embedded_reviews_with_the_simulated_labeler(tmp_path):
    """sft to eval on real reviews: the labeler, the judge and the split are written down."""
    out = tmp_path / "run"
    done = rlhf_ray("pipeline", *SMALL, "data=reviews", "stages=[sft,compare,rm,ppo,eval]",
                    "model.path=assets://reviews_base", f"output_dir={out}", "sft.max_examples=64",
                    "compare.prompts=24", "model.max_length=112", "data.max_prompt_tokens=40")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    validate_report(report)
    assert report["judge"]["held_out_accuracy"] > 0.7 and report["labeler"]["held_out_accuracy"] > 0.7
    assert 0.5 < report["labeler"]["self_agreement"] <= report["labeler"]["noise_ceiling"] < 1
    history = [json.loads(line) for line in (out / "ppo/metrics.jsonl").read_text().splitlines()]
    assert all("judge_score" in h and h["ptx_loss"] > 0 for h in history)
    split = json.loads((out / "split.json").read_text())["documents"]
    assert sum(len(part) for part in split.values()) == len(set().union(*map(set, split.values())))
    rows = [json.loads(line) for line in (out / "compare/comparisons.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(len(r["responses"]) == 4 and min(r["ranks"]) == 1 for r in rows)


def test_ctrl_c_leaves_no_process_behind(models, files, tmp_path):
    """Interrupted while its actors run, the command ends with 130, and so does everything it started."""
    before = ray_processes()
    process = subprocess.Popen(
        [RLHF_RAY, "sft", *SMALL, *files, f"model.path={models[0]}", f"output_dir={tmp_path}", "sft.epochs=10000",
         "stages=[sft]"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    metrics, deadline = tmp_path / "sft/metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-3000:]
    assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while ray_processes() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray_processes() <= before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["roles.policy.ranks=3", "cluster.num_cpus=2"], "cpus: 7 wanted, 2 offered"),
        (["roles.policy.gpus=1", "roles.generator.gpus=1"], "gpus"),
    ],
)
def test_resources_that_are_not_there_are_named_before_anything_starts(models, files, tmp_path, change, expected):
    for made in ("sft/model", "rm/model"):
        (tmp_path / made).parent.mkdir()
        (tmp_path / made).symlink_to(models[0])
        (tmp_path / made).parent.joinpath("stage.json").write_text("{}")
    before = ray_processes()
    done = rlhf_ray("ppo", *SMALL, *files, f"model.path={models[0]}", f"output_dir={tmp_path}", "stages=[ppo]", *change)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert ray_processes() <= before


def test_a_malformed_line_is_named_with_file_and_line(models, files, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "a"}\n')
    done = rlhf_ray("sft", *SMALL, *files, f"data.demonstrations={bad}", f"model.path={models[0]}",
                    f"output_dir={tmp_path / 'run'}", "stages=[sft]")
    assert done.returncode == 2
    assert f"{bad}:3: `response` must be a string that is not empty" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
