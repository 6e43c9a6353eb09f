"""Keeps a worker's own data folder from growing for ever: what is not used any more is removed while no job runs here.

Only what can be had again goes by the settings: files that were fetched, tokens that were made of them, folders of jobs
whose last attempt here has told the server everything. Where it has not, nobody else has what the folder holds: it is
kept for `UNDELIVERED_DAYS`. In a folder that is shared with the server the server does this.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftd.protocol import TRAINER_LINES_FILE
from sftd_worker.gpus import Locks
from sftd_worker.registration import NameLock
from sftd_worker.worker import Worker

log = logging.getLogger("sftd.worker")

DELIVERED_FILE = ".delivered"  # in a job's folder: the server has all that the newest attempt there has said
TRAINER_LOCK = ".trainer.lock"
UNDELIVERED_DAYS = 30.0
DAY_SECONDS = 86400.0
_KINDS = ("jobs", "blobs", "cache")
_TRASH = ".trash-"


def mark_delivered(folder: Path) -> None:
    """The server has all that the attempt in this folder has said."""
    with contextlib.suppress(OSError):  # without the mark it is kept for longer
        (folder / DELIVERED_FILE).touch()


def unmark(folder: Path) -> None:
    """An attempt begins in this folder."""
    (folder / DELIVERED_FILE).unlink(missing_ok=True)


def touch(path: Path) -> None:
    """It is in use: what was used longest ago goes first."""
    with contextlib.suppress(OSError):
        os.utime(path)


@dataclass(frozen=True)
class Item:
    """Something that is removed as a whole."""

    path: Path
    used_at: float  # seconds since the epoch
    num_bytes: int
    delivered: bool


class Tidier:
    """Of one worker. `tidy` runs in a thread of its own, whenever it is `due`."""

    def __init__(self, worker: Worker, name: NameLock) -> None:
        self._worker = worker
        self._name = name
        self._next_at = float("-inf")  # monotonic

    @property
    def due(self) -> bool:
        """Is it time, and does no job run?"""
        mine = self._worker.settings.own_data and self._name.held
        return mine and not self._worker.attempt_bells and time.monotonic() >= self._next_at

    def tidy(self) -> None:
        """Look once. A job that starts meanwhile ends it."""
        data = self._worker.settings.data
        self._next_at = time.monotonic() + self._worker.settings.tidy_seconds
        try:
            if not self._is_alone():
                return
            for kind in _KINDS:
                for path in _entries(data, kind):
                    if path.name.startswith(_TRASH):
                        _delete(path)
            self._remove(to_remove(list(items(data)), self._worker, time.time()))
        except OSError as error:
            log.warning("the data folder could not be tidied: %s", error)

    def _is_alone(self) -> bool:
        return _alone(self._worker.settings.data, self._worker.settings.worker_name)

    def _remove(self, unused: list[Item]) -> None:
        num_bytes = 0
        for item in unused:
            with self._worker.files_lock:  # what is gone is gone before the next attempt looks for it
                if self._worker.attempt_bells or self._worker.stops.asked:
                    break
                # An attempt may have come and gone, or another worker begun here, since this was listed.
                if not self._is_alone() or _item(item.path, is_job=item.path.parent.name == "jobs") != item:
                    continue
                trash = _put_away(item.path)
            if trash is not None:
                _delete(trash)
                num_bytes += item.num_bytes
        if num_bytes:
            log.info("removed %s MiB of files that were not used any more", f"{num_bytes / 2**20:,.0f}")


def items(data: Path) -> Iterator[Item]:
    """What an own data folder holds, but for models, keys and locks."""
    for kind in _KINDS:
        for path in _entries(data, kind):
            if not path.name.startswith(_TRASH):
                yield _item(path, is_job=kind == "jobs")


def to_remove(found: list[Item], worker: Worker, now: float) -> list[Item]:
    """What is too old; then, of what the server has, what was used longest ago while there is too much."""
    days, most = worker.settings.own_data_days, worker.settings.own_data_bytes

    def is_old(item: Item) -> bool:
        kept = days if item.delivered else max(days, UNDELIVERED_DAYS)
        return days > 0 and item.used_at < now - kept * DAY_SECONDS

    unused = [item for item in found if is_old(item)]
    left = [item for item in found if item not in unused]
    num_bytes = sum(item.num_bytes for item in left)
    for item in sorted(left, key=lambda item: item.used_at):
        if not most or num_bytes <= most:
            break
        if item.delivered:
            unused.append(item)
            num_bytes -= item.num_bytes
    return unused


def _entries(data: Path, kind: str) -> list[Path]:
    if kind == "blobs":  # they lie in folders by their hash
        return [path for path in (data / kind).rglob("*") if path.is_file()]
    return list((data / kind).glob("*"))


def _item(path: Path, *, is_job: bool) -> Item:
    used_at, delivered = _changed_at(path), True
    if is_job:
        said_at, marked_at = _changed_at(path / TRAINER_LINES_FILE), _changed_at(path / DELIVERED_FILE)
        used_at, delivered = max(used_at, said_at, marked_at), said_at <= marked_at  # a base has neither
    return Item(path, used_at, _num_bytes(path), delivered)


def _changed_at(path: Path) -> float:
    """0 where it is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _num_bytes(path: Path) -> int:
    paths = (
        [path]
        if not path.is_dir()
        else [Path(parent) / name for parent, _, names in os.walk(path) for name in names]
    )
    total = 0
    for file in paths:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def _put_away(path: Path) -> Path | None:
    """Take it out of its place, all at once. None where a trainer still holds it."""
    locks = Locks()
    try:
        if path.is_dir() and (path / TRAINER_LOCK).exists() and not locks.take(path, [TRAINER_LOCK], 1):
            return None
        return path.rename(path.with_name(f"{_TRASH}{path.name}"))
    except FileNotFoundError:
        return None
    finally:
        locks.let_go()


def _delete(trash: Path) -> None:
    if trash.is_dir():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        trash.unlink(missing_ok=True)


def _alone(data: Path, worker_name: str) -> bool:
    """Does no other worker use this folder? Each holds the lock of its name."""
    for lock in (data / "locks").glob("worker-*.lock"):
        if lock.name == f"worker-{worker_name}.lock":
            continue
        locks = Locks()
        if not locks.take(lock.parent, [lock.name], 1):
            return False
        locks.let_go()
    return True
