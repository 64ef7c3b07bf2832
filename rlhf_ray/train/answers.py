"""Responses of any model to any prompts, through vLLM: what `compare` and `eval` need."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_ray import storage
from rlhf_ray.actors.generator import Generator, sample_seed
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import Group, Overdue, debtors
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import PromptSet, Sample
from rlhf_ray.data.journal import Journal
from rlhf_ray.metrics.progress import progress_bar
from rlhf_ray.train.roles import generators, layout_of

ANSWERS = "answers"  # how the journals in a stage's directory begin


def prompt_set(prompts: Sequence[Sequence[int]]) -> PromptSet:
    """Encoded prompts as one ragged array."""
    return PromptSet(np.concatenate([np.asarray(p, dtype=np.int32) for p in prompts]),
                     np.array([len(p) for p in prompts], dtype=np.int32))


@contextmanager
def answering(cfg: Config, path: str, prompts: PromptSet, directory: Path) -> Iterator[tuple[Cast, Group]]:
    """Generators on the model at `path`, for as long as the context lasts; directory: of the stage."""
    with Cast(layout_of(cfg, ["generator"]), cfg.cluster, directory) as cast:
        yield cast, generators(cast, cfg, path, ray.put(prompts), "gloo")


def sample_answers(
    cast: Cast, group: Group, path: str, prompts: PromptSet, name: str, per_prompt: int, temperature: float,
    max_tokens: int, seed: int, chunk: int = 32, journal: Path | None = None, model: str = "",
) -> list[list[np.ndarray]]:
    """`per_prompt` responses of the model at `path` to every prompt: token ids int32, [prompts][per_prompt].

    journal: a file that keeps every finished part (`chunk` prompts), so that a call with the same arguments, after this
    one was cut off, samples only what is missing; the result is the same. The caller deletes it when all is done.
    model: what tells the model from others, for the journal. Generators of `cast` that are lost or late are replaced.
    """
    samples = [Sample(i, i // per_prompt, sample_seed(seed, 0, i)) for i in range(len(prompts.lengths) * per_prompt)]
    size = chunk * per_prompt
    asked = {"prompts": hashlib.sha256(prompts.lengths.tobytes() + prompts.ids.tobytes()).hexdigest(),
             "per_prompt": per_prompt, "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
             "chunk": chunk, "model": model}
    with Journal(journal, asked) if journal else nullcontext() as kept:
        parts = dict(kept.parts) if kept else {}
        missing = {i: samples[i : i + size] for i in range(0, len(samples), size) if i not in parts}
        with progress_bar(name, len(parts) + len(missing)) as bar:

            def rest() -> None:
                group.call(Generator.load, path)  # who takes the place of a lost one begins with another
                for first, part in _answered(group, missing, temperature, max_tokens):
                    if kept:
                        kept.add(first, part)
                        storage.publish(kept.path)
                    parts[first] = part
                    bar(len(parts), f"{sum(map(len, parts.values()))} responses")
                    del missing[first]

            if missing:
                cast.persist(rest, lambda: len(parts))
    return [parts[first][i : i + per_prompt] for first in sorted(parts)
            for i in range(0, len(parts[first]), per_prompt)]


def _answered(
    group: Group, parts: Mapping[int, Sequence[Sample]], temperature: float, max_tokens: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number, responses) of every part as it finishes; a generator has one in hand, and the next when it is free."""
    waiting = iter(list(parts.items()))
    in_hand: dict[Any, tuple[int, int, float]] = {}  # by reference, oldest first: part, generator, deadline

    def give(generator: int) -> None:
        number, samples = next(waiting, (None, None))
        if number is not None:
            ref = group.submit(generator, Generator.answer, (samples, temperature, max_tokens))
            in_hand[ref] = number, generator, time.monotonic() + group.timeout_s

    for generator in range(len(group)):
        give(generator)
    try:
        while in_hand:
            _, _, deadline = next(iter(in_hand.values()))
            done, _ = ray.wait(list(in_hand), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise Overdue(f"generator.{Generator.answer.__name__} did not answer within {group.timeout_s:.0f} s",
                              debtors(list(in_hand)[:1]))
            number, generator, _ = in_hand.pop(done[0])
            responses = ray.get(done[0])
            give(generator)
            yield number, responses
    finally:
        for ref in in_hand:  # who still samples need not
            ray.cancel(ref)


def forget_answers(directory: Path) -> None:
    """Delete the journals of a stage: it is done, or is to start over."""
    for path in directory.glob(f"{ANSWERS}*.jsonl"):
        path.unlink()
        storage.withdraw(path)
