"""What the wires of our own share: both ends' way through a sync, how weights are cut into buckets, and a call beside
the sender's own work. A wire adds how its two ends meet, and how a bucket gets across."""

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
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

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
SenderInfo = TypeVar("SenderInfo", bound=TrainerInitInfo)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The parameters that an update carries, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @property
    def meta(self) -> list[ParamMeta]:
        """The inverse of `described`."""
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape))
                for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)]


Update = TypeVar("Update", bound=UpdateInfo)


class Receiver(WeightTransferEngine[InitInfo, Update]):
    """The engine's side: `receive_weights` loads into a model that vLLM puts together layer by layer."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator afterwards; here is none, and what was received is there.
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)


class Sender(TrainerWeightTransferEngine[SenderInfo]):
    """The learner's side: rank 0 sends, the others take part in the gathers."""

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool, bucket_bytes: int
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._bucket_bytes = bucket_bytes

    def send_weights(self) -> None:
        assert self.source is not None
        weights = iter(self.source)
        if not self.is_sender:
            for _ in weights:  # the gathers are collective
                pass
            return
        self.client.start_weight_update()
        self._send(self.source.metadata(), weights)
        if next(weights, None) is not None:
            raise ValueError("the source yields more parameters than its metadata declares")
        self.client.finish_weight_update()

    @abstractmethod
    def _send(self, meta: list[ParamMeta], weights: Iterator[tuple[str, Tensor]]) -> None:
        """Draw all of `meta`, bucket by bucket; every engine has loaded them when this returns."""


def buckets(meta: Sequence[ParamMeta], limit_bytes: int) -> Iterator[list[ParamMeta]]:
    """Parameters in order, in runs of one dtype and at most `limit_bytes` (a larger one travels alone)."""
    bucket: list[ParamMeta] = []
    size = 0
    for m in meta:
        nbytes = numel(m) * m.dtype.itemsize
        if bucket and (size + nbytes > limit_bytes or bucket[0].dtype != m.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(m)
        size += nbytes
    if bucket:
        yield bucket


def numel(m: ParamMeta) -> int:
    return torch.Size(m.shape).numel()


def described(meta: Sequence[ParamMeta]) -> dict[str, Any]:
    """An UpdateInfo, as an update's message has it."""
    return {"names": [m.name for m in meta], "dtype_names": [str(m.dtype).removeprefix("torch.") for m in meta],
            "shapes": [list(m.shape) for m in meta]}


def drawn(weights: Iterator[tuple[str, Tensor]], bucket: Sequence[ParamMeta]) -> Iterator[Tensor]:
    """The tensors of a bucket, each valid until the next is drawn. Raises ValueError if they are not those."""
    for m in bucket:
        name, tensor = next(weights)
        if (name, tuple(tensor.shape)) != (m.name, m.shape):
            raise ValueError(f"expected parameter {m.name} {m.shape}, got {name} {tuple(tensor.shape)}")
        yield tensor.detach()


class Background:
    """A call on a thread that never outlives the process, and whose error is raised here."""

    def __init__(self, call: Callable[[], Any]) -> None:
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
