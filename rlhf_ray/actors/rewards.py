"""The roles that get scores from outside: from a Python function of the user, and from an HTTP service."""

import difflib
import importlib
import inspect
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from rlhf_ray.actors.reader import Reader
from rlhf_ray.config.reward_sources import check_source
from rlhf_ray.config.schema import RewardConfig
from rlhf_ray.core.types import PromptTexts, RolloutBatch
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import load_tokenizer

TOKEN_VARIABLE = "RLHF_RAY_REWARD_TOKEN"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # before the first retry; it doubles with each
LONGEST_TIMEOUT_S = 1e6  # beyond, queues and sockets overflow
MAX_REPLY_BYTES = 16 * 2**20  # half a million scores


class _Failed(Exception):
    """An attempt without scores: what happened, what to do about it, and whether another attempt may do better."""

    def __init__(self, what: str, remedy: str, again: bool = True):
        super().__init__(what)
        self.remedy, self.again = remedy, again


class _External(Reader):
    """Calls `_answer` with a deadline and retries, and believes nothing of what it says."""

    bad_answer_again: bool  # whether an answer that makes no sense is worth another attempt
    too_slow, bad_answer = "", ""  # what to do about it

    def _use(self, source: str, tokenizer_path: str, prompts: PromptTexts, cfg: RewardConfig) -> None:
        check_source(source)
        self.source, self.prompts = source, prompts
        self.timeout_s, self.retries = min(cfg.timeout_s, LONGEST_TIMEOUT_S), cfg.retries
        self.tokenizer = load_tokenizer(tokenizer_path)
        self._stats = {"calls": 0.0, "retries": 0.0, "seconds": 0.0}

    def scores(self, rollout: RolloutBatch) -> np.ndarray:
        """float32 [N]: the source's score of each response, all finite.

        An attempt has reward.timeout_s seconds; after reward.retries more that failed too, raises UserError.
        """
        ends = np.cumsum(rollout.lengths)
        starts = ends - rollout.lengths + rollout.prompt_lengths
        responses = [str(self.tokenizer.decode(rollout.ids[a:b].tolist(), skip_special_tokens=True))
                     for a, b in zip(starts, ends, strict=True)]  # batch_decode makes one text out of none
        started = time.monotonic()
        self._stats["calls"] += 1
        try:
            return self._scores_of(rollout.prompt_index.tolist(), responses)
        finally:
            self._stats["seconds"] += time.monotonic() - started

    def stats(self) -> dict[str, float]:
        """Since the last call of stats: calls of `scores`, retries, and seconds spent on both, pauses included."""
        now, self._stats = self._stats, dict.fromkeys(self._stats, 0.0)
        return now

    def _scores_of(self, prompt_index: list[int], responses: list[str]) -> np.ndarray:
        pause = FIRST_PAUSE_S
        for attempt in range(1, self.retries + 2):
            # Fresh copies: an abandoned attempt that is still running may change its own.
            texts = [self.prompts.texts[i] for i in prompt_index]
            metadata = [json.loads(self.prompts.metadata[i] or "{}") for i in prompt_index]
            try:
                answer = self._in_time(self._answer, texts, list(responses), metadata)
                return self._checked(answer, responses)
            except _Failed as failure:
                if failure.again and attempt <= self.retries:
                    self._stats["retries"] += 1
                    time.sleep(min(pause, LONGEST_PAUSE_S))
                    pause *= 2
                    continue
                tries = f", last of {attempt} attempts" if attempt > 1 else ""
                # `from None`: what was raised may be of a class that the driver cannot load
                raise UserError(f"reward.sources={self.source}: {failure}{tries}; {failure.remedy}") from None
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        raise NotImplementedError

    def _in_time(self, call: Callable[..., Any], *args: Any) -> Any:
        """What `call` returns or raises in a thread of its own; _Failed if that takes longer than the deadline.

        Each call answers into a box of its own, so that nobody ever reads what an abandoned one says later.
        """
        box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((call(*args), None))
            except BaseException as error:
                box.put((None, error))

        threading.Thread(target=work, daemon=True).start()  # daemon: does not keep the actor from ending
        try:
            answer, error = box.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self._late() from None
        if error is not None:
            raise error
        return answer

    def _late(self) -> _Failed:
        return _Failed(f"timed out after {self.timeout_s:g} s", f"{self.too_slow} or raise reward.timeout_s")

    def _bad(self, what: str) -> _Failed:
        return _Failed(what, self.bad_answer, self.bad_answer_again)

    def _checked(self, answer: Any, responses: list[str]) -> np.ndarray:
        """The answer as float32 [N], or _Failed that says how it is not N finite numbers."""
        if hasattr(answer, "tolist"):  # numpy, torch, pandas
            answer = answer.tolist()
        if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
            raise self._bad(f"gave no list of scores but a {type(answer).__name__}")
        if len(answer) != len(responses):
            raise self._bad(f"{len(answer)} scores for {len(responses)} responses")
        scores = np.zeros(len(answer), dtype=np.float32)
        for i, score in enumerate(answer):
            try:
                if isinstance(score, str | bytes):
                    raise TypeError  # float() would read "1.5"
                with np.errstate(over="ignore"):
                    scores[i] = float(score)
            except OverflowError:
                scores[i] = np.inf
            except (TypeError, ValueError):
                raise self._bad(f"score {i} (the first is 0) is {_short(repr(score), 40)}, not a number") from None
            if not np.isfinite(scores[i]):
                what = "NaN" if np.isnan(scores[i]) else "infinite as float32"
                raise self._bad(f"score {i} (the first is 0) is {what}, for the response {responses[i][:60]!r}")
        return scores


