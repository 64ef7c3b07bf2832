"""A number that tells whether two copies of the weights are the same, bit for bit."""

import hashlib
from functools import cache

import numpy as np
import torch
import xxhash
from torch import Tensor

_MASK = (1 << 64) - 1
_WORDS = 1 << 16  # of 4 bytes


def tensor_digest(name: str, tensor: Tensor) -> int:
    """Of the tensor's bits, its dtype, shape and name: 64 bits; computed on the tensor's device, as fast as it is read.

    Those of different tensors can be added up in any order. Copies are to be compared on one kind of device, for
    processors (XXH3) and accelerators have digests of their own. A check against accidents, not against malice.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    label = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    seed = int.from_bytes(hashlib.sha256(label).digest()[:8], "big")
    return _on_processor(data, seed) if data.device.type == "cpu" else _on_accelerator(data, seed)


def add_digests(a: int, b: int) -> int:
    return (a + b) & _MASK


def _on_processor(data: Tensor, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(data.numpy().data, seed)


def _on_accelerator(data: Tensor, seed: int) -> int:
    """A sum over words of bits (4 bytes, so that in 64 bits none is lost) times a number of their place, so swapped or
    moved elements are noticed. Many parts in one step: an accelerator takes as long to be asked as to answer."""
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    words, places = data.view(torch.int32), _places(data.device)[:_WORDS]
    whole = len(words) // _WORDS * _WORDS
    parts = [(some * places).sum(1) for some in words[:whole].view(-1, _WORDS).split(64)]  # int64 wraps around
    parts.append((words[whole:] * places[: len(words) - whole]).sum(0, keepdim=True))
    sums = torch.cat(parts).tolist()
    factors = _odd(np.arange(_WORDS, _WORDS + len(sums), dtype=np.uint64)).tolist()
    total = sum(part * factor for part, factor in zip(sums, factors, strict=True))
    return (total ^ seed) & _MASK


@cache
def _places(device: torch.device) -> Tensor:
    return torch.from_numpy(_odd(np.arange(_WORDS, dtype=np.uint64)).view(np.int64)).to(device)


def _odd(numbers: np.ndarray) -> np.ndarray:
    """A fixed odd number for each, uint64, scattered as by splitmix64 (Steele et al. 2014): odd, so that no bit is
    lost, and without any pattern, or words that change places could make up for each other."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
