"""How the rows of a step go through the model: micro-batches of rows end to end, common beginnings once.

Pure functions of the rows: packing changes the speed of a run but never which rows an optimizer step sees, nor what
each of them counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

TokenRow = tuple[np.ndarray, np.ndarray]  # (ids int64 (L,), supervised bool (L,))
Kernel = Literal["rows", "varlen"]  # how rows end to end attend: see attention.py

_SHORTEST_PREFIX = 16  # tokens; to share fewer is not worth the pieces
_MOST_SHARING = 256  # rows in a group
_MOST_SHARED_TOKENS = 4  # times the budget: tokens of a bin's rows with their prefixes


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of all rows of a `group`: the same system prompt, the same question."""

    group: int
    length: int


def lay_out(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int,
    packing: bool,
    prefixes: Sequence[Prefix | None] | None = None,
) -> list[list[int]]:
    """Micro-batches as lists of positions into `lengths`.

    Without packing: `batch_size` rows each, in order. With packing: best fit decreasing (Johnson 1973) into bins of
    `max_tokens`, whatever the number of rows in a bin. A row longer than a bin gets one of its own. A row costs a bin
    that holds its prefix already only what comes behind it, and goes there first.
    """
    if not packing:
        return [list(range(i, min(i + batch_size, len(lengths)))) for i in range(0, len(lengths), batch_size)]
    bins: list[_Bin] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        prefix = prefixes[position] if prefixes is not None else None
        fitting = [b for b in bins if b.takes(lengths[position], prefix)]
        if fitting:
            best = min(fitting, key=lambda b: (not b.holds(prefix), b.room))
        else:
            best = _Bin(max_tokens, _MOST_SHARED_TOKENS * max_tokens)
            bins.append(best)
        best.add(position, lengths[position], prefix)
    return [sorted(b.positions) for b in bins]


def most_tokens(
    layout: Sequence[Sequence[int]], lengths: Sequence[int], prefixes: Sequence[Prefix | None]
) -> int:
    """Tokens that the largest micro-batch of a layout computes; 1 where there is none."""
    most = 1
    for group in layout:
        shared = [prefix for prefix in (prefixes[i] for i in group) if prefix is not None]
        saved = sum(prefix.length for prefix in shared) - sum(prefix.length for prefix in set(shared))
        most = max(most, sum(lengths[i] for i in group) - saved)
    return most


@dataclass
class _Bin:
    room: int
    whole_room: int  # the same counted with every prefix: attention reads the prefix's keys for each row
    positions: list[int] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)

    def holds(self, prefix: Prefix | None) -> bool:
        return prefix is not None and prefix.group in self.groups

    def takes(self, length: int, prefix: Prefix | None) -> bool:
        return self.room >= self.cost(length, prefix) and self.whole_room >= length

    def cost(self, length: int, prefix: Prefix | None) -> int:
        return length - prefix.length if prefix is not None and self.holds(prefix) else length

    def add(self, position: int, length: int, prefix: Prefix | None) -> None:
        self.room -= self.cost(length, prefix)
        self.whole_room -= length
        self.positions.append(position)
        if prefix is not None:
            self.groups.add(prefix.group)


def find_prefixes(rows: Sequence[TokenRow]) -> list[Prefix | None]:
    """For each row the tokens that it shares with others from the start, where that saves something.

    The shared part ends before the token that predicts a row's first supervised one, so nothing in it is learned: its
    hidden states are the same in every row, and are computed once.
    """
    limits = [int(np.flatnonzero(supervised[1:])[0]) if supervised[1:].any() else 0 for _, supervised in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i][0].astype(">i8").tobytes())
    limits = [limits[i] for i in order]
    common = [_num_common(rows[i][0], rows[j][0]) for i, j in pairwise(order)]
    found: list[Prefix | None] = [None] * len(rows)
    for start, end, length in _best_groups(limits, common):
        for index in order[start:end]:
            found[index] = Prefix(start, length)
    return found


