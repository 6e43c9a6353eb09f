"""Rows to tokens: which tokens go in, and which of them carry the loss.

Rows are read by `sftd.rows`, rendered by `template.py`, tokenised, and kept as Arrow on disk under a name made of all
that decides their content, so a second run on the same data starts at once. What is refused is refused here, before
any step: with file, line, field and remedy.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from datasets.features import Features, Sequence, Value

from sftd.rows import MAX_PROBLEMS, Row, RowProblem, RowsInvalid, is_test_translation, read_rows
from sftd.schemas import FailureReason
from sftd_worker.disk import naming
from sftd_worker.trainer.checkpoint import hash_file
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.template import CannotRender, Rendered, Template, TrainOn

_CACHE_VERSION = 4  # raise it when the same input would give other tokens or another mask
_CHUNK_ROWS = 256
NOTHING_TO_LEARN = "has nothing to learn from"
_COLUMNS = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "supervised": Sequence(Value("bool")),  # input_ids[t] is learned, predicted from the tokens before it
        "num_tokens": Value("int32"),
        "num_supervised": Value("int32"),
        "line": Value("int64"),
        "split_key": Value("float64"),  # in [0, 1), from the row's hash alone
        "task_type": Value("string"),
        "num_spelled": Value("int32"),  # control tokens of the model that its words spell out
    }
)


@dataclass(frozen=True)
class Tokenizing:
    """All that decides which tokens a row becomes."""

    tokenizer: Any  # transformers' PreTrainedTokenizerBase, untyped here
    template: Template
    train_on: TrainOn


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows, on disk, and how many were left out and why."""

    table: Dataset
    lengths: np.ndarray  # int64 (num_rows,)
    num_supervised: np.ndarray  # int64 (num_rows,)
    max_length: int  # longer rows are cut to it
    num_spelling: int = 0  # rows whose words spell out control tokens of the model: read as text
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, supervised) of one row, cut to max_length."""
        row = self.table[index]
        ids = np.asarray(row["input_ids"], dtype=np.int64)[: self.max_length]
        return ids, np.asarray(row["supervised"], dtype=bool)[: self.max_length]


def tokenize_file(
    path: Path,
    *,
    sha256: str,
    name: str,
    how: Tokenizing,
    cache_dir: Path,
    alive: Callable[[], None] = lambda: None,
) -> Dataset:
    """All rows of a file (whose hash is `sha256`) as tokens, from the cache where they have been made before.

    `alive` is called between pieces of the work.

    Raises RunFailed(bad_data) naming file, line, field and remedy of every bad row (the first twenty in full).
    """
    cached = _in_cache(cache_dir, sha256, how)
    if not cached.exists():
        problems = _Problems(name, MAX_PROBLEMS)
        with _unfinished(cached) as unfinished:
            _write_rows(
                unfinished, _token_rows(path, how=how, problems=problems, alive=alive, wrong_too=False)
            )
            if problems.num_problems:
                raise RunFailed(FailureReason.BAD_DATA, str(problems.as_error()))
            unfinished.rename(cached)
    return Dataset.from_file(str(cached))


@dataclass(frozen=True)
class LookedOver:
    """A data file, counted: the rows that can be trained on, and all that is wrong with the others."""

    table: Dataset
    cached: Path  # of the table; what belongs to it lies beside it
    formats: dict[str, int]  # rows by format
    masked: list[int]  # lines of rows that have nothing to learn from
    problems: list[RowProblem]
    num_problems: int


def look_over(
    path: Path, *, sha256: str, name: str, how: Tokenizing, cache_dir: Path, max_problems: int
) -> LookedOver:
    """Tokenise a file as a run would, but go on past rows that are wrong, and tell all of them.

    Of a file without mistakes the tokens are those that a run will find in the cache.
    """
    cached = _in_cache(cache_dir, sha256, how)
    partial, told = cached.with_suffix(".partial.arrow"), cached.with_suffix(".problems.json")
    if not cached.exists() and not (told.exists() and partial.exists()):
        if hash_file(path) != sha256:  # else a run would find tokens of another file under this one's name
            raise RunFailed(FailureReason.BAD_DATA, f"{name}: is not what was uploaded; check the disk")
        problems = _Problems(name, max_problems)
        with _unfinished(cached) as unfinished:
            _write_rows(unfinished, _token_rows(path, how=how, problems=problems, alive=lambda: None))
            if not problems.num_problems:
                unfinished.rename(cached)
            else:
                unfinished.rename(partial)
                # Last: with it the other one is known to be whole.
                with _unfinished(told) as written:
                    written.write_text(problems.to_json())
                    written.rename(told)
    if cached.exists():
        table = Dataset.from_file(str(cached))
        first = Counter[str]()
        next(read_rows(path, name=name, formats=first))  # all are of its format
        return LookedOver(table, cached, dict.fromkeys(first, len(table)), [], [], 0)
    for path in (partial, told):
        os.utime(path)
    kept = json.loads(told.read_text())
    return LookedOver(
        table=Dataset.from_file(str(partial)),
        cached=partial,
        formats=kept["formats"],
        masked=kept["masked"],
        problems=[RowProblem(**problem) for problem in kept["found"]],
        num_problems=kept["num_problems"],
    )


def choose_rows(
    table: Dataset,
    *,
    name: str,
    max_seq_length: int,
    on_overlong: str,
    keep: np.ndarray | None = None,  # bool (num_rows,)
    skip_test_translation: bool = False,
) -> TokenRows:
    """The rows of a table that a run uses: of its part of the split, short enough, with something left to learn."""
    chosen = np.ones(len(table), dtype=bool) if keep is None else keep.copy()
    left_out: dict[str, int] = {}
    if skip_test_translation:
        translations = np.array(
            [is_test_translation(task) for task in column(table, "task_type")], dtype=bool
        )
        left_out["test-case translation"] = int((chosen & translations).sum())
        chosen &= ~translations
    lengths = column(table, "num_tokens").astype(np.int64)
    supervised = column(table, "num_supervised").astype(np.int64)
    overlong = np.flatnonzero(chosen & (lengths > max_seq_length))
    if len(overlong) and on_overlong == "error":
        raise _overlong(table, overlong, lengths, name, max_seq_length)
    if on_overlong == "drop":
        chosen[overlong] = False
        left_out[f"longer than {max_seq_length} tokens"] = len(overlong)
    elif len(overlong):
        supervised, emptied = after_cut(table, overlong, supervised, max_seq_length)
        chosen[emptied] = False
        left_out["nothing to learn from after the cut"] = len(emptied)
        left_out["(cut, not left out)"] = len(overlong) - len(emptied)
    indices = np.flatnonzero(chosen)
    if not len(indices):
        raise RunFailed(FailureReason.BAD_DATA, f"{name}: no row is left to use; left out: {_say(left_out)}")
    return TokenRows(
        table=table.select(indices).with_format("numpy"),
        lengths=np.minimum(lengths[indices], max_seq_length),
        num_supervised=supervised[indices],
        max_length=max_seq_length,
        num_spelling=int((column(table, "num_spelled")[indices] > 0).sum()),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def split_by_hash(table: Dataset, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) as bool masks. A row's side depends on its content alone, so equal rows stay together."""
    validation = column(table, "split_key") < share
    if validation.all() or not validation.any():
        side = "training" if validation.all() else "validation"
        raise RunFailed(
            FailureReason.BAD_SPEC,
            f"validation_split: {share} of {len(table)} rows leaves none for {side}; choose another share, "
            "or give a validation_file",
        )
    return ~validation, validation


