"""How uploaded blobs become a checkpoint or a result, with the layout that a shared folder has: staged, then one rename.

What takes long is done before the write: the files are checked and linked into a stage of the attempt's own. The rename
is part of the write, behind its fence: the job's row is locked then, so no other server can hand the job on between, and
a stale worker never lays its files over those of the attempt after it. A crash between the rename and the commit leaves
files without a row, which the repeated report finds in their place; a row of the same name that an earlier attempt wrote
does not fit them, by its hash, and is not resumed from.
"""

import asyncio
import contextlib
import functools
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlmodel import Session, col, func, select

from sftd.protocol import ArtifactPath, CheckpointReport, Finish
from sftd.schemas import ManifestFile
from sftd_server.artifacts.rights import held
from sftd_server.artifacts.uploads import Uploads
from sftd_server.disk import fsync, hash_of
from sftd_server.errors import Invalid, Unavailable
from sftd_server.server import Server
from sftd_server.tables import CheckpointRow
from sftd_server.workers.leases import Holder, StaleLease, fenced

MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    """What manifest.json must say of the checkpoint that is reported."""

    model_config = ConfigDict(extra="ignore")

    step: int
    files: dict[ArtifactPath, ManifestFile]


class Staged:
    """A folder that is ready beside its place. `is_placed`: it is in its place already."""

    def __init__(self, holder: Holder, target: Path) -> None:
        self.holder = holder
        self.target = target
        self.is_placed = False
        own = f"{target.name}-{holder.attempt}-{secrets.token_hex(4)}"  # the same report may be under way elsewhere
        self.stage = target.parent / f".stage-{own}"
        self.trash = target.parent / f".trash-{own}"

    def put(self, session: Session) -> None:
        """Rename it into its place, where its attempt still has the lease; else whoever writes the row says so. Part of the
        write: the row stays locked until that is done. It may be called again when the write is done anew. Raises
        Unavailable where the stage is gone: nothing is recorded then."""
        try:
            fenced(session, self.holder)
        except StaleLease:
            return
        if self.is_placed:
            return
        if not self.stage.exists():
            raise Unavailable(
                "What was uploaded could not be put in its place; say it again.", code="stage_gone"
            )
        if self.target.exists():
            self.target.rename(self.trash)
        try:
            self.stage.rename(self.target)
        except OSError:
            if self.trash.exists():
                self.trash.rename(self.target)
            raise
        self.is_placed = True
        fsync(self.target.parent)

    def clear(self) -> None:
        """Remove what is left beside the place: of a write that did not happen, or of a server that was killed here."""
        for left in (self.stage, self.trash):
            shutil.rmtree(left, ignore_errors=True)


Put = Callable[[Session], None]


def _nothing(session: Session) -> None:
    """Where there is nothing to put in place."""


@contextlib.asynccontextmanager
async def checkpoint_to_place(server: Server, holder: Holder, report: CheckpointReport) -> AsyncIterator[Put]:
    """Stage an uploaded checkpoint; write its row within, and call what this gives in the same write, behind everything that
    may refuse the report. Raises Invalid naming what is not there."""
    if not report.uploaded or report.corrupt:
        yield _nothing
        return
    hashes = {name: file.sha256 for name, file in report.files.items()}
    hashes[MANIFEST] = report.manifest_sha256
    staged = Staged(holder, _job_folder(server, holder) / "checkpoints" / report.name)

    def stage() -> None:
        _stage_checkpoint(server.uploads, holder, report, hashes, staged)

    may_place = functools.partial(_may_place, holder=holder, report=report)
    async with _staged(server, staged, may_place, stage, hashes) as put:
        yield put


@contextlib.asynccontextmanager
async def result_to_place(server: Server, holder: Holder, word: Finish) -> AsyncIterator[Put]:
    """Stage an uploaded result; write the job's end within, and call what this gives in the same write, before the job
    moves. Raises Invalid naming what is not there."""
    if not word.uploaded or word.state != "succeeded":
        yield _nothing
        return
    hashes = {name: file.sha256 for name, file in word.files.items()}
    staged = Staged(holder, _job_folder(server, holder) / "results")

    def stage() -> None:
        _stage(server.uploads, holder, word.files, hashes, staged)

    async with _staged(
        server, staged, lambda session: held(session, holder) is not None, stage, hashes
    ) as put:
        yield put


