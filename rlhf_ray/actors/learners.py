"""What policy and critic learners share, and the critic.

All methods are collective over the group: the driver calls them on every rank at once. A rank is handed
references; it reads the arrays from the object store, and puts what it makes back there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, RayError
from torch import Tensor

from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.config.schema import AlgorithmConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_ray.core.losses import explained_variance, value_loss
from rlhf_ray.core.masked import moments
from rlhf_ray.core.ragged import PackedRows, first_true, take
from rlhf_ray.core.types import CriticBatch, Moments, PolicyBatch, RolloutBatch, Window
from rlhf_ray.engines.learner import Learner, MicroBatch, Rank, join_group
from rlhf_ray.models.hub import Packer, load_scalar_model, score_shift
from rlhf_ray.models.modules import ScalarModel

Batch = TypeVar("Batch", PolicyBatch, CriticBatch)
T = TypeVar("T")


class RLLearner(LearnerRole):
    """Base of the two: packing, and rows of batches."""

    cfg: LearnerConfig
    learner: Learner
    packer: Packer

    def _read(self, shards: Sequence[Any]) -> list[RolloutBatch]:
        """What this rank is to pass through."""
        return self._unless_lost(lambda: ray.get(list(shards)))

    def _unless_lost(self, read: Callable[[], list[T]]) -> list[T]:
        """What `read` finds in the object store. If one rank misses something, all raise: else the others would wait
        for it in the next collective."""
        error, found = None, list[T]()
        try:
            found = read()
        except RayError as lost:
            error = lost
        (failed,) = self.learner.sum(float(error is not None))
        if error is not None:
            raise error
        if failed:
            raise ObjectLostError("what another rank was to read", None, "")
        return found

    def _pack(self, ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None = None) -> list[PackedRows]:
        return self.packer(ids, lengths, self.cfg.micro_batch_tokens, prompts)

    def _pack_responses(self, batch: Batch) -> list[PackedRows]:
        return self._pack(batch.ids, batch.lengths, first_true(batch.in_response, batch.lengths))

    @staticmethod
    def _whole(kind: type[Batch], batches: Sequence[Any]) -> Batch:
        """All shards end to end."""
        parts: list[Batch] = ray.get(list(batches))
        return kind(**{f.name: np.concatenate([getattr(b, f.name) for b in parts]) for f in fields(kind)})

    @staticmethod
    def _rows(batch: Batch, chosen: np.ndarray) -> Batch:
        """The chosen rollouts."""
        rows = {f.name: take(getattr(batch, f.name), batch.lengths, chosen)
                for f in fields(batch) if f.name != "lengths"}
        return type(batch)(lengths=batch.lengths[chosen], **rows)


class CriticLearner(RLLearner):
    """The value function: starts as the reward model, head included; without one as the policy, with a head of 0."""

    role = "critic"

    def setup(
        self, where: Rank, path: str, model: ModelConfig, cfg: LearnerConfig, optimizer: OptimizerConfig,
        algorithm: AlgorithmConfig, total_steps: int, seed: int, timeout_s: float,
    ) -> None:
        self.leave()
        torch.manual_seed(seed)
        device = join_group(where, cfg.threads, timeout_s)
        self.cfg, self.algorithm = cfg, algorithm
        self.model = load_scalar_model(path, model)
        self.packer = Packer.of(self.model, model)
        self.learner = Learner(ScalarModel(self.model, score_shift(path)), cfg, optimizer, model.dtype, total_steps,
                               device)

    def values(self, shards: Sequence[Any]) -> list[Any]:
        """References to the values float32 [T] of this rank's shards: entry t is predicted before token t."""
        rollouts = self._read(shards)
        packed = [(r, self._pack(r.ids, r.lengths, r.prompt_lengths)) for r in rollouts]
        outputs = iter(self.learner.forward(
            [rows for _, batches in packed for rows in batches], lambda rows: rows.before(self.learner.engine(rows))))
        refs = []
        for rollout, batches in packed:
            values = np.zeros(len(rollout.ids), dtype=np.float32)
            for rows in batches:
                values[rows.index[rows.filled].numpy()] = next(outputs)[rows.filled].numpy()
            values[~rollout.in_response] = 0.0
            refs.append(ray.put(values))
        return refs

    def update(self, batches: Sequence[Any], windows: Sequence[Window]) -> dict[str, Any]:
        """One optimizer step per window on the clipped value loss. If one was dropped, `critic_fault` says of which
        gradients."""
        data = self._whole(CriticBatch, batches)
        report, spread, steps, fault = np.zeros(5), Moments(0.0, 0.0, 0.0), 0, ""
        for window in windows:
            rollouts = self._rows(data, window.rollouts)
            (tokens,) = self.learner.sum(float(rollouts.in_response.sum()))
            if not tokens:  # every response of this step is left out
                continue
            spread += moments(torch.as_tensor(rollouts.returns), torch.as_tensor(rollouts.in_response))
            sums = np.zeros(3)
            result = self.learner.step([
                MicroBatch(rows, partial(self._value_loss, rows=rows, data=rollouts, tokens=tokens, sums=sums))
                for rows in self._pack_responses(rollouts)
            ])
            loss, clipped, squares = self.learner.sum(*sums)
            report += [loss, clipped / tokens, squares, result.grad_norm, result.skipped]
            steps, fault = steps + 1, fault or result.fault
        total = Moments(*self.learner.sum(spread.total, spread.squares, spread.count))
        n = max(1, steps)
        return {"value_loss": report[0] / n, "value_clip_fraction": report[1] / n,
                "explained_variance": explained_variance(total, float(report[2])),
                "critic_grad_norm": report[3] / n, "critic_skipped_steps": float(report[4])} | \
            ({"critic_fault": fault} if fault else {})

    def _value_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: CriticBatch, tokens: float, sums: np.ndarray
    ) -> Tensor:
        wanted, device = rows.pick(data.in_response, False), device_rows.ids.device
        values = device_rows.before(self.learner.engine(device_rows))[wanted.to(device)]
        old, returns = (rows.pick(x)[wanted].to(device) for x in (data.values, data.returns))
        result = value_loss(values, old, returns, torch.ones_like(values, dtype=torch.bool), self.algorithm.value_clip,
                            tokens)
        sums += [float(result.loss.detach()), float(result.clip_count), float(result.squared_error_sum)]
        return result.loss
