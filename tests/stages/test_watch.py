"""`rlhf-ray watch`: what it shows, and that it leaves the run alone."""

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from metrics.runs import NOW, done, iteration, jsonl, lock, post_mortem, running, sample, text
from rlhf_ray import cli
from rlhf_ray.metrics.overview import RunFiles
from rlhf_ray.stages.watch import duration, view
from rlhf_ray.storage import CACHE, local_root

ROOT = Path(__file__).resolve().parents[2]


def shown(run: Path, width: int = 80) -> str:
    """As on a page of that width; no line is wider, and nothing is styled."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view(RunFiles(run).read(NOW), width))
    text = out.getvalue()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    return "\n".join(line.rstrip() for line in text.splitlines())


def troubled(run: Path) -> Path:
    """Everything that there can be to show, and long."""
    running(run, iterations=30)
    rows = [iteration(k, restarts={"policy": 1, "generator": 2}, score=-1234.5 * k,
                      seconds={f"phase_{i}": 1.0 + i for i in range(9)},
                      memory_gib={f"generator-{i}": 1.0 + i * k / 100 for i in range(64)}) for k in range(1, 31)]
    jsonl(run / "ppo/metrics.jsonl", rows)
    jsonl(run / "ppo/alarms.jsonl", [{"name": "kl", "iteration": k, "action": "pause", "message": "KL [b]is[/b] high: "
                                      + "lower it " * 30} for k in range(1, 8)])
    jsonl(run / "ppo/samples.jsonl", [sample(30, "wide 問 " * 99, "\x1b[31mred\x07 [b]bold[/b] " * 99, score=-12345.6)])
    text(run / "ppo/PAUSED", "iteration 30\n" + "KL is high. " * 9 + "\n")
    post_mortem(run, "sft", "20270115-080500", "out of memory " * 20, 0)
    post_mortem(run, "ppo", "20270115-080000", "", 9999)
    (run / "sft/stage.json").unlink()
    return run


def test_a_running_run_has_its_numbers(tmp_path: Path) -> None:
    lines = shown(running(tmp_path)).splitlines()
    rows = {line.split("  ")[0].split(" done")[0]: line for line in lines}
    assert rows["sft"].split() == ["sft", "done", "83s", "10", "4.000", "██▇▆▅▄▃▂▁▁"]  # 8 x (10 - k) / 9
    assert rows["rm"].split()[:5] == ["rm", "done", "2m", "01s", "10"]
    assert rows["rm"].split()[5::2] == ["0.600", "0.75"]
    assert "ppo     running 2m 05s   12" in lines
    assert "eval    waiting" in lines
    assert "ppo: newest checkpoint step 11, 7s ago; last heard of 3s ago" in lines
    assert "ppo  iteration 12 of 40, 4.0 s each, 1m 52s left" in lines
    curve = "▁▁▂▃▃▄▅▆▆▇██"  # 8 levels x (k - 1) / 11, rounded down
    for label, value, span in (("score", "1.20", "0.10 to 1.20"), ("judge score", "0.60", "0.05 to 0.60"),
                               ("KL, nats", "3.00", "0.25 to 3.00"), ("length, tokens", "32", "21 to 32")):
        (row,) = [line for line in lines if line.startswith(f"{label}  ")]
        assert row.removeprefix(label).split() == [value, curve, *span.split()]
    assert "mismatch, nats  1.7e-06  ▄▄▄▄▄▄▄▄▄▄▄▄  1.7e-06 to 1.7e-06" in lines
    assert "█" * 20 + "▓" * 60 in lines  # 1 s and 3 s
    assert "█ rollout 1.0 s  ▓ update 3.0 s" in lines
    assert "memory 3.50 GiB (growth since the warm-up):  policy-0 2.00 (+0%)" in lines
    assert "generator-0 1.50 (+0%)" in lines
    assert "0 actors replaced, 0 alarms" in lines


@pytest.mark.parametrize("width", [80, 100, 40])
def test_it_fits(width: int, tmp_path: Path) -> None:
    page = shown(troubled(tmp_path), width)
    assert "[b]is[/b]" in " ".join(page.split())  # no markup


def test_trouble_is_named(tmp_path: Path) -> None:
    words = " ".join(shown(troubled(tmp_path)).split())
    assert "PAUSED after iteration 30: KL is high." in words
    assert "; remove " in words and "ppo/PAUSED to go on" in words
    assert "ppo: 1 earlier post-mortem, newest " in words
    assert "sft failed: out of memory" in words
    assert "3 actors replaced, 7 alarms, the last: kl in iteration 5 (pause)" in words
    assert "generator-63 19.90 (+" in words and "and 56 that grew less" in words


def test_the_latest_samples(tmp_path: Path) -> None:
    """The end of the prompt and the beginning of the response, each in one line where there is room."""
    run = running(tmp_path)
    jsonl(run / "ppo/samples.jsonl", [sample(12, "Tell me\nof love", "  No.\n\nNever. "),
                                      sample(12, "x" * 100 + "end", "begin" + "y" * 200, score=None)])
    lines = shown(run).splitlines()
    start = lines.index("samples of iteration 12: score, prompt, response")
    assert lines[start + 1 : start + 6] == [
        "1.50  Tell me of love", "No. Never.", "-  …" + "x" * 73 + "end", "begin" + "y" * 75, "y" * 79 + "…"]


def test_a_pause_that_nobody_waits_in(tmp_path: Path) -> None:
    """To remove the file helps only while somebody looks for it."""
    text(running(tmp_path) / "ppo/PAUSED", "iteration 12\nKL is 31\n")
    assert "PAUSED after iteration 12: KL is 31; remove" in shown(tmp_path)
    text(tmp_path / ".lock", "")
    words = shown(tmp_path)
    assert "nobody is running it now" in words
    assert "PAUSED after iteration 12: KL is 31; the same command goes on" in words
    assert "ppo: newest checkpoint step 11, 7s ago; the same command goes on" in words


def test_failed_and_killed_and_elsewhere(tmp_path: Path) -> None:
    run = running(tmp_path)
    lock(run, os.getpid(), 600, host="node-7")
    assert f"if it has not been killed (another host): process {os.getpid()} on node-7" in shown(run)
    process = subprocess.Popen(["true"])
    process.wait()
    lock(run, process.pid, 600)
    assert f"killed: process {process.pid} on " in shown(run)
    assert "ppo     killed" in shown(run)
    post_mortem(run, "ppo", "20270115-080500", "policy-0 was killed for lack of memory.\n", 1)
    words = " ".join(shown(run, 200).split())
    assert "ppo failed: policy-0 was killed for lack of memory. See " in words


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """A lock and nothing else; then a first stage without a line; then numbers that are not finite."""
    lock(tmp_path, os.getpid(), 1)
    assert f"process {os.getpid()} on" in shown(tmp_path)
    text(tmp_path / "ppo/config.yaml", "ppo: {iterations: 40}\n")
    assert "ppo  iteration 0 of 40\n" in shown(tmp_path)
    jsonl(tmp_path / "ppo/metrics.jsonl", [iteration(1), iteration(2, score=None)])
    assert "score                 -  ▄" in shown(tmp_path)


@pytest.mark.parametrize(("seconds", "words"), [
    (None, ""), (0.4, "0s"), (99.4, "99s"), (99.6, "1m 40s"), (5999, "99m 59s"), (6000, "1h 40m"), (86400, "24h 00m"),
    (360000, "4d 04h")])
def test_duration(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


# --- the command ---


def test_one_snapshot_where_the_output_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    before = {path: path.stat().st_mtime_ns for path in running(tmp_path).rglob("*")}
    assert cli.main(["watch", f"output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "ppo  iteration 12 of 40" in out
    assert max(map(cell_len, out.splitlines())) <= 80 and "\x1b" not in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_by_its_directory_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that mean something in an override are no trouble."""
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    done(tmp_path / "a b,c", "sft", 83.0)
    assert cli.main(["watch", f"{tmp_path}/a b,c"]) == 0
    assert f"run {tmp_path}/a b,c"[:79] in capsys.readouterr().out
    assert cli.main(["watch", f"{tmp_path}/none", "--address", "http://127.0.0.1:8265"]) == 2
    assert "--address is an option of `rlhf-ray submit` and `rlhf-ray watch job:" in capsys.readouterr().err


