"""A run on a cluster, watched from elsewhere: by its job's metadata and by `ray timeline`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from end_to_end.test_pipeline import RLHF_RAY, files  # noqa: F401 - fixtures
from end_to_end.test_submit import Head, head, ppo, wait_for  # noqa: F401
from rlhf_ray.cluster.runtime import free_port
from rlhf_ray.metrics.wire import from_json

ITERATIONS = 24  # of half a second; the metadata are written every two
TIMELINE = "import json, ray, sys; ray.init(sys.argv[1], log_to_driver=False); json.dump(ray.timeline(), sys.stdout)"


def output(cluster: Head, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=cluster.env | env, text=True, capture_output=True, timeout=120, check=False)


def page(text: str) -> str:
    """What is shown of ppo, but for bars that rounding may have moved by one."""
    return re.sub("[▁-█]", "", text[text.index("ppo  iteration"):])


def test_a_job_is_watched_from_elsewhere(head: Head, ppo: tuple[list[str], Path], tmp_path: Path) -> None:  # noqa: F811
    overrides, run = ppo
    done = head.submit("--no-wait", "ppo", *overrides, f"ppo.iterations={ITERATIONS}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    client = head.client()
    (job,) = [details.submission_id for details in client.list_jobs()]
    assert job is not None
    watch = [RLHF_RAY, "watch", f"job:{job}", f"--address={head.address}"]
    first = output(head, *watch).stdout
    seen: dict[str, dict[str, str]] = {}

    def ended() -> bool:
        details = client.get_job_info(job)
        metadata = details.metadata or {}
        if metadata.get("progress", "").endswith(f"/{ITERATIONS}"):
            seen[metadata["progress"]] = metadata
        return details.status in (JobStatus.SUCCEEDED, JobStatus.FAILED)

    wait_for(lambda: len(seen) > 1 or ended(), 150)
    live = output(head, *watch)
    wait_for(ended, 150)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]

    # The metadata: what was there stays, progress moves, and there is an end to its size.
    last = client.get_job_info(job).metadata
    assert last and len(seen) > 2 and {"stage": "ppo", "run": "run"}.items() <= last.items()
    assert last["progress"] == f"ppo {ITERATIONS}/{ITERATIONS}" and {"score", "kl"} <= set(last)
    assert max(len(metadata["overview"].encode()) for metadata in seen.values()) < 16_000
    rows = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    told = from_json(last["overview"])
    assert told.stages[-1].series["score"] == pytest.approx([row["score"] for row in rows], rel=1e-5)

    # What is shown is what the files show.
    assert f"job {job}: " in first
    assert live.returncode == 0, live.stderr
    assert re.search(rf"job {job}: running ppo, told \d+ s ago", live.stdout)
    assert re.search(rf"ppo  iteration \d+ of {ITERATIONS}, .* left", live.stdout)
    after, here = output(head, *watch).stdout, output(head, RLHF_RAY, "watch", str(run)).stdout
    assert after.splitlines()[1].startswith(f"job {job}: succeeded")
    assert page(after) == page(here)
    (*_, sample) = [json.loads(line) for line in (run / "ppo/samples.jsonl").read_text().splitlines()]
    assert f"samples of iteration {ITERATIONS}: score, prompt, response\n" in after
    assert f"\n{sample['score']:.2f}  {sample['prompt'].strip()}" in after

    # The timeline: every phase of every iteration, and who worked in it.
    events = json.loads(output(head, sys.executable, "-c", TIMELINE, head.gcs, RAY_AUTH_MODE="token").stdout)
    boxes = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "rlhf"}
    phases = ("rollout", "score", "advantages", "update", "weight_sync", "checkpoint")
    assert set(boxes) == {f"iteration {k}: {phase}" for k in range(1, ITERATIONS + 1) for phase in phases}
    work = {e["cat"].removeprefix("task::"): (e["ts"], e["ts"] + e["dur"])
            for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["cat"].startswith("task::")}  # the last of each
    assert {"generator-0 rollout", "reward-0 scores", "reference-0 logprobs", "policy-0 score", "policy-0 prepare",
            "critic-0 values", "policy-0 update", "critic-0 update", "policy-0 push", "reward-0 samples"} <= set(work)
    for task, phase in (("generator-0 rollout", "rollout"), ("policy-0 update", "update"),
                        ("policy-0 push", "weight_sync")):
        begins, ends = work[task]  # of the last that Ray has told of; it may be late by an iteration
        assert any(box[0] <= begins and ends <= box[1] for name, box in boxes.items() if name.endswith(f": {phase}"))
    actors = [e["cat"] for e in events if e["name"] == "__init__"]
    assert any(re.fullmatch(r"task::policy-0\.\d+:PolicyLearner\.__init__", name) for name in actors)

    # Mistakes.
    (wrong := tmp_path / "token").write_text("f" * 32)
    for what, address, env, says in (
        (job, head.address, {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "the cluster refuses the token"),
        ("nobody", head.address, {}, "cannot look at job nobody: "),
        (job, f"http://127.0.0.1:{free_port()}", {}, "no Ray cluster answers there"),
    ):
        done = output(head, RLHF_RAY, "watch", f"job:{what}", f"--address={address}", **env)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"rlhf-ray: error: {address}: {says}")