def show_mask(rows: TokenRows, tokenizer: Any, *, num_rows: int = 1, max_chars: int = 600) -> list[str]:
    """What is learned, by decoding: the supervised tokens of the first rows, between marks, with a little context."""
    shown = []
    for index in range(min(num_rows, len(rows))):
        ids, supervised = rows.row(index)
        parts, start = [], 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or supervised[end] != supervised[start]:
                text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
                parts.append(f"⟦{text}⟧" if supervised[start] else text)
                start = end
        text = "".join(parts).replace("\n", "⏎")
        shown.append(text if len(text) <= max_chars else text[:max_chars] + "…")
    return shown


# ---------------------------------------------------------------- making the rows


@dataclass
class _Problems:
    """What is wrong with the rows of a file: the first of it in full, all of it counted."""

    name: str
    most: int
    found: list[RowProblem] = field(default_factory=list)
    num_problems: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    masked: list[int] = field(default_factory=list)

    def note(self, problem: RowProblem) -> None:
        self.num_problems += 1
        if problem.message.startswith(NOTHING_TO_LEARN):
            self.masked.append(problem.line)
        if len(self.found) < self.most:
            self.found.append(problem)

    def to_json(self) -> str:
        return json.dumps(
            {
                "num_problems": self.num_problems,
                "formats": dict(self.formats),
                "masked": self.masked,
                "found": [asdict(problem) for problem in self.found],
            }
        )

    def as_error(self) -> RowsInvalid:
        return RowsInvalid(self.name, self.found, self.num_problems)


