"""One rank of a DeepSpeed ZeRO-3 learner. The only file that imports deepspeed.

What every rank must do alike, or all wait for ever: the same number of forward passes, backward passes and
gathers. `Learner` sees to it: ranks agree on the number of micro-batches, and a rank that has fewer computes
an empty one with weight 0.

Losses are *sums divided by the denominator of the whole optimizer window* (all micro-batches, all ranks), so
the update depends neither on the micro-batch size nor on the number of ranks. DeepSpeed averages gradients
over ranks; the loss is multiplied by the world size to undo that.
"""

import gc
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.config.schema import LearnerConfig, OptimizerConfig
from rlhf_ray.core.ragged import PackedRows, one_token_rows
from rlhf_ray.core.schedule import lr_scale
from rlhf_ray.engines.gloo import bind_towards, share_devices
from rlhf_ray.engines.shared_memory import SharedMemory
from rlhf_ray.models.modules import CausalLM, layer_classes, where_broken
from rlhf_ray.models.processors import use_processors
from rlhf_ray.models.shards import WEIGHT, Shards


@dataclass(frozen=True)
class Rank:
    """Who this process is in its learner group, and where the group meets."""

    rank: int
    world_size: int
    master_address: str
    master_port: int


def join_group(where: Rank, threads: int, timeout_s: float) -> torch.device:
    """Join the learner group (gloo on CPU, NCCL on GPUs) and return this rank's device."""
    cuda = torch.cuda.is_available()
    os.environ.update(
        RANK=str(where.rank), WORLD_SIZE=str(where.world_size), LOCAL_RANK="0",
        MASTER_ADDR=where.master_address, MASTER_PORT=str(where.master_port),
    )
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        use_processors(threads)
        bind_towards(where.master_address)
        share_devices()
    import deepspeed

    # DeepSpeed would compile its shared-memory collectives with g++ on the first run of every machine, a minute
    # or more; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero import stage3

    # It looks whether our optimizer is its Muon, whose functions ask for torch's compiler: two seconds of imports.
    compiler.compile = lambda: compiler.dummy_decorator
    stage3.reduce_scatter_coalesced = _scatter_gradients
    deepspeed.logger.setLevel("WARNING")
    if dist.is_initialized():  # this process lives on, others of its group did not: leave what is left of it
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        _count_anew()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def _scatter_gradients(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """Each rank's part of the mean gradients, flat. DeepSpeed's own, but that with a single rank it would copy all
    gradients three times to find that they are its own."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    if dist.get_world_size(group) == 1:
        return [tensor.reshape(-1) for tensor in tensors]
    parts: list[Tensor] = reduce_scatter_coalesced(tensors, group)
    return parts


def _count_anew() -> None:
    """DeepSpeed numbers modules and parameters as it meets them in a process, and compares the numbers between ranks:
    one that lives on must agree with one that is new."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    register: Any = DeepSpeedZeRoOffload._register_deepspeed_module
    register.__defaults__[0][0] = 0
    Init.param_id = 0


def _deepspeed_config(
    cfg: LearnerConfig, optimizer: OptimizerConfig, dtype: str, module: nn.Module, world_size: int
) -> dict:
    cuda, alone = torch.cuda.is_available(), world_size == 1
    zero: dict[str, Any] = {
        "stage": 3,
        # A single rank has all: on a GPU nothing to gather, nor to wait for on other streams. On CPU no step is faster.
        "stage3_param_persistence_threshold": sys.maxsize if cuda and alone else cfg.param_persistence_threshold,
        "overlap_comm": cuda and not alone,
        # Memory on the device, whatever the model: DeepSpeed's own size for a large one, or all of a small one.
        "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in module.parameters())),
    }
    if layers := layer_classes(module):
        # A layer is gathered and let go as a whole. DeepSpeed's way is each module by itself, at the cost of its
        # Python code before and after each.
        zero["leaf_module"] = {"classes": layers}
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a formality: batches are ragged, and `step` counts them itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True)
class MicroBatch:
    """A rectangle and the loss to compute on it, already divided by the window's denominator."""

    rows: PackedRows
    loss: Callable[[PackedRows], Tensor]


@dataclass(frozen=True)
class StepReport:
    """grad_norm: before clipping; skipped: it was not finite, and `fault` says of which parameters; norms: that of each
    group of micro-batches alone, none with an offloaded optimizer, where DeepSpeed shows gradients only after the last
    micro-batch."""

    grad_norm: float
    lr: float
    skipped: bool
    norms: list[float]
    fault: str = ""


