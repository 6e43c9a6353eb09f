"""Keeps the store in step with what is on record: files, checkpoints and results go there, and what is no longer on record
is removed. It also sweeps uploads that nobody used.

Training never waits for it. What is whole in the store stands in the table `stored`, so that it goes on where it was
after a kill. One server at a time does this (a lock in the data folder); all may run it.
"""

import asyncio
import functools
import hashlib
import io
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar

from sqlmodel import Session, col, delete, select, update

from sftd.schemas import JobState
from sftd_server.artifacts.store import Store, StoreError, WrongContent
from sftd_server.datafolder import open_beneath
from sftd_server.db import DatabaseClosed
from sftd_server.disk import try_lock
from sftd_server.server import Server
from sftd_server.tables import CheckpointRow, FileRow, JobRow, StoredRow

T = TypeVar("T")
V = TypeVar("V", str, int)
MANIFEST = "manifest.json"
MOST_BACKOFF_SECONDS = 60.0
SWEEP_SECONDS = 600.0
LEAVING = -1  # `stored.bytes` of a blob that is being removed
OLD_UPLOAD = timedelta(days=1)
_CHUNK = 500  # values in one IN (…)

log = logging.getLogger("sftd.server")


@dataclass(frozen=True)
class Blob:
    """A file on record. `size` is None where only its hash is."""

    sha256: str
    size: int | None
    folder: str  # relative to the data folder
    name: str  # empty: it is its piece's manifest


@dataclass(frozen=True)
class Piece:
    """What goes to the store together: one uploaded file, checkpoint or result."""

    blobs: tuple[Blob, ...]
    object_name: str | None = None  # of its manifest in the store
    manifest: bytes = b""
    checkpoint: tuple[int, str] | None = None  # (job, name): marked when it is there


class Stopped(Exception):
    """The server is stopping: an upload under way is given up."""


