"""Memory of two processes: what one writes the other sees, and nobody takes it for another's."""

import gc
import multiprocessing
from pathlib import Path

import pytest
import torch

from rlhf_ray.engines.shared_memory import SharedMemory


def double(path: str, size: int, key: str) -> None:
    SharedMemory.opened(path, size, key).tensor(64, torch.float32, (2, 3)).mul_(2)


def test_another_process_reads_and_writes_it() -> None:
    memory = SharedMemory(1000)
    mine = memory.tensor(64, torch.float32, (2, 3)).copy_(torch.arange(6.0).view(2, 3))
    other = multiprocessing.get_context("spawn").Process(target=double, args=(memory.path, memory.size, memory.key))
    other.start()
    other.join()
    assert torch.equal(mine, 2 * torch.arange(6.0).view(2, 3))


def test_a_view_says_where_it_begins() -> None:
    """From byte 8 on, 4 rows of 5 float32 values: row 2 begins 40 bytes later."""
    memory = SharedMemory(88)
    matrix = memory.tensor(8, torch.float32, (4, 5))
    assert memory.place(matrix) == 8 and memory.place(matrix[2]) == 48
    assert memory.place(memory.tensor(88, torch.float32, (0, 7))) == 0  # nothing is anywhere


@pytest.mark.parametrize("what", ["elsewhere", "strided", "in another memory"])
def test_what_is_no_such_view_has_no_place(what: str) -> None:
    memory, other = SharedMemory(80), SharedMemory(80)
    tensor = {"elsewhere": torch.ones(3), "strided": memory.tensor(0, torch.float32, (4, 5)).T,
              "in another memory": other.tensor(0, torch.float32, (3,))}[what]
    with pytest.raises(ValueError, match="not a part of this memory"):
        memory.place(tensor)


def test_only_its_key_opens_it() -> None:
    a, b = SharedMemory(80), SharedMemory(80)
    with pytest.raises(ValueError, match="another file"):
        SharedMemory.opened(a.path, a.size, b.key)
    with pytest.raises(OSError, match="No such file"):
        SharedMemory.opened("/proc/self/fd/no-such", a.size, a.key)


def test_its_file_is_closed_with_it_and_tensors_live_on() -> None:
    memory = SharedMemory(80)
    path, tensor = memory.path, memory.tensor(0, torch.float32, (3,)).fill_(7)
    del memory
    gc.collect()
    assert not Path(path).exists()
    assert tensor.tolist() == [7, 7, 7]
