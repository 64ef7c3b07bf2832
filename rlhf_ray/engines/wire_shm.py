"""The wire within one host without GPUs: policy rank 0 writes the weights into memory that all engines see.

    policy rank 0 ──writes──▶ memory of the whole model ◀──read by── engine 0, engine 1, …

Nothing is sent, and one more engine costs no more writing. A bucket is announced when it is written, and loaded while
the next one is. Every parameter has a place of its own, so what an engine still holds of earlier buckets (a layer
waits for its last part) stays as it is until the sync is over.

The memory is a file without a name (memfd), which engines open through /proc: it needs no room in /dev/shm, and is
gone with the last process that maps it, however that ends. A key at its beginning tells it from whatever another host
may have at the same place.
"""

import mmap
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
)

from rlhf_ray.engines.wire import Background, Receiver, Sender, UpdateInfo, buckets, described, drawn, numel

_ALIGNED = 64  # bytes: where a parameter may begin
_KEY_BYTES = 32


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the memory is, how many bytes it has, and what it begins with, in hexadecimal."""

    path: str
    size: int
    key: str
    host: str


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):
    """The sender's side."""

    backend: ClassVar[str] = "shm"
    bucket_bytes: int


@dataclass
class ShmUpdateInfo(UpdateInfo):
    """One bucket: its parameters, and the places where they begin, bytes."""

    places: list[int]


def places(meta: list[ParamMeta]) -> tuple[dict[str, int], int]:
    """(where each parameter begins, bytes of them all): aligned, behind the key."""
    found, end = {}, _KEY_BYTES
    for m in meta:
        found[m.name] = -(-end // _ALIGNED) * _ALIGNED
        end = found[m.name] + numel(m) * m.dtype.itemsize
    return found, end


def tensor_at(memory: mmap.mmap, place: int, m: ParamMeta) -> Tensor:
    """The parameter there: a view."""
    if not numel(m):
        return torch.empty(m.shape, dtype=m.dtype)
    return torch.frombuffer(memory, dtype=m.dtype, count=numel(m), offset=place).view(m.shape)


class ShmReceiver(Receiver[ShmInitInfo, ShmUpdateInfo]):
    """The engine's side: loads from the memory."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _memory: mmap.mmap | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._memory = None  # of an earlier sender
        try:
            with open(init_info.path, "r+b") as file:  # noqa: PTH123 - no file that a Path would know how to treat
                memory = mmap.mmap(file.fileno(), init_info.size)
        except (OSError, ValueError) as error:
            raise _elsewhere(init_info.host, str(error)) from error
        if memory[:_KEY_BYTES].hex() != init_info.key:
            raise _elsewhere(init_info.host, "it has another file there")
        self._memory = memory

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        assert self._memory is not None, "an update before a connection"
        model: Any = self.model
        model.load_weights([(m.name, tensor_at(self._memory, place, m))
                            for m, place in zip(update_info.meta, update_info.places, strict=True)])

    def shutdown(self) -> None:
        self._memory = None


def _elsewhere(host: str, why: str) -> RuntimeError:
    return RuntimeError(f"a generator on {socket.gethostname()} does not see the memory of the policy on {host} "
                        f"({why}): set weight_sync.backend=gloo")


class ShmSender(Sender[ShmTrainerInitInfo]):
    """The learner's side; rank 0 has the memory."""

    init_info_cls = ShmTrainerInitInfo
    _memory: mmap.mmap | None = None

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "this wire needs a WeightSource"
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, bucket_bytes=init_info.bucket_bytes)
        if sender.is_sender:
            size, key = places(source.metadata())[1], secrets.token_bytes(_KEY_BYTES)
            file = os.memfd_create("rlhf_ray weights")
            try:
                os.ftruncate(file, size)
                sender._memory = mmap.mmap(file, size)
                sender._memory[:_KEY_BYTES] = key
                client.init_weight_transfer_engine(asdict(ShmInitInfo(
                    f"/proc/{os.getpid()}/fd/{file}", size, key.hex(), socket.gethostname())))
            finally:
                os.close(file)  # all who need it have mapped it
        return sender

    def _send(self, meta: list[ParamMeta], weights: Iterator[tuple[str, Tensor]]) -> None:
        assert self._memory is not None, "a sender that was shut down"
        where, _ = places(meta)
        loading: Background | None = None
        for bucket in buckets(meta, self._bucket_bytes):
            for m, tensor in zip(bucket, drawn(weights, bucket), strict=True):
                tensor_at(self._memory, where[m.name], m).copy_(tensor)
            if loading:
                loading.join()
            info = {**described(bucket), "places": [where[m.name] for m in bucket]}
            loading = Background(lambda info=info: self.client.update_weights(info))  # type: ignore[misc]
        if loading:
            loading.join()

    def shutdown(self) -> None:
        self._memory = None
