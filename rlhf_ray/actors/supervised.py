"""The learner of the supervised stages: language modelling (pretrain, sft), ranking (rm) and DPO (dpo)."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_ray import storage
from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.config.schema import DPOConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_ray.core.algorithms.dpo import DPOLoss, dpo_loss, implicit_rewards
from rlhf_ray.core.losses import RankingLoss, lm_loss, ranking_loss
from rlhf_ray.core.ragged import PackedRows, take
from rlhf_ray.core.types import RankedDataset, TokenDataset
from rlhf_ray.engines.learner import Learner, MicroBatch, Rank, join_group
from rlhf_ray.models.hub import Packer, load_causal_lm, load_scalar_model, load_tokenizer, save_model
from rlhf_ray.models.modules import CausalLM, ScalarModel

REFERENCE = "reference.safetensors"  # in a checkpoint of DPO: the responses' log-probabilities under the first weights


class SupervisedLearner(LearnerRole):
    """One ZeRO-3 rank. `objective`: "lm" reads a TokenDataset, "ranking" and "dpo" a RankedDataset.

    "dpo" needs its options and, before the first step, `remember_reference`.
    """

    role = "supervised"

    def setup(
        self, where: Rank, objective: str, path: str, data: TokenDataset | RankedDataset, model: ModelConfig,
        learner: LearnerConfig, optimizer: OptimizerConfig, total_steps: int, seed: int, dropout: float = 0.0,
        autocast: bool = False, timeout_s: float = 1800.0, dpo: DPOConfig | None = None,
    ) -> None:
        self.leave()
        torch.manual_seed(seed)
        device = join_group(where, learner.threads, timeout_s)
        self.objective, self.data, self.cfg, self.path = objective, data, learner, path
        assert (objective == "dpo") == (dpo is not None)
        self.autocast, self.dpo = autocast, dpo
        self.reference: np.ndarray | None = None  # DPO: log-probability of every response, nats, float64 [N]
        if isinstance(data, RankedDataset):
            self.in_response = data.in_response
        if objective == "ranking":
            self.model = load_scalar_model(path, model)
            module: torch.nn.Module = ScalarModel(self.model)
        else:
            self.model = load_causal_lm(path, model, dropout)
            module = CausalLM(self.model)
        self.packer = Packer.of(self.model, model)
        self.learner = Learner(module, learner, optimizer, model.dtype, total_steps, device)

    def train(self, rows: Sequence[int]) -> dict[str, Any]:
        """One optimizer step on this rank's share of the batch (sequence numbers, or prompt numbers for rankings). If
        it was dropped, `fault` says of which gradients."""
        batches, denominator = self._batches(rows)
        total = self.learner.sum(denominator)[0]
        sums = [0.0] * 4
        step = self.learner.step(
            [MicroBatch(b, partial(self._loss, extra=e, total=total, sums=sums)) for b, e in batches],
        )
        return {"grad_norm": step.grad_norm, "lr": step.lr, "skipped": float(step.skipped)} | self._summed(sums) \
            | ({"fault": step.fault} if step.fault else {})

    def evaluate(self, rows: Sequence[int]) -> dict[str, float]:
        """Mean loss on this rank's share and all others'; for rankings also correctly ordered pairs, and all pairs."""
        batches, denominator = self._batches(rows)
        total = self.learner.sum(denominator)[0]
        sums = [0.0] * 4
        extras = iter([e for _, e in batches])  # runs out on the empty passes that wait for the other ranks
        self.learner.forward([b for b, _ in batches],
                             lambda r: self._loss(r, next(extras, None), total, sums).reshape(1))
        return self._summed(sums)

    def scores(self, rows: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """(sequence numbers, their rewards float32) of this rank's share of prompts: the head's output after the last
        token, or with DPO the implicit reward."""
        chosen, values = self._outputs(rows)
        if self.dpo is not None:
            assert self.reference is not None
            values = implicit_rewards(values, torch.as_tensor(self.reference[chosen]), self.dpo.beta)
        return chosen, values.float().numpy()

    def remember_reference(self, rows: Sequence[int]) -> None:
        """Keep the log-probabilities of the responses under the weights as they are now (DPO only): the reference.

        Each rank passes its share of prompts forward; afterwards all ranks know all shares. No second model is needed.
        """
        chosen, values = self._outputs(rows)
        found = self.learner.gather(np.column_stack([np.array(chosen, dtype=np.float64), values.double().numpy()]))
        self.reference = np.full(len(self.data.lengths), np.nan)  # so that none can be forgotten
        self.reference[found[:, 0].astype(np.int64)] = found[:, 1]

    def more(self) -> list[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        if self.reference is None or self.learner.rank:
            return []
        return [(REFERENCE, {"logprobs": torch.as_tensor(self.reference)}, {})]

    def restore(self, directory: str) -> None:
        super().restore(directory)
        if self.dpo is not None:
            with safe_open(Path(directory) / REFERENCE, framework="pt") as saved:
                self.reference = saved.get_tensor("logprobs").numpy()

    def save(self, path: str, dtype: str, config: dict[str, Any]) -> None:
        """Write a Hugging Face directory (rank 0; the others take part in the gather)."""
        weights = self.learner.weights()
        if self.learner.rank == 0:
            save_model(self.model, weights, load_tokenizer(self.path), Path(path), dtype, **config)
            storage.publish(Path(path), exact=True)
            storage.settle()
        else:
            for _ in weights:
                pass

    # ----------------------------------------------------------------------------------------------------------

    def _summed(self, sums: list[float]) -> dict[str, float]:
        """Of all ranks: the loss, and for rankings what was counted."""
        loss, correct, pairs, margin = self.learner.sum(*sums)
        counted = {"loss": loss, "correct": correct, "pairs": pairs}
        return counted | {"margin_sum": margin} if self.dpo is not None else counted

    def _batches(self, units: Sequence[int]) -> tuple[list[tuple[PackedRows, tuple]], float]:
        """Packed micro-batches with what their loss needs, and this rank's part of the loss denominator."""
        d = self.data
        if isinstance(d, TokenDataset):
            chosen = np.asarray(units, dtype=np.int64)
            weights = take(d.in_loss, d.lengths, chosen)
            packed = self.packer(take(d.ids, d.lengths, chosen), d.lengths[chosen], self.cfg.micro_batch_tokens)
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
            (rows,) = self.packer(take(d.ids, d.lengths, chosen), d.lengths[chosen], 1 << 60,
                                  d.prompt_lengths[chosen])
            if self.objective == "ranking":
                batches.append((rows, (chosen,)))
                continue
            wanted = rows.pick(take(self.in_response, d.lengths, chosen), False)
            owner = torch.as_tensor(np.repeat(np.arange(len(chosen)), d.lengths[chosen]))[rows.index[wanted]]
            batches.append((rows, (chosen, wanted, owner)))
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
                logprobs, _ = self.learner.engine(rows, wanted, 1.0)
            loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), total)
        else:
            loss = self._ranking(self._of_responses(rows, *extra), extra[0], sums) / total
        sums[0] += float(loss.detach())
        return loss

    def _ranking(self, values: Tensor, chosen: np.ndarray, sums: list[float]) -> Tensor:
        """The loss of whole prompts, summed, from what `_of_responses` says of them."""
        assert isinstance(self.data, RankedDataset)
        ranks, groups = (torch.as_tensor(x[chosen]).to(values.device) for x in (self.data.ranks, self.data.groups))
        result: RankingLoss | DPOLoss
        if self.dpo is not None:
            assert self.reference is not None, "remember_reference comes before the first step"
            reference = torch.as_tensor(self.reference[chosen]).to(values.device)
            result = dpo_loss(values, reference, ranks, groups, self.dpo.beta, self.dpo.label_smoothing)
            sums[3] += float(result.margin_sum)
        else:
            result = ranking_loss(values, ranks, groups)
        sums[1] += float(result.correct)
        sums[2] += float(result.pairs)
        return result.loss.float()

    def _outputs(self, units: Sequence[int]) -> tuple[list[int], Tensor]:
        """(sequence numbers, `_of_responses` on the CPU) of this rank's share of prompts, without gradients."""
        batches, _ = self._batches(units)
        extras = iter([e for _, e in batches])  # runs out as in `evaluate`

        def of(rows: PackedRows) -> Tensor:
            extra = next(extras, None)
            return self.learner.any_output(rows) if extra is None else self._of_responses(rows, *extra)

        values = self.learner.forward([b for b, _ in batches], of)
        return [int(i) for _, extra in batches for i in extra[0]], torch.cat([torch.zeros(0), *values])

    def _of_responses(
        self, rows: PackedRows, chosen: np.ndarray, wanted: Tensor | None = None, owner: Tensor | None = None
    ) -> Tensor:
        """[len(chosen)]: the head's output after the last token, float32; with DPO the log-probability of the whole
        response, float64, as margins are small differences of large sums. `owner`: whose each wanted token is."""
        device = rows.ids.device
        if wanted is None or owner is None:
            outputs: Tensor = self.learner.engine(rows).flatten()
            return outputs[self._last_tokens(rows, chosen).to(device)]
        logprobs, _ = self.learner.engine(rows, wanted.to(device), 1.0)
        sums = torch.zeros(len(chosen), dtype=torch.float64, device=device)
        return sums.index_add(0, owner.to(device), logprobs.double())
