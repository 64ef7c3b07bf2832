"""What ended a run, told from what was seen; and what is left behind for whoever looks into it."""

import json
import os
import signal
import time
from collections import deque
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from rlhf_ray.cluster import post_mortem
from rlhf_ray.cluster.diagnosis import Facts, diagnose
from rlhf_ray.cluster.health import Member, Pulse
from rlhf_ray.cluster.post_mortem import redact, write_post_mortem
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.memory import GIB, kernel_oom_kills, own_pulse_numbers

# What Ray 2.60 says, taken down from real deaths. Of kill -9, of the kernel's OOM killer, of SIGSEGV and of os._exit it
# says the same.
HEAD = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 7\n\tip: 10.0.0.3\n"
DIED = HEAD + ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
               "Worker exit detail: ")
SILENT = DIED + (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker "
    "crashed unexpectedly due to SIGSEGV or another unexpected error. If the process was killed by the kernel OOM "
    "killer (verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation.")
TERMINATED = DIED + ("Worker exits unexpectedly by a signal. SystemExit is raised (sys.exit is called). Exit code: 1. "
                     "The process receives a SIGTERM.")
EXITED = DIED + "Worker exits unexpectedly. Worker exits with an exit code 1."
RAY_KILL = HEAD + "The actor is dead because it was killed by `ray.kill`."
CREATION = ("The actor died because of an error raised in its creation task, \x1b[36mray::B.__init__()\x1b[39m\n"
            '  File "probe.py", line 21, in __init__\nRuntimeError: no file')
RAY_OOM = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.3, ID: 4523) was "
    "22.37GB used / 23.54GB limit (0.950857)\nOOM kill reason: Memory usage exceeded threshold\nTop 10 memory users:")
NODE_DIED = HEAD + "The actor died because its node has died. Node Id: 0a2a"
UNAVAILABLE = ("The actor d8c353bd773c9b153176fa1b01000000 is unavailable: The actor is temporarily unavailable: "
               "RpcError: RPC error: Socket closed rpc_code: 14. The task may or may not have been executed.")
SEGV = ("*** SIGSEGV received at time=1795282735 on cpu 0 ***\nFatal Python error: Segmentation fault\n\n"
        'Stack (most recent call first):\n  File "ctypes/__init__.py", line 519 in string_at\n')
ABORT = "*** SIGABRT received at time=1795282737 on cpu 0 ***\nFatal Python error: Aborted\n"
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n" + ABORT


def member(gone: str = "", words: str = "", role: str = "policy", index: int = 1, pid: int = 7,
           rss: tuple[float, ...] = (1.1, 3.2)) -> Member:
    """On node n1, whose kernel counted 4 kills at every sign of life; rss: in GiB, a minute apart."""
    pulses = deque((1000.0 + 60 * i, Pulse(int(x * GIB), 20, 4)) for i, x in enumerate(rss))
    return Member(role, index, f"{role}-{index}.1", None, "10.0.0.3", "n1", pid, pulses=pulses, gone=gone,
                  words=words)


def raised(cause: Exception, pid: int = 7) -> BaseException:
    """As the driver gets it from an actor."""
    text = f"ray::A.f() (pid={pid}, ip=10.0.0.3)\n  File \"a.py\", line 3\n{type(cause).__name__}: {cause}"
    return RayTaskError("f", text, cause, "ray::A", pid, "10.0.0.3").as_instanceof_cause()


# How it was lost, Ray's words, the end of its log, what its node's kernel counts after -> cause, and what tells so.
DEATHS = {
    "kill -9": ("died", SILENT, "step 3", 4, "killed", "counted no kill for lack of memory"),
    "the kernel's OOM killer": ("died", SILENT, "step 3", 5, "out_of_memory",
                                "the kernel of node 10.0.0.3 counted 1 kill for lack of memory"),
    "its node cannot be asked": ("died", SILENT, "", None, "killed", "is not known"),
    "SIGTERM": ("died", TERMINATED, "", 4, "killed", "received SIGTERM"),
    "ray.kill by another": ("died", RAY_KILL, "", 4, "killed", "ray.kill"),
    "Ray's memory monitor": ("died", RAY_OOM, "", 4, "out_of_memory", "22.37GB used / 23.54GB limit"),
    "SIGSEGV": ("died", SILENT, SEGV, 4, "crashed", 'SIGSEGV, in "ctypes/__init__.py", line 519 in string_at'),
    "SIGABRT": ("died", SILENT, ABORT, 4, "crashed", "SIGABRT"),
    "a crash while the kernel killed another": ("died", SILENT, SEGV, 5, "crashed", "SIGSEGV"),
    "C++ out of memory": ("died", SILENT, BAD_ALLOC, 4, "out_of_memory", "std::bad_alloc"),
    "node death": ("died", NODE_DIED, "", None, "node_lost", "Ray says: its node has died"),
    "a cut cable": ("died", UNAVAILABLE, "", None, "node_lost", "is unavailable"),
    "sys.exit": ("died", EXITED, "", 4, "python_error", "exit code 1"),
    "its constructor": ("died", CREATION, "", 4, "python_error", "RuntimeError: no file"),
    "its setup": ("failed", str(raised(OSError("no file"))), "", 4, "python_error", "setup raised OSError: no file"),
    "its setup on a full GPU": ("failed", str(raised(RuntimeError("CUDA out of memory."))), "", 4, "out_of_memory",
                                "CUDA out of memory."),
    "silence": ("hung", "no sign of life for 60 s", "", 4, "hung", "no sign of life for 60 s"),
    "a late answer": ("overdue", "update did not answer within 1800 s", "", 4, "overdue", "within 1800 s"),
}


