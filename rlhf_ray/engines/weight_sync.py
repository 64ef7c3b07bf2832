"""Weights from the policy learners to every vLLM engine, through vLLM's own weight-transfer interface.

    policy rank 0 ──(shm | gloo | nccl | ipc)──▶ worker of generator 0
      ▲ gathers, a bucket at a time         └──▶ worker of generator 1 …
    policy rank 1..n: take part in the gathers, send nothing

Life cycle. `connect` once: rank 0 opens a rendezvous and tells every generator to join it. `push(version)` after
each update, on all ranks: start_weight_update on every engine, its weights, finish_weight_update, which also
stamps the version, empties the prefix cache and compares a digest of what was sent with one of what each engine
loaded. `close` at the end.

One interface, four wires. NCCL and CUDA IPC are vLLM's own engines. Without GPUs there are `wire_shm`, for processes
of one host, and `wire_gloo`; they are registered from the `vllm.general_plugins` entry point, so that they are there in
a worker's process too, wherever that runs.

Traps. Engines receive while rank 0 sends: the calls to them run on another thread, and an engine must not be
busy with a rollout. vLLM's layerwise reload around an update is not optional on CPU, where linear weights are packed
after loading. Sender and receiver cut the stream into buckets from the same metadata: a source whose `metadata()`
disagrees with what it yields hangs. Tied parameters are sent once, and the head that shares them is refreshed
afterwards (see `WorkerExtension`). NCCL refuses two ranks on one GPU: use ipc there.

vLLM's interface moves between minor versions; all that touches it is in this file, the wires and `generation`. A change
here needs tests/end_to_end/test_weight_sync.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.core.digest import add_digests, tensor_digest
from rlhf_ray.engines.learner import Learner
from rlhf_ray.engines.wire_gloo import GlooReceiver, GlooSender, GlooTrainerInitInfo
from rlhf_ray.engines.wire_shm import ShmReceiver, ShmSender, ShmTrainerInitInfo
from rlhf_ray.errors import UserError

_REFUSED = (
    "NCCL refuses to connect the policy with the generators, as it does where two of them are on one GPU: set "
    "roles.policy.gpus=1 and roles.generator.gpus=1, or cluster.placement=colocated, or, with NCCL 2.30 or newer, the "
    "environment variable NCCL_MULTI_RANK_GPU_ENABLE=1 on every node. NCCL_DEBUG=WARN tells more")


def register() -> None:
    """Make our wires known to vLLM (entry point `vllm.general_plugins`; may run more than once in a process)."""
    for name, receiver, sender in (("gloo", GlooReceiver, GlooSender), ("shm", ShmReceiver, ShmSender)):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, receiver)
            WeightTransferTrainerFactory.register_engine(name, sender)


class WorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`): methods that `collective_rpc` reaches by name."""

    model_runner: Any
    digest: int
    updating: bool = False

    def share_device(self) -> None:
        """From here on, fall asleep whatever others on the device do meanwhile.

        vLLM looks at the end whether more memory of the device is free than before, and asserts it. A scorer that took
        more in that moment is no failure of this engine's, which sleeps by then.
        """
        worker: Any = self
        sleep = worker.sleep

        def among_others(level: int = 1) -> None:
            with suppress(AssertionError):
                sleep(level)

        worker.sleep = among_others

    def refresh_tied_head(self) -> None:
        """Make an output head that shares the embeddings' weights see the new ones.

        On CPU vLLM packs the head's weights for its matmul kernel, and those of the embeddings too. A reload brings
        only the embeddings (tied parameters travel once), and so the head's packed copy would stay what it was:
        fluent, and wrong. From here on it has that of the embeddings.
        """
        model: Any = self.model_runner.get_model()
        head: Any = getattr(model, "lm_head", None)
        method: Any = getattr(head, "quant_method", None)
        if not self.model_runner.model_config.hf_text_config.tie_word_embeddings or method is None:
            return
        for layer in model.modules():
            if layer is not head and getattr(layer, "weight", None) is head.weight and hasattr(layer, "cpu_linear"):
                head.cpu_linear = layer.cpu_linear
                return
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
        timeout_s: float, observe: Any = None,
    ):
        register()
        bucket = int(bucket_mib * 2**20)
        self._client = _Client(engines)
        rank, world = learner.rank, 1 + engines.workers
        info: TrainerInitInfo
        if backend == "shm":
            shared = (learner.memory, learner.places) if learner.memory else None
            info = ShmTrainerInitInfo(bucket, shared, rank=rank)
        elif backend == "gloo":
            info = GlooTrainerInitInfo(address, port, world, bucket, timeout_s, rank=rank)
        elif backend == "nccl":
            info = NCCLTrainerInitInfo(address, port, world, packed_buffer_size_bytes=bucket, rank=rank)
        else:
            largest = max(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in learner.shapes())
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(bucket, largest), rank=rank)
        self._client.source = LearnerWeights(learner, bucket, observe)
        try:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                info, client=self._client, source=self._client.source)
        except RuntimeError as error:
            if backend == "nccl" and "invalid usage" in str(error):
                raise UserError(_REFUSED) from error
            raise

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
