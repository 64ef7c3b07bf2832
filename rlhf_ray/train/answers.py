"""Responses of any model to any prompts, through vLLM: what `compare` and `eval` need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import ray

from rlhf_ray.actors.generator import Generator, Sample, sample_seed
from rlhf_ray.cluster.group import Cast, Group, wait
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import PromptSet
from rlhf_ray.metrics.progress import progress_bar
from rlhf_ray.train.roles import generators, layout_of


def prompt_set(prompts: Sequence[Sequence[int]]) -> PromptSet:
    """Encoded prompts as one ragged array."""
    return PromptSet(np.concatenate([np.asarray(p, dtype=np.int32) for p in prompts]),
                     np.array([len(p) for p in prompts], dtype=np.int32))


@contextmanager
def answering(cfg: Config, path: str, prompts: PromptSet) -> Iterator[tuple[Cast, Group]]:
    """Generators on the model at `path`, for as long as the context lasts."""
    with Cast(layout_of(cfg, ["generator"]), cfg.cluster) as cast:
        yield cast, generators(cast, cfg, path, ray.put(prompts), "gloo")


def sample_answers(
    group: Group, prompts: PromptSet, name: str, per_prompt: int, temperature: float, max_tokens: int, seed: int,
    chunk: int = 32,
) -> list[list[np.ndarray]]:
    """`per_prompt` responses to every prompt: token ids int32, [prompts][per_prompt]."""
    samples = [Sample(i, i // per_prompt, sample_seed(seed, 0, i)) for i in range(len(prompts.lengths) * per_prompt)]
    size = chunk * per_prompt
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    answers: list[list[np.ndarray]] = []
    with progress_bar(name, len(parts)) as bar:
        for first in range(0, len(parts), len(group)):  # one part per generator at a time
            some = parts[first : first + len(group)]
            refs = [a.answer.remote(p, temperature, max_tokens)
                    for a, p in zip(group.actors[: len(some)], some, strict=True)]
            for part in wait(refs, group.timeout_s, f"generator.{Generator.answer.__name__}"):
                answers += [part[i : i + per_prompt] for i in range(0, len(part), per_prompt)]
                bar(f"{len(answers) * per_prompt} responses")
    return answers
