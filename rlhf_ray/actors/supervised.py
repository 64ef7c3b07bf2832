"""The learner of the supervised stages: language modelling (pretrain, sft) and ranking (rm)."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_ray.core.losses import lm_loss, ranking_loss
from rlhf_ray.core.ragged import PackedRows, pack, take
from rlhf_ray.core.types import RankedDataset, TokenDataset
from rlhf_ray.engines.learner import Learner, MicroBatch, Rank, join_group
from rlhf_ray.models.hub import load_causal_lm, load_scalar_model, load_tokenizer, one_row, save_model
from rlhf_ray.models.modules import CausalLM, ScalarModel


class SupervisedLearner(Role):
    """One ZeRO-3 rank. `objective`: "lm" reads a TokenDataset, "ranking" a RankedDataset."""

    def setup(
        self, where: Rank, objective: str, path: str, data: TokenDataset | RankedDataset, model: ModelConfig,
        learner: LearnerConfig, optimizer: OptimizerConfig, total_steps: int, seed: int, dropout: float = 0.0,
        autocast: bool = False, timeout_s: float = 1800.0,
    ) -> None:
        torch.manual_seed(seed)
        device = join_group(where, learner.threads, timeout_s)
        self.objective, self.data, self.cfg, self.path = objective, data, learner, path
        self.autocast = autocast
        if objective == "ranking":
            self.model = load_scalar_model(path, model)
            module: torch.nn.Module = ScalarModel(self.model)
        else:
            self.model = load_causal_lm(path, model, dropout)
            module = CausalLM(self.model)
        self.row_length, self.one_row = model.max_length, one_row(model)
        self.learner = Learner(module, learner, optimizer, model.dtype, total_steps, device)

    def train(self, rows: Sequence[int]) -> dict[str, float]:
        """One optimizer step on this rank's share of the batch (sequence numbers, or prompt numbers for ranking)."""
        batches, denominator = self._batches(rows)
        total = self.learner.sum(denominator)[0]
        sums = [0.0, 0.0, 0.0]
        result = self.learner.step(
            [MicroBatch(b, partial(self._loss, extra=e, total=total, sums=sums)) for b, e in batches],
        )
        loss, correct, pairs = self.learner.sum(*sums)
        return result | {"loss": loss, "correct": correct, "pairs": pairs}

    def evaluate(self, rows: Sequence[int]) -> dict[str, float]:
        """Mean loss on this rank's share and all others'; for ranking also correctly ordered pairs, and all pairs."""
        batches, denominator = self._batches(rows)
        total = self.learner.sum(denominator)[0]
        sums = [0.0, 0.0, 0.0]
        extras = iter([e for _, e in batches])  # runs out on the empty passes that wait for the other ranks
        self.learner.forward([b for b, _ in batches],
                             lambda r: self._loss(r, next(extras, None), total, sums).reshape(1))
        value, correct, pairs = self.learner.sum(*sums)
        return {"loss": value, "correct": correct, "pairs": pairs}

    def scores(self, rows: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """(sequence numbers, the head's output after the last token float32) of this rank's share (ranking only)."""
        batches, _ = self._batches(rows)
        outputs = self.learner.forward([b for b, _ in batches], lambda r: self.learner.engine(r.ids, r.positions))
        found: dict[int, float] = {}
        for (batch, extra), output in zip(batches, outputs, strict=True):
            last = self._last_tokens(batch, extra[0])
            found |= dict(zip(extra[0].tolist(), output.flatten()[last].tolist(), strict=True))
        return list(found), np.array(list(found.values()), dtype=np.float32)

    def save(self, path: str, dtype: str, config: dict[str, object]) -> None:
        """Write a Hugging Face directory (rank 0; the others take part in the gather)."""
        weights = self.learner.weights()
        if self.learner.rank == 0:
            save_model(self.model, weights, load_tokenizer(self.path), Path(path), dtype, **config)
        else:
            for _ in weights:
                pass

    # ----------------------------------------------------------------------------------------------------------

    def _batches(self, units: Sequence[int]) -> tuple[list[tuple[PackedRows, tuple]], float]:
        """Packed micro-batches with what their loss needs, and this rank's part of the loss denominator."""
        d = self.data
        if isinstance(d, TokenDataset):
            chosen = np.asarray(units, dtype=np.int64)
            weights = take(d.in_loss, d.lengths, chosen)
            packed = pack(take(d.ids, d.lengths, chosen), d.lengths[chosen], self.row_length,
                          self.cfg.micro_batch_tokens, self.one_row)
            return [(p, (p.pick(weights, False),)) for p in packed], float(weights.sum())
        batches: list[tuple[PackedRows, tuple]] = []
        members = [np.flatnonzero(d.groups == g) for g in units]
        while members:  # whole prompts, as many as fit the token budget, in one rectangle
            chunk, size = [members.pop(0)], 0
            size = int(d.lengths[chunk[0]].sum())
            while members and size + int(d.lengths[members[0]].sum()) <= self.cfg.micro_batch_tokens:
                size += int(d.lengths[members[0]].sum())
                chunk.append(members.pop(0))
            chosen = np.concatenate(chunk)
            (rows,) = pack(take(d.ids, d.lengths, chosen), d.lengths[chosen], self.row_length, 1 << 60,
                           self.one_row)
            batches.append((rows, (chosen,)))
        return batches, float(len(units))

    def _last_tokens(self, batch: PackedRows, chosen: np.ndarray) -> Tensor:
        """Places of the last token of each chosen sequence in the flattened rectangle: int64 [len(chosen)]."""
        d = self.data
        place = torch.full((int(d.lengths[chosen].sum()) + 1,), -1, dtype=torch.int64)
        flat = batch.index.flatten().cpu()
        place[flat] = torch.arange(flat.numel())  # empty places (-1) land on the spare last entry
        return place[torch.as_tensor(np.cumsum(d.lengths[chosen]) - 1)]

    def _loss(self, rows: PackedRows, extra: object, total: float, sums: list[float]) -> Tensor:
        if extra is None:
            return self.learner.any_output(rows).sum() * 0.0
        assert isinstance(extra, tuple)
        if self.objective == "lm":
            wanted = extra[0].to(rows.ids.device)
            with torch.autocast(rows.ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
                logprobs, _ = self.learner.engine(rows.ids, rows.positions, wanted, 1.0)
            loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), total)
        else:
            (chosen,) = extra
            assert isinstance(self.data, RankedDataset)
            outputs = self.learner.engine(rows.ids, rows.positions).flatten()
            rewards = outputs[self._last_tokens(rows, chosen).to(outputs.device)]
            result = ranking_loss(rewards, torch.as_tensor(self.data.ranks[chosen]).to(rewards.device),
                                  torch.as_tensor(self.data.groups[chosen]).to(rewards.device))
            loss = result.loss / total
            sums[1] += float(result.correct)
            sums[2] += float(result.pairs)
        sums[0] += float(loss.detach())
        return loss
