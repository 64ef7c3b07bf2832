"""wandb offline, with the real library: what is kept, how much, and that nobody is called."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.core.types import SampleText
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.recorder import Recorder
from rlhf_ray.metrics.wandb_run import ROWS, TABLES, WandbRun

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING"):  # set by what is tested: forget them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def samples(k: int) -> list[SampleText]:
    return [SampleText(i, f"prompt {k}", f"response {k}", 5, False, 0.5) for i in range(3)]


def tables(run: Path) -> list[list[list[Any]]]:
    """The rows of each table, oldest first."""
    found = run.glob("wandb/offline-run-*/files/media/table/samples_*")
    return [json.loads(path.read_text())["data"] for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]


def kept(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in run.glob("wandb/offline-run-*/*.wandb"))


def test_what_a_run_keeps(tmp_path: Path) -> None:
    """Its name, configuration, metrics, a table for each of 2 iterations, the report and the model; in its own
    directory, though another stage of this process had one before."""
    earlier, tmp_path = tmp_path / "a/seed=1/sft", tmp_path / "a/seed=1/ppo"
    for directory in (earlier, tmp_path):
        directory.mkdir(parents=True)
    WandbRun(earlier, "offline", "project", {}, False, None).close()
    before = {path for path in earlier.rglob("*") if path.is_file()}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "report.html").write_text("<p>84.2%</p>")
    run = WandbRun(tmp_path, "offline", "project", {"ppo": {"iterations": 2}}, False, 2)
    for k in (1, 2):
        run.log(k, {"score": k / 2, "seconds": {"rollout": 1.0}}, samples(k))
    run.model(tmp_path / "model")
    run.report(tmp_path / "report.html", {"win_rate": {"ppo_vs_sft": {"rate": 0.842}}})
    assert run._run.settings.finish_timeout == 600.0  # else it would wait for a network that is gone
    run.close()
    run.close()
    assert tables(tmp_path) == [[[k, 0.5, f"prompt {k}", f"response {k}", 5, False]] * 3 for k in (1, 2)]
    for words in (b"a/seed=1/ppo", b"iterations", b"score", b"rollout", b"policy-", b"model.safetensors",
                  b"report_numbers", b"0.842"):
        assert words in kept(tmp_path), words
    assert b"a/seed=1/sft" in kept(earlier) and {path for path in earlier.rglob("*") if path.is_file()} == before
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/*.html")
    assert page.read_text() == "<p>84.2%</p>"
    assert not list(tmp_path.rglob("wandb/**/*.safetensors"))  # the model is not copied
    assert not [p for p in psutil.Process().children() if "wandb" in p.name()]


def test_tables_have_an_end(tmp_path: Path) -> None:
    """200 iterations of 30 samples each: 20 tables, each of the newest 60 rows; the last ones come when it closes."""
    run = WandbRun(tmp_path, "offline", "project", {}, False, 200)
    for k in range(1, 205):
        run.log(k, {"score": 0.5}, samples(k) * 10)
    run.close()
    found = tables(tmp_path)
    assert len(found) == TABLES + 1 and {len(rows) for rows in found} == {ROWS}
    assert [row[0] for row in found[0]] == [9] * 30 + [10] * 30 and found[-1][-1][0] == 204


def test_an_iteration_that_is_done_again_is_in_one_table_once(tmp_path: Path) -> None:
    run = WandbRun(tmp_path, "offline", "project", {}, False, 60)  # a table every third iteration
    for k in (1, 2, 1, 2, 3):
        run.log(k, {"score": 0.5}, samples(k))
    run.close()
    assert [[row[0] for row in rows] for rows in tables(tmp_path)] == [[1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_a_stage_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    names = []
    for done in (0, 1, 0):  # the third begins anew, as after resume=never
        with Recorder(tmp_path, "offline", "project", {}, done) as recorder:
            recorder.log(done + 1, {"score": 0.5})
        names.append((tmp_path / "wandb_id").read_text())
        time.sleep(1.1)  # wandb names directories after seconds
    assert names[0] == names[1] != names[2]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{names[0]}"))) == 2


def test_a_process_of_wandb_that_dies_costs_a_line_and_nothing_else(tmp_path: Path,
                                                                    capfd: pytest.CaptureFixture[str]) -> None:
    """As when a job is stopped: everybody gets the signal."""
    code = ("import psutil; from pathlib import Path; from rlhf_ray.metrics.recorder import Recorder\n"
            f"with Recorder(Path({str(tmp_path)!r}), 'offline', 'project', {{}}) as recorder:\n"
            "    recorder.log(1, {'score': 0.5})\n"
            "    [c] = psutil.Process().children(); c.terminate(); psutil.wait_procs([c], timeout=20)\n"
            "    for k in (2, 3, 4): recorder.log(k, {'score': 0.5})\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60,
                          check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("wandb: ") == 1 and "nothing more is logged there" in done.stdout
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_what_cannot_begin_is_an_error_only_if_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    def broken(**_: object) -> None:
        raise OSError("no space left\nsomewhere")

    monkeypatch.setattr("wandb.init", broken)
    with Recorder(tmp_path, "offline", "project", {}) as recorder:
        recorder.log(1, {"score": 0.5}, samples(1))
        recorder.log_model(tmp_path)
    assert capsys.readouterr().out.startswith("wandb: no space left; nothing is logged there\nppo 1")
    with pytest.raises(UserError, match=r"logging\.wandb=online: no space left; or take"):
        Recorder(tmp_path, "online", "project", {})


def test_offline_nobody_is_called(tmp_path: Path) -> None:
    """No connection but to processes of this machine, not even to ask for an address."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not on PATH")
    code = ("from pathlib import Path; from rlhf_ray.core.types import SampleText\n"
            "from rlhf_ray.metrics.wandb_run import WandbRun\n"
            f"run = WandbRun(Path({str(tmp_path)!r}), 'offline', 'project', {{}}, False, 1)\n"
            "run.log(1, {'score': 0.5}, [SampleText(0, 'a', 'b', 1, False, 0.5)]); run.close()\n")
    done = subprocess.run(["strace", "-f", "-e", "trace=connect", "-o", tmp_path / "calls", sys.executable, "-c", code],
                          cwd=ROOT, text=True, capture_output=True, timeout=100, check=False)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert tables(tmp_path) and calls
    assert not [line for line in calls if "connect(" in line and "AF_UNIX" not in line]


