"""Uploaded files: their content under its hash, their records in the database.

A file's row appears after its content is safely on disk, and goes before it. `Server.file_changes` is held
meanwhile, so that a delete never takes the content of an upload of the same bytes. A file to train on has its rows
checked: before it is taken in, or after that by `checker`, as its `status` tells. A server checks the same content once.
"""

import asyncio
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import Response
from sqlalchemy import Text, cast
from sqlmodel import Session, col, delete, func, select

from sftd.schemas import File, JobState, ManifestFile, Page
from sftd_server.audit import service as audit
from sftd_server.auth import Caller
from sftd_server.cursors import bury, number_of
from sftd_server.db import touch
from sftd_server.disk import fsync
from sftd_server.errors import Conflict, Invalid, NotFound, Unavailable, UnsupportedMedia
from sftd_server.files.checks import CheckFailed
from sftd_server.files.rowcheck import Verdict
from sftd_server.files.upload import Upload
from sftd_server.ids import new_id
from sftd_server.jobs.downloads import plain_file
from sftd_server.jobs.service import JobInputs
from sftd_server.jobs.states import TERMINAL
from sftd_server.server import Server
from sftd_server.tables import FileRow, JobRow

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
CHECKED = ("fine-tune",)  # hold rows to train on
UNCHECKED = "files"  # the topic of files that are to be checked
NOT_CHECKED = (
    "its rows could not be checked"  # so begin the details where the check is to blame, not the file
)
# What a file begins with that is no text. Nothing is ever unpacked here, and nothing unpickled.
_ARCHIVES = {
    b"PK\x03\x04": "zip archive",
    b"PK\x05\x06": "zip archive",
    b"\x1f\x8b": "gzip file",
    b"BZh": "bzip2 file",
    b"\xfd7zXZ\x00": "xz file",
    b"\x28\xb5\x2f\xfd": "zstandard file",
    b"7z\xbc\xaf\x27\x1c": "7z archive",
    b"Rar!": "rar archive",
}
_TAR_AT, _TAR = 257, b"ustar"
_PICKLES = tuple(b"\x80" + bytes([version]) for version in range(2, 6))


async def keep(server: Server, upload: Upload, caller: Caller) -> File:
    """Check an upload and take it in. Raises Invalid with every problem of its rows; then nothing is kept."""
    await asyncio.to_thread(require_takeable, upload)
    verdict = None
    if upload.purpose in CHECKED:
        verdict = await _verdict(server, upload)
        if verdict.problems:
            await drop_unused_marks(server, upload.sha256)
            raise Invalid(verdict.problems_of(upload.filename), code="invalid_file", param="file")
    return await take_in(server, upload, caller.name, verdict)


async def keep_unchecked(server: Server, upload: Upload, caller: Caller) -> File:
    """Take an upload in; its rows are checked later, unless the same content has been checked before."""
    await asyncio.to_thread(require_takeable, upload)
    return await take_in(server, upload, caller.name)


def require_takeable(upload: Upload) -> None:
    """Refuse what can be told at once. Raises Invalid, UnsupportedMedia."""
    require_purpose(upload.purpose)
    if upload.purpose in CHECKED:
        _refuse_containers(upload)


def require_purpose(purpose: str) -> None:
    """Raises Invalid."""
    if purpose not in PURPOSES:
        raise Invalid(
            f"purpose: must be one of {', '.join(PURPOSES)}, not {purpose[:60]!r}",
            code="invalid_request",
            param="purpose",
        )


async def take_in(
    server: Server,
    upload: Upload,
    owner: str,
    verdict: Verdict | None = None,
    then: Callable[[Session, str], None] = lambda session, file_id: None,
) -> File:
    """Put content in its place, and a file on record. `then` is called with its id in the same transaction."""
    now = server.clock.now()
    lifetime = upload.lifetime_seconds
    values = {
        "id": new_id("file"),
        "owner": owner,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "bytes": upload.bytes,
        "sha256": upload.sha256,
        "created_at": now,
        "expires_at": None if lifetime is None else now + timedelta(seconds=lifetime),
    }

    known = server.checks.known(upload.sha256)

    def work(session: Session) -> File:
        row = _recorded(session, values, verdict or known)
        audit.describe(
            session, filename=row.filename, bytes=row.bytes, sha256=row.sha256, purpose=row.purpose
        )
        then(session, row.id)
        return file_of(row)

    blob = server.folder.path / server.folder.blob_name(upload.sha256)
    async with server.file_changes:
        await asyncio.to_thread(publish, upload.path, blob)
        try:
            return await server.db.write(work)
        except Exception:  # a full disk, say: what nobody can name or delete must not fill it further
            if not await server.db.read(lambda session: _num_files_of(session, upload.sha256)):
                blob.unlink(missing_ok=True)
            raise


