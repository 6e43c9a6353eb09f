"""What else grows: spools of finished jobs, uploads that no job names, blobs without a record, the cache.

Each `find_…` says what may go now and deletes nothing; the janitor removes it. Nothing that is missing is an error.
"""

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlmodel import Session, col, func, select

from sftd.protocol import TRAINER_LINES_FILE
from sftd.schemas import StorageItem
from sftd_server.jobs.accounts import is_newest_attempt
from sftd_server.jobs.service import JobInputs
from sftd_server.jobs.states import LEASED, TERMINAL
from sftd_server.sweep import ORPHAN_AGE, tree_bytes
from sftd_server.tables import AttemptRow, CheckpointRow, FileRow, JobRow, StoredRow, StreamRow

RESULTS_PURPOSE = "fine-tune-results"  # of files that jobs made; they go with their jobs
REJECTED_FILE = "logs/rejected.jsonl"
# How far behind a file's time of last use may lag: file systems note reads once a day, if at all. Trainers set the time of
# change of an entry when they begin to use it, so one in use is younger than its job's claim wherever the clocks agree.
ACCESS_LAG = timedelta(hours=25)
_STREAMS = {"step": "metrics", "log": "logs", "run": "events", "evaluation": "events", "notice": "events"}
_BEGIN = re.compile(rb'^\{"type":"(\w+)","attempt":(\d+)[,}]')

log = logging.getLogger("sftd.server")


# ---------------------------------------------------------------- spools


@dataclass(frozen=True)
class Shipped:
    """A job that has been over for long, and how much of each stream the server holds."""

    job_id: str
    next_seq: Mapping[tuple[int, str], int]  # by (attempt, stream)


def finished_jobs(session: Session, *, before: datetime) -> list[Shipped]:
    """Jobs that were over before a moment."""
    jobs = select(JobRow.number, JobRow.id).where(
        col(JobRow.state).in_(TERMINAL), col(JobRow.finished_at) < before
    )
    found = dict(session.exec(jobs).all())
    held: dict[int, dict[tuple[int, str], int]] = {number: {} for number in found if number is not None}
    streams = select(StreamRow.job, StreamRow.attempt, StreamRow.kind, StreamRow.next_seq)
    for number, attempt, kind, next_seq in session.exec(streams):
        if number in held:
            held[number][attempt, kind] = next_seq
    return [Shipped(found[number], next_seq) for number, next_seq in held.items()]


def find_spools(jobs: Path, finished: list[Shipped], unshipped: dict[Path, int]) -> Iterator[StorageItem]:
    """Spools that the server holds every line of, and beside each the lines that it refused.

    `unshipped` are those that it does not, by size: they are not read again, and noted here.
    """
    for job in finished:
        folder = jobs / job.job_id
        spool, rejected = folder / TRAINER_LINES_FILE, folder / REJECTED_FILE
        size = _size(spool)
        if size is None and _size(rejected) is None:
            continue
        if size is not None and unshipped.get(spool) == size:
            continue
        if not is_all_held(spool, rejected, job.next_seq):
            unshipped[spool] = size or 0
            log.warning("%s is kept: it holds lines that never reached the server", spool)
            continue
        for path in (spool, rejected):
            with contextlib.suppress(OSError):
                size = path.lstat().st_size
                yield StorageItem(
                    kind="spool",
                    job_id=job.job_id,
                    name=str(path.relative_to(jobs.parent)),
                    step=None,
                    bytes=size,
                    why="its job has long been over",
                )


def is_all_held(spool: Path, rejected: Path, next_seq: Mapping[tuple[int, str], int]) -> bool:
    """Whether every line of a spool was acknowledged, or refused and set down in `rejected`."""
    told: Counter[tuple[int, str]] = Counter()
    for type, attempt in _lines(spool):
        if type in _STREAMS:
            told[attempt, _STREAMS[type]] += 1
    missing: Counter[str] = Counter()
    for (attempt, stream), count in told.items():
        missing[stream] += max(0, count - next_seq.get((attempt, stream), 0))
    if not missing.total():
        return True
    refused = Counter(_refused(rejected))
    return all(count <= refused[stream] for stream, count in missing.items())


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _lines(spool: Path) -> Iterator[tuple[str, int]]:
    """(type, attempt) of each whole line. A line that a kill has torn says nothing."""
    try:
        with spool.open("rb") as file:
            for line in file:
                found = _BEGIN.match(line)
                if found and line.endswith(b"}\n"):
                    yield found[1].decode(), int(found[2])
                    continue
                with contextlib.suppress(ValueError, KeyError, TypeError):  # another writer's, or torn
                    told = json.loads(line)
                    yield str(told["type"]), int(told["attempt"])
    except FileNotFoundError:
        return


def _refused(rejected: Path) -> Iterator[str]:
    try:
        with rejected.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    kind = str(json.loads(line)["kind"])
                    yield _STREAMS.get(kind, kind)
    except FileNotFoundError:
        return


