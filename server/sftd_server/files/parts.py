"""Files that come in parts: announced, sent piece by piece in any order, put together at the end.

A part lies at `uploads/<upload>/<part>` before it is on record, so that sending goes on after a restart. What was not
completed within an hour expires. Nothing is put together in memory: the kernel copies part behind part.
"""

import asyncio
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from weakref import WeakValueDictionary

from fastapi import Request
from sqlmodel import Session, col, delete, func, select, update

from sftd.schemas import File, StorageItem
from sftd_server.auth import Caller
from sftd_server.datafolder import PARTS_PREFIX, FolderLock
from sftd_server.disk import fsync
from sftd_server.errors import Conflict, Invalid, NotFound, TooLarge
from sftd_server.files import store
from sftd_server.files.upload import MAX_PART_BYTES, Upload, label, receive_form
from sftd_server.ids import new_id
from sftd_server.server import Server
from sftd_server.sweep import tree_bytes
from sftd_server.tables import FileRow, UploadPartRow, UploadRow

LIFETIME = timedelta(hours=1)
REMEMBERED = timedelta(days=30)  # a closed upload: whoever completes it again gets the same file
MAX_CLOSED = 1000  # of one owner that are remembered
MAX_OPEN = 32  # of one owner
MAX_OPEN_FILES = 8  # the bytes that they announce together, in files of the largest size
MAX_PARTS = 10_000
MIN_BYTES = 64 * 1024  # of a part, on the average
SPARE_PARTS = 100  # that may be smaller
SPARE_BYTES = 4 * MAX_PART_BYTES  # room for parts that are sent again because an answer was lost
_PIECE = 1024 * 1024
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class Announced:
    """What is going to be sent."""

    filename: str
    purpose: str
    bytes: int
    mime_type: str
    file_lifetime_seconds: int | None


@dataclass(frozen=True)
class Part:
    """A part that has arrived."""

    id: str
    upload_id: str
    bytes: int
    sha256: str
    created_at: datetime


