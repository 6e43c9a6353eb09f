"""Taking folders of jobs off the disk, and finding those that a crash has left behind.

A checkpoint's folder is renamed first and deleted then. Its name may come again, when a job goes on from before it: so
what was renamed must be what was meant, by the hash of its manifest, else it is put back.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import select as columns
from sqlmodel import Session, col, select

from sftd.schemas import StorageItem
from sftd_server.jobs.states import TERMINAL
from sftd_server.tables import CheckpointRow, JobRow

MANIFEST = "manifest.json"
TRASH = ".trash-gc-"  # ours; a trainer's own begin with .trash- alone
LOCK = ".trainer.lock"  # held by a trainer for its life
ORPHAN_AGE = timedelta(days=1)

log = logging.getLogger("sftd.server")


@dataclass(frozen=True)
class Record:
    """What the database says of a checkpoint's folder."""

    manifest_sha256: str
    deleted: bool
    corrupt: bool


@dataclass(frozen=True)
class Known:
    """What it says of a job."""

    is_over: bool
    checkpoints: Mapping[str, Record]


def known_jobs(session: Session) -> dict[str, Known]:
    """All jobs, by id. Read this before looking at the disk."""
    jobs: dict[int | None, tuple[str, bool]] = {
        number: (id, state in TERMINAL)
        for number, id, state in session.exec(select(JobRow.number, JobRow.id, JobRow.state))
    }
    records: dict[int | None, dict[str, Record]] = {number: {} for number in jobs}
    rows = columns(
        col(CheckpointRow.job),
        col(CheckpointRow.name),
        col(CheckpointRow.manifest_sha256),
        col(CheckpointRow.deleted_at).is_not(None),
        col(CheckpointRow.corrupt),
    )
    for number, name, manifest_sha256, deleted, corrupt in session.execute(rows):
        if number in records:
            records[number][name] = Record(manifest_sha256, bool(deleted), corrupt)
    return {id: Known(is_over, records[number]) for number, (id, is_over) in jobs.items()}


def remove_checkpoint(job: Path, name: str, *, manifest_sha256: str | None) -> bool:
    """Delete a checkpoint's folder if it is the one with this manifest; None: whatever it holds.

    True: it is gone, or was not there.
    """
    folder = job / "checkpoints"
    if folder.is_symlink():
        log.warning("%s is a link and is not followed: nothing is deleted there", folder)
        return False
    path, trash = folder / name, folder / f"{TRASH}{secrets.token_hex(4)}-{name}"
    if not path.is_dir():
        return True
    if manifest_sha256 is not None and _manifest_of(path) != manifest_sha256:
        return False
    try:
        path.rename(trash)
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)
        return False
    if manifest_sha256 is not None and _manifest_of(trash) != manifest_sha256:
        _put_back(trash, path)  # the trainer has just put another in its place
        return False
    return _delete(trash)


def leftovers(jobs: Path, known: Mapping[str, Known], *, now: datetime) -> Iterator[StorageItem]:
    """What nobody needs any more in the jobs' folders. Folders of jobs that are not on record are left alone."""
    for job in _entries(jobs):
        if job.name.startswith(".trash-") and _is_folder(job) and _is_older(job, now - ORPHAN_AGE):
            yield _leftover(job, jobs.parent, None, "its job was deleted")
        facts = known.get(job.name)
        if facts is None or not _is_folder(job):
            continue
        idle = facts.is_over and not _is_locked(job)
        found = [*_of_job(job, idle=idle), *_of_checkpoints(job, facts, idle=idle, now=now)]
        for path, why in found:
            yield _leftover(path, jobs.parent, job.name, why)


def remove_leftover(data: Path, item: StorageItem, known: Mapping[str, Known]) -> bool:
    """Delete one of `leftovers`. False: it was not what it seemed, or could not be deleted."""
    path = data / item.name
    if item.job_id is None:
        return _delete(path)
    facts = known.get(item.job_id)
    if facts is None:
        return False
    if path.name.startswith(TRASH):
        name = path.name.removeprefix(TRASH).partition("-")[2]
        record = facts.checkpoints.get(name)
        if record and not record.deleted and _manifest_of(path) == record.manifest_sha256:
            _put_back(path, path.parent / name)  # a crash came between taking it and putting it back
            return False
        return _delete(path)
    record = facts.checkpoints.get(path.name)
    if path.parent.name == "checkpoints" and not path.name.startswith("."):
        wanted = None if record is None or facts.is_over else record.manifest_sha256
        return remove_checkpoint(path.parent.parent, path.name, manifest_sha256=wanted)
    return _delete(path)


def _leftover(path: Path, data: Path, job_id: str | None, why: str) -> StorageItem:
    name = str(path.relative_to(data))
    return StorageItem(kind="leftover", job_id=job_id, name=name, step=None, bytes=tree_bytes(path), why=why)


def _of_job(job: Path, *, idle: bool) -> Iterator[tuple[Path, str]]:
    for path in _entries(job) if idle else ():
        if path.name.startswith((".stage-", ".trash-")) and _is_folder(path):
            yield path, "half written or half deleted"


def _of_checkpoints(job: Path, facts: Known, *, idle: bool, now: datetime) -> Iterator[tuple[Path, str]]:
    for path in _entries(job / "checkpoints"):
        record = facts.checkpoints.get(path.name)
        if not _is_folder(path):
            continue
        if path.name.startswith(TRASH):
            yield path, "half deleted"
        elif path.name.startswith("."):
            if idle and path.name.startswith((".stage-", ".trash-")):
                yield path, "half written or half deleted"
        elif record is None:
            if idle and _is_older(path, now - ORPHAN_AGE):
                yield path, "never reported, and its job is over"
        elif record.deleted and (idle or _manifest_of(path) == record.manifest_sha256):
            yield path, "deleted on record"


# ---------------------------------------------------------------- the disk


def tree_bytes(path: Path) -> int:
    """Bytes of all plain files below a path, or of the file itself; links are not followed."""
    total = 0
    with contextlib.suppress(OSError):
        if not _is_folder(path):
            return path.lstat().st_size
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _entries(folder: Path) -> list[Path]:
    if folder.is_symlink():
        return []
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_older(path: Path, moment: datetime) -> bool:
    try:
        return path.stat().st_mtime < moment.timestamp()
    except OSError:
        return False


def _is_locked(job: Path) -> bool:
    """Whether a trainer of this machine still works in the folder, as one whose worker hangs may."""
    try:
        handle = os.open(job / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _manifest_of(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _put_back(trash: Path, path: Path) -> None:
    with contextlib.suppress(OSError):  # there is one again already: then this one is the older
        trash.rename(path)


def _delete(path: Path) -> bool:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("%s could not be deleted whole; it is tried again later", path)
        return False
    return True