# ---------------------------------------------------------------- uploads and blobs


def find_unused_files(session: Session, *, before: datetime) -> list[StorageItem]:
    """Uploads from before a moment that no job names, nor has made."""
    named = set()
    for inputs in session.exec(select(JobRow.inputs)):
        found = JobInputs.model_validate(inputs)
        named |= {file.file_id for file in (found.training_file, found.validation_file) if file}
    query = select(FileRow).where(col(FileRow.created_at) < before, FileRow.purpose != RESULTS_PURPOSE)
    rows = session.exec(query.order_by(col(FileRow.number)))
    return [
        StorageItem(
            kind="file", job_id=None, name=row.id, step=None, bytes=row.bytes, why="no job has named it"
        )
        for row in rows
        if row.id not in named
    ]


def find_expired_files(session: Session, *, now: datetime) -> list[StorageItem]:
    """Files whose time is up, but for those that a job that is not over needs."""
    needed = set()
    for inputs in session.exec(select(JobRow.inputs).where(col(JobRow.state).not_in(list(TERMINAL)))):
        needed |= {file.file_id for file in JobInputs.model_validate(inputs).files.values()}
    due = select(FileRow).where(col(FileRow.expires_at) <= now).order_by(col(FileRow.number))
    return [
        StorageItem(kind="file", job_id=None, name=row.id, step=None, bytes=row.bytes, why="its time was up")
        for row in session.exec(due)
        if row.id not in needed
    ]


def blobs_on_record(session: Session) -> set[str]:
    """Hashes of everything that a row names: uploads, inputs, checkpoints, results, and what is in a store."""
    found = set(session.exec(select(FileRow.sha256))) | set(session.exec(select(StoredRow.sha256)))
    waiting = select(JobRow.inputs).where(col(JobRow.state).not_in(list(TERMINAL)))
    for job_inputs in session.exec(waiting):
        inputs = JobInputs.model_validate(job_inputs)
        found |= {file.sha256 for file in (inputs.training_file, inputs.validation_file) if file}
    live = select(CheckpointRow.files, CheckpointRow.manifest_sha256)
    for files, manifest_sha256 in session.exec(live.where(col(CheckpointRow.deleted_at).is_(None))):
        found |= {manifest_sha256, *(str(file["sha256"]) for file in files.values())}
    for result in session.exec(select(JobRow.result).where(col(JobRow.result).is_not(None))):
        found |= {str(file["sha256"]) for file in (result or {}).values()}
    return found


def find_orphan_blobs(data: Path, on_record: set[str], *, now: datetime) -> Iterator[StorageItem]:
    """Blobs that no row names, for a day at least: what a crash left between a file and its row."""
    for path in sorted((data / "blobs" / "sha256").glob("??/*")):
        if path.name not in on_record and is_orphan_age(path, now):
            yield StorageItem(
                kind="blob",
                job_id=None,
                name=str(path.relative_to(data)),
                step=None,
                bytes=tree_bytes(path),
                why="no record names it",
            )


def is_orphan_age(path: Path, now: datetime) -> bool:
    """Whether a file is a day old."""
    try:
        return path.lstat().st_mtime < (now - ORPHAN_AGE).timestamp()
    except OSError:
        return False


# ---------------------------------------------------------------- the cache


def cache_needed_since(session: Session, now: datetime) -> datetime:
    """What of the cache was used since then may be in use now."""
    query = (
        select(func.min(AttemptRow.claimed_at))
        .join(JobRow, is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED))
    )
    earliest = session.exec(query).one()
    return (earliest or now) - ACCESS_LAG


def find_cached(cache: Path, *, max_bytes: int, needed_since: datetime) -> Iterator[StorageItem]:
    """What was used longest ago, until the rest is below the limit."""
    entries = []
    with contextlib.suppress(OSError):
        for path in cache.iterdir():
            entries.append((last_use(path), path, tree_bytes(path)))
    total = sum(size for _, _, size in entries)
    for used_at, path, size in sorted(entries):
        if total <= max_bytes or used_at >= needed_since.timestamp():
            return
        total -= size
        yield StorageItem(
            kind="cache",
            job_id=None,
            name=f"cache/{path.name}",
            step=None,
            bytes=size,
            why="used longest ago",
        )


def last_use(path: Path) -> float:
    """When a file, or anything in a folder, was last read or written: seconds since the epoch."""
    used = 0.0
    with contextlib.suppress(OSError):
        found = path.lstat()
        used = max(found.st_atime, found.st_mtime)
        if path.is_dir() and not path.is_symlink():
            # A folder's own time of access is no use of it: whoever measures it reads it.
            used = found.st_mtime
            for folder, _, names in os.walk(path):
                for name in names:
                    with contextlib.suppress(OSError):
                        inner = os.lstat(os.path.join(folder, name))
                        used = max(used, inner.st_atime, inner.st_mtime)
    return used
