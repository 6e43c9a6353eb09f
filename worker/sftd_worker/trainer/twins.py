"""Rows that say the same as an earlier one: exactly, by a hash of their tokens, or nearly, by MinHash (Broder 1997) over
their token 5-grams, with locality-sensitive hashing to find the pairs.

5-grams of the context that nearly all rows share (the template's, a system prompt's) say nothing about a row and are left out.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from rensa import RMinHash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

SHINGLE_TOKENS = 5
THRESHOLD = 0.8  # estimated Jaccard similarity from which two rows are near duplicates
MOST_ROWS = 400_000  # beyond them near duplicates are not looked for: a sketch takes half a KiB
_NUM_HASHES = 128  # the estimate is off by 0.035 at 0.8 (one standard deviation)
_BANDS = 32  # a pair at the threshold is missed with probability 5e-8
_COMMON_SHARE = 0.95  # of the rows of a sample
_SAMPLE_ROWS = 2_000
_FEWEST_ROWS = 10  # of fewer rows it cannot be told what they share by their template
_PIECE_ROWS = 4_096
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sketches:
    """What is compared of the rows of a table."""

    exact: np.ndarray  # uint64 (num_rows,)
    minhash: np.ndarray | None  # uint32 (num_rows, 128); None: too many rows


@dataclass(frozen=True)
class Twins:
    """For each row an earlier one that it repeats, by position, or -1."""

    exact: np.ndarray  # int64 (num_rows,)
    near: np.ndarray | None  # int64 (num_rows,); not of rows with an exact one
    similarity: np.ndarray  # float64 (num_rows,); of `near`


def sketch(table: Dataset, cached: Path) -> Sketches:
    """Sketches of all rows of a table, from the cache where they have been made before."""
    with contextlib.suppress(OSError, KeyError, SafetensorError):  # cut short, perhaps
        kept = load_file(cached)
        found = Sketches(kept["exact"], kept.get("minhash"))
        if len(found.exact) == len(table):
            os.utime(cached)  # in use
            return found
    sketches = Sketches(_hashes(table), _minhash(table) if len(table) <= MOST_ROWS else None)
    unfinished = cached.with_suffix(f".{os.getpid()}.tmp")
    arrays = {"exact": sketches.exact}
    if sketches.minhash is not None:
        arrays["minhash"] = sketches.minhash
    try:
        save_file(arrays, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(cached)
    finally:
        unfinished.unlink(missing_ok=True)
    return sketches


def find_twins(sketches: Sketches) -> Twins:
    """Earlier twins of each row. Of a pair the later one counts, so that the first of its kind is no duplicate."""
    exact = _first_equal(sketches.exact)
    similarity = np.zeros(len(exact))
    if sketches.minhash is None:
        return Twins(exact, None, similarity)
    near = np.full(len(exact), -1)
    rows_per_band = _NUM_HASHES // _BANDS
    for band in range(_BANDS):
        part = sketches.minhash[:, band * rows_per_band : (band + 1) * rows_per_band]
        first = _first_equal(_as_numbers(part))
        found = np.flatnonzero((first >= 0) & (exact < 0))
        for piece in np.array_split(found, max(1, len(found) // _PIECE_ROWS)):
            alike = (sketches.minhash[piece] == sketches.minhash[first[piece]]).mean(axis=1)
            better = (alike >= THRESHOLD) & (alike > similarity[piece])
            near[piece[better]] = first[piece[better]]
            similarity[piece[better]] = alike[better]
    return Twins(exact, near, similarity)


def joined(training: Sketches, validation: Sketches) -> Sketches:
    """The rows of two tables, one behind the other."""
    minhash = None
    if training.minhash is not None and validation.minhash is not None:
        minhash = np.concatenate([training.minhash, validation.minhash])
    return Sketches(np.concatenate([training.exact, validation.exact]), minhash)


def chosen(sketches: Sketches, rows: np.ndarray) -> Sketches:
    """Some rows of a table, in the order given."""
    return Sketches(sketches.exact[rows], None if sketches.minhash is None else sketches.minhash[rows])


def _first_equal(values: np.ndarray) -> np.ndarray:
    """For each value the position of the first equal one before it, or -1."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    earlier = first[which]
    return np.where(earlier < np.arange(len(values)), earlier, -1)


