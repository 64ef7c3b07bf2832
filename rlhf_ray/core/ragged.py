"""Ragged batches: sequences laid end to end in flat arrays, and how they become rectangles.

`lengths` [N] is how many tokens each sequence has; sequence i owns flat[offsets[i]:offsets[i + 1]].
A forward pass sees *packed rows*: several sequences share one row of a rectangle, told apart by position
ids that start again at 0, so that (nearly) no padding is computed.

Responses to one prompt may go further and share its tokens, so that these are computed once: the row

    p0 p1 p2 | a3 a4 a5 | b3 b4        positions 0 1 2 3 4 5 3 4

is both p0 p1 p2 a3 a4 a5 and p0 p1 p2 b3 b4. Attention then needs a mask (a response sees its prompt and itself), and
what comes before b3 is p2, not its neighbour: `PackedRows.links`. Gradients are those of the sequences one by one, for
each is a sum over tokens.
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
    index [R, L] int64: the token's place in the flat array, -1 where empty; a shared prompt's in the first sequence;
    links [3, R, L] int64, None if no prompt is shared: the place in the row of the token before (that of a first token
    means nothing), the number of its segment, and that of the prompt before its segment, or its own.
    """

    ids: Tensor
    positions: Tensor
    index: Tensor
    links: Tensor | None = None

    @property
    def filled(self) -> Tensor:
        """[R, L] bool: a token is here."""
        return self.index >= 0

    def pick(self, flat: np.ndarray, fill: float = 0.0) -> Tensor:
        """The entries of a flat per-token array in this rectangle [R, L], `fill` where empty."""
        values = torch.as_tensor(np.array(flat)) if not flat.flags.writeable else torch.as_tensor(flat)
        picked = values.to(self.index.device)[self.index.clamp(min=0)]
        return torch.where(self.filled, picked, torch.full_like(picked, fill))

    def before(self, states: Tensor) -> Tensor:
        """States [R, L, ...] to those of the token before each: what was known when it was chosen. Those of first
        tokens mean nothing."""
        if self.links is None:
            return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        return states[torch.arange(len(states), device=states.device)[:, None], self.links[0]]

    def visible(self) -> Tensor | None:
        """[R, 1, L, L] bool: whether the token (third) sees that one (fourth); None if positions say it all."""
        if self.links is None:
            return None
        _, own, prompt = self.links
        related = (own[:, :, None] == own[:, None, :]) | (prompt[:, :, None] == own[:, None, :])
        return related.tril()[:, None]

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(self.ids.to(device), self.positions.to(device), self.index.to(device),
                          None if self.links is None else self.links.to(device))


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


_PAR = 2_500  # tokens: attention within so many costs as much as the rest of a model of width 384; of a wider one less


def family_limits(prompts: np.ndarray) -> np.ndarray:
    """How many tokens responses may have that share a prompt of so many [N] to gain by it: int64 [N].

    Of two families of s tokens each one of 2s - p computes p tokens less. But attention sees all of a row: it takes
    2s instead of s for each token, in all 2s^2 / c more, in units of the rest of a token, which is c times what
    attention to one takes. That is p where 2s - p is what is returned.
    """
    return (np.sqrt(2.0 * _PAR * prompts) - prompts).astype(np.int64)


