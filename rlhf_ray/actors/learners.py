"""The PPO learners: policy and critic, each a group of DeepSpeed ZeRO-3 ranks.

All methods are collective over the group: the driver calls them on every rank at once. A rank is handed
references; it reads the arrays from the object store, and puts what it makes back there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor

from rlhf_ray.actors.generator import RayEngines
from rlhf_ray.cluster.role import Role
from rlhf_ray.config.schema import AlgorithmConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_ray.core.advantages import gae
from rlhf_ray.core.kl import k1
from rlhf_ray.core.losses import explained_variance, lm_loss, policy_loss, value_loss
from rlhf_ray.core.masked import Moments, moments, whiten
from rlhf_ray.core.ragged import PackedRows, pack, pad, take, unpad
from rlhf_ray.core.rewards import apply_truncation, token_rewards
from rlhf_ray.core.types import RolloutBatch, TokenDataset, TrainBatch
from rlhf_ray.engines.learner import Learner, MicroBatch, Rank, join_group
from rlhf_ray.models.hub import load_causal_lm, load_scalar_model, load_tokenizer, one_row, save_model, score_shift
from rlhf_ray.models.modules import CausalLM, ScalarModel

if TYPE_CHECKING:
    from rlhf_ray.engines.weight_sync import WeightSender


@dataclass(frozen=True)
class ScoredShard:
    """References to one shard's arrays: rollout, and per rollout or per token what each role made of it."""

    rollout: Any  # -> RolloutBatch
    scores: Any  # -> float32 [N]
    ref_logprobs: Any  # -> float32 [T]
    old_logprobs: Any = None  # -> float32 [T]
    values: Any = None  # -> float32 [T]


@dataclass(frozen=True)
class Window:
    """One optimizer step of one rank: rollout numbers (places in the concatenated shards), ptx block numbers."""

    rollouts: np.ndarray
    ptx: np.ndarray


class _PPOLearner(Role):
    learner: Learner
    cfg: LearnerConfig
    row_length: int
    one_row: bool

    def _pack(self, ids: np.ndarray, lengths: np.ndarray) -> list[PackedRows]:
        return pack(ids, lengths, self.row_length, self.cfg.micro_batch_tokens, self.one_row)

    @staticmethod
    def _whole(batches: Sequence[Any]) -> TrainBatch:
        """All shards end to end."""
        parts: list[TrainBatch] = ray.get(list(batches))
        return TrainBatch(**{f.name: np.concatenate([getattr(b, f.name) for b in parts]) for f in fields(TrainBatch)})

    @staticmethod
    def _rows(batch: TrainBatch, chosen: np.ndarray) -> TrainBatch:
        """The chosen rollouts."""
        rows = {f.name: take(getattr(batch, f.name), batch.lengths, chosen)
                for f in fields(TrainBatch) if f.name != "lengths"}
        return TrainBatch(lengths=batch.lengths[chosen], **rows)


