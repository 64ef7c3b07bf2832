"""Padding computed, and balance over ranks, on long-tailed lengths. No engine runs; seconds on any machine.

    .venv/bin/python benchmarks/packing.py [--short]

Lengths are log-normal (median 160 tokens, cut at 1,024), as responses are that mostly end early and sometimes run on.
Prints a table and writes benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from conditions import conditions

from rlhf_ray.core.minibatches import plan_minibatches
from rlhf_ray.core.ragged import pack

RESULTS = Path(__file__).parent / "results" / "packing.json"
LONGEST, MICRO_BATCH, RESPONSES, SEEDS = 1024, 4096, 256, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="no results file")
    short, table = parser.parse_args().short, []
    for ranks in (1, 2, 4, 8):
        places = tokens = 0
        worst = []
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            lengths = np.clip(rng.lognormal(np.log(160), 0.8, RESPONSES), 16, LONGEST).astype(np.int64)
            ids = np.zeros(int(lengths.sum()), dtype=np.int32)
            starts = np.concatenate([[0], np.cumsum(lengths)])
            (parts,) = plan_minibatches(lengths, ranks, RESPONSES, 1, rng)
            work = []
            for part in parts:
                mine = lengths[part]
                flat = np.concatenate([ids[starts[i] : starts[i + 1]] for i in part])
                batches = pack(flat, mine, LONGEST, MICRO_BATCH)
                work.append(sum(b.ids.numel() for b in batches))
                tokens += int(mine.sum())
            places += sum(work)
            worst.append(max(work) / np.mean(work) - 1)
        table.append({"ranks": ranks, "padding": 1 - tokens / places, "rows_longest": LONGEST,
                      "most_loaded_rank_over_mean": float(np.median(worst)), "worst_seed": float(max(worst))})
    if not short:
        RESULTS.write_text(json.dumps({**conditions(), "responses": RESPONSES, "micro_batch_tokens": MICRO_BATCH,
                                       "seeds": SEEDS, "table": table}, indent=1) + "\n")
    print("| ranks | padding computed | most loaded rank over the mean (median, worst seed) |\n|---|---|---|")
    for row in table:
        print(f"| {row['ranks']} | {row['padding']:.1%} | {row['most_loaded_rank_over_mean']:+.1%}, "
              f"{row['worst_seed']:+.1%} |")


if __name__ == "__main__":
    main()