class Mirror:
    """One a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._is_ours: bool | None = None  # None: not known yet whether the store is this installation's
        self._failed_at: dict[str, float] = {}  # blobs that are not what is on record, or gone
        self._results_done: set[int] = set()
        self._swept_at = -SWEEP_SECONDS

    async def run(self) -> None:
        """Mirror and sweep until cancelled. An error is logged and the loop goes on."""
        num_failures = 0
        pause = self._server.settings.mirror_seconds
        try:
            while True:
                await asyncio.sleep(pause)
                try:
                    await self.tick()
                    num_failures = 0
                    pause = self._server.settings.mirror_seconds
                except DatabaseClosed:
                    return
                except Exception as error:
                    if num_failures == 0 or not isinstance(error, StoreError):
                        log.warning("the artifact store: %s; trying on", error, exc_info=not _expected(error))
                    pause = random.uniform(0.5, 1) * min(MOST_BACKOFF_SECONDS, 2.0 ** min(num_failures, 10))
                    num_failures += 1
        finally:
            self._stop.set()

    async def tick(self) -> int:
        """Send what is missing, once through; now and then sweep. Returns how many blobs were sent."""
        lock = try_lock(self._server.folder.path / "locks" / "mirror.lock")
        if lock is None:  # another server is at it
            return 0
        try:
            return await self._tick()
        finally:
            os.close(lock)

    async def _tick(self) -> int:
        now = self._server.clock.monotonic()
        is_time = now - self._swept_at >= SWEEP_SECONDS
        if is_time:
            self._swept_at = now
            await self._server.uploads.in_thread(self._server.uploads.sweep)
        store = self._server.store
        if store is None or not await self._may_use(store):
            return 0
        num_sent = 0
        for piece in await self._server.db.read(self._missing):
            num_sent += await self._send(store, piece)
        if is_time:
            await self.sweep(store)
        return num_sent

    async def _may_use(self, store: Store) -> bool:
        if self._is_ours is None:
            try:
                await self._in_thread(store.claim, self._server.installation_id)
                self._is_ours = True
                await self._in_thread(functools.partial(store.abort_old_uploads, older_than=OLD_UPLOAD))
            except WrongContent as error:
                self._is_ours = False
                log.error("nothing is mirrored: %s", error)
        return self._is_ours

    # ---------------------------------------------------------------- sending

    async def _send(self, store: Store, piece: Piece) -> int:
        num_sent = 0
        if piece.object_name is not None and piece.checkpoint is None:
            await self._in_thread(store.put_object, piece.object_name, piece.manifest)
        known = await self._server.db.read(lambda session: stored_of(session, _hashes(piece.blobs)))
        for blob in piece.blobs:
            if blob.sha256 in known:
                continue
            now = self._server.clock.monotonic()
            if now - self._failed_at.get(blob.sha256, -SWEEP_SECONDS) < SWEEP_SECONDS:
                return num_sent
            try:
                size = await self._in_thread(self._put, store, blob, piece.manifest)
            except (WrongContent, OSError) as error:
                self._failed_at[blob.sha256] = now  # it is looked at again later, and may be back
                log.warning("%s/%s is not mirrored: %s", blob.folder, blob.name, error)
                return num_sent
            await self._server.db.write(functools.partial(self._note, blob.sha256, size))
            known.add(blob.sha256)
            num_sent += 1
        if piece.object_name is not None and piece.checkpoint is not None:
            await self._in_thread(store.put_object, piece.object_name, piece.manifest)
            await self._server.db.write(
                functools.partial(self._mark, *piece.checkpoint, _hashes(piece.blobs))
            )
        return num_sent

    def _put(self, store: Store, blob: Blob, manifest: bytes) -> int:
        if not blob.name:
            store.put_blob(io.BytesIO(manifest), sha256=blob.sha256, size=len(manifest))
            return len(manifest)
        handle = open_beneath(self._server.folder.path / blob.folder, blob.name)
        with open(handle, "rb") as file:
            size = os.fstat(handle).st_size
            if blob.size not in (None, size):
                raise WrongContent(f"it has {size:,} bytes, {blob.size:,} on record")
            content = _Stoppable(file, self._stop)
            store.put_blob(content, sha256=blob.sha256, size=size)
        return size

    def _note(self, sha256: str, size: int, session: Session) -> None:
        session.merge(StoredRow(sha256=sha256, bytes=size, created_at=self._server.clock.now()))

    def _mark(self, job: int, name: str, hashes: set[str], session: Session) -> None:
        if stored_of(session, hashes) != hashes:  # removed meanwhile: the next look sends it again
            return
        session.exec(
            update(CheckpointRow)
            .where(col(CheckpointRow.job) == job, col(CheckpointRow.name) == name)
            .values(mirrored_at=self._server.clock.now())
        )

    # ---------------------------------------------------------------- what is missing

    def _missing(self, session: Session) -> list[Piece]:
        """Everything on record that is not known to be whole in the store, uploaded files first."""
        return [*_files(session), *_checkpoints(session), *self._results(session)]

    def _results(self, session: Session) -> Iterator[Piece]:
        numbers = session.exec(select(JobRow.number).where(JobRow.state == JobState.SUCCEEDED))
        new = [number for number in numbers if number is not None and number not in self._results_done]
        for some in _chunks(new):
            for row in session.exec(select(JobRow).where(col(JobRow.number).in_(some))):
                piece = _result(row)
                if not stored_of(session, _hashes(piece.blobs)) >= _hashes(piece.blobs):
                    yield piece
                elif row.number is not None:
                    self._results_done.add(row.number)

    # ---------------------------------------------------------------- sweeping

    async def sweep(self, store: Store) -> int:
        """Remove blobs that nothing on record refers to, and manifests of what is gone. Returns the number of blobs.

        A blob is marked first and looked at again: what came to refer to it meanwhile is sent anew, never lost.
        """
        db = self._server.db
        unused = await db.read(lambda session: _all_stored(session) - references(session))
        for some in _chunks(sorted(unused)):
            await db.write(functools.partial(_mark_leaving, some))
        wanted_again = unused & await db.read(references) if unused else set()
        for sha256 in sorted(unused):
            if sha256 not in wanted_again:
                await self._in_thread(store.remove_blob, sha256)
            await db.write(functools.partial(_forget, sha256))
        await self._sweep_manifests(store)
        return len(unused) - len(wanted_again)

    async def _sweep_manifests(self, store: Store) -> None:
        db = self._server.db
        listed = await self._in_thread(store.names_below, "manifests")
        known = await db.read(lambda session: set(session.exec(select(JobRow.id))))
        for job_id in sorted(set(listed) - known):
            await self._in_thread(store.remove_objects, f"manifests/{job_id}")
        for number, job_id, name in await db.read(_removed_checkpoints):
            await self._in_thread(store.remove_objects, _object_name(job_id, name))
            await db.write(functools.partial(_unmark, number, name))

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await self._server.uploads.in_thread(work, *arguments)


# ---------------------------------------------------------------- what is on record


def is_safely_stored(session: Session, row: CheckpointRow) -> bool:
    """Whether every file of a checkpoint is whole in the store: then its folder may be removed from the data folder.

    Leave `deleted_at` alone when only the folder goes: what is deleted goes from the store too.
    """
    hashes = {row.manifest_sha256, *(file["sha256"] for file in row.files.values())}
    return row.mirrored_at is not None and stored_of(session, hashes) == hashes


def stored_of(session: Session, hashes: Iterable[str]) -> set[str]:
    """Which of these blobs are whole in the store."""
    found: set[str] = set()
    for some in _chunks(sorted(hashes)):
        query = select(StoredRow.sha256).where(col(StoredRow.sha256).in_(some), col(StoredRow.bytes) >= 0)
        found.update(session.exec(query))
    return found


def references(session: Session) -> set[str]:
    """Hashes of everything that is on record."""
    found = set(session.exec(select(FileRow.sha256)))
    kept = select(CheckpointRow.files, CheckpointRow.manifest_sha256)
    for files, manifest_sha256 in session.exec(kept.where(col(CheckpointRow.deleted_at).is_(None))):
        found.add(manifest_sha256)
        found.update(file["sha256"] for file in files.values())
    for row in session.exec(select(JobRow).where(JobRow.state == JobState.SUCCEEDED)):
        found |= _hashes(_result(row).blobs)
    return found


def _files(session: Session) -> Iterator[Piece]:
    done = select(StoredRow.sha256).where(col(StoredRow.bytes) >= 0)
    query = select(FileRow.sha256, FileRow.bytes).where(col(FileRow.sha256).not_in(done))
    for sha256, size in set(session.exec(query)):
        yield Piece((Blob(sha256, size, f"blobs/sha256/{sha256[:2]}", sha256),))


def _checkpoints(session: Session) -> Iterator[Piece]:
    query = (
        select(CheckpointRow, JobRow.id)
        .join(JobRow, col(JobRow.number) == col(CheckpointRow.job))
        .where(col(CheckpointRow.mirrored_at).is_(None), col(CheckpointRow.deleted_at).is_(None))
        .where(col(CheckpointRow.corrupt).is_(False))
        .order_by(col(CheckpointRow.created_at))
    )
    for row, job_id in session.exec(query):
        folder = f"jobs/{job_id}/checkpoints/{row.name}"
        blobs = [Blob(row.manifest_sha256, None, folder, MANIFEST)]
        blobs += [Blob(file["sha256"], file["bytes"], folder, name) for name, file in row.files.items()]
        told = {"step": row.step, "attempt": row.attempt, "manifest_sha256": row.manifest_sha256}
        yield Piece(
            tuple(blobs),
            _object_name(job_id, row.name),
            _json(job_id=job_id, kind="checkpoint", name=row.name, **told, files=row.files),
            (row.job, row.name),
        )


def _result(row: JobRow) -> Piece:
    """Its manifest is a blob as well: where that is stored, all of the result is."""
    files = row.result or {}
    folder = f"jobs/{row.id}/results"
    manifest = _json(job_id=row.id, kind="result", name="results", files=files)
    blobs = [Blob(file["sha256"], file["bytes"], folder, name) for name, file in files.items()]
    blobs.append(Blob(hashlib.sha256(manifest).hexdigest(), len(manifest), folder, ""))
    return Piece(tuple(blobs), _object_name(row.id, "results"), manifest)


def _removed_checkpoints(session: Session) -> list[tuple[int, str, str]]:
    query = (
        select(CheckpointRow.job, JobRow.id, CheckpointRow.name)
        .join(JobRow, col(JobRow.number) == col(CheckpointRow.job))
        .where(col(CheckpointRow.deleted_at).is_not(None), col(CheckpointRow.mirrored_at).is_not(None))
    )
    return list(session.exec(query))


def _unmark(number: int, name: str, session: Session) -> None:
    session.exec(
        update(CheckpointRow)
        .where(col(CheckpointRow.job) == number, col(CheckpointRow.name) == name)
        .values(mirrored_at=None)
    )


def _all_stored(session: Session) -> set[str]:
    return set(session.exec(select(StoredRow.sha256)))


def _mark_leaving(hashes: list[str], session: Session) -> None:
    session.exec(update(StoredRow).where(col(StoredRow.sha256).in_(hashes)).values(bytes=LEAVING))


def _forget(sha256: str, session: Session) -> None:
    session.exec(delete(StoredRow).where(col(StoredRow.sha256) == sha256))


def _object_name(job_id: str, name: str) -> str:
    return f"manifests/{job_id}/{name}.json"


def _json(**fields: Any) -> bytes:  # JSON values
    return json.dumps(fields, sort_keys=True).encode()


def _hashes(blobs: Iterable[Blob]) -> set[str]:
    return {blob.sha256 for blob in blobs}


def _chunks(values: Sequence[V]) -> Iterator[list[V]]:
    for start in range(0, len(values), _CHUNK):
        yield list(values[start : start + _CHUNK])


# ---------------------------------------------------------------- how


class _Stoppable:
    """A file whose reading ends when the server stops: a large upload must not hold it up."""

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file = file
        self._stop = stop

    def read(self, size: int, /) -> bytes:
        if self._stop.is_set():
            raise Stopped("the server is stopping")
        return self._file.read(size)


def _expected(error: Exception) -> bool:
    return isinstance(error, StoreError | OSError)
