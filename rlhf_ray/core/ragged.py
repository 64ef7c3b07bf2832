"""Ragged batches: sequences laid end to end in flat arrays, and how they become rectangles.

`lengths` [N] is how many tokens each sequence has; sequence i owns flat[offsets[i]:offsets[i + 1]].
A forward pass sees *packed rows*: several sequences share one row of a rectangle, told apart by position
ids that start again at 0, so that (nearly) no padding is computed.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Start of every sequence in the flat array, and the end of the last one: int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def take(flat: np.ndarray, lengths: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The flat array of the chosen sequences, in the given order."""
    starts = offsets(lengths)
    parts = [flat[starts[i] : starts[i + 1]] for i in rows]
    return np.concatenate(parts) if parts else flat[:0]


def pad(flat: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """Flat [T] to left-aligned ([N, L] values with zeros behind, [N, L] bool mask), L = the longest length."""
    mask = torch.arange(int(max(lengths, default=0)))[None, :] < torch.as_tensor(np.array(lengths))[:, None]
    entries = torch.as_tensor(np.array(flat))  # a copy: what Ray hands out is read-only
    values = torch.zeros(mask.shape, dtype=entries.dtype)
    values[mask] = entries
    return values, mask


def unpad(values: Tensor, mask: Tensor) -> np.ndarray:
    """The inverse of `pad`."""
    return values[mask].numpy()


@dataclass(frozen=True)
class PackedRows:
    """A rectangle for one forward pass.

    ids [R, L] int64 token ids (0 where empty); positions [R, L] int64, 0 at the start of every sequence and
    at every empty place, so that attention treats each of those as a sequence of its own;
    index [R, L] int64: the token's place in the flat array, -1 where empty.
    """

    ids: Tensor
    positions: Tensor
    index: Tensor

    @property
    def filled(self) -> Tensor:
        """[R, L] bool: a token is here."""
        return self.index >= 0

    def pick(self, flat: np.ndarray, fill: float = 0.0) -> Tensor:
        """The entries of a flat per-token array in this rectangle [R, L], `fill` where empty."""
        values = torch.as_tensor(np.array(flat)) if not flat.flags.writeable else torch.as_tensor(flat)
        picked = values[self.index.clamp(min=0)]
        return torch.where(self.filled, picked, torch.full_like(picked, fill))

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(self.ids.to(device), self.positions.to(device), self.index.to(device))


def plan_rows(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Lay whole sequences into as few rows of at most `row_length` tokens as this finds, all about equally full.

    Longest first, each into the emptiest row: rows of one width leave no padding between them. Returns the sequence
    numbers of each row. Raises ValueError for a sequence longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -int(lengths[i]))
    if order and lengths[order[0]] > row_length:
        raise ValueError(f"sequence {order[0]} has {lengths[order[0]]} tokens; a row holds {row_length}")
    count = math.ceil(int(np.sum(lengths)) / row_length)
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, row) for row in range(count)]  # a heap: the emptiest first
        for i in order:
            load, row = loads[0]
            if load + int(lengths[i]) > row_length:
                break
            rows[row].append(i)
            heapq.heapreplace(loads, (load + int(lengths[i]), row))
        else:
            loads.sort(key=lambda load: (-load[0], load[1]))
            return [rows[row] for _, row in loads]  # neighbours are about equally full
        count += 1


def pack(
    ids: np.ndarray, lengths: np.ndarray, row_length: int, tokens_per_batch: int, one_row: bool = False
) -> list[PackedRows]:
    """Flat ids [T] to micro-batches of at most `tokens_per_batch` places (at least one row each).

    Rows are as long as the fullest of their micro-batch, at most `row_length`. If one has fewer rows it is the first,
    that of the fullest: a long sequence pads as few others as can be. one_row: lay a micro-batch's rows end to end,
    [1, R * L]: kernels for variable length tell sequences apart in a batch of one row only.
    """
    rows = plan_rows(lengths, max(row_length, int(max(lengths, default=1))))
    per_batch = max(1, tokens_per_batch // max(row_length, int(max(lengths, default=1))))
    starts = offsets(lengths)
    flat = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    batches = []
    for end in range(len(rows) % per_batch or per_batch, len(rows) + 1, per_batch):
        chunk = rows[max(0, end - per_batch) : end]
        width = max(int(sum(lengths[i] for i in row)) for row in chunk)
        index = torch.full((len(chunk), width), -1, dtype=torch.int64)
        positions = torch.zeros((len(chunk), width), dtype=torch.int64)
        for r, row in enumerate(chunk):
            at = 0
            for i in row:
                n = int(lengths[i])
                index[r, at : at + n] = torch.arange(int(starts[i]), int(starts[i]) + n)
                positions[r, at : at + n] = torch.arange(n)
                at += n
        if one_row:
            index, positions = index.reshape(1, -1), positions.reshape(1, -1)
        batches.append(PackedRows(torch.where(index >= 0, flat[index.clamp(min=0)], 0), positions, index))
    return batches


def one_token_rows() -> PackedRows:
    """The smallest rectangle: what a rank computes, with weight 0, when the others have one batch more."""
    zero = torch.zeros((1, 2), dtype=torch.int64)
    return PackedRows(zero, zero.clone(), torch.full((1, 2), -1, dtype=torch.int64))
