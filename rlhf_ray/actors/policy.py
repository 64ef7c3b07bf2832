"""The policy in training: old log-probabilities, advantages, updates, and its weights to the generators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_ray import storage
from rlhf_ray.actors.generator import RayEngines
from rlhf_ray.actors.learners import RLLearner
from rlhf_ray.config.schema import AlgorithmConfig, LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.core.experience import Responses, assess, token_advantages
from rlhf_ray.core.importance import effective_sample_size, importance_weights
from rlhf_ray.core.kl import k1
from rlhf_ray.core.losses import Clip, entropy_loss, kl_loss, lm_loss, policy_loss
from rlhf_ray.core.masked import moments, whiten
from rlhf_ray.core.ragged import PackedRows, pad, take, unpad
from rlhf_ray.core.types import (
    CriticBatch,
    Moments,
    PolicyBatch,
    RolloutBatch,
    ScoredShard,
    Shaping,
    TokenDataset,
    Window,
)
from rlhf_ray.engines.learner import Learner, MicroBatch, Rank, join_group
from rlhf_ray.models.hub import Packer, load_causal_lm, load_tokenizer, save_model
from rlhf_ray.models.modules import CausalLM

if TYPE_CHECKING:
    from rlhf_ray.engines.weight_sync import WeightSender

EMA = "ema.safetensors"  # in a checkpoint: the averaged weights


@dataclass(frozen=True)
class Sampling:
    """What a learner must know of the rollout: temperature, responses per prompt, the longest response in tokens."""

    temperature: float
    group_size: int
    max_tokens: int


@dataclass(frozen=True)
class OldLogprobs:
    """Of one shard: a reference to them, float32 [T], and sums over its response tokens: how many, entropy, and
    |trainer - engine| log-probability, nats."""

    logprobs: Any
    tokens: int
    entropy: float
    gap: float


@dataclass(frozen=True)
class Prepared:
    """References to PolicyBatch and CriticBatch (none without a critic), shard by shard, and the batch's numbers;
    seen: moments of its raw scores. Numbers and moments are the same on every rank."""

    policy: list[Any]
    critic: list[Any]
    numbers: dict[str, float]
    seen: Moments


class PolicyLearner(RLLearner):
    """One ZeRO-3 rank of the policy."""

    role = "policy"

    def setup(
        self, where: Rank, path: str, model: ModelConfig, cfg: LearnerConfig, optimizer: OptimizerConfig,
        algorithm: AlgorithmConfig, sampling: Sampling, total_steps: int, ptx: TokenDataset | None, seed: int,
        timeout_s: float, shared: bool = False,
    ) -> None:
        """shared: engines of this host may map the weights (see Learner)."""
        self.sender: WeightSender | None = None
        self.leave()
        torch.manual_seed(seed)
        device = join_group(where, cfg.threads, timeout_s)
        self.path, self.cfg, self.dtype = path, cfg, model.dtype
        self.algorithm, self.kind, self.sampling, self.ptx = algorithm, ALGORITHMS[algorithm.name], sampling, ptx
        high = algorithm.clip_ratio if algorithm.clip_ratio_high is None else algorithm.clip_ratio_high
        self.clip = Clip(algorithm.clip_ratio, high, algorithm.dual_clip)
        self.model = load_causal_lm(path, model)
        self.packer = Packer.of(self.model, model)
        self.learner = Learner(CausalLM(self.model), cfg, optimizer, model.dtype, total_steps, device, shared)
        self.average: dict[str, Tensor] = {}  # EMA of the weights, float32, on rank 0
        self.averaged: dict[str, int] = {}  # up to which version
        self.version = 0

    def score(self, shards: Sequence[Any]) -> list[OldLogprobs]:
        """Log-probabilities before the update of this rank's shards."""
        rollouts = self._read(shards)
        packed = [(r, self._pack(r.ids, r.lengths, r.prompt_lengths)) for r in rollouts]
        wanted = iter([rows.pick(r.in_response, False) for r, batches in packed for rows in batches])

        def pass_(rows: PackedRows) -> Tensor:
            chosen = next(wanted, torch.ones_like(rows.ids, dtype=torch.bool)).to(rows.ids.device)
            result: Tensor = self.learner.engine(rows, chosen, self.sampling.temperature)
            return result

        outputs = iter(self.learner.forward([rows for _, batches in packed for rows in batches], pass_))
        scored = []
        for rollout, batches in packed:
            logprobs, mask, entropy = np.zeros(len(rollout.ids), dtype=np.float32), rollout.in_response, 0.0
            for rows in batches:
                values, entropies = next(outputs)
                logprobs[rows.index[rows.pick(mask, False)].numpy()] = values.numpy()
                entropy += float(entropies.sum())
            gap = float(np.abs(logprobs - rollout.sampled_logprobs)[mask].sum())
            scored.append(OldLogprobs(ray.put(logprobs), int(mask.sum()), entropy, gap))
        return scored

    # -- advantages ----------------------------------------------------------------------------------------------

    def prepare(
        self, shards: Sequence[ScoredShard], weights: list[float], shaping: Shaping, kl_coef: float, seen: Moments
    ) -> Prepared:
        """Rewards, advantages and returns of this rank's shards; statistics span the whole batch, all ranks.

        weights: of the reward sources; seen: moments of the raw scores of earlier iterations.
        """
        a, in_reward = self.algorithm, kl_coef if self.algorithm.kl_in == "reward" else 0.0
        loaded = self._unless_lost(lambda: _Loaded.read(shards))
        mine = [x.responses.table() for x in loaded] or [np.zeros((0, 4 + len(weights)))]
        everybody = Responses.from_table(self.learner.gather(np.concatenate(mine)))
        assessment = assess(everybody, self.kind, weights, shaping, in_reward, self.sampling.group_size, seen)
        parts, spread = [], Moments()
        for x in loaded:
            rows = assessment.rows(x.rollout.positions)
            advantages, returns, kept = token_advantages(self.kind, assessment, rows, x.kl, x.values, x.mask, in_reward,
                                                         a.gamma, a.lam)
            parts.append((x, advantages, returns, kept))
            spread += moments(advantages, kept)
        total = Moments(*self.learner.sum(spread.total, spread.squares, spread.count))
        policy, critic, importance = [], [], np.zeros(4)
        largest = 0.0
        for x, advantages, returns, kept in parts:
            if total.count and (self.kind.whiten == "always" or (self.kind.whiten == "option" and a.whiten_advantages)):
                advantages = whiten(advantages, kept, total)
            weight = kept.float()
            if a.importance_cap is not None:
                weight, sums = importance_weights(x.old, x.sampled, kept, a.importance_cap)
                importance += [sums.weights, sums.squares, sums.count, sums.capped]
                largest = float(np.maximum(largest, sums.largest))  # unlike max, it lets NaN through
            r, in_response = x.rollout, unpad(kept, x.filled)
            policy.append(ray.put(PolicyBatch(
                ids=r.ids, lengths=r.lengths, in_response=in_response, old_logprobs=unpad(x.old, x.filled),
                ref_logprobs=unpad(x.ref, x.filled), advantages=unpad(advantages, x.filled),
                weights=unpad(weight, x.filled))))
            if self.kind.critic:
                critic.append(ray.put(CriticBatch(
                    ids=r.ids, lengths=r.lengths, in_response=in_response, values=unpad(x.values, x.filled),
                    returns=unpad(returns, x.filled))))
        numbers = assessment.numbers
        if a.importance_cap is not None:
            w, squares, count, capped = self.learner.sum(*importance)
            numbers |= {"importance_ess": effective_sample_size(w, squares, count),
                        "importance_clip_fraction": capped / max(1.0, count),
                        "importance_max": self.learner.max(largest)}
        return Prepared(policy, critic, numbers, assessment.seen)

    # -- updates -------------------------------------------------------------------------------------------------

    def update(
        self, batches: Sequence[Any], windows: Sequence[Window], kl_coef: float, on_policy: bool = False
    ) -> dict[str, Any]:
        """One optimizer step per window on the algorithm's loss, with KL, entropy and ptx terms where asked for.

        The numbers are means over the windows; a window in which every response is left out makes no step. If a step
        was dropped, `policy_fault` says of which gradients.
        on_policy: it is the one step on this batch, so that what it computes are the old log-probabilities; those of
        the batch are the engine's.
        """
        data = self._whole(PolicyBatch, batches)
        totals: dict[str, float] = {}
        steps, fault = 0, ""
        for window in windows:
            rollouts, ptx = self._rows(data, window.rollouts), self._ptx_rows(window.ptx)
            counts = response_counts(rollouts)
            tokens, responses, ptx_tokens = self.learner.sum(
                float(rollouts.in_response.sum()), float((counts > 0).sum()), float(ptx.in_loss.sum()))
            if not tokens:
                continue
            factors, denominator = self._mean(rollouts, counts, tokens, responses)
            sums = np.zeros(8)
            rl = [MicroBatch(rows, partial(self._policy_loss, rows=rows, data=rollouts, factors=factors, sums=sums,
                                           denominator=denominator, kl_coef=kl_coef, on_policy=on_policy))
                  for rows in self._pack_responses(rollouts)]
            mixed = [MicroBatch(rows, partial(self._ptx_loss, rows=rows, data=ptx, tokens=ptx_tokens, sums=sums))
                     for rows in self._pack(ptx.ids, ptx.lengths)]
            result = self.learner.step(rl, mixed)
            loss, clipped, kl, clamped, kl_term, ptx_loss, entropy, mismatch = self.learner.sum(*sums)
            report = {"policy_loss": loss, "clip_fraction": clipped / tokens, "update_kl_per_token": kl / tokens,
                      "clamped_tokens": clamped, "policy_grad_norm": result.grad_norm, "policy_lr": result.lr,
                      "policy_skipped_steps": float(result.skipped)}
            if self.algorithm.kl_in == "loss":
                report["kl_loss"] = kl_term
            if on_policy:
                report |= {"entropy": entropy / tokens, "mismatch": mismatch / tokens}
            if self.algorithm.ptx:
                report["ptx_loss"] = ptx_loss
                if result.norms:
                    report["rl_grad_norm"], report["ptx_grad_norm"] = result.norms
            totals = {key: totals.get(key, 0.0) + value for key, value in report.items()}
            steps, fault = steps + 1, fault or result.fault
        counted = ("clamped_tokens", "policy_skipped_steps")
        means = {key: value if key in counted else value / steps for key, value in totals.items()}
        return means | ({"policy_fault": fault} if fault else {})

    def _mean(
        self, data: PolicyBatch, counts: np.ndarray, tokens: float, responses: float
    ) -> tuple[np.ndarray, float]:
        """(factor of every token float32 [T], denominator) of the algorithm's mean over this optimizer step."""
        if self.kind.mean_over == "tokens":
            return np.ones(len(data.ids), dtype=np.float32), tokens
        if self.kind.mean_over == "limit":
            return np.ones(len(data.ids), dtype=np.float32), responses * self.sampling.max_tokens
        return np.repeat(1 / np.maximum(counts, 1), data.lengths).astype(np.float32), responses

    def _policy_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: PolicyBatch, factors: np.ndarray, denominator: float,
        kl_coef: float, on_policy: bool, sums: np.ndarray,
    ) -> Tensor:
        a, device, wanted = self.algorithm, device_rows.ids.device, rows.pick(data.in_response, False)

        def of(flat: np.ndarray) -> Tensor:
            return rows.pick(flat)[wanted].to(device)

        logprobs, entropies = self.learner.engine(device_rows, wanted.to(device), self.sampling.temperature,
                                                  a.entropy_coef > 0)
        factor, old = of(factors), of(data.old_logprobs)
        if on_policy:
            sums[6:] += [float(entropies.detach().sum()), float((logprobs.detach() - old).abs().sum())]
            old = logprobs.detach()
        whole = of(np.repeat(np.arange(len(data.lengths)), data.lengths)) if self.kind.ratio == "response" else None
        result = policy_loss(logprobs, old, of(data.advantages), factor * of(data.weights), self.clip,
                             denominator, whole)
        sums[:4] += [float(result.loss.detach()), float(result.clip_count), float(result.kl_k1_sum),
                     float(result.clamped_count)]
        loss = result.loss
        if a.kl_in == "loss":
            kl, clamped = kl_loss(logprobs, of(data.ref_logprobs), factor, a.kl_estimator, denominator)
            sums[3:5] += [float(clamped), float(kl.detach())]
            loss = loss + kl_coef * kl
        if a.entropy_coef:
            loss = loss + a.entropy_coef * entropy_loss(entropies, factor, denominator)
        return loss

    def _ptx_loss(
        self, device_rows: PackedRows, rows: PackedRows, data: TokenDataset, tokens: float, sums: np.ndarray
    ) -> Tensor:
        wanted = rows.pick(data.in_loss, False)
        logprobs, _ = self.learner.engine(device_rows, wanted.to(device_rows.ids.device), 1.0)
        loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), tokens)
        sums[5] += float(loss.detach())
        return self.algorithm.ptx_coef * loss

    def _ptx_rows(self, blocks: np.ndarray) -> TokenDataset:
        if self.ptx is None or not len(blocks):
            none = np.zeros(0, dtype=np.int32)
            return TokenDataset(none, none, none.astype(bool))
        p = self.ptx
        return TokenDataset(take(p.ids, p.lengths, blocks), p.lengths[blocks], take(p.in_loss, p.lengths, blocks))

    # -- weights -------------------------------------------------------------------------------------------------

    def connect(
        self, generators: Sequence[Any], workers_each: int, backend: str, meeting_point: tuple[str, int],
        bucket_mib: float, timeout_s: float,
    ) -> None:
        """Open the wire to the generators; they and rank 0 meet at `meeting_point` (on rank 0's node).

        Called again, when generators were replaced, it closes the old wire.
        """
        from rlhf_ray.engines.weight_sync import WeightSender  # imports vllm, which only these ranks need

        if self.sender is not None:
            self.sender.close()
        engines = RayEngines(generators, workers_each, timeout_s)
        observe = self._observe if self.algorithm.ema_decay and self.learner.rank == 0 else None
        self.sender = WeightSender(self.learner, engines, backend, *meeting_point, bucket_mib, timeout_s, observe)

    def push(self, version: int) -> list[int]:
        """Bring all generators to the current weights; they then hold `version`, or this raises.

        Returns the version that each says it holds, in the order of `connect` (rank 0; the others talk to none).
        """
        if self.sender is None:
            raise RuntimeError("push before connect")
        self.version = version
        try:
            return self.sender.push(version)
        except BaseException:  # let go of the wire, or the other generators wait at its end
            self.sender.close()
            self.sender = None
            raise

    def _observe(self, name: str, weight: Tensor) -> None:
        # The sync shows rank 0 every whole weight once per iteration: the moment to average them. A sync that has to
        # be done again shows the same ones.
        if self.averaged.get(name) == self.version:
            return
        self.averaged[name] = self.version
        if name in self.average:
            self.average[name].lerp_(weight.detach().float().cpu(), 1 - self.algorithm.ema_decay)
        else:
            self.average[name] = weight.detach().float().cpu().clone()

    def more(self) -> list[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        average = {name: tensor.clone() for name, tensor in self.average.items()}
        return [(EMA, average, {"version": self.version})] if average else []

    def restore(self, directory: str) -> None:
        super().restore(directory)
        file = Path(directory) / EMA
        if self.learner.rank == 0 and file.is_file():
            with safe_open(file, framework="pt") as saved:
                self.version = json.loads(saved.metadata()["header"])["version"]
                self.average = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            self.averaged = dict.fromkeys(self.average, self.version)

    def save(self, path: str) -> None:
        """Write the policy as a Hugging Face directory: the averaged weights if there is an EMA."""
        weights: Any = iter(self.learner.weights())
        if self.learner.rank == 0:
            saved = self.average.items() if self.average else weights
            save_model(self.model, saved, load_tokenizer(self.path), Path(path), self.dtype)
            storage.publish(Path(path), exact=True)
        for _ in weights:  # the gathers are collective, whoever needs them
            pass
        storage.settle()


@dataclass(frozen=True)
class _Loaded:
    """One shard, read and padded: old, sampled, ref, values, kl [N, L]; mask: response tokens; filled: any token."""

    rollout: RolloutBatch
    responses: Responses
    old: Tensor
    sampled: Tensor
    ref: Tensor
    values: Tensor
    kl: Tensor
    mask: Tensor
    filled: Tensor

    @staticmethod
    def read(shards: Sequence[ScoredShard]) -> list[_Loaded]:
        """All of them in one go: every question to the object store takes as long, however little it asks for."""
        refs = [(s.rollout, s.ref_logprobs, s.old_logprobs, s.values, *s.scores) for s in shards]
        found = iter(ray.get([ref for of_shard in refs for ref in of_shard if ref is not None]))
        return [_Loaded._of(*[None if ref is None else next(found) for ref in of_shard]) for of_shard in refs]

    @staticmethod
    def _of(rollout: Any, ref: Any, old: Any, values: Any, *scores: Any) -> _Loaded:
        old = rollout.sampled_logprobs if old is None else old
        values = np.zeros_like(old) if values is None else values
        mask, _ = pad(rollout.in_response, rollout.lengths)
        (old_, filled), (sampled, _), (ref_, _), (values_, _) = (
            pad(x, rollout.lengths) for x in (old, rollout.sampled_logprobs, ref, values))
        kl = torch.where(mask, k1(old_, ref_), 0)
        responses = Responses(rollout.positions, rollout.truncated, mask.sum(1).numpy(), kl.double().sum(1).numpy(),
                              np.stack(scores))
        return _Loaded(rollout, responses, old_, sampled, ref_, values_, kl, mask, filled)


def response_counts(batch: PolicyBatch) -> np.ndarray:
    """Tokens of each rollout that are in the update: int64 [N]."""
    return np.add.reduceat(batch.in_response.astype(np.int64), np.cumsum(batch.lengths) - batch.lengths) \
        if len(batch.lengths) else np.zeros(0, dtype=np.int64)
