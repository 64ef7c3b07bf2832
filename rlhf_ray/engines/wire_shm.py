"""The wire within one host without GPUs: all engines see the memory that the weights are in.

    weights of policy rank 0 ◀──read by── engine 0, engine 1, …

Nothing is sent, and one more engine costs no more. A single policy rank has its weights in such memory from the start
(`Learner`), and engines load them all at once. Where each rank has a part of them, rank 0 writes what is gathered into
memory of the whole model, bucket by bucket: each is announced when it is there, and neither side waits for the other
before the end, for every parameter has a place of its own. So what an engine still holds of earlier buckets (a layer
waits for its last part) stays as it is, too.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
)

from rlhf_ray.engines.shared_memory import SharedMemory
from rlhf_ray.engines.wire import Background, Receiver, Sender, UpdateInfo, buckets, described, drawn, numel

_ALIGNED = 64  # bytes: where a parameter may begin


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """The memory, and the host that it is on."""

    path: str
    size: int
    key: str
    host: str


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):
    """The sender's side. memory: where the weights are from the start, if it is such; places: of them all."""

    backend: ClassVar[str] = "shm"
    bucket_bytes: int
    memory: SharedMemory | None = None
    places: Callable[[], Mapping[str, int]] = dict


@dataclass
class ShmUpdateInfo(UpdateInfo):
    """One bucket: its parameters, and the places where they begin, bytes."""

    places: list[int]


def places(meta: list[ParamMeta]) -> tuple[dict[str, int], int]:
    """(where a copy of each parameter begins, bytes of them all): aligned."""
    found, end = {}, 0
    for m in meta:
        found[m.name] = -(-end // _ALIGNED) * _ALIGNED
        end = found[m.name] + numel(m) * m.dtype.itemsize
    return found, end


class ShmReceiver(Receiver[ShmInitInfo, ShmUpdateInfo]):
    """The engine's side: loads from the memory."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _memory: SharedMemory | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._memory = None  # of an earlier sender
        try:
            self._memory = SharedMemory.opened(init_info.path, init_info.size, init_info.key)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"a generator on {socket.gethostname()} does not see the memory of the policy on "
                               f"{init_info.host} ({error}): set weight_sync.backend=gloo") from error

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        assert self._memory is not None, "an update before a connection"
        model: Any = self.model
        model.load_weights([(m.name, self._memory.tensor(place, m.dtype, m.shape))
                            for m, place in zip(update_info.meta, update_info.places, strict=True)])

    def shutdown(self) -> None:
        self._memory = None


class ShmSender(Sender[ShmTrainerInitInfo]):
    """The learner's side; rank 0 has the memory."""

    init_info_cls = ShmTrainerInitInfo
    _memory: SharedMemory | None = None
    _places: Callable[[], Mapping[str, int]]
    _copies: bool

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "this wire needs a WeightSource"
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, bucket_bytes=init_info.bucket_bytes)
        if sender.is_sender:
            memory, sender._places, sender._copies = init_info.memory, init_info.places, init_info.memory is None
            if memory is None:
                where, size = places(source.metadata())
                memory, sender._places = SharedMemory(size), lambda: where
            sender._memory = memory
            client.init_weight_transfer_engine(asdict(
                ShmInitInfo(memory.path, memory.size, memory.key, socket.gethostname())))
        return sender

    def _send(self, meta: list[ParamMeta], weights: Iterator[tuple[str, Tensor]]) -> None:
        memory, where, loading = self._memory, self._places(), list[Background]()
        assert memory is not None, "a sender that was shut down"

        def load(some: list[ParamMeta]) -> None:
            info = {**described(some), "places": [where[m.name] for m in some]}
            loading.append(Background(lambda: self.client.update_weights(info)))

        if not self._copies:
            load(meta)
        for bucket in buckets(meta, self._bucket_bytes):
            for m, tensor in zip(bucket, drawn(weights, bucket), strict=True):
                if self._copies:
                    memory.tensor(where[m.name], m.dtype, m.shape).copy_(tensor)
            for earlier in loading:
                earlier.check()
            if self._copies:
                load(bucket)
        for earlier in loading:
            earlier.join()

    def shutdown(self) -> None:
        self._memory = None
