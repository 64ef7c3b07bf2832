"""The wire between hosts without GPUs: packed buckets, broadcast by gloo from policy rank 0 to all engines at once."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
)

from rlhf_ray.engines.gloo import bind_towards
from rlhf_ray.engines.wire import Background, Receiver, Sender, UpdateInfo, buckets, described, drawn, numel


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets and which rank the first worker of this engine has."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The sender's side; it is rank 0 of the group."""

    backend: ClassVar[str] = "gloo"
    master_address: str
    master_port: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


def join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> Any:
    """The group, when all have met; `timeout_s` is the deadline of that and of each of its broadcasts."""
    bind_towards(address)
    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, backend="gloo", timeout=timedelta(seconds=timeout_s)
    )


def broadcast(group: Any, tensor: Tensor) -> Any:
    """Begin it, from rank 0; `wait` of what comes back ends it."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


class GlooReceiver(Receiver[GlooInitInfo, UpdateInfo]):
    """The engine's side: receives packed buckets."""

    init_info_cls = GlooInitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: Any = None
        self._bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = join(init_info.master_address, init_info.master_port, rank, init_info.world_size,
                           init_info.timeout_s)
        self._bucket_bytes = init_info.bucket_bytes

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model
        arriving: deque[tuple[list[ParamMeta], Tensor, Any]] = deque()

        def load() -> None:
            bucket, flat, work = arriving.popleft()
            work.wait()
            parts = flat.split([numel(m) for m in bucket])
            model.load_weights([(m.name, p.view(m.shape)) for m, p in zip(bucket, parts, strict=True)])

        for bucket in buckets(update_info.meta, self._bucket_bytes):
            flat = torch.empty(sum(numel(m) for m in bucket), dtype=bucket[0].dtype)
            arriving.append((bucket, flat, broadcast(self._group, flat)))
            if len(arriving) > 1:  # the next one comes while this one is loaded
                load()
        while arriving:
            load()

    def shutdown(self) -> None:
        self._group = None


@contextmanager
def _engines_word(call: Background) -> Iterator[None]:
    """If the wire breaks, whoever was called at its other end knows better why."""
    try:
        yield
    except RuntimeError:
        call.join()
        raise


class GlooSender(Sender[GlooTrainerInitInfo]):
    """The learner's side."""

    init_info_cls = GlooTrainerInitInfo
    _group: Any = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "this wire needs a WeightSource"
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, bucket_bytes=init_info.bucket_bytes)
        if sender.is_sender:
            info = GlooInitInfo(
                master_address=init_info.master_address, master_port=init_info.master_port, rank_offset=1,
                world_size=init_info.world_size, bucket_bytes=init_info.bucket_bytes, timeout_s=init_info.timeout_s,
            )
            joining = Background(lambda: client.init_weight_transfer_engine(asdict(info)))  # all block until all met
            with _engines_word(joining):
                sender._group = join(init_info.master_address, init_info.master_port, 0, init_info.world_size,
                                     init_info.timeout_s)
            joining.join()
        return sender

    def _send(self, meta: list[ParamMeta], weights: Iterator[tuple[str, Tensor]]) -> None:
        receiving = Background(lambda: self.client.update_weights(described(meta)))
        sending: list[tuple[Tensor, Any]] = []
        with _engines_word(receiving):
            for bucket in buckets(meta, self._bucket_bytes):
                parts = [tensor.to("cpu").reshape(-1) for tensor in drawn(weights, bucket)]
                receiving.check()
                for _, work in sending:  # it was on its way while this bucket was gathered
                    work.wait()
                flat = torch.cat(parts)
                sending = [(flat, broadcast(self._group, flat))]
            for _, work in sending:
                work.wait()
        receiving.join()

    def shutdown(self) -> None:
        self._group = None