def first_true(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Flat bool [T]: how many entries of each sequence come before its first True, 0 if it has none. int64 [N]."""
    return np.array([part.argmax() if len(part) else 0 for part in np.split(flags, offsets(lengths)[1:-1])],
                    dtype=np.int64)[: len(lengths)]


def families(ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, limits: np.ndarray) -> list[list[int]]:
    """The sequences whose first `prompts` [N] tokens are equal, together, in their order; as many as have `limits` [N]
    tokens when these are counted once. One that is its prompt alone, or has none, is by itself."""
    starts = offsets(lengths)
    found: list[list[int]] = []
    newest: dict[bytes, tuple[list[int], int]] = {}  # prompt -> its last family, and the tokens of that
    for i, (n, p) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        prompt = ids[starts[i] : starts[i] + p].tobytes()
        family, size = newest.get(prompt, ([], p))
        if not family or not 0 < p < n or size + n - p > limits[i]:
            family, size = [], p
            found.append(family)
        family.append(i)
        if 0 < p < n:
            newest[prompt] = family, size + n - p
    return found


def pack(
    ids: np.ndarray, lengths: np.ndarray, row_length: int, tokens_per_batch: int, one_row: bool = False,
    prompts: np.ndarray | None = None,
) -> list[PackedRows]:
    """Flat ids [T] to micro-batches of at most `tokens_per_batch` places (at least one row each).

    Rows are as long as the fullest of their micro-batch, at most `row_length`. If one has fewer rows it is the first,
    that of the fullest: a long sequence pads as few others as can be. one_row: lay a micro-batch's rows end to end,
    [1, R * L]: kernels for variable length tell sequences apart in a batch of one row only.

    prompts [N]: how many of each sequence's first tokens are its prompt, to be shared by those that have the same; a
    row may then be longer, as far as that gains.
    """
    if prompts is None:
        prompts = np.zeros(len(lengths), dtype=np.int64)
    limits = np.maximum(row_length, np.minimum(family_limits(prompts), tokens_per_batch))
    units = families(ids, lengths, prompts, limits)
    starts = offsets(lengths)
    laid = [_Unit.of(unit, starts, int(prompts[unit[0]])) for unit in units]
    sizes = np.array([len(unit.places) for unit in laid], dtype=np.int64)
    row_length = max(row_length, int(max(sizes, default=1)))
    rows = plan_rows(sizes, row_length)
    per_batch = max(1, tokens_per_batch // row_length)
    flat = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    batches = []
    for end in range(len(rows) % per_batch or per_batch, len(rows) + 1, per_batch):
        chunk = rows[max(0, end - per_batch) : end]
        width = max(int(sizes[row].sum()) for row in chunk)
        index = np.full((len(chunk), width), -1, dtype=np.int64)
        positions = np.zeros((len(chunk), width), dtype=np.int64)
        links = np.empty((3, len(chunk), width), dtype=np.int64)
        links[0], links[1:] = 0, -1 - np.arange(width)  # every empty place is a segment of its own
        for r, row in enumerate(chunk):
            at = segments = 0
            for unit in (laid[i] for i in row):
                here = slice(at, at + len(unit.places))
                index[r, here], positions[r, here] = unit.places, unit.positions
                links[0, r, here] = unit.before + at
                links[1, r, here], links[2, r, here] = unit.segment + segments, segments
                at, segments = here.stop, segments + int(unit.segment[-1]) + 1
        if one_row:
            index, positions = index.reshape(1, -1), positions.reshape(1, -1)
        places = torch.from_numpy(index)
        shares = any(len(units[i]) > 1 for row in chunk for i in row)
        batches.append(PackedRows(torch.where(places >= 0, flat[places.clamp(min=0)], 0), torch.from_numpy(positions),
                                  places, torch.from_numpy(links) if shares else None))
    return batches


@dataclass(frozen=True)
class _Unit:
    """What stays together in a row, int64 [n] each: places in the flat array, positions, place of the token before
    (from the unit's beginning), segment (0 is the prompt, or the one sequence)."""

    places: np.ndarray
    positions: np.ndarray
    before: np.ndarray
    segment: np.ndarray

    @staticmethod
    def of(members: Sequence[int], starts: np.ndarray, prompt: int) -> "_Unit":
        if len(members) == 1:
            n = int(starts[members[0] + 1] - starts[members[0]])
            return _Unit(starts[members[0]] + np.arange(n), np.arange(n), np.maximum(np.arange(n) - 1, 0),
                         np.zeros(n, dtype=np.int64))
        tails = [np.arange(starts[i] + prompt, starts[i + 1]) for i in members]
        lengths = [prompt, *map(len, tails)]
        places = np.concatenate([starts[members[0]] + np.arange(prompt), *tails])
        before = np.maximum(np.arange(len(places)) - 1, 0)
        before[np.cumsum(lengths)[:-1]] = prompt - 1
        return _Unit(places, np.concatenate([np.arange(prompt), *(prompt + np.arange(len(t)) for t in tails)]),
                     before, np.repeat(np.arange(len(lengths)), lengths))


def one_token_rows() -> PackedRows:
    """The smallest rectangle: what a rank computes, with weight 0, when the others have one batch more."""
    zero = torch.zeros((1, 2), dtype=torch.int64)
    return PackedRows(zero, zero.clone(), torch.full((1, 2), -1, dtype=torch.int64))
