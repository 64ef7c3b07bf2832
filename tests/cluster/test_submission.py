"""Jobs without a cluster: addresses, exit statuses, and output that is read through interruptions."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus

from rlhf_ray.cluster import submission
from rlhf_ray.cluster.submission import JobServer, Lost, Output, exit_status, find_address
from rlhf_ray.errors import UserError


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray's library turns it on, for the tests after this one, too


def details(status: JobStatus, code: int | None = None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="", driver_exit_code=code)


# --- where ---


def test_what_is_given_counts_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert find_address(None) == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://b:2/")
    assert find_address(None) == "https://b:2"
    assert find_address("http://c:3") == "http://c:3"


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://10.0.0.1:10001", "http://"])
def test_an_address_is_that_of_a_dashboard(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"RAY_ADDRESS=.*: give the address of the cluster's dashboard"):
        find_address(None)


class Page(BaseHTTPRequestHandler):
    """Something else that speaks HTTP."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *args: object) -> None:
        pass


def test_nobody_there_and_somebody_else_there() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"no Ray cluster answers there; start one with `ray start --head`"):
            JobServer(f"http://127.0.0.1:{bound.getsockname()[1]}")
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"no Ray cluster answers there \(Expecting value"):
            JobServer(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize(("versions", "says"), [
    ({"rayVersion": "2.9.3", "pythonVersion": "3.11.7"}, "the cluster has Ray 2.9.3, and here is Ray 2"),
    ({"rayVersion": "", "pythonVersion": "3.1.2"}, "the cluster has Python 3.1.2, and here is Python 3"),
])
def test_other_versions_are_refused(versions: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, address: str) -> None: ...

        def _do_request(self, method: str, endpoint: str) -> "Client":
            return self

        def json(self) -> dict[str, dict[str, str]]:
            return {"data": versions | {"rayVersion": versions["rayVersion"] or submission.ray.__version__}}

    monkeypatch.setattr(submission, "_Client", Client)
    with pytest.raises(UserError, match=says):
        JobServer("http://a:1")


# --- how it ended ---


@pytest.mark.parametrize(("status", "code", "expected"), [
    (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, -9, 137), (JobStatus.STOPPED, None, 143),
    (JobStatus.FAILED, None, 1),
])
def test_exit_status(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_status(details(status, code)) == expected


# --- what it prints ---


class Server:
    """A job that prints 0123456789 and ends. connections: what each says of it; an exception cuts it off."""

    def __init__(self, *connections: list[str | Exception]) -> None:
        self.connections = list(connections)
        self.unreachable = 0

    async def pieces(self, job: str) -> AsyncGenerator[str, None]:
        for piece in self.connections.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece
            await asyncio.sleep(0)

    def look(self, job: str) -> JobDetails:
        if self.unreachable:
            self.unreachable -= 1
            raise ConnectionError("refused\nby whom?")
        return details(JobStatus.RUNNING if self.connections else JobStatus.SUCCEEDED)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_RETRY_S", 0.01)


def output_of(server: object) -> Output:
    return Output(server, "job")  # type: ignore[arg-type]


async def said(output: Output) -> str:
    return "".join([text async for text in output.follow()])


def test_a_connection_that_breaks_is_made_again_and_nothing_is_said_twice() -> None:
    """Each begins at the beginning, and cuts the text into pieces of its own."""
    server = Server(["012", "34", RuntimeError("abnormal")], ["0", OSError()], ["01234567", "8"], ["0123456789"])
    server.unreachable = 1
    output = output_of(server)
    assert asyncio.run(said(output)) == "0123456789"
    assert output.ended is not None and output.ended.status == JobStatus.SUCCEEDED


def test_a_reader_who_was_interrupted_reads_on() -> None:
    output = output_of(Server(["0123", "4567"], ["0123456789"]))

    async def first() -> str:
        async for text in output.follow():
            return text
        return ""

    assert asyncio.run(first()) == "0123"
    assert asyncio.run(said(output)) == "456789"


def test_a_connection_that_is_silent_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be half open: after a laptop slept, nobody will ever say so."""
    monkeypatch.setattr(submission, "_QUIET_S", 0.05)

    class Silent(Server):
        async def pieces(self, job: str) -> AsyncGenerator[str, None]:
            if len(self.connections) == 2:
                self.connections.pop()
                yield "0"
                await asyncio.sleep(100)
            async for piece in super().pieces(job):
                yield piece

    assert asyncio.run(said(output_of(Silent(["0123456789"], [])))) == "0123456789"


def test_a_cluster_out_of_reach_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LOST_S", 0.1)
    server = Server(*([OSError()] for _ in range(1000)))
    server.unreachable, started = 1000, time.monotonic()
    with pytest.raises(Lost, match=r"by whom\?"):
        asyncio.run(said(output_of(server)))
    assert 0.1 <= time.monotonic() - started < 5


def test_the_variable_that_ray_prefers_says_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    with pytest.raises(UserError):
        JobServer("http://127.0.0.1:1")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"
