"""A number that tells whether two copies of the weights are the same, bit for bit."""

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_WORDS = 1 << 16  # of 4 bytes, looked at together: they and their places stay in a processor's cache


def tensor_digest(name: str, tensor: Tensor) -> int:
    """Of the tensor's bits, its dtype, shape and name: 64 bits; computed on the tensor's device, as fast as it is read.

    A sum over words of bits (4 bytes, so that in 64 bits none is lost) times a number of their place, so swapped or
    moved elements are noticed; sums commute, so digests of tensors can be added up in any order. A check against
    accidents, not against malice.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    words = data.view(torch.int32)
    sums = _sums(words) if data.device.type == "cpu" else _sums_side_by_side(words)
    factors = _odd(np.arange(_WORDS, _WORDS + len(sums), dtype=np.uint64)).tolist()
    total = sum(part * factor for part, factor in zip(sums, factors, strict=True))
    label = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    salt = int.from_bytes(hashlib.sha256(label).digest()[:8], "big")
    return (total ^ salt) & _MASK


def add_digests(a: int, b: int) -> int:
    return (a + b) & _MASK


def _sums(words: Tensor) -> list[int]:
    """Of each part of _WORDS words times their places; int64 wraps around, the same everywhere."""
    places, wide = _places(words.device), torch.empty(_WORDS, dtype=torch.int64)
    return [int(torch.dot(wide[: len(part)].copy_(part), places[: len(part)])) for part in words.split(_WORDS)]


def _sums_side_by_side(words: Tensor) -> list[int]:
    """The same, many parts in one step: an accelerator takes as long to be asked as to answer."""
    places, whole = _places(words.device), len(words) // _WORDS * _WORDS
    sums = [(parts * places).sum(1) for parts in words[:whole].view(-1, _WORDS).split(64)]
    if whole < len(words):
        sums.append((words[whole:] * places[: len(words) - whole]).sum(0, keepdim=True))
    return [int(x) for x in torch.cat(sums).tolist()]


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
