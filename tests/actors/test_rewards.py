"""Scores from a user's function and from a service: what is wrong with them is said in one line, and never believed."""

import contextlib
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.actors import rewards
from rlhf_ray.actors.rewards import RewardFunction, RewardService
from rlhf_ray.config.load import asset_dir
from rlhf_ray.config.reward_sources import check_source, source_file
from rlhf_ray.config.schema import RewardConfig
from rlhf_ray.core.types import PromptTexts, RolloutBatch
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import load_tokenizer

TOKENIZER = asset_dir("reviews_base")
PROMPTS = PromptTexts(("Zero", "One", "Two"), ("", '{"answer": 1}', '{"answer": 2}'))
RESPONSES = [" a good film", " a bad one"]  # of prompts 2 and 1


def rollout(responses: list[str] = RESPONSES) -> RolloutBatch:
    """Responses to prompts 2, 1, 0, 2, ...; the first ends with EOS, the others were cut."""
    tokenizer = load_tokenizer(TOKENIZER)
    n, prompt = len(responses), tokenizer("a prompt").input_ids
    bodies = [tokenizer(r).input_ids + [tokenizer.eos_token_id] * (i == 0) for i, r in enumerate(responses)]
    rows = [prompt + body for body in bodies]
    ids = np.array([i for row in rows for i in row], dtype=np.int32)
    return RolloutBatch(
        ids=ids, lengths=np.array([len(row) for row in rows], dtype=np.int32),
        prompt_lengths=np.full(n, len(prompt), dtype=np.int32), sampled_logprobs=np.zeros(len(ids), dtype=np.float32),
        truncated=np.arange(n) > 0, prompt_index=np.array([2, 1, 0] * n, dtype=np.int64)[:n],
        positions=np.arange(n), seeds=np.arange(n), version=1,
    )


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "FIRST_PAUSE_S", 0.001)


# -- a Python function -------------------------------------------------------------------------------------------------

Load = Callable[..., RewardFunction]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """load(code): the role on function `score` of a module with this code in a directory of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def start(code: str, function: str = "score", **cfg: Any) -> RewardFunction:
        (tmp_path / "my_rewards.py").write_text(code)
        role = RewardFunction()
        role.setup(f"my_rewards:{function}", TOKENIZER, PROMPTS, RewardConfig(**cfg), str(tmp_path))
        return role

    yield start
    sys.modules.pop("my_rewards", None)


def test_a_function_sees_texts_and_metadata_in_the_order_of_the_rollout(load: Load) -> None:
    role = load("def score(prompts, responses, metadata):\n    global seen\n    seen = prompts, responses, metadata\n"
                "    return [m.get('answer', 0) + 0.5 for m in metadata]")
    scores = role.scores(rollout([" a good film", " a bad one", ""]))
    assert scores.dtype == np.float32 and scores.tolist() == [2.5, 1.5, 0.5]
    assert sys.modules["my_rewards"].seen == (  # EOS is no part of the text
        ["Two", "One", "Zero"], [" a good film", " a bad one", ""], [{"answer": 2}, {"answer": 1}, {}])


@pytest.mark.parametrize("value", ["[1, 2.0]", "(True, 2)", "np.array([1, 2])", "np.float16([1, 2])",
                                   "[np.float32(1), 2]", "torch.tensor([1., 2.], requires_grad=True)"])
def test_numbers_of_every_kind_are_taken(load: Load, value: str) -> None:
    role = load(f"import numpy as np, torch\ndef score(p, r, m): return {value}")
    assert role.scores(rollout()).tolist() == [1.0, 2.0]


def test_no_responses_have_no_scores(load: Load) -> None:
    assert load("def score(p, r, m): return [1.0 for _ in r]").scores(rollout([])).shape == (0,)


@pytest.mark.parametrize(("value", "what"), [
    ("[1]", "1 scores for 2 responses"),
    ("[]", "0 scores for 2 responses"),
    ("[[1], [2]]", "score 0 (the first is 0) is [1], not a number"),
    ("[1, float('nan')]", "score 1 (the first is 0) is NaN, for the response ' a bad one'"),
    ("[1e39, 1]", "score 0 (the first is 0) is infinite as float32, for the response ' a good film'"),
    ("[1, 10**400]", "score 1 (the first is 0) is infinite as float32, for the response ' a bad one'"),
    ("[1, '2']", "score 1 (the first is 0) is '2', not a number"),
    ("[None, 2]", "score 0 (the first is 0) is None, not a number"),
    ("'12'", "gave no list of scores but a str"),
    ("3.5", "gave no list of scores but a float"),
    ("{'scores': [1, 2]}", "gave no list of scores but a dict"),
    ("(x for x in [1, 2])", "gave no list of scores but a generator"),
    ("None", "gave no list of scores but a NoneType"),
])
def test_a_function_that_gives_something_else_is_not_asked_again(load: Load, value: str, what: str) -> None:
    role = load(f"def score(p, r, m): return {value}")
    with pytest.raises(UserError) as error:
        role.scores(rollout())
    assert str(error.value) == (f"reward.sources=my_rewards:score: {what}; it must return one finite number for each "
                                "response")
    assert role.stats()["retries"] == 0


def test_a_function_that_raises_is_asked_again_and_then_named_with_its_line(load: Load) -> None:
    role = load("def score(p, r, m):\n    return float('a\\nb')\n", retries=2)
    with pytest.raises(UserError) as error:
        role.scores(rollout())
    assert str(error.value) == ("reward.sources=my_rewards:score: raised ValueError: could not convert string to "
                                "float: 'a\\nb' (my_rewards.py:2), last of 3 attempts; mend the function")
    assert error.value.__cause__ is None  # a class of the user's need not exist at the driver
    assert role.stats()["retries"] == 2


def test_a_function_that_exits_is_one_that_raises(load: Load) -> None:
    role = load("import sys\ndef score(p, r, m): sys.exit('on two\\nlines')", retries=0)
    with pytest.raises(UserError, match=r"score: raised SystemExit: on two lines \(my_rewards.py:2\); mend"):
        role.scores(rollout())


def test_a_function_that_is_too_slow_is_given_up(load: Load) -> None:
    role = load("import threading\ngate = threading.Event()\ndef score(p, r, m): gate.wait()", timeout_s=0.2, retries=1)
    with pytest.raises(UserError) as error:
        role.scores(rollout())
    sys.modules["my_rewards"].gate.set()
    assert str(error.value) == ("reward.sources=my_rewards:score: timed out after 0.2 s, last of 2 attempts; make the "
                                "function faster or raise reward.timeout_s")


def test_a_late_return_value_is_nobodys_answer(load: Load) -> None:
    """The first call returns 1s only after the second returned 2s; it changes its arguments, too."""
    role = load("""import threading
