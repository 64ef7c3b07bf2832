"""Memory that other processes of this host can map.

A file without a name (memfd), which others open through /proc: it needs no room in /dev/shm, and is gone with the last
process that maps it, however that ends. A key at its beginning tells it from whatever another host may have at the
same place.
"""

import mmap
import os
import secrets
import weakref
from typing import Self

import torch
from torch import Tensor

_KEY_BYTES = 64  # as many as a line of a processor's cache, so that what follows begins with one


class SharedMemory:
    """Places in it are bytes behind the key. path, size, key (hexadecimal): what another process opens it by.

    What its owner writes all see; what others write they alone see.
    """

    def __init__(self, nbytes: int):
        file = os.memfd_create("rlhf_ray")
        weakref.finalize(self, os.close, file)
        self.path, self.size = f"/proc/{os.getpid()}/fd/{file}", _KEY_BYTES + nbytes
        os.ftruncate(file, self.size)
        self._memory = mmap.mmap(file, self.size)
        key = secrets.token_bytes(_KEY_BYTES)
        self._memory[:_KEY_BYTES], self.key = key, key.hex()

    @classmethod
    def opened(cls, path: str, size: int, key: str) -> Self:
        """That of another process. Raises OSError or ValueError if it is not there."""
        found = cls.__new__(cls)
        with open(path, "rb") as file:  # noqa: PTH123 - no file that a Path would know how to treat
            found._memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        if found._memory[:_KEY_BYTES].hex() != key:
            raise ValueError("it has another file there")
        found.path, found.size, found.key = path, size, key
        return found

    def tensor(self, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor there: a view."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=_KEY_BYTES + place).view(shape)

    def place(self, tensor: Tensor) -> int:
        """Where a contiguous view of it begins. Raises ValueError if the tensor is no such view."""
        start = self.tensor(0, torch.uint8, (1,)).data_ptr() if self.size > _KEY_BYTES else 0
        place = tensor.data_ptr() - start if tensor.numel() else 0
        if not (0 <= place <= self.size - _KEY_BYTES - tensor.numel() * tensor.element_size() and
                tensor.is_contiguous()):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not a part of this memory")
        return place
