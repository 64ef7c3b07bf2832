"""What the wires of our own share: how weights are cut into buckets, and a call beside the sender's own work."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta


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
    """`names`, `dtype_names` and `shapes`, as an update's message has them."""
    return {"names": [m.name for m in meta], "dtype_names": [str(m.dtype).removeprefix("torch.") for m in meta],
            "shapes": [list(m.shape) for m in meta]}


def metadata(names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> list[ParamMeta]:
    """The inverse of `described`."""
    return [ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(names, dtype_names, shapes, strict=True)]


def drawn(weights: Iterator[tuple[str, Tensor]], bucket: Sequence[ParamMeta]) -> Iterator[Tensor]:
    """The tensors of a bucket, each valid until the next is drawn. Raises ValueError if they are not those."""
    for m in bucket:
        name, tensor = next(weights)
        if (name, tuple(tensor.shape)) != (m.name, m.shape):
            raise ValueError(f"expected parameter {m.name} {m.shape}, got {name} {tuple(tensor.shape)}")
        yield tensor.detach()


def ended(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Raises ValueError if there are more than were declared."""
    if next(weights, None) is not None:
        raise ValueError("the source yields more parameters than its metadata declares")


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