def _as_numbers(part: np.ndarray) -> np.ndarray:
    """Rows of a few uint32 as one uint64 each; two different ones meet once in 2^64."""
    mixed = np.zeros(len(part), np.uint64)
    for column in part.T:
        mixed = (mixed ^ column.astype(np.uint64)) * _MIX
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _hashes(table: Dataset) -> np.ndarray:
    """A hash of each row's tokens and mask: what a model sees of it."""
    found = np.empty(len(table), np.uint64)
    for start, ids, offsets, supervised in _pieces(table):
        for i in range(len(offsets) - 1):
            here = slice(offsets[i], offsets[i + 1])
            row = hashlib.blake2b(ids[here].tobytes(), digest_size=8)
            row.update(supervised[here].tobytes())
            found[start + i] = int.from_bytes(row.digest(), "little")
    return found


def _minhash(table: Dataset) -> np.ndarray:
    common = _common(table)
    rows = []
    for _, ids, offsets, supervised in _pieces(table):
        shingles, owners, places = _shingles(ids, offsets)
        telling = np.ones(len(shingles), bool)
        if len(common):
            # What is learned tells, however many rows learn it; where all of a row is learned, its template is no context.
            some_context = ~np.logical_and.reduceat(supervised[1:], offsets[:-1].clip(max=len(ids) - 2))
            telling = ~np.isin(shingles, common) | (supervised[places] & some_context[owners])
        # A row that holds nothing else is compared by all that it has.
        counts = np.bincount(owners[telling], minlength=len(offsets) - 1)
        kept = telling | (counts[owners] == 0)
        counts = np.bincount(owners[kept], minlength=len(offsets) - 1)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles[kept], ends, _NUM_HASHES, 1)
        rows.append(np.array(matrix.to_rows(), np.uint32).reshape(-1, _NUM_HASHES))
    return np.concatenate(rows) if rows else np.empty((0, _NUM_HASHES), np.uint32)


def _common(table: Dataset) -> np.ndarray:
    """5-grams that stand in most rows of a sample."""
    if len(table) < _FEWEST_ROWS:
        return np.empty(0, np.uint64)
    step = max(1, len(table) // _SAMPLE_ROWS)
    sample = table.select(range(0, len(table), step))
    counted: list[np.ndarray] = []
    for row in sample.with_format("numpy"):
        ids = np.asarray(row["input_ids"])
        counted.append(np.unique(_shingles(ids, np.array([0, len(ids)]))[0]))
    values, counts = np.unique(np.concatenate(counted), return_counts=True)
    return values[counts > _COMMON_SHARE * len(sample)]


def _shingles(ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash, row, place of its last token) of each 5-gram of rows that lie end to end; a shorter row is one by itself."""
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    place = np.arange(len(ids)) - np.asarray(offsets)[:-1][owner]
    length = np.diff(offsets)[owner]
    hashes = np.zeros(len(ids), np.uint64)
    for ahead in range(SHINGLE_TOKENS):
        there = np.minimum(np.arange(len(ids)) + ahead, len(ids) - 1)
        inside = place + ahead < length
        hashes = (hashes ^ np.where(inside, ids[there] + 1, 0).astype(np.uint64)) * _MIX
        hashes ^= hashes >> np.uint64(29)
    begins = (place + SHINGLE_TOKENS <= length) | (place == 0)
    last = np.minimum(np.arange(len(ids)) + SHINGLE_TOKENS - 1, offsets[1:][owner] - 1)
    return hashes[begins], owner[begins], last[begins]


def _pieces(table: Dataset) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of a table by pieces: (first row, ids (n,) end to end, where each row begins (rows + 1,), their mask (n,))."""
    start = 0
    plain = table.with_format("arrow")
    for first in range(0, len(table), _PIECE_ROWS):
        piece = plain[first : first + _PIECE_ROWS]
        ids, mask = piece.column("input_ids").combine_chunks(), piece.column("supervised").combine_chunks()
        offsets = ids.offsets.to_numpy()
        values = ids.values.to_numpy()[offsets[0] : offsets[-1]]
        at = mask.offsets.to_numpy()
        supervised = mask.values.to_numpy(zero_copy_only=False)[at[0] : at[-1]]
        yield start, values, offsets - offsets[0], supervised
        start += len(piece)
