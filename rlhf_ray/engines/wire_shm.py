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
_AHEAD = 8  # buckets that are announced and not loaded yet: each has a thread that waits


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """The memory, and the host that it is on."""

    path: str
    size: int
    key: str
    host: str


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):
    """The sender's side. shared: where the weights are from the start, if they are in such memory, and their places."""

    backend: ClassVar[str] = "shm"
    bucket_bytes: int
    shared: tuple[SharedMemory, Callable[[], Mapping[str, int]]] | None = None


@dataclass
class ShmUpdateInfo(UpdateInfo):
    """Parameters that are there, and the places where they begin, bytes."""

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
    _to: tuple[SharedMemory, Callable[[], Mapping[str, int]]] | None = None  # and where each parameter is in it
    _copies: bool

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "this wire needs a WeightSource"
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, bucket_bytes=init_info.bucket_bytes)
        if sender.is_sender:
            where, size = places(source.metadata())
            sender._copies = init_info.shared is None
            memory, _ = sender._to = init_info.shared or (SharedMemory(size), lambda: where)
            client.init_weight_transfer_engine(asdict(
                ShmInitInfo(memory.path, memory.size, memory.key, socket.gethostname())))
        return sender

    def _send(self, meta: list[ParamMeta], weights: Iterator[tuple[str, Tensor]]) -> None:
        assert self._to, "a sender that was shut down"
        memory, places_now = self._to
        where, loading = places_now(), list[Background]()

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
            if len(loading) == _AHEAD:
                loading.pop(0).join()
            if self._copies:
                load(bucket)
        for earlier in loading:
            earlier.join()

    def shutdown(self) -> None:
        self._to = None