def _in_cache(cache_dir: Path, sha256: str, how: Tokenizing) -> Path:
    """Where the tokens of a file are kept."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    cached = cache_dir / f"rows-{_cache_key(sha256, how)}.arrow"
    with contextlib.suppress(OSError):
        os.utime(cached)  # in use: what was used longest ago is deleted first
    return cached


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name to write under until the file is whole. What has not been renamed by then goes."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


def _token_rows(
    path: Path,
    *,
    how: Tokenizing,
    problems: _Problems,
    alive: Callable[[], None],
    wrong_too: bool = True,
) -> Iterator[dict[str, Any]]:
    """The rows that can be learned from. With `wrong_too` false none comes after the first mistake."""
    try:
        for chunk in _chunks(
            read_rows(path, name=problems.name, max_problems=problems.most, formats=problems.formats)
        ):
            alive()
            for made in _tokenize_chunk(chunk, how):
                if isinstance(made, RowProblem):
                    problems.note(made)
                elif wrong_too or not problems.num_problems:
                    yield made
    except RowsInvalid as error:  # at the end: of the rows that could not even be read
        if not wrong_too:
            raise RunFailed(FailureReason.BAD_DATA, str(error)) from error
        problems.num_problems += error.num_problems
        problems.found = sorted([*problems.found, *error.problems], key=lambda p: p.line)[: problems.most]


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Some rows at a time. What `rows` raises at its end comes after the last of them."""
    chunk: list[Row] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == _CHUNK_ROWS:
                yield chunk
                chunk = []
    except RowsInvalid:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _tokenize_chunk(chunk: list[Row], how: Tokenizing) -> Iterator[dict[str, Any] | RowProblem]:
    rendered: list[Rendered | RowProblem] = []
    for row in chunk:
        try:
            rendered.append(how.template.render(row, how.train_on))
        except CannotRender as error:
            rendered.append(RowProblem(row.line, error.where, str(error)))
    for row, text, tokens in zip(chunk, rendered, _encode(rendered, how.tokenizer), strict=True):
        if isinstance(text, RowProblem):
            yield text
            continue
        if tokens is None:
            yield RowProblem(
                row.line,
                "messages",
                "spells out a control token of the model, which its tokenizer cannot read as plain text; take it out",
            )
            continue
        ids, supervised = tokens
        learned = int(supervised[1:].sum())
        if not learned:
            yield RowProblem(
                row.line,
                "text" if row.text is not None else "messages",
                f"{NOTHING_TO_LEARN} under this train_on; give it an answer or remove the row",
            )
            continue
        yield {
            "input_ids": ids,
            "supervised": supervised,
            "num_tokens": len(ids),
            "num_supervised": learned,
            "line": row.line,
            "split_key": int(row.digest[:13], 16) / 16**13,
            "task_type": row.task_type or "",
            "num_spelled": len(text.cuts),
        }


def _encode(
    rendered: list[Rendered | RowProblem], tokenizer: Any
) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """(ids, supervised) of each text, None where its control tokens would steer. The text is cut where a span begins or ends, so that a token is never half
    prompt and half answer: the prompt's tokens are then those that generation will start from."""
    texts = [text for text in rendered if isinstance(text, Rendered)]
    pieces = [_pieces(text) for text in texts]
    flat = [piece for of_text in pieces for piece, _ in of_text]
    whole_ids = iter(_ids(tokenizer, [text.text for text in texts]))
    piece_ids = iter(_ids(tokenizer, flat))
    of_pieces = iter(pieces)
    for text in rendered:
        if not isinstance(text, Rendered):
            yield np.empty(0, np.int32), np.empty(0, bool)
            continue
        whole = next(whole_ids)
        parts = [(next(piece_ids), learned) for _, learned in next(of_pieces)]
        if text.add_special_tokens:
            yield _document(text.text, tokenizer)
            continue
        ids = [token for part, _ in parts for token in part]
        if ids != whole and tokenizer.decode(ids) != tokenizer.decode(whole):
            # A tokenizer that marks the beginning of each piece (older SentencePiece): cutting would change the text.
            if text.cuts:
                yield None
                continue
            yield _by_offsets(text, tokenizer)
            continue
        supervised = np.concatenate([np.full(len(part), learned) for part, learned in parts])
        yield np.asarray(ids, np.int32), supervised.astype(bool)