gate, late, calls, seen = threading.Event(), threading.Event(), [], []
def score(prompts, responses, metadata):
    calls.append(0)
    number = len(calls)
    if number == 1:
        responses.clear(), metadata.clear()
        gate.wait()
        late.set()
    seen.append(list(responses))
    return [number] * 2
""", timeout_s=1.0)
    assert role.scores(rollout()).tolist() == [2.0, 2.0]
    module = sys.modules["my_rewards"]
    module.gate.set()
    assert module.late.wait(10)
    assert role.scores(rollout()).tolist() == [3.0, 3.0]
    assert module.seen[0] == RESPONSES
    assert role.stats()["retries"] == 1


@pytest.mark.parametrize(("code", "function", "what"), [
    ("def scores(p, r, m): ...", "score", "no function score in DIR/my_rewards.py: it is not there; did you mean "
                                          "scores?"),
    ("score = 3.5", "score", "no function score in DIR/my_rewards.py: it is a float; define it, or name another "
                             "function of my_rewards"),
    ("def score(answers): ...", "score", "takes (answers); it must take (prompts, responses, metadata)"),
    ("import not_here", "score", "cannot import my_rewards: ModuleNotFoundError: No module named 'not_here'; it must "
                                 "be in DIR or installed on every node"),
    ("def score(:", "score", "cannot import my_rewards: SyntaxError: invalid syntax (my_rewards.py, line 1); it must "
                             "be in DIR or installed on every node"),
    ("import sys; sys.exit(1)", "score", "cannot import my_rewards: SystemExit: 1; it must be in DIR or installed on "
                                         "every node"),
])
def test_a_function_that_cannot_be_had_is_said_at_the_start(
    load: Load, tmp_path: Path, code: str, function: str, what: str
) -> None:
    with pytest.raises(UserError) as error:
        load(code, function)
    assert str(error.value) == f"reward.sources=my_rewards:{function}: {what}".replace("DIR", str(tmp_path))


def test_pauses_double_without_chance_and_have_a_limit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    role = load("def score(p, r, m): raise OSError", retries=6)
    monkeypatch.setattr(rewards, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(rewards, "time", SimpleNamespace(sleep=pauses.append, monotonic=lambda: 0.0))
    with pytest.raises(UserError, match=r"raised OSError \(my_rewards.py:1\), last of 7 attempts"):
        role.scores(rollout())
    assert pauses == [0.5, 1, 2, 4, 8, 8]


def test_stats_count_since_they_were_last_read(load: Load) -> None:
    role = load("import time\ndef score(p, r, m):\n    time.sleep(0.05)\n    return [1, 2]")
    role.scores(rollout())
    role.scores(rollout())
    first = role.stats()
    assert (first["calls"], first["retries"]) == (2, 0) and 0.1 <= first["seconds"] < 10
    assert role.stats() == {"calls": 0, "retries": 0, "seconds": 0}


# -- a service ---------------------------------------------------------------------------------------------------------

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def reply(body: str, status: int = 200, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body.encode("latin-1"))

    return answer


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers one after the other, the last one again and again, and keeps what it was sent."""

    daemon_threads = True
    answers: tuple[Answer, ...]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        self.requests: list[tuple[str | None, Any]] = []  # Authorization, body
        self.lock, self.over = threading.Lock(), threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            answer = self.server.answers[min(len(self.server.requests), len(self.server.answers) - 1)]
            self.server.requests.append((self.headers["Authorization"], body))
        answer(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("RLHF_RAY_REWARD_TOKEN", raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def service(server: Server, *answers: Answer, **cfg: Any) -> RewardService:
    server.answers = answers
    role = RewardService()
    role.setup(server.url, TOKENIZER, PROMPTS, RewardConfig(**cfg))
    return role


GOOD = reply('{"scores": [1, 2.5]}')


def test_a_service_gets_texts_and_metadata_and_gives_scores(server: Server) -> None:
    """A lone surrogate in a prompt, which JSON can hold and UTF-8 cannot, arrives too."""
    role = service(server, GOOD)
    role.prompts = PromptTexts(("Zero", "One \udc80", "Two"), PROMPTS.metadata)
    scores = role.scores(rollout())
    assert scores.dtype == np.float32 and scores.tolist() == [1.0, 2.5]
    assert server.requests == [(None, {"prompts": ["Two", "One \udc80"], "responses": RESPONSES,
                                       "metadata": [{"answer": 2}, {"answer": 1}]})]


@pytest.mark.parametrize("answer", [
    reply("busy", 503), reply("<html>"), reply("\xff"), reply('{"scores": [1]}'), reply('{"scores": [1, NaN]}'),
])
def test_a_service_is_asked_again_and_retries_are_counted(server: Server, answer: Answer) -> None:
    role = service(server, answer, answer, GOOD)
    assert role.scores(rollout()).tolist() == [1.0, 2.5]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]
    assert role.stats() | {"seconds": 0} == {"calls": 1, "retries": 2, "seconds": 0}


MUST = 'the service must answer {"scores": [...]} with one finite number for each response'


@pytest.mark.parametrize(("answer", "what"), [
    (reply("busy", 503), "HTTP 503, last of 2 attempts; the service's log may say why"),
    (reply("", 302, Location="/other"), "HTTP 302, a redirect, and none is followed, last of 2 attempts; give the URL "
                                        "that it leads to"),
    (reply("<html>"), f"answered no JSON, last of 2 attempts; {MUST}"),
    (reply("[" * 100_000), f"answered no JSON, last of 2 attempts; {MUST}"),
    (reply("[1, 2]"), f"answered no `scores`, last of 2 attempts; {MUST}"),
    (reply('{"score": [1, 2]}'), f"answered no `scores`, last of 2 attempts; {MUST}"),
    (reply('{"scores": 1}'), f"gave no list of scores but a int, last of 2 attempts; {MUST}"),
    (reply('{"scores": [1, 2, 3]}'), f"3 scores for 2 responses, last of 2 attempts; {MUST}"),
    (reply('{"scores": [1, "2"]}'), f"score 1 (the first is 0) is '2', not a number, last of 2 attempts; {MUST}"),
    (reply('{"scores": [NaN, 2]}'), "score 0 (the first is 0) is NaN, for the response ' a good film', last of 2 "
                                    f"attempts; {MUST}"),
])
def test_a_service_that_stays_bad_ends_the_run_in_one_line(server: Server, answer: Answer, what: str) -> None:
    with pytest.raises(UserError) as error:
        service(server, answer, retries=1).scores(rollout())
    assert str(error.value) == f"reward.sources={server.url}: {what}"
    assert len(server.requests) == 2


def test_a_reply_that_does_not_end_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "MAX_REPLY_BYTES", 2**20)

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client is gone
            while True:
                handler.wfile.write(b" " * 65536)

    with pytest.raises(UserError, match="answered more than 1 MiB; the service must answer"):
        service(server, endless, retries=0).scores(rollout())