# --- online ---

KEY = "x" * 40


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address, the keys that it takes)."""
    takes: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            key = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode().removeprefix("api:")
            answer = json.dumps({"data": {"viewer": {"id": "ann"} if key in takes else None}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", takes
        found.shutdown()


def checked(home: Path, address: str, key: str | None) -> subprocess.CompletedProcess[str]:
    """`check_online` as a user sees it who has no account elsewhere."""
    env = {**os.environ, "HOME": str(home), "WANDB_BASE_URL": address, "no_proxy": "127.0.0.1",
           **({"WANDB_API_KEY": key} if key else {})}
    code = ("import sys; from rlhf_ray import cli; from rlhf_ray.metrics import wandb_run\n"
            "cli._command = lambda argv: wandb_run.check_online() or 0\n"
            "sys.exit(cli.main([]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True, timeout=60,
                          check=False, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr and not (key and key in done.stderr + done.stdout)
    return done


@pytest.mark.parametrize(("key", "says"), [
    (None, "no API key for {}: run `wandb login` or set WANDB_API_KEY, or take logging.wandb=offline and send"),
    ("short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5.; mend that, or take logging.wandb=off"),
    (KEY, "{} does not take the API key: run `wandb login --relogin` or set WANDB_API_KEY, or take logging.wandb=off"),
])
def test_online_with_no_good_key_is_one_line(key: str | None, says: str, tmp_path: Path,
                                             server: tuple[str, list[str]]) -> None:
    """The key itself is never shown."""
    done = checked(tmp_path, server[0], key)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"rlhf-ray: error: logging.wandb=online: {says.format(server[0])}")


def test_online_without_a_server_is_one_line(tmp_path: Path) -> None:
    done = checked(tmp_path, "http://127.0.0.1:9", KEY)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rlhf-ray: error: logging.wandb=online: http://127.0.0.1:9: ")


def test_a_key_that_the_server_takes(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    server[1].append(KEY)
    assert checked(tmp_path, server[0], KEY).returncode == 0