def columns_of(verdict: Verdict) -> dict[str, Any]:  # of several types
    """What a verdict says in a file's row."""
    return {
        "status": "error" if verdict.problems else "processed",
        "status_details": verdict.problems,
        "format": verdict.format,
        "num_rows": verdict.num_rows,
    }


async def remove(server: Server, file_id: str, caller: Caller) -> None:
    """Delete a file, and its content where no other file has the same. Raises Conflict while a job needs it."""
    now = server.clock.now()

    def work(session: Session) -> str:
        row = _find(session, file_id, lock=True)
        caller.require_owner(row.owner)
        job = _needed_by(session, row)
        if job is not None:
            raise Conflict(
                f"{row.id} is needed by {job.id}, which is {job.state}; cancel it or wait for it.",
                code="file_in_use",
            )
        audit.describe(session, filename=row.filename, owner=row.owner)
        return _delete(session, row, now)

    await _remove(server, work)


async def remove_unused(server: Server, file_id: str) -> bool:
    """Delete a file that no job names.

    All jobs are looked at, behind the lock on the file's row that a post of a job shares: their numbers do not tell which
    of them were there at an earlier look, since other servers may commit a lower number later.
    """
    now = server.clock.now()

    def work(session: Session) -> str | None:
        row = session.exec(select(FileRow).where(FileRow.id == file_id).with_for_update()).first()
        if row is None:
            return None
        # Its id as text is enough to look for: where that stands in a file's name the file is kept, which harms nobody.
        named = select(JobRow.number).where(cast(col(JobRow.inputs), Text).contains(file_id, autoescape=True))
        if session.exec(named).first() is not None:
            return None
        why = f"no job has named it for {server.settings.unused_file_days:g} days"
        _note_own(session, row, why, now)
        return _delete(session, row, now)

    return await _remove(server, work)


async def remove_expired(server: Server, file_id: str) -> bool:
    """Delete a file whose time is up, unless a job that is not over needs it: then it is looked at again."""
    now = server.clock.now()

    def work(session: Session) -> str | None:
        row = session.exec(select(FileRow).where(FileRow.id == file_id).with_for_update()).first()
        if row is None or row.expires_at is None or row.expires_at > now or _needed_by(session, row):
            return None
        _note_own(session, row, "its time was up", now)
        return _delete(session, row, now)

    return await _remove(server, work)


def _note_own(session: Session, row: FileRow, why: str, now: datetime) -> None:
    """The server deletes a file by itself."""
    facts = {"filename": row.filename, "owner": row.owner, "why": why}
    audit.add_own(session, now, "file.delete", row.id, **facts)


def file(session: Session, file_id: str) -> File:
    """One file's record."""
    return file_of(_find(session, file_id))