def test_the_deadline_is_for_the_whole_reply(server: Server) -> None:
    """A service that sends a byte now and then never trips a socket's timeout."""
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not server.over.wait(0.02):
                handler.wfile.write(b" ")

    role = service(server, drip, timeout_s=0.5, retries=0)
    with pytest.raises(UserError) as error:
        role.scores(rollout())
    assert str(error.value) == (f"reward.sources={server.url}: timed out after 0.5 s; make the service faster or raise "
                                "reward.timeout_s")
    assert 0.5 <= role.stats()["seconds"] < 5


def test_a_late_reply_is_nobodys_answer(server: Server) -> None:
    """The first reply comes only after the retry's; it is not taken for the answer of the next call either."""
    gate, late = threading.Event(), threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        gate.wait(30)
        with contextlib.suppress(OSError):  # the client is gone
            reply('{"scores": [7, 7]}')(handler)
        late.set()

    role = service(server, slow, GOOD, reply('{"scores": [3, 4]}'), timeout_s=1.0)
    assert role.scores(rollout()).tolist() == [1.0, 2.5]
    gate.set()
    assert late.wait(30)
    assert role.scores(rollout()).tolist() == [3.0, 4.0]
    assert role.stats()["retries"] == 1


def test_a_service_that_is_not_there_is_named(server: Server) -> None:
    role = service(server, GOOD, retries=0)
    role.source = "http://127.0.0.1:1/"
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/: ConnectError: .*refused; is the service running, and"):
        role.scores(rollout())