def _pieces(text: Rendered) -> list[tuple[str, bool]]:
    """The text cut at the ends of its spans, and inside control tokens that are none: (piece, is it learned)."""
    pieces, at = [], 0
    for start, end in [*text.spans, (len(text.text), len(text.text))]:
        pieces += _cut(text, at, start, learned=False) + _cut(text, start, end, learned=True)
        at = end
    return pieces


def _cut(text: Rendered, start: int, end: int, *, learned: bool) -> list[tuple[str, bool]]:
    ends = [start, *(at for at in text.cuts if start < at < end), end]
    return [(text.text[a:b], learned) for a, b in pairwise(ends) if b > a]


def _document(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A raw text: all of it is learned, and its end."""
    ids = list(tokenizer(text)["input_ids"])
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        del ids[0]  # the text brings the token that the tokenizer puts before every text: models know it once
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, np.int32), np.ones(len(ids), bool)


def _by_offsets(text: Rendered, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the uncut text; one that lies across the beginning of an answer counts as answer."""
    encoding = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [
        any(start < span_end and end > span_start for span_start, span_end in text.spans)
        for start, end in encoding["offset_mapping"]
    ]
    return np.asarray(encoding["input_ids"], np.int32), np.asarray(supervised, bool)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


# ---------------------------------------------------------------- on disk


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with naming(path), ArrowWriter(features=_COLUMNS, path=str(path)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    pa.ipc.open_stream(str(path)).schema  # noqa: B018  # a file that cannot be opened must not enter the cache


def column(table: Dataset, name: str) -> np.ndarray:
    """A whole column of a table that no rows have been selected from."""
    assert table._indices is None
    return table.data.column(name).to_numpy()  # type: ignore[no-any-return]  # datasets is untyped here


def _cache_key(data_sha256: str, how: Tokenizing) -> str:
    settings = {
        "version": _CACHE_VERSION,
        "data": data_sha256,
        "template": how.template.source,
        "special_tokens": how.template.special_tokens,
        "turn_ends": sorted(how.template.turn_ends),
        "train_on": how.train_on,
        "eos": how.tokenizer.eos_token_id,
        "tokenizer": hashlib.sha256(_tokenizer_text(how.tokenizer).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_text(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


# ---------------------------------------------------------------- overlong rows


def _overlong(
    table: Dataset,
    overlong: np.ndarray,
    lengths: np.ndarray,
    name: str,
    max_seq_length: int,
) -> RunFailed:
    remedy = "raise max_seq_length, shorten the row, or set on_overlong to truncate or drop"
    problems = [
        RowProblem(
            int(table[int(i)]["line"]),
            "row",
            f"has {lengths[i]} tokens, more than max_seq_length {max_seq_length}; {remedy}",
        )
        for i in overlong[:MAX_PROBLEMS]
    ]
    return RunFailed(FailureReason.BAD_DATA, str(RowsInvalid(name, problems, len(overlong))))


def after_cut(
    table: Dataset,
    overlong: np.ndarray,
    supervised: np.ndarray,
    max_seq_length: int,
) -> tuple[np.ndarray, list[int]]:
    """Supervised tokens left in each row after the cut, and the rows that have none left."""
    supervised = supervised.copy()
    start = 0
    for chunk in table.data.column("supervised").chunks:
        here = overlong[(overlong >= start) & (overlong < start + len(chunk))]
        if len(here):
            offsets = chunk.offsets.to_numpy()
            learned = np.concatenate([[0], np.cumsum(chunk.values.to_numpy(zero_copy_only=False))])
            begins = offsets[here - start]
            supervised[here] = learned[begins + max_seq_length] - learned[begins + 1]
        start += len(chunk)
    return supervised, [int(i) for i in overlong if not supervised[i]]


def _say(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none"