class RewardFunction(_External):
    """Scores from a Python function `f(prompts: list[str], responses: list[str], metadata: list[dict])`, which
    returns a sequence of one number for each response.

    It runs in a thread that is not the main one (so it cannot use signal.alarm). Python has no way to end a thread: a
    call that was given up goes on until the actor ends, beside the retry. What it raises may be a matter of chance, so
    that is retried; a return value of the wrong kind is not.
    """

    bad_answer_again = False
    too_slow, bad_answer = "make the function faster", "it must return one finite number for each response"

    def setup(
        self, source: str, tokenizer_path: str, prompts: PromptTexts, cfg: RewardConfig, cwd: str
    ) -> None:
        """Import the function of `source`, MODULE:FUNCTION; modules in the directory `cwd` come first.

        Raises UserError if there is no such module or function, or if it does not take three arguments.
        """
        self._use(source, tokenizer_path, prompts, cfg)
        if sys.path[:1] != [cwd]:
            sys.path.insert(0, cwd)
        self.function, self.file = _find_function(source, cwd)

    def _answer(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        try:
            return self.function(prompts, responses, metadata)
        except BaseException as error:  # sys.exit() too
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.file]
            where = f" ({Path(self.file).name}:{frames[-1].lineno})" if frames else ""
            raise _Failed(f"raised {_named(error)}{where}", "mend the function") from None


class RewardService(_External):
    """Scores from an HTTP service: POST {"prompts": [...], "responses": [...], "metadata": [{...}, ...]}, which
    answers 200 and {"scores": [one number for each response]}, both in JSON.

    Sends `Authorization: Bearer TOKEN` if the environment variable RLHF_RAY_REWARD_TOKEN is set where the actor runs
    (on a cluster: where `ray start` was called). Redirects are not followed. Each attempt has a connection of its own.
    """

    bad_answer_again = True
    too_slow = "make the service faster"
    bad_answer = 'the service must answer {"scores": [...]} with one finite number for each response'

    def setup(
        self, source: str, tokenizer_path: str, prompts: PromptTexts, cfg: RewardConfig
    ) -> None:
        """Nothing is sent yet. Raises UserError if the token cannot be part of an HTTP header."""
        self._use(source, tokenizer_path, prompts, cfg)
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not (token.isascii() and token.isprintable()):
            raise UserError(f"{TOKEN_VARIABLE}: holds what an HTTP header cannot; set it to the token alone")
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def _answer(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        # json.dumps, not httpx's: its ASCII can hold lone surrogates, which bytes of UTF-8 cannot.
        body = json.dumps({"prompts": prompts, "responses": responses, "metadata": metadata}).encode()
        try:
            reply = json.loads(self._post(body))
        except (ValueError, RecursionError):
            raise self._bad("answered no JSON") from None
        if not isinstance(reply, dict) or "scores" not in reply:
            raise self._bad("answered no `scores`")
        return reply["scores"]

    def _post(self, body: bytes) -> bytes:
        """The body of a good answer. Never tells what else the service said: it might repeat the token."""
        try:
            with httpx.stream("POST", self.source, content=body, headers=self.headers, timeout=self.timeout_s,
                              follow_redirects=False) as response:
                if response.status_code != 200:
                    raise _bad_status(response)
                reply = bytearray()
                for chunk in response.iter_bytes():
                    reply += chunk
                    if len(reply) > MAX_REPLY_BYTES:
                        raise self._bad(f"answered more than {MAX_REPLY_BYTES / 2**20:g} MiB")
                return bytes(reply)
        except httpx.TimeoutException:
            raise self._late() from None
        # Beside httpx's own: a proxy or certificate of the environment that cannot be used.
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, ValueError) as error:
            raise _Failed(_named(error), "is the service running, and is this its address?") from None


def _bad_status(response: httpx.Response) -> _Failed:
    status = response.status_code
    if 300 <= status < 400:
        return _Failed(f"HTTP {status}, a redirect, and none is followed", "give the URL that it leads to")
    if status in (401, 403):
        return _Failed(f"HTTP {status}", f"set {TOKEN_VARIABLE} to a token that the service accepts")
    return _Failed(f"HTTP {status}", "the service's log may say why")


def _find_function(source: str, cwd: str) -> tuple[Callable[..., Any], str]:
    """The function of MODULE:FUNCTION and the file of the module. Raises UserError."""
    name, _, attribute = source.partition(":")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward.sources={source}: cannot import {name}: {_named(error)}; it must be in {cwd} or "
                        "installed on every node") from None
    function, file = getattr(module, attribute, None), getattr(module, "__file__", None) or ""
    if not callable(function):
        what = f"is a {type(function).__name__}" if hasattr(module, attribute) else "is not there"
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, known, n=1)
        raise UserError(f"reward.sources={source}: no function {attribute} in {file or name}: it {what}; "
                        + (f"did you mean {near[0]}?" if near else f"define it, or name another function of {name}"))
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError:
        raise UserError(f"reward.sources={source}: takes {inspect.signature(function)}; it must take (prompts, "
                        "responses, metadata)") from None
    except ValueError:  # compiled, without a signature to check
        pass
    return function, file


def _named(error: BaseException) -> str:
    return _short(f"{type(error).__name__}: {error}", 300).removesuffix(":")


def _short(text: str, most: int) -> str:
    """On one line of at most `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 3] + "..."
