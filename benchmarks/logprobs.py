"""Peak memory and time of log-probabilities and entropies: from hidden states in chunks, and from whole logits.

    .venv/bin/python benchmarks/logprobs.py [--short]

64 sequences of 1,024 tokens, a vocabulary of 32,000, hidden states of 256, float32, forward and backward; every way in
a process of its own, whose peak resident size is that of the pass alone (that before it is taken off). Prints a table
and writes benchmarks/results/logprobs.json with conditions.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from conditions import conditions

RESULTS = Path(__file__).parent / "results" / "logprobs.json"
WIDTH, VOCABULARY = 256, 32_000
WAYS = ("chunks", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="4 sequences, no results file")
    args = parser.parse_args()
    tokens = (4 if args.short else 64) * 1024
    free = psutil.virtual_memory().available
    rows, skipped = [], []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for way in WAYS:
            for backward in (False, True):
                needs = 4 * tokens * VOCABULARY * (1 if way == "chunks" else 3 if backward else 2)
                if way == "whole" and needs > 0.9 * free:
                    skipped.append(f"{name(way, backward)}: needs about {needs / 2**30:.0f} GiB, "
                                   f"{free / 2**30:.0f} are free")
                else:
                    rows.append(fresh.submit(measured, way, backward, tokens).result())
    if not args.short:
        RESULTS.write_text(json.dumps({**conditions(), "tokens": tokens, "vocabulary": VOCABULARY, "width": WIDTH,
                                       "rows": rows, "skipped": skipped}, indent=1) + "\n")
    print(f"{tokens:,} tokens, one matrix of logits is {4 * tokens * VOCABULARY / 2**30:.2f} GiB")
    for row in rows:
        print(f"{row['way']:<28} peak {row['peak_gib']:6.2f} GiB  {row['seconds']:6.2f} s")
    print("\n".join(f"skipped: {line}" for line in skipped))


def name(way: str, backward: bool) -> str:
    return f"{way}, forward{' and backward' if backward else ''}"


def measured(way: str, backward: bool, tokens: int) -> dict[str, Any]:
    import torch

    from rlhf_ray.core.logprobs import token_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=backward)
    weight = (torch.randn(VOCABULARY, WIDTH) / 16).requires_grad_(backward)
    targets = torch.randint(VOCABULARY, (tokens,))
    token_logprobs(hidden[:8].detach(), weight.detach(), targets[:8], 1.0)  # threads and kernels are there
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "chunks":
        logprobs, _ = token_logprobs(hidden, weight, targets, 1.0)
    else:
        logits = hidden @ weight.T
        log_p = torch.log_softmax(logits, dim=-1)
        logprobs = log_p.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():  # row by row: this way's peak is that of its logits
            torch.cat([-(some.exp() * some).sum(-1) for some in log_p.split(1024)])
    if backward:
        logprobs.sum().backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"way": name(way, backward), "peak_gib": (peak - before) / 2**20, "seconds": seconds}


if __name__ == "__main__":
    main()
