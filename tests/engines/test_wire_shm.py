"""The wire within one host: what the learner has, or writes, is what every engine sees.

With real engines: end_to_end/test_weight_sync.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_ray.engines.shared_memory import SharedMemory
from rlhf_ray.engines.wire_shm import ShmInitInfo, ShmReceiver, ShmSender, ShmTrainerInitInfo, places

WEIGHTS = {
    "embedding": torch.arange(60, dtype=torch.float32).view(20, 3),
    "scale": torch.tensor(2.5),
    "half": torch.full((7,), 0.5, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 4),
    "last": -torch.arange(5, dtype=torch.float32),
}


class Source(WeightSource):
    def __init__(self, weights: dict[str, Tensor], declared: dict[str, Tensor] | None = None):
        self.weights, self.declared = weights, declared or weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in self.declared.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()


class Model:
    """Keeps what it is given, as vLLM does until a layer is whole."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.held |= dict(weights)


class Engines:
    """Two engines, as the sender sees them."""

    def __init__(self) -> None:
        self.receivers, self.updates = [ShmReceiver.__new__(ShmReceiver) for _ in range(2)], 0
        for receiver in self.receivers:
            receiver.model = Model()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        for receiver in self.receivers:
            receiver.init_transfer_engine(ShmInitInfo(**init_info))

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.updates += 1
        for receiver in self.receivers:
            receiver.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


@pytest.mark.parametrize(("bucket_bytes", "updates"), [(1, 5), (10**6, 3)])  # a bucket is of one dtype
def test_every_engine_holds_what_was_written(bucket_bytes, updates):
    """What came with the first bucket is still right when the last is there."""
    engines = Engines()
    sender = ShmSender.trainer_init(ShmTrainerInitInfo(bucket_bytes, rank=0), client=engines, source=Source(WEIGHTS))
    sender.send_weights()
    assert engines.updates == updates
    check_held(engines, WEIGHTS)


def check_held(engines: Engines, weights: dict[str, Tensor]) -> None:
    for receiver in engines.receivers:
        assert receiver.model.held.keys() == weights.keys()
        for name, weight in weights.items():
            found = receiver.model.held[name]
            assert (found.dtype, found.shape) == (weight.dtype, weight.shape) and torch.equal(found, weight)


def test_weights_that_are_in_such_memory_are_not_copied():
    """One update carries all, whatever a bucket holds; engines see the learner's own bytes, which it may change for the
    next sync."""
    memory = SharedMemory(256)
    weights = {"matrix": memory.tensor(0, torch.float32, (4, 5)), "vector": memory.tensor(80, torch.float32, (3,))}
    for weight in weights.values():
        weight.copy_(torch.randn(weight.shape))
    engines, walked = Engines(), Source(weights)
    sender = ShmSender.trainer_init(
        ShmTrainerInitInfo(1, (memory, lambda: {n: memory.place(w) for n, w in weights.items()}), rank=0),
        client=engines, source=walked)
    sender.send_weights()
    assert engines.updates == 1
    check_held(engines, weights)
    weights["matrix"].mul_(2)
    check_held(engines, weights)


def test_the_second_sync_brings_the_new_weights():
    engines, source = Engines(), Source(dict(WEIGHTS))
    sender = ShmSender.trainer_init(ShmTrainerInitInfo(100, rank=0), client=engines, source=source)
    sender.send_weights()
    source.weights = {name: weight + 1 for name, weight in WEIGHTS.items()}
    sender.send_weights()
    assert torch.equal(engines.receivers[1].model.held["last"], 1 - torch.arange(5, dtype=torch.float32))


def test_what_was_not_declared_is_refused():
    swapped = {"embedding": WEIGHTS["last"], **{k: w for k, w in WEIGHTS.items() if k != "embedding"}}
    for weights, message in ((swapped, "expected parameter embedding"), (WEIGHTS | {"more": torch.ones(1)}, "more")):
        sender = ShmSender.trainer_init(ShmTrainerInitInfo(100, rank=0), client=Engines(),
                                        source=Source(weights, WEIGHTS))
        with pytest.raises(ValueError, match=message):
            sender.send_weights()


def test_other_ranks_walk_along_and_send_nothing():
    engines, seen = Engines(), []

    class Watched(Source):
        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, weight in super().__iter__():
                seen.append(name)
                yield name, weight

    sender = ShmSender.trainer_init(ShmTrainerInitInfo(100, rank=1), client=engines, source=Watched(WEIGHTS))
    sender.send_weights()
    assert seen == list(WEIGHTS) and engines.updates == 0


def test_copies_begin_at_multiples_of_64_bytes():
    """240 bytes of the embedding, 4 at 256, 14 at 320, none at 384, 20 at 384."""
    assert places(Source(WEIGHTS).metadata()) == (
        {"embedding": 0, "scale": 256, "half": 320, "nothing": 384, "last": 384}, 404)


@pytest.mark.parametrize(("path", "key", "why"), [
    ("/proc/1/fd/no-such", "00" * 64, "No such file"),
    (__file__, "00" * 64, "it has another file there"),
])
def test_an_engine_on_another_host_says_what_to_do(path, key, why):
    receiver = ShmReceiver.__new__(ShmReceiver)
    with pytest.raises(RuntimeError, match=rf"does not see the memory of the policy on alpha \(.*{why}.*backend=gloo"):
        receiver.init_transfer_engine(ShmInitInfo(path, 64, key, "alpha"))