@contextlib.asynccontextmanager
async def _staged(
    server: Server,
    staged: Staged,
    may_place: Callable[[Session], bool],
    stage: Callable[[], None],
    hashes: dict[str, str],
) -> AsyncIterator[Put]:
    uploads, job_id = server.uploads, staged.holder.job_id
    with uploads.lock(job_id):
        if await server.db.read(may_place):
            await uploads.in_thread(stage)
            try:
                yield staged.put
            except asyncio.CancelledError:
                raise  # of a server that stops: the write may still be done, and needs the stage; what is left is swept
            except BaseException:
                await uploads.in_thread(staged.clear)
                raise
            await uploads.in_thread(staged.clear)
        else:
            yield _nothing
        await uploads.in_thread(uploads.forget, job_id, set(hashes.values()))


def _may_place(session: Session, holder: Holder, report: CheckpointReport) -> bool:
    """Whether the report can end in a row: else nothing on disk is touched, and the row's own check says why."""
    row = held(session, holder)
    if row is None:
        return False
    here = (CheckpointRow.job == row.number, CheckpointRow.attempt == holder.attempt)
    newest = session.exec(select(func.max(CheckpointRow.step)).where(*here)).one()
    if newest is None or report.step > newest:
        return True
    same = select(CheckpointRow.name).where(*here, CheckpointRow.name == report.name)
    same = same.where(CheckpointRow.manifest_sha256 == report.manifest_sha256)
    return session.exec(same.where(col(CheckpointRow.corrupt).is_(False))).first() is not None


def _stage_checkpoint(
    uploads: Uploads, holder: Holder, report: CheckpointReport, hashes: dict[str, str], staged: Staged
) -> None:
    placed = staged.target / MANIFEST
    is_there = placed.is_file() and hash_of(placed) == report.manifest_sha256
    if is_there and _has_sizes(staged.target, report.files):
        staged.is_placed = True  # the answer to the same report was lost
        return
    manifest = uploads.blob(holder.job_id, report.manifest_sha256)
    if not manifest.is_file():
        raise _missing(MANIFEST, report.manifest_sha256)
    _check_manifest(manifest, report)
    _stage(uploads, holder, report.files, hashes, staged)


def _check_manifest(manifest: Path, report: CheckpointReport) -> None:
    """The manifest says what the report says: a worker verifies a checkpoint by it, and users see the report."""
    try:
        said = _Manifest.model_validate(json.loads(manifest.read_bytes()))
    except (ValueError, ValidationError) as error:
        raise Invalid(
            f"{MANIFEST} is not one of a checkpoint: {str(error).splitlines()[0]}",
            code="wrong_manifest",
            param="manifest_sha256",
        ) from None
    files = {name: file for name, file in report.files.items() if name != MANIFEST}
    if said.step != report.step or said.files != files:
        raise Invalid(
            f"{MANIFEST} names other files, or another step than {report.step}; report what it says.",
            code="wrong_manifest",
            param="files",
        )


def _stage(
    uploads: Uploads, holder: Holder, files: dict[str, ManifestFile], hashes: dict[str, str], staged: Staged
) -> None:
    for name, sha256 in hashes.items():
        blob = uploads.blob(holder.job_id, sha256)
        expected = files[name].bytes if name in files else None
        if not blob.is_file() or expected not in (None, blob.stat().st_size):
            raise _missing(name, sha256)
    parent, stage = staged.target.parent, staged.stage
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, sha256 in hashes.items():
        path = stage / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.link(uploads.blob(holder.job_id, sha256), path)
    for folder in [*(path for path in stage.rglob("*") if path.is_dir()), stage]:
        fsync(folder)
    fsync(parent.parent)


def _has_sizes(target: Path, files: dict[str, ManifestFile]) -> bool:
    try:
        return all((target / name).stat().st_size == file.bytes for name, file in files.items())
    except OSError:
        return False


def _job_folder(server: Server, holder: Holder) -> Path:
    return server.folder.path / server.folder.job_name(holder.job_id)


def _missing(name: str, sha256: str) -> Invalid:
    return Invalid(
        f"{name} has not been uploaded: there is no blob {sha256}; PUT it to /worker/blobs/{sha256}, then say this again.",
        code="blob_missing",
        param=name,
    )