@dataclass(frozen=True)
class PartedUpload:
    """An upload as it stands."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    status: str  # pending, completed, cancelled or expired
    file_lifetime_seconds: int | None
    created_at: datetime
    expires_at: datetime
    file: File | None
    parts: list[Part]


async def create(server: Server, announced: Announced, caller: Caller) -> PartedUpload:
    """Begin an upload. Raises Invalid, TooLarge, Conflict, DiskFull."""
    store.require_purpose(announced.purpose)
    most = server.settings.max_upload_bytes
    if announced.bytes > most:
        raise TooLarge(
            f"bytes: {announced.bytes:,} is larger than the limit of {most:,}; split the file",
            code="too_large",
            param="bytes",
        )
    server.disk.require_room(announced.bytes)
    now, upload_id = server.clock.now(), new_id(PARTS_PREFIX.rstrip("_"))

    def work(session: Session) -> PartedUpload:
        _require_place(session, announced, caller, most, now)
        session.add(
            UploadRow(
                id=upload_id,
                owner=caller.name,
                filename=label(announced.filename),
                purpose=announced.purpose,
                bytes=announced.bytes,
                mime_type=announced.mime_type,
                status="pending",
                file_lifetime_seconds=announced.file_lifetime_seconds,
                created_at=now,
                expires_at=now + LIFETIME,
            )
        )
        session.flush()
        return _look(session, upload_id, now)

    return await server.db.write(work)


async def retrieve(server: Server, upload_id: str, caller: Caller) -> PartedUpload:
    """An upload, with the parts that have arrived: how one goes on that was interrupted."""
    now = server.clock.now()
    return await server.db.read(lambda session: _own(session, upload_id, caller, now))


async def add_part(server: Server, request: Request, upload_id: str, caller: Caller) -> Part:
    """Take one part. It is on disk before it is on record."""
    now = server.clock.now()
    await server.db.read(lambda session: _open_row(session, upload_id, caller, now))
    got = await receive_form(request, server.folder.tmp, file="data", fields=(), max_bytes=MAX_PART_BYTES)
    part = Part(new_id("part"), upload_id, got.bytes, got.sha256, now)
    path = _folder(server, upload_id) / part.id
    try:
        if not got.bytes:
            raise Invalid("data: is empty; send a part of the file", code="invalid_request", param="data")
        await asyncio.to_thread(_place, got.path, path)
        await server.db.write(lambda session: _record_part(session, part, caller, server.clock.now()))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        got.path.unlink(missing_ok=True)
    return part


async def complete(
    server: Server, upload_id: str, part_ids: Sequence[str], md5: str | None, caller: Caller
) -> PartedUpload:
    """Make a file of the parts, in the order given. Asked again it answers the same file."""
    async with _locks.of(server, upload_id):
        now = server.clock.now()
        upload = await server.db.read(lambda session: _own(session, upload_id, caller, now))
        if upload.status == "completed":
            return upload
        _require_open(upload, now)
        parts = _in_order(upload, part_ids)
        server.disk.require_room(upload.bytes)
        # What is being put together does not expire under it.
        await server.db.write(lambda session: _keep_open(session, upload_id, server.clock.now()))
        whole = await server.uploads.in_thread(_put_together, server, upload, parts, md5)
        try:
            await asyncio.to_thread(store.require_takeable, whole)

            def close(session: Session, file_id: str) -> None:
                _close(session, upload_id, "completed", file_id)

            await store.take_in(server, whole, upload.owner, then=close)
        finally:
            whole.path.unlink(missing_ok=True)
    server.in_background(asyncio.to_thread(_clear, _folder(server, upload_id)))
    return await retrieve(server, upload_id, caller)


async def cancel(server: Server, upload_id: str, caller: Caller) -> PartedUpload:
    """Give an upload up; what has arrived of it is deleted. May be repeated."""

    def work(session: Session) -> PartedUpload:
        now = server.clock.now()
        row = _own_row(session, upload_id, caller, lock=True)
        if row.status != "cancelled":
            _require_open(row, now)
            _close(session, upload_id, "cancelled", None)
        return _look(session, upload_id, now)

    cancelled = await server.db.write(work)
    server.in_background(asyncio.to_thread(_clear, _folder(server, upload_id)))
    return cancelled


async def sweep(server: Server, *, dry_run: bool) -> list[StorageItem]:
    """Let uploads expire whose time is up, and delete what lies on disk of those that are not open any more."""
    now = server.clock.now()
    uploads = server.folder.uploads
    # The disk first: an upload has its row before its folder.
    folders = await asyncio.to_thread(lambda: sorted(uploads.glob(f"{PARTS_PREFIX}*")))
    if not dry_run:
        await server.db.write(lambda session: _expire(session, now))
    open_ids = await server.db.read(lambda session: _open_ids(session, now))
    found = []
    for folder in folders:
        if folder.name not in open_ids:
            size = await asyncio.to_thread(tree_bytes, folder)
            why = "its upload is over"
            name = str(folder.relative_to(server.folder.path))
            found.append(StorageItem(kind="leftover", job_id=None, name=name, step=None, bytes=size, why=why))
            if not dry_run:
                await asyncio.to_thread(_clear, folder)
    return found


# ---------------------------------------------------------------- the record


def _look(session: Session, upload_id: str, now: datetime) -> PartedUpload:
    """An upload with all its parts, of which there may be thousands: not for the writer."""
    row = _row(session, upload_id)
    columns = select(UploadPartRow.id, UploadPartRow.bytes, UploadPartRow.sha256, UploadPartRow.created_at)
    here = columns.where(UploadPartRow.upload == upload_id)
    parts = session.exec(here.order_by(col(UploadPartRow.created_at), col(UploadPartRow.id)))
    made = session.exec(select(FileRow).where(FileRow.id == row.file_id)).first() if row.file_id else None
    return PartedUpload(
        id=row.id,
        owner=row.owner,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        status=_status(row, now),
        file_lifetime_seconds=row.file_lifetime_seconds,
        created_at=row.created_at,
        expires_at=row.expires_at,
        file=store.file_of(made) if made else None,
        parts=[Part(part_id, upload_id, size, sha256, at) for part_id, size, sha256, at in parts],
    )


def _own(session: Session, upload_id: str, caller: Caller, now: datetime) -> PartedUpload:
    upload = _look(session, upload_id, now)
    caller.require_owner(upload.owner)
    return upload


def _row(session: Session, upload_id: str, *, lock: bool = False) -> UploadRow:
    query = select(UploadRow).where(UploadRow.id == upload_id)
    row = session.exec(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"There is no upload {upload_id!r}.", code="unknown_upload")
    return row


def _own_row(session: Session, upload_id: str, caller: Caller, *, lock: bool = False) -> UploadRow:
    row = _row(session, upload_id, lock=lock)
    caller.require_owner(row.owner)
    return row


def _open_row(
    session: Session, upload_id: str, caller: Caller, now: datetime, *, lock: bool = False
) -> UploadRow:
    row = _own_row(session, upload_id, caller, lock=lock)
    _require_open(row, now)
    return row


def _status(upload: UploadRow | PartedUpload, now: datetime) -> str:
    return "expired" if upload.status == "pending" and upload.expires_at <= now else upload.status


def _require_open(upload: UploadRow | PartedUpload, now: datetime) -> None:
    status = _status(upload, now)
    if status != "pending":
        raise Conflict(
            f"{upload.id} is {status}; create another upload and send the file there.", code="upload_closed"
        )


def _require_place(session: Session, announced: Announced, caller: Caller, most: int, now: datetime) -> None:
    """An owner has few uploads open at once, and so many bytes."""
    query = select(func.count(), func.coalesce(func.sum(UploadRow.bytes), 0)).where(
        UploadRow.owner == caller.name, UploadRow.status == "pending", col(UploadRow.expires_at) > now
    )
    num_open, num_bytes = session.exec(query).one()
    if num_open >= MAX_OPEN or int(num_bytes) + announced.bytes > MAX_OPEN_FILES * most:
        raise Conflict(
            f"{caller.name} has {num_open} uploads open, of {int(num_bytes):,} bytes together; {MAX_OPEN} of"
            f" {MAX_OPEN_FILES * most:,} bytes may be. Complete or cancel some of them.",
            code="too_many_uploads",
        )


def _record_part(session: Session, part: Part, caller: Caller, now: datetime) -> None:
    upload = _open_row(session, part.upload_id, caller, now, lock=True)
    totals = select(func.count(), func.coalesce(func.sum(UploadPartRow.bytes), 0))
    num_parts, num_bytes = session.exec(totals.where(UploadPartRow.upload == upload.id)).one()
    most = min(MAX_PARTS, SPARE_PARTS + upload.bytes // MIN_BYTES)
    if int(num_bytes) + part.bytes > upload.bytes + SPARE_BYTES or num_parts >= most:
        raise TooLarge(
            f"data: {upload.id} holds {num_parts:,} parts of {int(num_bytes):,} bytes already, and its file has"
            f" {upload.bytes:,}; at most {most:,} parts are taken: cancel it, and send larger parts to another",
            code="too_large",
            param="data",
        )
    session.add(
        UploadPartRow(
            id=part.id,
            upload=part.upload_id,
            bytes=part.bytes,
            sha256=part.sha256,
            created_at=part.created_at,
        )
    )


def _in_order(upload: PartedUpload, part_ids: Sequence[str]) -> list[Part]:
    """The parts to put together. Raises Invalid."""
    known = {part.id: part for part in upload.parts}
    for at, part_id in enumerate(part_ids):
        if part_id not in known:
            raise _invalid(f"part_ids[{at}]", f"{upload.id} has no part {part_id[:80]!r}; send it first")
    if len(set(part_ids)) < len(part_ids):
        raise _invalid("part_ids", "names a part twice; name each once, in the file's order")
    parts = [known[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in parts)
    if total != upload.bytes:
        raise _invalid(
            "part_ids",
            f"these parts have {total:,} bytes, {upload.bytes:,} were announced; name all parts once",
        )
    return parts


def _close(session: Session, upload_id: str, status: str, file_id: str | None) -> None:
    statement = update(UploadRow).where(col(UploadRow.id) == upload_id, col(UploadRow.status) == "pending")
    if session.exec(statement.values(status=status, file_id=file_id)).rowcount != 1:
        raise Conflict(f"{upload_id} has just been closed by another call.", code="upload_closed")
    session.exec(delete(UploadPartRow).where(col(UploadPartRow.upload) == upload_id))


def _keep_open(session: Session, upload_id: str, now: datetime) -> None:
    """For as long again as a new one."""
    is_open = (col(UploadRow.status) == "pending", col(UploadRow.expires_at) > now)
    longer = update(UploadRow).where(col(UploadRow.id) == upload_id, *is_open)
    if session.exec(longer.values(expires_at=now + LIFETIME)).rowcount != 1:
        _require_open(_row(session, upload_id), now)


def _expire(session: Session, now: datetime) -> None:
    late = select(UploadRow.id).where(UploadRow.status == "pending", col(UploadRow.expires_at) <= now)
    for upload_id in session.exec(late.with_for_update()).all():
        _close(session, upload_id, "expired", None)
    old = (col(UploadRow.status) != "pending", col(UploadRow.expires_at) <= now - REMEMBERED)
    session.exec(delete(UploadRow).where(*old))
    newest = func.row_number().over(
        partition_by=col(UploadRow.owner), order_by=[col(UploadRow.created_at).desc(), col(UploadRow.id)]
    )
    closed = select(UploadRow.id, newest.label("nth")).where(UploadRow.status != "pending").subquery()
    too_many = select(closed.c.id).where(closed.c.nth > MAX_CLOSED)
    session.exec(delete(UploadRow).where(col(UploadRow.id).in_(too_many)))


def _open_ids(session: Session, now: datetime) -> set[str]:
    query = select(UploadRow.id).where(UploadRow.status == "pending", col(UploadRow.expires_at) > now)
    return set(session.exec(query))


# ---------------------------------------------------------------- the disk


class _Locks:
    """One completion of an upload at a time: another waits, and finds it done."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()

    def of(self, server: Server, upload_id: str) -> FolderLock:
        # A few files for all uploads: none is left behind for each.
        slot = hashlib.sha256(upload_id.encode()).hexdigest()[:1]
        path = server.folder.path / "locks" / f"upload-{slot}.lock"
        lock = self._held.get(path)
        if lock is None:
            lock = self._held[path] = FolderLock(path, shared=server.db.shared)
        return lock


