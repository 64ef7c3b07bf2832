"""Jobs of a Ray cluster, over the HTTP API of its dashboard: what is there, submit, follow, stop.

Needs Ray's token where the cluster does: the file ~/.ray/auth_token is enough.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from rlhf_ray.core.packing import NodeResources
from rlhf_ray.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
STOP_WAIT_S = 240  # what a stopped job may take to save before Ray kills it (its own default: 3)
STOPPED = 128 + 15  # exit status of a job that was stopped
LOST_S = 60.0  # how long the cluster may be out of reach while a job is followed
_ANSWER_S = (10.0, 60.0)  # to connect, and between two pieces of an answer
_QUIET_S = 600.0  # a connection that says nothing for so long may be dead: another is made
_RETRY_S = 1.0
_FIRST_NODE_S = 10.0
_NODES = 10_000  # the most that the state API lists
TROUBLE = (RuntimeError, OSError, AuthenticationError)  # what Ray's client raises; those of requests are OSErrors


class Lost(Exception):
    """The cluster was out of reach for too long; what became of the job is not known."""


class _Client(JobSubmissionClient):
    """With a deadline for every request: Ray's own waits for ever for a host that does not answer."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _ANSWER_S, **kwargs})


def find_address(given: str | None) -> str:
    """The dashboard's address: the one given, else that of `ray job`'s environment variables, else this machine's.

    Raises UserError unless it is an http(s) URL.
    """
    found = {"--address": given, **{name: os.environ.get(name) for name in ADDRESS_VARIABLES}}
    source, address = next(((k, v) for k, v in found.items() if v), ("--address", DEFAULT_ADDRESS))
    assert address is not None
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"{source}={address}: give the address of the cluster's dashboard, such as "
                        f"--address {DEFAULT_ADDRESS}")
    return address.rstrip("/")


class JobServer:
    """The job server of a cluster. Everything raises UserError if it cannot be reached or refuses the token."""

    def __init__(self, address: str):
        """Raises UserError, too, if the cluster has another Ray or Python than this process."""
        self.address = address
        # The state API looks there first, whatever it is told.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            self._client = _Client(address)
            metadata = self._client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
            there = {"Ray": metadata["rayVersion"], "Python": metadata["pythonVersion"]}
        except AuthenticationError as error:
            raise _refused(address, error) from None
        except (ConnectionError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            # Ray does not say why it could not connect.
            why = "" if isinstance(error, ConnectionError) else f" ({_short(error).split('. ')[0]})"
            raise UserError(f"{address}: no Ray cluster answers there{why}; start one with `ray start --head`, or give "
                            "--address http://HOST:8265 of one that runs") from None
        here = {"Ray": ray.__version__, "Python": "{}.{}.{}".format(*sys.version_info[:3])}
        for name, version in there.items():
            if version.split(".")[:2] != here[name].split(".")[:2]:
                raise UserError(f"{address}: the cluster has {name} {version}, and here is {name} {here[name]}: use "
                                f"the same {name} on both")

    def nodes(self) -> list[NodeResources]:
        """Every living node and what it offers in all. A head answers before its own node is there: that is waited
        for."""
        deadline = time.monotonic() + _FIRST_NODE_S
        try:
            while not (found := list_nodes(self.address, filters=[("state", "=", "ALIVE")], limit=_NODES)) \
                    and time.monotonic() < deadline:
                time.sleep(0.5)
        except (RayStateApiException, requests.RequestException) as error:
            raise UserError(f"{self.address}: the cluster does not say what nodes it has: {_short(error)}") from error
        return [NodeResources(node.node_name, float(node.resources_total.get("CPU", 0)),
                              float(node.resources_total.get("GPU", 0))) for node in found]

    def submit(self, job: str, entrypoint: str, metadata: Mapping[str, str], archive: Path | None) -> None:
        """Start `entrypoint` on the head node as the job of that id, with the archive's files around it."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        if archive:
            environment["working_dir"] = str(archive)
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=job, metadata=dict(metadata),
                                    runtime_env=environment)
        except TROUBLE as error:
            raise UserError(f"{self.address}: the cluster did not take job {job}: {_short(error)}") from error

    def stop(self, job: str) -> None:
        """Ask the job to end; it saves first. See `ended`."""
        try:
            self._client.stop_job(job)
        except TROUBLE as error:
            raise UserError(f"{self.address}: cannot stop job {job}: {_short(error)}") from error

    def details(self, job: str) -> JobDetails:
        """How the job is now."""
        try:
            return self.look(job)
        except TROUBLE as error:
            raise UserError(f"{self.address}: cannot look at job {job}: {_short(error)}") from error

    def look(self, job: str) -> JobDetails:
        """The same for who goes on asking: raises TROUBLE."""
        return self._client.get_job_info(job)

    async def pieces(self, job: str) -> AsyncGenerator[str, None]:
        """The job's output from its beginning, until the connection ends."""
        async for piece in self._client.tail_job_logs(job):
            yield piece


class Output:
    """What a job prints, once: it may be read on after an interruption, of the reader or of the connection.

    ended: how the job ended; None before it has.
    """

    def __init__(self, server: JobServer, job: str):
        self._server, self._job = server, job
        self._read = 0  # characters
        self.ended: JobDetails | None = None

    async def follow(self) -> AsyncGenerator[str, None]:
        """Until the job has ended. Raises Lost if the cluster is out of reach for LOST_S."""
        heard = time.monotonic()
        while True:
            told = 0  # of this connection, which begins at the beginning
            try:
                async with aclosing(self._server.pieces(self._job)) as pieces:
                    while (piece := await _next(pieces)) is not None:
                        new = piece[max(0, self._read - told):]
                        told += len(piece)
                        self._read = max(self._read, told)
                        heard = time.monotonic()
                        if new:
                            yield new
            except (aiohttp.ClientError, *TROUBLE):  # a TimeoutError is an OSError
                pass
            try:
                now = self._server.look(self._job)
                if now.status.is_terminal():
                    self.ended = now
                    return
                heard = time.monotonic()
            except TROUBLE as error:
                if time.monotonic() - heard > LOST_S:
                    raise Lost(_short(error)) from error
            await asyncio.sleep(_RETRY_S)


async def _next(pieces: AsyncGenerator[str, None]) -> str | None:
    """Raises TimeoutError if there is none for _QUIET_S. (Of Python 3.11, wait_for may swallow a Ctrl-C.)"""
    async with asyncio.timeout(_QUIET_S):
        return await anext(pieces, None)


def exit_status(job: JobDetails) -> int:
    """What the driver's process ended with, as a shell has it; of a job that was stopped STOPPED."""
    code = job.driver_exit_code
    if code is not None:
        return 128 - code if code < 0 else code
    return {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: STOPPED}.get(job.status, 1)


def _refused(address: str, error: AuthenticationError) -> UserError:
    if "Authentication required" not in str(error):
        return UserError(f"{address}: the cluster refuses the token: ~/.ray/auth_token (or what RAY_AUTH_TOKEN or "
                         "RAY_AUTH_TOKEN_PATH says) must be that of its head node")
    off = os.environ.get("RAY_AUTH_MODE", "token") != "token"
    return UserError(f"{address}: the cluster asks for a token: "
                     + ("set RAY_AUTH_MODE=token" if off else "copy ~/.ray/auth_token from its head node"))


def _short(error: BaseException) -> str:
    """The last line of what an error says, which of a traceback is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
