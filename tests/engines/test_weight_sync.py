"""What opens the wires that are vLLM's own. How they work: tests/end_to_end/test_gpu.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.engines import weight_sync
from rlhf_ray.engines.weight_sync import WeightSender
from rlhf_ray.errors import UserError

LEARNER: Any = SimpleNamespace(rank=0, shapes=lambda: [("small", torch.float32, (10,)),
                                                       ("large", torch.bfloat16, (1024, 1024))])
ENGINES: Any = SimpleNamespace(workers=1)


def opened(backend: str, bucket_mib: float, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> Any:
    """What vLLM is asked to open."""
    asked: list[Any] = []

    def trainer_init(info: Any, **_: Any) -> None:
        asked.append(info)
        if error:
            raise error

    monkeypatch.setattr(weight_sync.WeightTransferTrainerFactory, "trainer_init", trainer_init)
    WeightSender(LEARNER, ENGINES, backend, "127.0.0.1", 1, bucket_mib, 1.0)
    return asked[0]


@pytest.mark.parametrize(("bucket_mib", "nbytes"), [(0.001, 2 * 2**20), (64.0, 64 * 2**20)])
def test_every_tensor_fits_into_the_buffer_that_processes_of_one_gpu_share(monkeypatch, bucket_mib, nbytes) -> None:
    assert opened("ipc", bucket_mib, monkeypatch).packed_buffer_size_bytes == nbytes


def test_where_nccl_refuses_it_is_said_what_to_do(monkeypatch) -> None:
    refused = RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)")
    with pytest.raises(UserError, match=r"two of them are on one GPU: .*NCCL_MULTI_RANK_GPU_ENABLE=1"):
        opened("nccl", 64.0, monkeypatch, refused)
    with pytest.raises(RuntimeError, match="remote process exited"):
        opened("nccl", 64.0, monkeypatch, RuntimeError("NCCL error: remote process exited"))