class PolicyLearner(_PPOLearner):
    """The policy in training: old log-probabilities, advantages, clipped updates with ptx, weight sync."""

    def setup(
        self, where: Rank, path: str, model: ModelConfig, cfg: LearnerConfig, optimizer: OptimizerConfig,
        algorithm: AlgorithmConfig, temperature: float, total_steps: int, ptx: TokenDataset | None, seed: int,
        timeout_s: float,
    ) -> None:
        torch.manual_seed(seed)
        device = join_group(where, cfg.threads, timeout_s)
        self.path, self.cfg, self.dtype, self.row_length = path, cfg, model.dtype, model.max_length
        self.one_row = one_row(model)
        self.algorithm, self.temperature, self.ptx = algorithm, temperature, ptx
        self.model = load_causal_lm(path, model)
        self.learner = Learner(CausalLM(self.model), cfg, optimizer, model.dtype, total_steps, device)
        self.average: dict[str, Tensor] = {}  # EMA of the weights, float32, on rank 0
        self.sender: WeightSender | None = None

    def score(self, shards: Sequence[Any]) -> tuple[list[Any], list[float]]:
        """Log-probabilities before the update of this rank's shards (references), and sums over them.

        The sums: response tokens, entropy, |trainer - engine| log-probability. Returns ([-> float32 [T]], sums).
        """
        rollouts: list[RolloutBatch] = ray.get(list(shards))
        packed = [(r, self._pack(r.ids, r.lengths)) for r in rollouts]
        wanted = iter([rows.pick(r.in_response, False) for r, batches in packed for rows in batches])

        def pass_(rows: PackedRows) -> Tensor:
            chosen = next(wanted, torch.ones_like(rows.ids, dtype=torch.bool)).to(rows.ids.device)
            return torch.stack(self.learner.engine(rows.ids, rows.positions, chosen, self.temperature))

        outputs = iter(self.learner.forward([rows for _, batches in packed for rows in batches], pass_))
        refs, sums = [], [0.0, 0.0, 0.0]
        for rollout, batches in packed:
            logprobs, mask = np.zeros(len(rollout.ids), dtype=np.float32), rollout.in_response
            for rows in batches:
                values, entropies = next(outputs)
                logprobs[rows.index[rows.pick(mask, False)].numpy()] = values.numpy()
                sums[1] += float(entropies.sum())
            sums[0] += float(mask.sum())
            sums[2] += float(np.abs(logprobs - rollout.sampled_logprobs)[mask].sum())
            refs.append(ray.put(logprobs))
        return refs, self.learner.sum(*sums)

    def prepare(self, shards: Sequence[ScoredShard], kl_coef: float) -> tuple[list[Any], dict[str, float]]:
        """Rewards, advantages and returns of this rank's shards; whitening spans all ranks.

        Returns references to TrainBatch, and the batch's numbers (the same on every rank).
        """
        parts, totals, spread = [], np.zeros(6), Moments(0.0, 0.0, 0.0)
        for shard in shards:
            rollout, scores, ref, old, values = ray.get(
                [shard.rollout, shard.scores, shard.ref_logprobs, shard.old_logprobs, shard.values])
            mask, _ = pad(rollout.in_response, rollout.lengths)
            padded = [pad(x, rollout.lengths) for x in (old, ref, values)]
            (old_, filled), (ref_, _), (values_, _) = padded
            kl = torch.where(mask, k1(old_, ref_), torch.zeros_like(old_))
            final = apply_truncation(torch.tensor(scores), torch.tensor(rollout.truncated),
                                     self.algorithm.truncation_penalty)
            rewards = token_rewards(final, kl, mask, kl_coef)
            advantages, returns = gae(rewards, values_, mask, self.algorithm.gamma, self.algorithm.lam)
            parts.append((rollout, old, values, advantages, returns, mask, filled))
            spread += moments(advantages, mask)
            totals += [len(scores), scores.sum(), (scores.astype(np.float64) ** 2).sum(), float(kl.sum()),
                       float(mask.sum()), float(rewards.sum())]
        n, score, squares, kl_sum, tokens, reward, *m = self.learner.sum(*totals, spread.total, spread.squares,
                                                                          spread.count)
        refs = []
        for rollout, old, values, advantages, returns, mask, filled in parts:
            if self.algorithm.whiten_advantages:
                advantages = whiten(advantages, mask, Moments(*m))
            refs.append(ray.put(TrainBatch(
                ids=rollout.ids, lengths=rollout.lengths, in_response=rollout.in_response, old_logprobs=old,
                advantages=unpad(advantages, filled), values=values, returns=unpad(returns, filled),
            )))
        return refs, {
            "score": score / n, "score_std": max(0.0, squares / n - (score / n) ** 2) ** 0.5, "reward": reward / n,
            "kl_per_sequence": kl_sum / n, "kl_per_token": kl_sum / tokens, "response_length": tokens / n,
        }

    def update(self, batches: Sequence[Any], windows: Sequence[Window]) -> dict[str, float]:
        """One optimizer step per window on the clipped loss plus `ptx_coef` times the pre-training loss.

        Losses are means over the windows; entropy is not trained on.
        """
        data = self._whole(batches)
        report = np.zeros(8)
        for window in windows:
            rollouts = self._rows(data, window.rollouts)
            ptx = self._ptx_rows(window.ptx)
            tokens, ptx_tokens = self.learner.sum(float(rollouts.in_response.sum()), float(ptx.in_loss.sum()))
            sums = np.zeros(5)
            micro = [MicroBatch(rows, partial(self._policy_loss, rows=rows, data=rollouts, tokens=tokens, sums=sums))
                     for rows in self._pack(rollouts.ids, rollouts.lengths)]
            micro += [MicroBatch(rows, partial(self._ptx_loss, rows=rows, data=ptx, tokens=ptx_tokens, sums=sums))
                      for rows in self._pack(ptx.ids, ptx.lengths)]
            result = self.learner.step(micro)
            loss, clipped, kl, clamped, ptx_loss = self.learner.sum(*sums)
            report += [loss, clipped / tokens, kl / tokens, clamped, ptx_loss, result["grad_norm"], result["lr"],
                       result["skipped"]]
        loss, clip, kl, clamped, ptx_loss, norm, lr, skipped = (report / len(windows)).tolist()
        out = {"policy_loss": loss, "clip_fraction": clip, "update_kl_per_token": kl,
               "clamped_tokens": clamped * len(windows), "policy_grad_norm": norm, "policy_lr": lr,
               "policy_skipped_steps": skipped * len(windows)}
        return out | ({"ptx_loss": ptx_loss} if self.algorithm.ptx_coef else {})

    def _policy_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: TrainBatch, tokens: float, sums: np.ndarray
    ) -> Tensor:
        wanted = rows.pick(data.in_response, False)
        device = device_rows.ids.device
        logprobs, _ = self.learner.engine(device_rows.ids, device_rows.positions, wanted.to(device), self.temperature)
        old, advantages = (rows.pick(x)[wanted].to(device) for x in (data.old_logprobs, data.advantages))
        result = policy_loss(logprobs, old, advantages, torch.ones_like(logprobs, dtype=torch.bool),
                             self.algorithm.clip_ratio, tokens)
        sums[:4] += [float(result.loss.detach()), float(result.clip_count), float(result.kl_k1_sum),
                     float(result.clamped_count)]
        return result.loss

    def _ptx_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: TokenDataset, tokens: float, sums: np.ndarray
    ) -> Tensor:
        wanted = rows.pick(data.in_loss, False)
        logprobs, _ = self.learner.engine(device_rows.ids, device_rows.positions, wanted.to(device_rows.ids.device),
                                          1.0)
        loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), tokens)
        sums[4] += float(loss.detach())
        return self.algorithm.ptx_coef * loss

    def _ptx_rows(self, blocks: np.ndarray) -> TokenDataset:
        if self.ptx is None or not len(blocks):
            none = np.zeros(0, dtype=np.int32)
            return TokenDataset(none, none, none.astype(bool))
        p = self.ptx
        return TokenDataset(take(p.ids, p.lengths, blocks), p.lengths[blocks], take(p.in_loss, p.lengths, blocks))

    def connect(
        self, generators: Sequence[Any], workers_each: int, backend: str, meeting_point: tuple[str, int],
        bucket_mib: float, timeout_s: float,
    ) -> None:
        """Open the wire to the generators; they and rank 0 meet at `meeting_point` (on rank 0's node)."""
        from rlhf_ray.engines.weight_sync import WeightSender  # imports vllm, which only these ranks need

        engines = RayEngines(generators, workers_each, timeout_s)
        observe = self._observe if self.algorithm.ema_decay and self.learner.rank == 0 else None
        self.sender = WeightSender(self.learner, engines, backend, *meeting_point, bucket_mib, observe)

    def push(self, version: int) -> None:
        """Bring all generators to the current weights; they then hold `version`, or this raises."""
        if self.sender is None:
            raise RuntimeError("push before connect")
        self.sender.push(version)

    def _observe(self, name: str, weight: Tensor) -> None:
        # The sync shows rank 0 every whole weight once per iteration: the moment to average them.
        if name in self.average:
            self.average[name].lerp_(weight.detach().float().cpu(), 1 - self.algorithm.ema_decay)
        else:
            self.average[name] = weight.detach().float().cpu().clone()

    def save(self, path: str) -> None:
        """Write the policy as a Hugging Face directory: the averaged weights if there is an EMA."""
        weights: Any = iter(self.learner.weights())
        if self.learner.rank == 0:
            saved = self.average.items() if self.average else weights
            save_model(self.model, saved, load_tokenizer(self.path), Path(path), self.dtype)
        for _ in weights:  # the gathers are collective, whoever needs them
            pass


