"""Uploaded files: their content under its hash, their records in the database.

A file's row appears after its content is safely on disk, and goes before it. `Server.file_changes` is held
meanwhile, so that a delete never takes the content of an upload of the same bytes.
"""

import asyncio
import os
from datetime import datetime
from pathlib import Path

from sqlalchemy import Text, cast
from sqlmodel import Session, col, delete, func, select

from sftd.rows import FileSummary, RowsInvalid, check_file
from sftd.schemas import File, JobState, Page
from sftd_server.audit import service as audit
from sftd_server.auth import Caller
from sftd_server.disk import fsync
from sftd_server.errors import Conflict, Invalid, NotFound, UnsupportedMedia
from sftd_server.files.upload import Upload
from sftd_server.ids import new_id
from sftd_server.jobs.service import JobInputs
from sftd_server.jobs.states import TERMINAL
from sftd_server.server import Server
from sftd_server.tables import FileRow, JobRow

PURPOSES = ("fine-tune",)
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
    if upload.purpose not in PURPOSES:
        raise Invalid(
            f"purpose: must be {' or '.join(PURPOSES)}, not {upload.purpose[:60]!r}",
            code="invalid_request",
            param="purpose",
        )
    summary = await asyncio.to_thread(_check, upload)
    row = FileRow(
        id=new_id("file"),
        owner=caller.name,
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=upload.bytes,
        sha256=upload.sha256,
        status="processed",
        format=summary.format,
        num_rows=summary.num_rows,
        created_at=server.clock.now(),
    )
    answer = _file(row)
    blob = server.folder.path / server.folder.blob_name(upload.sha256)
    async with server.file_changes:
        await asyncio.to_thread(publish, upload.path, blob)
        try:
            # A row of its own for each run: a session that gives up uses it up.
            await server.db.write(lambda session: _add(session, row))
        except Exception:  # a full disk, say: what nobody can name or delete must not fill it further
            if not await server.db.read(lambda session: _num_files_of(session, upload.sha256)):
                blob.unlink(missing_ok=True)
            raise
    return answer


async def remove(server: Server, file_id: str, caller: Caller) -> None:
    """Delete a file, and its content where no other file has the same. Raises Conflict while a job needs it."""

    def work(session: Session) -> str | None:
        row = _find(session, file_id, lock=True)
        caller.require_owner(row.owner)
        _require_unused(session, row)
        session.exec(delete(FileRow).where(col(FileRow.id) == file_id))
        audit.describe(session, filename=row.filename, owner=row.owner)
        return None if _num_files_of(session, row.sha256) else row.sha256

    async with server.file_changes:
        orphan = await server.db.write(work)
        if orphan:
            path = server.folder.path / server.folder.blob_name(orphan)
            await asyncio.to_thread(path.unlink, missing_ok=True)


async def remove_unused(server: Server, file_id: str) -> bool:
    """Delete a file that no job names.

    All jobs are looked at, behind the lock on the file's row that a post of a job shares: their numbers do not tell which
    of them were there at an earlier look, since other servers may commit a lower number later.
    """

    def work(session: Session) -> str | None:
        row = session.exec(select(FileRow).where(FileRow.id == file_id).with_for_update()).first()
        if row is None:
            return None
        # Its id as text is enough to look for: where that stands in a file's name the file is kept, which harms nobody.
        named = select(JobRow.number).where(cast(col(JobRow.inputs), Text).contains(file_id, autoescape=True))
        if session.exec(named).first() is not None:
            return None
        session.exec(delete(FileRow).where(col(FileRow.id) == file_id))
        why = f"no job has named it for {server.settings.unused_file_days:g} days"
        audit.add_own(
            session,
            server.clock.now(),
            "file.delete",
            file_id,
            filename=row.filename,
            owner=row.owner,
            why=why,
        )
        return row.sha256

    async with server.file_changes:
        gone = await server.db.write(work)
        if gone and not await server.db.read(lambda session: _num_files_of(session, gone)):
            path = server.folder.path / server.folder.blob_name(gone)
            await asyncio.to_thread(path.unlink, missing_ok=True)
    return gone is not None


def file(session: Session, file_id: str) -> File:
    """One file's record."""
    return _file(_find(session, file_id))


def files(session: Session, *, after: str | None, limit: int) -> Page[File]:
    """All files, newest first."""
    query = select(FileRow).order_by(col(FileRow.number).desc()).limit(limit + 1)
    if after is not None:
        query = query.where(col(FileRow.number) < _find(session, after).number)
    rows = session.exec(query).all()
    data = [_file(row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page[File](data=data, has_more=more, next_after=data[-1].id if more else None)


def _check(upload: Upload) -> FileSummary:
    _refuse_containers(upload)
    try:
        return check_file(upload.path, name=upload.filename)
    except RowsInvalid as error:
        raise Invalid(str(error), code="invalid_file", param="file") from None


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


def _add(session: Session, row: FileRow) -> None:
    session.add(FileRow(**row.model_dump()))
    audit.describe(session, filename=row.filename, bytes=row.bytes, sha256=row.sha256, purpose=row.purpose)


def _find(session: Session, file_id: str, *, lock: bool = False) -> FileRow:
    query = select(FileRow).where(FileRow.id == file_id)
    row = session.exec(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"There is no file {file_id!r}; GET /files lists them.", code="unknown_file")
    return row


def _num_files_of(session: Session, sha256: str) -> int:
    return session.exec(select(func.count()).where(FileRow.sha256 == sha256)).one()


def _require_unused(session: Session, row: FileRow) -> None:
    """No job that is not over reads the file."""
    done: list[JobState] = list(TERMINAL)
    for job in session.exec(select(JobRow).where(col(JobRow.state).not_in(done))):
        inputs = JobInputs.model_validate(job.inputs)
        needed = [inputs.training_file, inputs.validation_file]
        if any(input and input.file_id == row.id for input in needed):
            raise Conflict(
                f"{row.id} is needed by {job.id}, which is {job.state}; cancel it or wait for it.",
                code="file_in_use",
            )


def _file(row: FileRow) -> File:
    created_at: datetime = row.created_at
    return File(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        sha256=row.sha256,
        status=row.status,
        format=row.format,
        num_rows=row.num_rows,
        created_at=created_at,
    )