def test_without_a_model_or_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """And by default the quickstart's directory."""
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    done(tmp_path / "outputs/quickstart", "sft", 83.0)
    assert cli.main(["watch"]) == 0
    assert "run outputs/quickstart" in capsys.readouterr().out
    assert cli.main(["watch", "experiment=null", "data=files", "output_dir=outputs/quickstart"]) == 0


@pytest.mark.parametrize(("given", "says"), [
    ("none", "no such directory; expected the output_dir of a run, with STAGE/config.yaml"),
    ("empty", "no run has begun there; expected"),
    ("run/sft", "that is one stage of a run, give output_dir=run; expected"),
])
def test_no_run(given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    done(Path("run"), "sft", 83.0)
    Path("empty").mkdir()
    assert cli.main(["watch", f"output_dir={given}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rlhf-ray: error: output_dir={given}: {says}")
    assert len(err.splitlines()) == 1


def test_a_run_at_a_url_is_shown_as_one_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """From a copy of his own that goes with the page; on the driver's machine from what the driver has."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setenv(CACHE, str(tmp_path / "copies"))
    there, url = tmp_path / "there/run", f"file://{tmp_path}/there/run"
    assert cli.main(["watch", f"output_dir={url}"]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf-ray: error: output_dir={url}: no such directory; expected")
    running(there)
    post_mortem(there, "ppo", "20270115-080500", "of an earlier attempt", 900)
    text(there / "ppo/model/model.safetensors", "large")
    cli.main(["watch", f"output_dir={there}"])
    page = capsys.readouterr().out.splitlines()
    assert cli.main(["watch", f"output_dir={url}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run file:///") and "1 earlier post-mortem, newest file:///" in "".join(lines)
    assert [line for line in lines[1:] if "post-mortem" not in line] == \
        [line for line in page[1:] if "post-mortem" not in line]
    assert not (tmp_path / "copies").exists()
    shutil.copytree(there, local_root(url))
    jsonl(local_root(url) / "ppo/metrics.jsonl", [iteration(k) for k in range(1, 14)])
    cli.main(["watch", f"output_dir={url}"])
    assert "iteration 13 of 40" in capsys.readouterr().out  # the URL has 12


def test_a_terminal_is_kept_up_to_date_until_ctrl_c(tmp_path: Path) -> None:
    """On a terminal of 80 columns; nothing heavy is imported, and the run's process is not interrupted."""
    running(tmp_path)
    code = ("import sys; from rlhf_ray import cli; status = cli.main(sys.argv[1:]); "
            "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'sklearn'}; "
            "sys.exit(status or 77 * bool(heavy & set(sys.modules)))")
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "60"}
    with subprocess.Popen([sys.executable, "-c", code, "watch", f"output_dir={tmp_path}"], env=env, stdin=slave,
                          stdout=slave, stderr=slave) as process:
        os.close(slave)
        seen = b""

        def wait_for(words: bytes) -> None:
            nonlocal seen
            until = time.monotonic() + 30
            while words not in seen and time.monotonic() < until:
                seen += os.read(master, 65536)
            assert words in seen, seen.decode()

        wait_for(b"Ctrl-C ends this view")
        with (tmp_path / "ppo/metrics.jsonl").open("a") as file:
            file.write('{"iteration": 13, "score": 9.5}\n')
        wait_for(b"iteration 13 of 40")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    os.close(master)
    assert b"Traceback" not in seen