class CriticLearner(_PPOLearner):
    """The value function: starts as the reward model, head included."""

    def setup(
        self, where: Rank, path: str, model: ModelConfig, cfg: LearnerConfig, optimizer: OptimizerConfig,
        algorithm: AlgorithmConfig, total_steps: int, seed: int, timeout_s: float,
    ) -> None:
        torch.manual_seed(seed)
        device = join_group(where, cfg.threads, timeout_s)
        self.cfg, self.row_length, self.one_row, self.algorithm = cfg, model.max_length, one_row(model), algorithm
        self.model = load_scalar_model(path, model)
        self.learner = Learner(ScalarModel(self.model, score_shift(path)), cfg, optimizer, model.dtype, total_steps,
                               device)

    def values(self, shards: Sequence[Any]) -> list[Any]:
        """References to the values float32 [T] of this rank's shards: entry t is predicted before token t."""
        rollouts: list[RolloutBatch] = ray.get(list(shards))
        packed = [(r, self._pack(r.ids, r.lengths)) for r in rollouts]
        outputs = iter(self.learner.forward(
            [rows for _, batches in packed for rows in batches],
            lambda rows: ScalarModel.values(self.learner.engine(rows.ids, rows.positions)),
        ))
        refs = []
        for rollout, batches in packed:
            values = np.zeros(len(rollout.ids), dtype=np.float32)
            for rows in batches:
                values[rows.index[rows.filled].numpy()] = next(outputs)[rows.filled].numpy()
            values[~rollout.in_response] = 0.0
            refs.append(ray.put(values))
        return refs

    def update(self, batches: Sequence[Any], windows: Sequence[Window]) -> dict[str, float]:
        """One optimizer step per window on the clipped value loss."""
        data = self._whole(batches)
        report, spread = np.zeros(5), Moments(0.0, 0.0, 0.0)
        for window in windows:
            rollouts = self._rows(data, window.rollouts)
            spread += moments(torch.as_tensor(rollouts.returns), torch.as_tensor(rollouts.in_response))
            (tokens,) = self.learner.sum(float(rollouts.in_response.sum()))
            sums = np.zeros(3)
            result = self.learner.step([
                MicroBatch(rows, partial(self._value_loss, rows=rows, data=rollouts, tokens=tokens, sums=sums))
                for rows in self._pack(rollouts.ids, rollouts.lengths)
            ])
            loss, clipped, squares = self.learner.sum(*sums)
            report += [loss, clipped / tokens, squares, result["grad_norm"], result["skipped"]]
        total = Moments(*self.learner.sum(spread.total, spread.squares, spread.count))
        n = len(windows)
        return {"value_loss": report[0] / n, "value_clip_fraction": report[1] / n,
                "explained_variance": explained_variance(total, float(report[2])),
                "critic_grad_norm": report[3] / n, "critic_skipped_steps": float(report[4])}

    def _value_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: TrainBatch, tokens: float, sums: np.ndarray
    ) -> Tensor:
        wanted, device = rows.pick(data.in_response, False), device_rows.ids.device
        values = ScalarModel.values(self.learner.engine(device_rows.ids, device_rows.positions))[wanted.to(device)]
        old, returns = (rows.pick(x)[wanted].to(device) for x in (data.values, data.returns))
        result = value_loss(values, old, returns, torch.ones_like(values, dtype=torch.bool), self.algorithm.value_clip,
                            tokens)
        sums += [float(result.loss.detach()), float(result.clip_count), float(result.squared_error_sum)]
        return result.loss
