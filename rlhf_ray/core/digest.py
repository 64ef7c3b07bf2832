"""A number that tells whether two copies of the weights are the same, bit for bit."""

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 63) - 1
_CHUNK = 1 << 22  # elements widened to int64 at a time


def tensor_digest(name: str, tensor: Tensor) -> int:
    """Of the tensor's bits, its dtype, shape and name: 63 bits; computed on the tensor's device.

    A sum over elements of bits times a number of their place, so swapped or moved elements are noticed; sums commute,
    so digests of tensors can be added up in any order. A check against accidents, not against malice.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGER[tensor.element_size()])
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device) * 2654435761
        # odd, so that no bit is lost; not linear in the place, or the identity with two rows swapped would be the same
        places = (places ^ (places >> 15)) * 2 + 1
        total += int((part * places).sum())  # wraps around in int64, the same everywhere
    label = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    salt = int.from_bytes(hashlib.sha256(label).digest()[:8], "big")
    return (total ^ salt) & _MASK


def add_digests(a: int, b: int) -> int:
    return (a + b) & _MASK


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # 8: as two halves, for 63 bits hold no 64
