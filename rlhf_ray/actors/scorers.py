"""The roles that read rollouts and give numbers: reward model, reference model, judge."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from rlhf_ray.actors.reader import Reader
from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import ModelConfig, ScorerConfig
from rlhf_ray.core.ragged import PackedRows
from rlhf_ray.core.types import RolloutBatch
from rlhf_ray.models.hub import Packer, load_causal_lm, load_scalar_model, load_tokenizer, score_shift
from rlhf_ray.models.modules import CausalLM, ScalarModel
from rlhf_ray.models.processors import use_processors
from rlhf_ray.models.spread import own_streams, spread

Module = TypeVar("Module", bound=nn.Module)


class _Scorer(Role):
    packer: Packer

    def _use(self, cfg: ScorerConfig) -> None:
        """Every thread has micro-batches of its own, all of them together `micro_batch_tokens`. On CPU threads would
        wait for each other in every product of one pass; of several GPUs, a thread each, one pass keeps one at work."""
        gpus = min(torch.cuda.device_count(), max(1, int(cfg.gpus)))
        self._devices = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
        self.device = self._devices[0]
        if self.device.type == "cpu":
            use_processors(1)
        threads = cfg.threads if self.device.type == "cpu" else len(self._devices)
        self._threads = ThreadPoolExecutor(threads, initializer=self._begin_thread) if threads > 1 else None
        self._seconds = 0.0
        self.micro_batch_tokens = max(1, cfg.micro_batch_tokens // threads)

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            own_streams(self._devices)

    def _placed(self, module: Module) -> Module:
        """The module where it is to work, in evaluation mode."""
        if len(self._devices) > 1:
            spread(module, self._devices)
            return module.eval()
        return module.to(self.device).eval()

    def stats(self) -> dict[str, float]:
        """Since the last call of stats: retries (there are none) and seconds of work on rollouts."""
        seconds, self._seconds = self._seconds, 0.0
        return {"retries": 0.0, "seconds": seconds}

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds += time.monotonic() - started

    def _pass(
        self, each: Callable[[PackedRows], None], ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None
    ) -> None:
        """`each` on every micro-batch, without gradients, and in no order."""

        @torch.no_grad()
        def on_device(rows: PackedRows) -> None:
            each(rows.to(self.device))

        for _ in (self._threads.map if self._threads else map)(
                on_device, self.packer(ids, lengths, self.micro_batch_tokens, prompts)):
            pass


class RewardModel(_Scorer, Reader):
    """Scores whole responses; the shift stored with the model is already taken off."""

    def setup(self, path: str, model: ModelConfig, cfg: ScorerConfig) -> None:
        self._use(cfg)
        found = load_scalar_model(path, model)
        self.packer = Packer.of(found, model)
        self.module = self._placed(ScalarModel(found, score_shift(path)))
        self.tokenizer = load_tokenizer(path)

    def scores(self, rollout: RolloutBatch) -> np.ndarray:
        """float32 [N]: the head's output after the last token of each rollout.

        A truncated response is read as if it ended there: every response of the reward model's training had an end,
        and a last token of another kind would be a place where it never learnt to judge.
        """
        with self._timed():
            return self.scores_of(rollout.ids, rollout.lengths, rollout.truncated, rollout.prompt_lengths)

    def scores_of(
        self, ids: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, prompts: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [N], of any sequences. truncated bool [N]: is to be read as if it ended there; prompts [N]: so many
        first tokens of each are its prompt, which those that have the same may share."""
        ids = np.insert(ids, np.cumsum(lengths)[truncated], self.tokenizer.eos_token_id)
        lengths = lengths + truncated
        outputs = np.empty(len(ids), dtype=np.float32)

        def score(rows: PackedRows) -> None:
            outputs[rows.index[rows.filled].cpu().numpy()] = self.module(rows)[rows.filled].cpu().numpy()

        self._pass(score, ids, lengths, prompts)
        return outputs[np.cumsum(lengths) - 1]


class ReferenceModel(_Scorer):
    """Log-probabilities under a frozen policy."""

    def setup(self, path: str, model: ModelConfig, cfg: ScorerConfig) -> None:
        self._use(cfg)
        self.model = model
        self.module: CausalLM | None = None
        self.load(path)

    def load(self, path: str) -> None:
        """Take another model."""
        self.module = None  # one at a time in memory
        found = load_causal_lm(path, self.model)
        self.packer = Packer.of(found, self.model)
        self.module = self._placed(CausalLM(found))

    def logprobs(self, rollout: RolloutBatch, temperature: float) -> np.ndarray:
        """float32 [T]: log p of every response token, 0 on prompt tokens."""
        with self._timed():
            return self.logprobs_of(rollout.ids, rollout.lengths, rollout.in_response, temperature,
                                    rollout.prompt_lengths)

    def logprobs_of(
        self, ids: np.ndarray, lengths: np.ndarray, wanted: np.ndarray, temperature: float,
        prompts: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 [T]: log p of the wanted tokens, 0 elsewhere. prompts [N]: so many first tokens of each sequence are
        its prompt, and none of them is wanted; without, all may be."""
        module = self.module
        assert module is not None
        outputs = np.zeros(len(ids), dtype=np.float32)

        def logprobs(rows: PackedRows) -> None:
            chosen = rows.pick(wanted, False)
            outputs[rows.index[chosen].cpu().numpy()] = module(rows, chosen, temperature)[0].cpu().numpy()

        self._pass(logprobs, ids, lengths, prompts)
        return outputs


class Judge(Role):
    """The held-out judge of the embedded task, watching the rollouts; it never takes part in training."""

    def setup(self, tokenizer_path: str, judge: object) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.judge = Tokenizer.from_file(f"{tokenizer_path}/tokenizer.json"), judge

    def mean_score(self, rollout: RolloutBatch) -> tuple[float, int]:
        """(sum of the judge's log-odds over the responses, number of responses)."""
        ends = np.cumsum(rollout.lengths)
        starts = ends - rollout.lengths + rollout.prompt_lengths
        texts = self.tokenizer.decode_batch([rollout.ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)])
        return float(np.sum(self.judge.log_odds(texts))), len(texts)  # type: ignore[attr-defined]
