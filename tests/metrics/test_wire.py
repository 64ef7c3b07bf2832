"""An overview goes through a few kilobytes of JSON and shows the same."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from metrics.runs import NOW, iteration, jsonl, post_mortem, running, sample, text
from rlhf_ray.metrics.overview import Overview, RunFiles
from rlhf_ray.metrics.wire import from_json, thinned, to_json
from rlhf_ray.stages.watch import WIDEST, view


def shown(overview: Overview) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=WIDEST, highlight=False).print(view(overview, WIDEST))
    return out.getvalue().splitlines()


def test_a_run_as_it_is_comes_back_as_it_was(tmp_path: Path) -> None:
    run = running(tmp_path)
    jsonl(run / "ppo/alarms.jsonl", [{"name": "kl", "iteration": 3, "action": "log", "message": "high"}])
    jsonl(run / "ppo/samples.jsonl", [sample(12, "tell", "a story", score=None)])
    post_mortem(run, "ppo", "20270115-070000", "old\n", 3600)
    seen = RunFiles(run).read(NOW)
    assert seen.policy and seen.policy.alarms and seen.policy.samples  # none of it is missing in this test
    for one in (seen, replace(seen, policy=None, holder=None)):
        came = from_json(to_json(one))
        assert shown(came) == shown(one) and to_json(came) == to_json(one)
        assert [s.state for s in came.stages] == [s.state for s in one.stages] and came.holder == one.holder


def test_however_much_there_is_it_stays_small_and_shows_the_same(tmp_path: Path) -> None:
    """2,000 iterations, 64 actors, 50 alarms, texts of 10,000 characters of 3 bytes; the width is the widest."""
    run = running(tmp_path)
    jsonl(run / "ppo/metrics.jsonl", [
        iteration(k, score=(-1.0) ** k / k, entropy=None if k % 3 else 1 / k, restarts={"policy": 1, "generator": 2},
                  memory_gib={f"generator-{i}": 1 + (i * k) / 1e5 for i in range(64)}) for k in range(1, 2001)])
    for stage in ("sft", "rm", "pretrain", "dpo"):
        jsonl(run / stage / "metrics.jsonl", [{"step": k, "loss": 1 / k, "accuracy": 1 - 1 / k} for k in range(1, 999)])
    jsonl(run / "ppo/alarms.jsonl", [{"name": "kl", "iteration": k, "action": "log", "message": "m" * 10_000}
                                     for k in range(50)])
    jsonl(run / "ppo/samples.jsonl", [sample(2000, "問" * 10_000, "答" * 10_000) for _ in range(3)])
    text(run / "ppo/PAUSED", "why " * 9999)
    seen = RunFiles(run).read(NOW)
    told = to_json(seen)
    assert len(told.encode()) < 16 * 1024
    came = from_json(told)
    assert came.policy and came.policy.rang == 50 and came.policy.restarts == 3
    curves = ("score", "KL", "entropy", "length")
    ours, theirs = ([line for line in shown(o) if line.startswith(curves)] for o in (seen, came))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):  # last value and range are exact, bars are means of other neighbours
        assert [w for w in a.split() if w[0] not in " ▁▂▃▄▅▆▇█"] == [w for w in b.split() if w[0] not in " ▁▂▃▄▅▆▇█"]
    (memory,) = [line for line in shown(came) if line.startswith("memory")]
    assert sum(a.gib for a in came.policy.memory) == pytest.approx(sum(a.gib for a in seen.policy.memory))  # type: ignore[union-attr]
    assert "generator-63" in memory and came.policy.memory[-1].name == "57 others"


def test_a_thinned_curve_keeps_its_end_and_its_extremes() -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned([0, 2, 4, 6, 5, 5, 7], 4) == [0, 6, 5, 7]  # means 1, 5, 5; 0 and 6 are the extremes
    assert thinned([9, -9, 0, 0, 0, 0, 1], 4) == [-9, 9, 0, 1]  # both are in the first part: the second has room
    assert thinned([0, 0, 0, 0, 9, -9, 1], 4) == [0, 9, -9, 1]
    assert thinned([None] * 9, 3) == [None] * 3
    assert thinned([None, None, 3, None, 5], 3) == [None, 3, 5]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"directory": "a"}', '{"version": 2, "more": {}}'])
def test_what_is_no_overview_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_one_of_another_version_is_refused(tmp_path: Path) -> None:
    tree = json.loads(to_json(RunFiles(running(tmp_path)).read(NOW)))
    tree["stages"][0]["colour"] = "blue"
    with pytest.raises(ValueError, match=r"not the overview of a run: .*colour"):
        from_json(json.dumps(tree))