def files(
    session: Session,
    *,
    after: str | None,
    limit: int,
    purpose: str | None = None,
    oldest_first: bool = False,
) -> Page[File]:
    """All files, newest first. `after` may have been deleted meanwhile."""
    number = col(FileRow.number)
    query = select(FileRow).order_by(number if oldest_first else number.desc()).limit(limit + 1)
    if after is not None:
        last = number_of(session, FileRow, after)
        if last is None:
            raise _unknown(after)
        query = query.where(number > last if oldest_first else number < last)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    rows = session.exec(query).all()
    data = [file_of(row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page[File](data=data, has_more=more, next_after=data[-1].id if more else None)


async def drop_unused_marks(server: Server, sha256: str) -> None:
    """Delete the marks of content that no file has: where one comes just now, they are made anew when they are needed."""
    if not await server.db.read(lambda session: _num_files_of(session, sha256)):
        await asyncio.to_thread(server.checks.marks(sha256).unlink, missing_ok=True)


async def content(server: Server, file_id: str) -> Response:
    """A file as it was uploaded."""
    found = await server.db.read(lambda session: file(session, file_id))
    folder, _, name = server.folder.blob_name(found.sha256).rpartition("/")
    entry = ManifestFile(bytes=found.bytes, sha256=found.sha256)
    return await server.uploads.in_thread(plain_file, server.shelf, folder, name, entry, found.filename)


async def _verdict(server: Server, upload: Upload) -> Verdict:
    known = server.checks.known(upload.sha256)
    if known is not None:
        return known
    try:
        return await server.checks.verdict(upload.path, num_bytes=upload.bytes, sha256=upload.sha256)
    except CheckFailed as error:
        raise Unavailable(
            f"file: the rows of {upload.filename} could not be checked ({error}); try again",
            code="check_failed",
        ) from error


def _recorded(session: Session, values: dict[str, Any], verdict: Verdict | None) -> FileRow:
    """A new row. A fresh one for each run: a session that gives up uses it up."""
    told: dict[str, Any] = {"status": "uploaded", "format": None, "num_rows": None}  # of several types
    if values["purpose"] not in CHECKED:
        told["status"] = "processed"
    else:
        told = told if verdict is None else columns_of(verdict)
    row = FileRow(**values, **told)
    session.add(row)
    session.flush()
    if row.status == "uploaded":
        touch(session, UNCHECKED)
    return row


async def _remove(server: Server, work: Callable[[Session], str | None]) -> bool:
    """Carry a deletion out: the row, and the content where it was the last of it. `work` gives the content's hash."""
    async with server.file_changes:
        gone = await server.db.write(work)
        if gone and not await server.db.read(lambda session: _num_files_of(session, gone)):
            path = server.folder.path / server.folder.blob_name(gone)
            await asyncio.to_thread(path.unlink, missing_ok=True)
            await drop_unused_marks(server, gone)
    return gone is not None


def _delete(session: Session, row: FileRow, now: datetime) -> str:
    session.exec(delete(FileRow).where(col(FileRow.id) == row.id))
    bury(session, row.id, row.number, now)
    return row.sha256


def _refuse_containers(upload: Upload) -> None:
    """Archives and pickles, told by what they begin with: the rows would fail too, but in words that help nobody."""
    with upload.path.open("rb") as file:
        head = file.read(_TAR_AT + len(_TAR))
    kind = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    if kind is None and head[_TAR_AT:] == _TAR:
        kind = "tar archive"
    if kind is not None:
        raise UnsupportedMedia(
            f"file: {upload.filename} is a {kind}; archives are not unpacked here, upload the JSONL or JSON file itself",
            code="archive_refused",
            param="file",
        )
    if head.startswith(_PICKLES):
        raise Invalid(
            f"file: {upload.filename} is a pickle, which could run code; save the rows as JSONL",
            code="invalid_file",
            param="file",
        )


def publish(temporary: Path, blob: Path) -> None:
    """Put the content in its place for good: on disk first, then under its name."""
    blob.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fsync(temporary)
    os.replace(temporary, blob)
    fsync(blob.parent)


def _find(session: Session, file_id: str, *, lock: bool = False) -> FileRow:
    query = select(FileRow).where(FileRow.id == file_id)
    row = session.exec(query.with_for_update() if lock else query).first()
    if row is None:
        raise _unknown(file_id)
    return row


def _unknown(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id!r}; GET /files lists them.", code="unknown_file")


def _num_files_of(session: Session, sha256: str) -> int:
    return session.exec(select(func.count()).where(FileRow.sha256 == sha256)).one()


def _needed_by(session: Session, row: FileRow) -> JobRow | None:
    """A job that is not over and reads the file."""
    done: list[JobState] = list(TERMINAL)
    for job in session.exec(select(JobRow).where(col(JobRow.state).not_in(done))):
        if row.id in {file.file_id for file in JobInputs.model_validate(job.inputs).files.values()}:
            return job
    return None


def file_of(row: FileRow) -> File:
    """A row as it is answered."""
    return File.model_validate(row.model_dump())