def test_the_token_is_sent_and_never_said(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even if the service repeats it."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", "s3cret\n")  # as files have it
    with pytest.raises(UserError) as error:
        service(server, reply("no such token: s3cret", 401, Said="Bearer"), retries=0).scores(rollout())
    assert [token for token, _ in server.requests] == ["Bearer s3cret"]
    assert str(error.value) == (f"reward.sources={server.url}: HTTP 401; set RLHF_RAY_REWARD_TOKEN to a token that the "
                                "service accepts")
    assert "s3cret" not in caplog.text


def test_a_token_that_is_no_header_is_not_said_either(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", "s3cret\nmore")
    with pytest.raises(UserError) as error:
        service(server, GOOD)
    assert str(error.value) == "RLHF_RAY_REWARD_TOKEN: holds what an HTTP header cannot; set it to the token alone"


# -- names of sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "rewards:score", "a.b_c.d:score2", "http://host/path?x=1",
                                    "https://host.example:8443", "http://[::1]:80/"])
def test_good_sources_are_taken(source: str) -> None:
    check_source(source)


@pytest.mark.parametrize("source", ["", "modle", "rewards", "rewards:", ":score", "a..b:score", "./rewards.py:score",
                                    "rewards:a.b", "rewards:score:2", "ftp://host", "http://", "http://:80", "host:80",
                                    "http://host:99999", "http://host:port", "http://[::1", "http://ho st",
                                    "http://host/a\nb", "rewards:score\n"])
def test_malformed_sources_are_refused_in_one_line(source: str) -> None:
    with pytest.raises(UserError, match=r"\Areward\.sources=.*: must be model, MODULE:FUNCTION or an http\(s\) URL\Z"):
        check_source(source)


def test_a_file_for_a_module_and_a_password_have_lines_of_their_own() -> None:
    with pytest.raises(UserError, match=r"a module's name has no \.py; write rewards:score"):
        check_source("rewards.py:score")
    with pytest.raises(UserError) as error:
        check_source("https://ann:s3cret@host/path")
    assert "https://...@host:" in str(error.value) and "s3cret" not in str(error.value)


def test_the_file_of_a_function_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory first, as the actor looks for it; models and services have none."""
    monkeypatch.chdir(tmp_path)
    for file in ("rewards.py", "json.py", "pack/__init__.py", "pack/inner.py", "model.py", "http.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("raise SystemExit")
    found = {source: source_file(source) for source in (
        "rewards:f", "json:f", "pack:f", "pack.inner:f", "gone:f", "model", "http://host/x")}
    assert found == {"rewards:f": tmp_path / "rewards.py", "json:f": tmp_path / "json.py",
                     "pack:f": tmp_path / "pack/__init__.py", "pack.inner:f": tmp_path / "pack/inner.py",
                     "gone:f": None, "model": None, "http://host/x": None}
    (tmp_path / "json.py").unlink()
    found_elsewhere = source_file("json:f")
    assert found_elsewhere is not None and found_elsewhere.name == "__init__.py"
