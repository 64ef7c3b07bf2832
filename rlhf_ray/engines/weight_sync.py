"""Weights from the policy learners to every vLLM engine, through vLLM's own weight-transfer interface.

    policy rank 0 ──(gloo | nccl | ipc)──▶ worker of generator 0
      ▲ gathers, a bucket at a time   └──▶ worker of generator 1 …
    policy rank 1..n: take part in the gathers, send nothing

Life cycle. `connect` once: rank 0 opens a rendezvous and tells every generator to join it. `push(version)` after
each update, on all ranks: start_weight_update on every engine, packed buckets, finish_weight_update, which also
stamps the version, empties the prefix cache and compares a digest of what was sent with one of what each engine
loaded. `close` at the end.

One interface, three wires. NCCL and CUDA IPC are vLLM's own engines. gloo is the pair below; it is registered from
the `vllm.general_plugins` entry point, so that it is there in a worker's process too, wherever that runs.

Traps. Engines receive while rank 0 sends: the calls to them run on another thread, and an engine must not be
busy with a rollout. vLLM's layerwise reload around an update is not optional on CPU, where linear weights are packed
after loading. Sender and receiver cut the stream into buckets from the same metadata: a source whose `metadata()`
disagrees with what it yields hangs. Tied parameters are sent once, and the head that shares them is refreshed
afterwards (see `WorkerExtension`). NCCL refuses two ranks on one GPU: use ipc there.

vLLM's interface moves between minor versions; all that touches it is in this file and in `generation`. A change
here needs tests/end_to_end/test_weight_sync.py.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.core.digest import add_digests, tensor_digest
from rlhf_ray.engines.gloo import bind_towards
from rlhf_ray.engines.learner import Learner

_CONNECT_TIMEOUT = timedelta(seconds=120)


def register() -> None:
    """Make `gloo` known to vLLM (entry point `vllm.general_plugins`; may run more than once in a process)."""
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
        WeightTransferTrainerFactory.register_engine("gloo", GlooSender)


class WorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`): methods that `collective_rpc` reaches by name."""

    model_runner: Any
    digest: int
    updating: bool = False

    def refresh_tied_head(self) -> None:
        """Make an output head that shares the embeddings' weights see the new ones.

        On CPU vLLM packs the head's weights for its matmul kernel. A reload brings only the embeddings (tied
        parameters travel once), and so the packed copy would stay what it was: fluent, and wrong.
        """
        head: Any = getattr(self.model_runner.get_model(), "lm_head", None)
        method: Any = getattr(head, "quant_method", None)
        if self.model_runner.model_config.hf_text_config.tie_word_embeddings and method is not None:
            method.process_weights_after_loading(head)

    def start_digest(self) -> None:
        """From here on, digest whatever is loaded into the model, whichever wire brings it."""
        self._abandon_update()
        self.updating = True
        model: Any = self.model_runner.get_model()
        load, self.digest = type(model).load_weights, 0

        def load_and_digest(weights: Iterable[tuple[str, Tensor]]) -> Any:
            return load(model, self._digested(weights))

        model.load_weights = load_and_digest

    def _digested(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.digest = add_digests(self.digest, tensor_digest(name, tensor))
            yield name, tensor

    def finish_digest(self) -> int:
        """The digest of everything that was loaded since `start_digest`."""
        model: Any = self.model_runner.get_model()
        del model.load_weights  # the class's own again
        self.updating = False
        return self.digest

    def _abandon_update(self) -> None:
        """Bring a model that was left in the middle of an update (its sender died) to where another can begin.

        Its weights are then some old, some new; it has no version until the next update is whole.
        """
        if not self.updating:
            return
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        model = self.model_runner.get_model()
        del model.load_weights
        with set_current_vllm_config(worker.vllm_config):
            finalize_layerwise_reload(model, self.model_runner.model_config)
        worker._weight_update_active = False
        self.updating = False


# -- gloo ------------------------------------------------------------------------------------------------------


def buckets(meta: Sequence[ParamMeta], limit_bytes: int) -> Iterator[list[ParamMeta]]:
    """Parameters in order, in runs of one dtype and at most `limit_bytes` (a larger one travels alone)."""
    bucket: list[ParamMeta] = []
    size = 0
    for m in meta:
        nbytes = _numel(m) * m.dtype.itemsize
        if bucket and (size + nbytes > limit_bytes or bucket[0].dtype != m.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(m)
        size += nbytes
    if bucket:
        yield bucket


def _numel(m: ParamMeta) -> int:
    return torch.Size(m.shape).numel()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets and which rank the first worker of this engine has."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The sender's side; it is rank 0 of the group."""

    backend: ClassVar[str] = "gloo"
    master_address: str
    master_port: int
    world_size: int
    bucket_bytes: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What this update will carry, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


def _join(address: str, port: int, rank: int, world_size: int) -> Any:
    bind_towards(address)
    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, backend="gloo", timeout=_CONNECT_TIMEOUT
    )


def _broadcast(group: Any, tensor: Tensor) -> Any:
    """Begin it; `wait` of what comes back ends it."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The engine's side: receives packed buckets over gloo and loads them layer by layer."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: Any = None
        self._bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = _join(init_info.master_address, init_info.master_port, rank, init_info.world_size)
        self._bucket_bytes = init_info.bucket_bytes

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator afterwards; gloo has none, and `wait` has waited.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        meta = [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        model: Any = self.model
        arriving: deque[tuple[list[ParamMeta], Tensor, Any]] = deque()

        def load() -> None:
            bucket, flat, work = arriving.popleft()
            work.wait()
            parts = flat.split([_numel(m) for m in bucket])
            model.load_weights([(m.name, p.view(m.shape)) for m, p in zip(bucket, parts, strict=True)])

        for bucket in buckets(meta, self._bucket_bytes):
            flat = torch.empty(sum(_numel(m) for m in bucket), dtype=bucket[0].dtype)
            arriving.append((bucket, flat, _broadcast(self._group, flat)))
            if len(arriving) > 1:  # the next one comes while this one is loaded
                load()
        while arriving:
            load()

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._group = None


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The learner's side of the gloo wire."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool, bucket_bytes: int
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._bucket_bytes = bucket_bytes
        self._group: Any = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if source is None:
            raise ValueError("the gloo wire needs a WeightSource")
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, bucket_bytes=init_info.bucket_bytes)
        if sender.is_sender:
            info = GlooInitInfo(
                master_address=init_info.master_address, master_port=init_info.master_port, rank_offset=1,
                world_size=init_info.world_size, bucket_bytes=init_info.bucket_bytes,
            )
            with ThreadPoolExecutor(1) as pool:  # both sides block until all have met
                joined = pool.submit(client.init_weight_transfer_engine, asdict(info))
                sender._group = _join(init_info.master_address, init_info.master_port, 0, init_info.world_size)
                joined.result()
        return sender

    def send_weights(self) -> None:
        assert self.source is not None
        weights = iter(self.source)
        if not self.is_sender:
            for _ in weights:  # the gathers are collective
                pass
            return
        meta = self.source.metadata()
        info = GlooUpdateInfo(
            names=[m.name for m in meta], dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
            shapes=[list(m.shape) for m in meta],
        )
        self.client.start_weight_update()
        receiving = _Background(lambda: self.client.update_weights(asdict(info)))
        sending: list[tuple[Tensor, Any]] = []
        for bucket in buckets(meta, self._bucket_bytes):
            parts = []
            for m in bucket:
                name, tensor = next(weights)
                if (name, tuple(tensor.shape)) != (m.name, m.shape):
                    raise ValueError(f"expected parameter {m.name} {m.shape}, got {name} {tuple(tensor.shape)}")
                parts.append(tensor.detach().to("cpu").reshape(-1))
            receiving.check()
            for _, work in sending:  # it was on its way while this bucket was gathered
                work.wait()
            flat = torch.cat(parts)
            sending = [(flat, _broadcast(self._group, flat))]
        for _, work in sending:
            work.wait()
        if next(weights, None) is not None:
            raise ValueError("the source yields more parameters than its metadata declares")
        receiving.join()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self._group = None


class _Background:
    """A call on a thread that never outlives the process, and whose error is raised here."""

    def __init__(self, call: Any) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                call()
            except BaseException as error:  # raised again in the thread that waits
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        self._thread.join()
        self.check()


# -- both ends, whatever the wire ------------------------------------------------------------------------------


class LearnerWeights(WeightSource):
    """A ZeRO-3 learner's parameters as vLLM wants them: gathered in buckets, in a fixed order.

    Every learner rank walks it. Each tensor is valid until the next is drawn. `observe`, if given, sees every
    whole tensor in passing (on all ranks). On rank 0 `digest` is that of the last walk.
    """

    def __init__(self, learner: Learner, bucket_bytes: int, observe: Any = None):
        self._learner, self._bucket_bytes, self._observe = learner, bucket_bytes, observe
        self.digest = 0
        self._walk: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*shape) for shape in self._learner.shapes()]

    def begin(self) -> None:
        """Before a walk which all ranks are about to make."""
        self._walk = self._weights()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._walk

    def finish(self) -> None:
        """Walk the rest of the way: the gathers are collective, and the other ranks are on it."""
        for _ in self._walk:
            pass

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        self.digest = 0
        for name, tensor in self._learner.weights(self._bucket_bytes):
            if self._learner.rank == 0:
                self.digest = add_digests(self.digest, tensor_digest(name, tensor))
            if self._observe is not None:
                self._observe(name, tensor)
            yield name, tensor


class Engines(Protocol):
    """How the sender reaches the engines: every method acts on all of them and waits for all."""

    workers: int
    """Workers (devices) of all engines together."""

    def init(self, payloads: list[dict[str, Any]]) -> None: ...
    def start(self) -> None: ...
    def update(self, payload: Any) -> None: ...
    def finish(self, version: int, digest: int) -> list[int]: ...  # the version that each engine says it holds
    def worker_counts(self) -> list[int]: ...


class _Client:
    """vLLM's four-method client protocol over `Engines`, with a rank offset for each engine."""

    def __init__(self, engines: Engines):
        self._engines = engines
        self.version = 0
        self.held: list[int] = []
        self.source: LearnerWeights | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        payloads, rank = [], init_info.get("rank_offset")
        for count in self._engines.worker_counts():
            payloads.append(init_info if rank is None else init_info | {"rank_offset": rank})
            rank = None if rank is None else rank + count
        self._engines.init(payloads)

    def start_weight_update(self) -> None:
        self._engines.start()

    def update_weights(self, update_info: Any) -> None:
        self._engines.update(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert self.source is not None
        self.held = self._engines.finish(self.version, self.source.digest)


class WeightSender:
    """One learner rank's end of the sync. All ranks call `push` together; rank 0 talks to the engines."""

    def __init__(
        self, learner: Learner, engines: Engines, backend: str, address: str, port: int, bucket_mib: float,
        observe: Any = None,
    ):
        register()
        bucket = int(bucket_mib * 2**20)
        self._client = _Client(engines)
        rank, world = learner.rank, 1 + engines.workers
        info: TrainerInitInfo
        if backend == "gloo":
            info = GlooTrainerInitInfo(address, port, world, bucket, rank=rank)
        elif backend == "nccl":
            info = NCCLTrainerInitInfo(address, port, world, packed_buffer_size_bytes=bucket, rank=rank)
        else:
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket, rank=rank)
        self._client.source = LearnerWeights(learner, bucket, observe)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._client.source)

    def push(self, version: int) -> list[int]:
        """Bring every engine to the learner's weights and stamp them `version`. Collective over the learner ranks.

        Returns the version that each engine says it holds (rank 0; the others talk to none). If an engine fails, this
        raises only after the gathers are done, so that the learners are whole.
        """
        assert self._client.source is not None
        self._client.version = version
        self._client.source.begin()
        try:
            self._engine.send_weights()
        finally:
            self._client.source.finish()
        return self._client.held

    def close(self) -> None:
        self._engine.shutdown()