_locks = _Locks()


def _folder(server: Server, upload_id: str) -> Path:
    return server.folder.uploads / upload_id


def _place(temporary: Path, path: Path) -> None:
    """Put a part in its place for good."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fsync(temporary)
    try:
        os.replace(temporary, path)
        fsync(path.parent)
    except FileNotFoundError:
        raise Conflict(f"{path.parent.name} has just been closed.", code="upload_closed") from None


def _put_together(server: Server, upload: PartedUpload, parts: Sequence[Part], md5: str | None) -> Upload:
    """The parts as one file under a temporary name. Raises Invalid where the md5 is another, Conflict or NotFound where a
    part is not what arrived."""
    handle, name = tempfile.mkstemp(prefix="upload-", dir=server.folder.tmp)
    whole, check = hashlib.sha256(), hashlib.md5(usedforsecurity=False) if md5 else None
    try:
        with os.fdopen(handle, "wb", buffering=0) as target:
            for part in parts:
                path = _folder(server, upload.id) / part.id
                try:
                    with path.open("rb", buffering=0) as source:
                        _hash_part(source.fileno(), part, whole, check)
                        _copy(source.fileno(), target.fileno(), part.bytes)
                except FileNotFoundError:
                    raise NotFound(
                        f"{part.id} is no longer on disk; send it again and complete with its new id.",
                        code="file_gone",
                    ) from None
        if check is not None and md5 is not None and check.hexdigest() != md5.lower():
            raise _invalid(
                "md5",
                f"the parts have {check.hexdigest()}, not {md5[:64]}; look at their order, or send them anew",
            )
    except BaseException:
        os.unlink(name)
        raise
    lifetime = upload.file_lifetime_seconds
    return Upload(Path(name), upload.filename, upload.purpose, upload.bytes, whole.hexdigest(), lifetime)


def _hash_part(source: int, part: Part, whole: "hashlib._Hash", check: "hashlib._Hash | None") -> None:
    own = hashlib.sha256()
    while piece := os.read(source, _PIECE):
        for digest in (own, whole, check):
            if digest is not None:
                digest.update(piece)
    if own.hexdigest() != part.sha256:
        raise Conflict(
            f"{part.id} on disk is not what arrived; send it again and complete with its new id.",
            code="file_changed",
        )
    os.lseek(source, 0, os.SEEK_SET)


def _copy(source: int, target: int, num_bytes: int) -> None:
    """Within the kernel; on file systems that can, without writing anything."""
    left = num_bytes
    while left:
        try:
            done = os.copy_file_range(source, target, left)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            done = os.sendfile(target, source, None, left)
        if not done:
            raise OSError(errno.EIO, "a part became shorter while it was copied")
        left -= done


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what is left is swept later


def _invalid(field: str, message: str) -> Invalid:
    return Invalid(f"{field}: {message}", code="invalid_request", param=field.partition("[")[0])
