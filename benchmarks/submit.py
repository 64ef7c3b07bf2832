"""What `rlhf-ray submit` adds to a bare Ray job, on a head that runs.

    RAY_AUTH_MODE=token ray start --head --num-cpus=8
    .venv/bin/python benchmarks/submit.py [--address http://127.0.0.1:8265] [--repeats 5] [--short]

From the command to the first line that the driver prints, in turns: `rlhf-ray submit sft` of the quickstart, from the
checkout, whose files go along; and `ray job submit -- echo started`, with nothing. As soon as the line is there the job
is stopped, and the next begins when it has ended. Prints a table and writes benchmarks/results/submit.json with
conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import conditions, spread
from ray.job_submission import JobSubmissionClient

from rlhf_ray.cluster.submission import JobServer, find_address

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "submit.json"
BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="of the cluster's dashboard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="once, no results file")
    args = parser.parse_args()
    address = find_address(args.address)
    JobServer(address)  # says it in a line if nobody is there, and turns the token on for Ray's command, too
    seconds: dict[str, list[float]] = {"rlhf-ray submit": [], "ray job submit": []}
    with tempfile.TemporaryDirectory() as output_dir:
        for _ in range(1 if args.short else args.repeats):
            seconds["rlhf-ray submit"].append(first_line(
                address, "sft: output_dir=", BIN / "rlhf-ray", "submit", "--address", address, "sft",
                "experiment=quickstart", "resume=never", f"output_dir={output_dir}"))
            seconds["ray job submit"].append(first_line(
                address, "started", BIN / "ray", "job", "submit", "--address", address, "--", "echo", "started"))
    result = {**conditions(), "repeats": len(seconds["ray job submit"]),
              "seconds": {name: spread(values) for name, values in seconds.items()}}
    if not args.short:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print("to the driver's first line | median s | least | most")
    for name, values in seconds.items():
        told = spread(values)
        print(f"{name:<26} | {told['median']:8.2f} | {told['min']:5.2f} | {told['max']:.2f}")


def first_line(address: str, begins: str, *command: str | Path) -> float:
    """Seconds from the command to a line of its output that begins so. The job has ended when this returns."""
    client = JobSubmissionClient(address)
    before = {job.submission_id for job in client.list_jobs()}
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith(begins):
                seconds = time.perf_counter() - started
                break
        else:
            raise SystemExit(f"no line begins with {begins!r}:\n{''.join(said)}")
        job, = {job.submission_id for job in client.list_jobs()} - before
        assert job
        client.stop_job(job)
        process.stdout.read()
    return seconds


if __name__ == "__main__":
    main()