@pytest.mark.parametrize("case", DEATHS)
def test_the_cause_of_a_death(case: str) -> None:
    gone, words, log, kills, cause, evidence = DEATHS[case]
    lost = member(gone, words)
    found = diagnose(Facts([member(role="critic", index=0, pid=6), lost], ActorDiedError(), "update", 7,
                           {lost.name: log}, {} if kills is None else {"n1": kills}))
    assert (found.cause, found.first) == (cause, lost)
    assert found.summary.startswith("policy-1 (pid 7, node 10.0.0.3) ")
    assert "in iteration 7, phase update" in found.summary and evidence in found.summary
    assert "The same command goes on" in found.summary


ERRORS = {
    "the user's mistake": (UserError("data.ppo_prompts: no such file"), "user_error", "data.ppo_prompts: no such file"),
    "the user's mistake, found by an actor": (raised(UserError("reward: NaN")), "user_error", ": reward: NaN."),
    "an actor's exception": (raised(ValueError("bad number")), "python_error", "ValueError: bad number"),
    "an actor's MemoryError": (raised(MemoryError("3 TiB")), "out_of_memory", "MemoryError: 3 TiB"),
    "a full GPU": (raised(RuntimeError("CUDA out of memory. Tried")), "out_of_memory", "CUDA out of memory"),
    "Ray's memory monitor": (OutOfMemoryError(RAY_OOM), "out_of_memory", "23.54GB limit"),
    "a late answer": (TimeoutError("push did not answer within 9 s"), "overdue", "within 9 s"),
    "the driver's own exception": (KeyError("loss"), "driver_error", "KeyError: 'loss'"),
    "nothing": (None, "driver_error", "nothing says why"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_the_cause_where_nobody_is_gone(case: str) -> None:
    error, cause, evidence = ERRORS[case]
    found = diagnose(Facts([member(role="critic", index=0, pid=6), member()], error))
    assert found.cause == cause and evidence in found.summary and "Traceback" not in found.summary
    assert found.summary.startswith("policy-1 " if "actor's" in case or "GPU" in case else ("The run", "an actor"))


def test_memory_is_named_as_it_was_and_before() -> None:
    found = diagnose(Facts([member("died", SILENT)], oom_kills={"n1": 5}))
    assert "it held 3.2 GiB at its last sign of life, up from 1.1 GiB 60 s before" in found.summary
    assert "roles.policy.micro_batch_tokens" in found.summary


def test_a_lost_node_is_the_cause_whatever_became_of_its_actors() -> None:
    assert diagnose(Facts([member("hung", "no sign of life for 60 s")], lost_nodes={"n1"})).cause == "node_lost"


def test_an_exception_or_a_crash_that_follows_from_a_death_is_not_the_cause() -> None:
    follower, first = member("died", SILENT, index=0, pid=6), member("died", SILENT)
    found = diagnose(Facts([follower, first], raised(RuntimeError("connection closed by peer"), pid=6),
                           logs={follower.name: ABORT}, oom_kills={"n1": 4}))
    assert (found.cause, found.first) == ("killed", first)
    assert "Also gone: policy-0 (died)" in found.summary


def test_an_error_that_came_from_a_death_tells_of_it() -> None:
    try:
        raise UserError("an actor was lost four times") from ActorDiedError()
    except UserError as error:
        assert diagnose(Facts([member("died", RAY_OOM)], error)).cause == "out_of_memory"


def test_the_numbers_of_a_pulse() -> None:
    rss, files, kills = own_pulse_numbers()
    assert rss > 2**20 and files > 0 and kills == kernel_oom_kills() >= 0


# -- what is written ---------------------------------------------------------------------------------------------------


def test_secrets_are_blotted_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"HF_TOKEN": "hf_abcdefgh", "MY_API_KEY": "hf_abcdefgh-longer", "DB_PASSWORD": "short",
                   "HOME": "/home/ann"}
    text = "hf_abcdefgh hf_abcdefgh-longer short /home/ann"
    assert redact(text, environment) == "*** *** short /home/ann"
    monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", 'quo"ted-secret')
    out = write_post_mortem(tmp_path, [], ValueError('no: quo"ted-secret'), config='a: quo"ted-secret')
    written = "".join(f.read_text() for f in out.rglob("*") if f.is_file())
    assert "ted-secret" not in written and "no: ***" in written and "a: ***" in written


def test_without_ray_the_rest_is_written_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_post_mortem(tmp_path, [member("hung", "no sign of life for 60 s")], TimeoutError("x"), "update", 3,
                            "seed: 0\n", restarts=2)
    report = json.loads((out / "report.json").read_text())
    assert report["cause"] == "hung" and report["restarts"] == 2 and report["iteration"] == 3
    assert report["first"]["role"] == "policy" and report["deaths"][0]["last_pulse"]["rss"] == int(3.2 * GIB)
    assert report["exception"] == {"type": "TimeoutError", "message": "x"} and report["versions"]["ray"]
    assert report["missing"] == ["cluster: Ray is not running"]
    assert (out / "memory.csv").read_text().splitlines()[1] == "1000.0,policy-1,1126.4"
    assert (out / "memory.png").stat().st_size > 1000
    assert (out / "config.yaml").read_text() == "seed: 0\n"
    assert (out / "summary.txt").read_text().strip() in capsys.readouterr().out


def test_it_never_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("no directory")
    write_post_mortem(file, [member()], ValueError("bad number"))
    assert "bad number" in capsys.readouterr().out
    for name in ("diagnose", "_visit", "_memory_table", "_draw_memory", "_report", "_traceback", "installed"):
        monkeypatch.setattr(post_mortem, name, lambda *_: 1 / 0)
    out = write_post_mortem(tmp_path, [member()], ValueError("bad number"))
    assert "bad number" in (out / "summary.txt").read_text()
    missing = " ".join(json.loads((out / "report.json").read_text())["missing"])
    for part in ("diagnosis", "cluster", "memory.csv", "memory.png", "report", "traceback.txt", "versions"):
        assert f"{part}: ZeroDivisionError" in missing


# -- real deaths -------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Victim:
    def who(self) -> tuple[str, str, int, tuple[str, ...], Pulse]:
        print("the last line", flush=True)
        context, files = ray.get_runtime_context(), (str(Path(f"/proc/self/fd/{n}").readlink()) for n in (1, 2))
        return (ray.util.get_node_ip_address(), context.get_node_id(), os.getpid(), tuple(files),
                Pulse(*own_pulse_numbers()))

    def sleep(self) -> None:
        time.sleep(60)

    def fail(self) -> None:
        raise ValueError("bad number")


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def watched(role: str) -> Member:
    actor = Victim.remote()
    node, node_id, pid, logs, pulse = ray.get(actor.who.remote(), timeout=60)
    return Member(role, 0, f"{role}-0.1", actor, node, node_id, pid, logs, pulses=deque([(time.time(), pulse)]))


def test_kill_9_from_outside(cluster: None, tmp_path: Path) -> None:
    victim, elsewhere = watched("policy"), member(role="critic", index=0, pid=1)
    elsewhere.node_id = "0" * 56
    call = victim.actor.sleep.remote()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError) as caught:
        ray.get(call, timeout=60)
    victim.gone, victim.words = "died", str(caught.value)
    out = write_post_mortem(tmp_path, [elsewhere, victim], caught.value, "rollout", 1, deadline_s=30)
    report = json.loads((out / "report.json").read_text())
    assert report["cause"] == "killed" and report["first"]["pid"] == victim.pid
    assert report["nodes"][0]["alive"] and report["resources"]["CPU"] == 2
    assert "the last line" in (out / "logs" / "policy-0.log").read_text()
    assert "its node" in (out / "logs" / "critic-0.log").read_text() and len(report["missing"]) == 1


def test_an_exception_in_an_actor(cluster: None, tmp_path: Path) -> None:
    victim = watched("critic")
    with pytest.raises(ValueError) as caught:
        ray.get(victim.actor.fail.remote(), timeout=60)
    out = write_post_mortem(tmp_path, [victim], caught.value, "update", 2, deadline_s=30)
    report = json.loads((out / "report.json").read_text())
    assert report["cause"] == "python_error" and report["missing"] == []
    assert report["first"]["role"] == "critic"
    assert report["exception"] == {"type": "ValueError", "message": "bad number"}
    assert 'raise ValueError("bad number")' in (out / "traceback.txt").read_text()
    assert "the last line" in (out / "logs" / "critic-0.log").read_text()