def _best_groups(limits: list[int], common: list[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours in sorted order, grouped so that most tokens are saved: (start, end, length) of each group.

    `limits` of each row, `common` between a row and the next. saved[n] is the most that the first n rows can save.
    """
    saved, cut = [0], [(0, 0)]  # cut[n]: (start, length) of the group that ends at row n
    for end in range(1, len(limits) + 1):
        best, choice = saved[end - 1], (end - 1, 0)
        length = limits[end - 1]
        for start in range(end - 2, max(-1, end - 1 - _MOST_SHARING), -1):
            length = min(length, limits[start], common[start])
            if length < _SHORTEST_PREFIX:
                break
            gain = saved[start] + (end - start - 1) * length
            if gain > best:
                best, choice = gain, (start, length)
        saved.append(best)
        cut.append(choice)
    end = len(limits)
    while end:
        start, length = cut[end]
        if length:
            yield start, end, length
        end = start


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    """Number of equal tokens at the beginning of both."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


# ---------------------------------------------------------------- tensors


def idle_row(pad_id: int) -> TokenRow:
    """The shortest row there is: for a rank that has to go through the model without rows."""
    return np.array([pad_id, pad_id]), np.array([False, True])


@dataclass(frozen=True)
class RowLayout:
    """Where rows lie in one sequence: end to end, each with its own tokens and perhaps a prefix that lies earlier."""

    lengths: tuple[int, ...]  # own tokens of each row, in the order of the sequence
    prefixes: tuple[slice | None, ...]  # tokens of the sequence that come before a row's own
    device: torch.device
    kernel: Kernel = "rows"

    @property
    def whole_lengths(self) -> list[int]:
        """Tokens of each row with its prefix."""
        return [
            length + (prefix.stop - prefix.start if prefix is not None else 0)
            for length, prefix in zip(self.lengths, self.prefixes, strict=True)
        ]

    @cached_property
    def query_ends(self) -> torch.Tensor:  # int32 (num_rows + 1,)
        return self._ends(self.lengths)

    @cached_property
    def key_ends(self) -> torch.Tensor:  # int32 (num_rows + 1,)
        return self._ends(self.whole_lengths)

    @cached_property
    def key_index(self) -> torch.Tensor | None:  # int64 (sum of whole lengths,)
        """Positions of all keys, row by row; None where they lie as they should."""
        if not any(self.prefixes):
            return None
        starts = np.cumsum([0, *self.lengths])
        pieces = []
        for start, length, prefix in zip(starts, self.lengths, self.prefixes, strict=False):
            if prefix is not None:
                pieces.append(np.arange(prefix.start, prefix.stop))
            pieces.append(np.arange(start, start + length))
        return _to(self.device, np.concatenate(pieces))

    def _ends(self, lengths: Sequence[int]) -> torch.Tensor:
        return _to(self.device, np.cumsum([0, *lengths]).astype(np.int32))


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end (`layout` given) or padded to one length (`attention_mask` given)."""

    input_ids: torch.Tensor  # (1, T) end to end, or (B, T) padded
    position_ids: torch.Tensor  # same shape; restarts in every row
    attention_mask: torch.Tensor | None  # (B, T), padded only
    layout: RowLayout | None  # end to end only
    predict_at: torch.Tensor  # (n,) flat positions whose next token is supervised
    targets: torch.Tensor  # (n,) those next tokens


def collate(
    rows: Sequence[TokenRow],
    *,
    device: torch.device,
    prefixes: Sequence[Prefix | None] | None = None,
    kernel: Kernel = "rows",
) -> MicroBatch:
    """Lay rows end to end. The first row of each group brings the prefix, the others refer to it.

    A row's first token has no predecessor and is never a target.
    """
    prefix_at: dict[int, slice] = {}  # group -> where its prefix lies
    lengths: list[int] = []
    referred: list[slice | None] = []
    ids, positions, predict_at, targets = [], [], [], []
    start = 0
    for number, (row_ids, supervised) in enumerate(rows):
        prefix = prefixes[number] if prefixes is not None else None
        refers_to = prefix_at.get(prefix.group) if prefix is not None else None
        left = (
            prefix.length if prefix is not None and refers_to is not None else 0
        )  # tokens that lie elsewhere
        if prefix is not None and refers_to is None:
            prefix_at[prefix.group] = slice(start, start + prefix.length)
        wanted = np.flatnonzero(supervised[1:])  # i: token i + 1 is supervised, predicted at i
        ids.append(row_ids[left:])
        positions.append(np.arange(left, len(row_ids)))
        predict_at.append(wanted - left + start)
        targets.append(row_ids[wanted + 1])
        lengths.append(len(row_ids) - left)
        referred.append(refers_to)
        start += lengths[-1]
    return MicroBatch(
        input_ids=_tensor(np.concatenate(ids), device)[None],
        position_ids=_tensor(np.concatenate(positions), device)[None],
        attention_mask=None,
        layout=RowLayout(tuple(lengths), tuple(referred), device, kernel),
        predict_at=_tensor(np.concatenate(predict_at), device),
        targets=_tensor(np.concatenate(targets), device),
    )


def collate_padded(rows: Sequence[TokenRow], *, device: torch.device, pad_id: int) -> MicroBatch:
    """Pad rows at their end to the longest one, for models whose rows cannot be laid end to end."""
    width = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), width), pad_id)
    positions = np.zeros_like(ids)
    present = np.zeros_like(ids)
    predict_at, targets = [], []
    for number, (row_ids, supervised) in enumerate(rows):
        length = len(row_ids)
        ids[number, :length] = row_ids
        positions[number, :length] = np.arange(length)
        present[number, :length] = 1
        wanted = np.flatnonzero(supervised[1:])
        predict_at.append(wanted + number * width)
        targets.append(row_ids[wanted + 1])
    return MicroBatch(
        input_ids=_tensor(ids, device),
        position_ids=_tensor(positions, device),
        attention_mask=_tensor(present, device),
        layout=None,
        predict_at=_tensor(np.concatenate(predict_at), device),
        targets=_tensor(np.concatenate(targets), device),
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64, on the device."""
    return _to(device, np.ascontiguousarray(array, dtype=np.int64))


def _to(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A GPU copies it while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
