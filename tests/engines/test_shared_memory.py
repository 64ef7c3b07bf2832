"""Memory of two processes: what its owner writes the other sees, and nobody takes it for another's."""

import gc
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

from rlhf_ray.engines.shared_memory import SharedMemory

OTHER = """
import sys
import torch
from rlhf_ray.engines.shared_memory import SharedMemory

path, size, key = sys.argv[1:]
there = SharedMemory.opened(path, int(size), key).tensor(64, torch.float32, (3,))
for _ in sys.stdin:
    print(there.tolist(), flush=True)
there.zero_()
print(there.tolist())
"""


def test_another_process_sees_what_the_owner_writes_and_changes_nothing() -> None:
    memory = SharedMemory(1000)
    mine = memory.tensor(64, torch.float32, (3,))
    with Popen([sys.executable, "-c", OTHER, memory.path, str(memory.size), memory.key], stdin=PIPE, stdout=PIPE,
               text=True) as other:
        assert other.stdin and other.stdout
        for values in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]):
            mine.copy_(torch.tensor(values))
            print("look", file=other.stdin, flush=True)
            assert other.stdout.readline() == f"{values}\n"
        other.stdin.close()
        assert other.stdout.read() == "[0.0, 0.0, 0.0]\n"
    assert mine.tolist() == [4.0, 5.0, 6.0]


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