class Learner:
    """Trains `module` on packed micro-batches; every method but `shapes` and `places` is collective over the group.

    `total_steps` is the number of optimizer steps of the whole run: the learning-rate schedule counts those. shared:
    on CPU, a single rank has its weights in `memory`, which other processes of the host can map.
    """

    memory: SharedMemory | None = None

    def __init__(
        self, module: nn.Module, cfg: LearnerConfig, optimizer: OptimizerConfig, dtype: str, total_steps: int,
        device: torch.device, shared: bool = False,
    ):
        import deepspeed
        from deepspeed.runtime.zero import stage3, utils

        self.cfg, self.optimizer_cfg, self.total_steps = cfg, optimizer, total_steps
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.steps_done = 0
        adamw = torch.optim.AdamW(
            [
                {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps,
            fused=True,  # one walk through memory instead of ten
        )
        shared = shared and device.type == "cpu" and self.world_size == 1
        stage3.defragment = self._shared if shared else utils.defragment
        try:
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=adamw,
                config=_deepspeed_config(cfg, optimizer, dtype, module, self.world_size),
                dist_init_required=False,
            )
        finally:
            stage3.defragment = utils.defragment
        assert not shared or self.memory, "DeepSpeed lays parameters elsewhere now"
        self.module: nn.Module = self.engine.module
        self._finite: list[bool] = []  # the gradients of this rank's parts of each parameter, in the last dropped step
        self._note_drops()
        self.device = device
        self._offloaded = False  # parameters and buffers
        self._host: dict[str, Tensor] = {}  # the newest copy of the state, to be written over: see `state`
        self._away: list[Tensor] = []  # where the optimizer is in host memory, pinned; kept, for it is slow to come by

    def _shared(self, tensors: list[Tensor]) -> Tensor:
        """Where DeepSpeed lays all its parts of the parameters end to end; they stay there."""
        self.memory = SharedMemory(sum(tensor.nbytes for tensor in tensors))
        flat = self.memory.tensor(0, tensors[0].dtype, (sum(tensor.numel() for tensor in tensors),))
        for tensor, place in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.data = place.copy_(tensor)
        return flat

    # -- collectives on numbers ------------------------------------------------------------------------------

    def sum(self, *numbers: float) -> list[float]:
        """Sums of the numbers over all ranks, in float64."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, number: float) -> float:
        return self._reduce([number], dist.ReduceOp.MAX)[0]

    def _reduce(self, numbers: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values, op=op)
        return [float(v) for v in values]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, rank after rank: float64 [n, k] -> [sum of n, k]; k is the same everywhere."""
        if self.world_size == 1:
            return rows
        counts = self._counts(len(rows))
        mine = torch.zeros((max(counts), rows.shape[1]), dtype=torch.float64, device=self.device)
        mine[: len(rows)] = torch.as_tensor(rows)
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine)
        return np.concatenate([p[:n].cpu().numpy() for p, n in zip(parts, counts, strict=True)])

    def _counts(self, mine: int) -> list[int]:
        counts = [0.0] * self.world_size
        counts[self.rank] = float(mine)
        return [int(c) for c in self.sum(*counts)]

    # -- passes ----------------------------------------------------------------------------------------------

    def forward(self, batches: Sequence[PackedRows], pass_: Callable[[PackedRows], Tensor]) -> list[Tensor]:
        """`pass_` on every rectangle, without gradients and in evaluation mode; the outputs on the CPU, in order."""
        self.engine.eval()
        count = int(self.max(len(batches)))
        outputs = []
        with torch.no_grad():
            for i in range(count):
                rows = batches[i] if i < len(batches) else one_token_rows()
                outputs.append(pass_(rows.to(self.device)).cpu())
        # Of models so large that layers are let go before their turn comes again, DeepSpeed has by now begun to gather
        # those that a backward pass would want first. None comes, and a walk over the weights may not meet them so.
        self.engine.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        return outputs[: len(batches)]

    def step(self, *groups: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step on the sum of the losses of all micro-batches of all groups and ranks.

        Groups (RL and ptx, say) differ in nothing but that the gradient norm of each is reported. A step with a
        gradient that is not finite on some rank is dropped by DeepSpeed on all ranks together, and the weights stay
        as they were.
        """
        self.engine.train()  # for gradient checkpointing; dropout is what the model was loaded with
        counts = [int(self.max(len(group))) for group in groups]
        counts[0] = counts[0] or int(not any(counts))  # one backward pass at least
        total, done = sum(counts), 0
        several = len([c for c in counts if c]) > 1  # a single group's norm is that of all
        watched = several and not self.cfg.offload_optimizer
        norms: list[float] = []
        before: list[Tensor] | None = None
        for group, count in zip(groups, counts, strict=True):
            for i in range(count):
                done += 1
                self.engine.set_gradient_accumulation_boundary(done == total)
                batch = group[i] if i < len(group) else self._nothing
                self.engine.backward(batch.loss(batch.rows.to(self.device)) * self.world_size)
            if watched:
                after = self._gradients()
                own = after if before is None else [a - b for a, b in zip(after, before, strict=True)]
                norms.append(self._norm(own))
                before = after
        lr = self.optimizer_cfg.lr * lr_scale(
            self.steps_done, self.total_steps, self.optimizer_cfg.warmup_ratio, self.optimizer_cfg.schedule,
            self.optimizer_cfg.min_lr_ratio,
        )
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = lr
        self.engine.step()
        self.steps_done += 1
        norm = float(self.engine.get_global_grad_norm())
        skipped = not math.isfinite(norm)
        return StepReport(norm, lr, skipped, norms if several else [norm if c else 0.0 for c in counts],
                          self._fault() if skipped else "")

    def _note_drops(self) -> None:
        """Look at the gradients of a step that is not finite before DeepSpeed throws them away."""
        from deepspeed.utils import safe_get_local_grad

        zero = self.engine.optimizer
        clean_up = zero._overflow_clean_up

        def noting(prev_scale: float) -> None:
            self._finite = [bool(safe_get_local_grad(p).isfinite().all()) for p in self.module.parameters()]
            clean_up(prev_scale)

        zero._overflow_clean_up = noting

    def _fault(self) -> str:
        """Whose gradients were not finite on any rank. Collective."""
        broken = self.sum(*(float(not finite) for finite in self._finite))
        names = [_hub_name(name) for name, _ in self.module.named_parameters()]
        return where_broken([name for name, ranks in zip(names, broken, strict=True) if ranks], len(names))

    def _gradients(self) -> list[Tensor]:
        """Copies of this rank's parts of the gradients accumulated so far."""
        from deepspeed.utils import safe_get_local_grad

        return [safe_get_local_grad(p).detach().float().clone() for p in self.module.parameters()]

    def _norm(self, parts: Sequence[Tensor]) -> float:
        return math.sqrt(self.sum(sum(float(p.double().square().sum()) for p in parts))[0])

    @property
    def _nothing(self) -> MicroBatch:
        def loss(rows: PackedRows) -> Tensor:
            return 0.0 * self.any_output(rows).sum()

        return MicroBatch(one_token_rows(), loss)

    def any_output(self, rows: PackedRows) -> Tensor:
        """A forward pass like the others, whatever the kind of module."""
        wanted = (torch.ones_like(rows.ids, dtype=torch.bool), 1.0) if isinstance(self.module, CausalLM) else ()
        output: Tensor = self.engine(rows, *wanted)
        return output

    # -- weights ---------------------------------------------------------------------------------------------

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name as Hugging Face has it, dtype, whole shape) of every parameter, without a gather."""
        return [
            (_hub_name(name), p.dtype, tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self.module.named_parameters()
        ]

    def weights(self, bucket_bytes: int = 64 << 20) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter, gathered a bucket at a time; valid until the next one is drawn.

        Tied parameters come once. All ranks must draw all of it.
        """
        import deepspeed

        if self._offloaded:  # in host memory DeepSpeed has them in another order
            self.reload()
        parameter: Any
        if self.world_size == 1:  # the one part is the whole, and a gather would copy it
            for name, parameter in self.module.named_parameters():
                yield _hub_name(name), parameter.ds_tensor.data[: parameter.ds_numel].view(parameter.ds_shape)
            return
        for bucket in _buckets(list(self.module.named_parameters()), bucket_bytes):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                for name, p in bucket:
                    yield _hub_name(name), p.data

    def places(self) -> dict[str, int]:
        """Where each parameter begins in `memory`."""
        assert self.memory is not None
        parameters: Iterable[tuple[str, Any]] = self.module.named_parameters()
        return {_hub_name(name): self.memory.place(p.ds_tensor.data) for name, p in parameters}

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(copies of this rank's parts of weights and optimizer, on the CPU, as `models.shards` has them; header).

        The next call writes over the copies of this one: fresh memory costs far more than copying to it.
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        moments = next(iter(self._moments()), {})
        tensors = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state()
        for name, p in self.module.named_parameters():
            parts = {WEIGHT: safe_get_local_fp32_param(p)}
            parts |= {kind: safe_get_local_optimizer_state(p, kind) for kind in moments if kind != "step"}
            for kind, part in parts.items():
                key = f"{_hub_name(name)}|{kind}"
                before = self._host.get(key)
                tensors[key] = part.detach().to("cpu", torch.float32, copy=True) if before is None \
                    else before.copy_(part)
        self._host = tensors
        return tensors, {"steps_done": self.steps_done, "adam_steps": float(moments.get("step", 0.0))}

    def load(self, shards: Shards) -> None:
        """Take over a state that as many ranks, or more, or fewer, have saved.

        Raises UserError if it is of another model.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self.reload()
        zero, kinds = self.engine.optimizer, [k for k in ("exp_avg", "exp_avg_sq") if shards.names(k)]
        zero.checkpoint_event_prologue()
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(shards.header["adam_steps"], device=flat.device),
                **{k: torch.zeros_like(flat) for k in kinds},
            } if kinds else {}
        parameter: Any
        for name, parameter in self.module.named_parameters():
            for kind in (WEIGHT, *kinds):
                part = shards.part(_hub_name(name), kind, parameter.ds_numel, self.rank, self.world_size)
                if kind == WEIGHT:
                    safe_set_local_fp32_param(parameter, part.to(self.device))
                else:
                    safe_set_local_optimizer_state(parameter, part.to(self.device), kind)
        for group in range(len(zero.fp32_partitioned_groups_flat)):  # what a step of DeepSpeed ends with
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # DeepSpeed gathers on a stream of its own
        self.steps_done = shards.header["steps_done"]
        for key, restore in (("rng", torch.set_rng_state), ("rng_cuda", torch.cuda.set_rng_state)):
            found = shards.own(key, self.rank, self.world_size)
            if found is not None:
                restore(found)

    # -- taking turns on a device ------------------------------------------------------------------------------

    def offload(self, everything: bool) -> None:
        """Move the optimizer (float32 weights and moments) to host memory; everything: parameters and buffers too.

        What needs them on the device calls `reload` first.
        """
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        for i, tensor in enumerate(self._optimizer_tensors()):
            if tensor.device.type == "cpu":
                continue
            if i == len(self._away):
                self._away.append(torch.empty_like(tensor, device="cpu", pin_memory=True))
            tensor.data = self._away[i].copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the copies are whole
        if everything and not self._offloaded and self.memory is None:  # `memory` is host memory
            # DeepSpeed's own way for the optimizer's part wants its FusedAdam.
            self.engine.offload_states(include=[State.lp_params, State.lp_grads, State.contiguous_grad_buffer])
            self._offloaded = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """All that `offload` moved is on the device again."""
        if self._offloaded:
            self.engine.reload_states()
            self._offloaded = False
        for tensor in self._optimizer_tensors():
            tensor.data = tensor.data.to(self.device, non_blocking=True)

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        if self.cfg.offload_optimizer:  # it lives in host memory
            return
        yield from self.engine.optimizer.fp32_partitioned_groups_flat
        for state in self._moments():
            yield from (tensor for kind, tensor in state.items() if kind != "step")

    def _moments(self) -> Iterator[dict[str, Any]]:
        """AdamW's state of each flat group; nothing before the first step."""
        zero = self.engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            if found := zero.optimizer.state.get(flat):
                yield found

    def close(self) -> None:
        """Let go of everything; another Learner may take this one's place in the process."""
        self.engine.destroy()
        del self.engine, self.module
        self.memory = None
        gc.collect()


def _hub_name(name: str) -> str:
    return name.removeprefix("model.")  # our wrappers hold the Hugging Face model as `.model`


def _buckets(parameters: Iterable[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, p in parameters:
        if bucket and size + p.ds_numel * p.element_size() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, p))
        size += p.ds_numel * p.element_size()
    if bucket:
        yield bucket


