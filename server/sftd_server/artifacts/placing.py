"""How uploaded blobs become a checkpoint or a result, with the layout that a shared folder has: staged, then one rename.

The lease is looked at again under the job's lock, and the row is written under it: so a stale worker never lays its
files over those of the attempt after it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlmodel import Session, col, func, select

from sftd.protocol import ArtifactPath, CheckpointReport, Finish
from sftd.schemas import ManifestFile
from sftd_server.artifacts.rights import held
from sftd_server.artifacts.uploads import Uploads
from sftd_server.disk import fsync, hash_of
from sftd_server.errors import Invalid
from sftd_server.server import Server
from sftd_server.tables import CheckpointRow
from sftd_server.workers.leases import Holder

MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    """What manifest.json must say of the checkpoint that is reported."""

    model_config = ConfigDict(extra="ignore")

    step: int
    files: dict[ArtifactPath, ManifestFile]


@contextlib.asynccontextmanager
async def checkpoint_in_place(
    server: Server, holder: Holder, report: CheckpointReport
) -> AsyncIterator[None]:
    """Put an uploaded checkpoint in its place; write its row within. Raises Invalid naming what is not there."""
    if not report.uploaded or report.corrupt:
        yield
        return
    uploads = server.uploads
    with uploads.lock(holder.job_id):
        if await server.db.read(lambda session: _may_place(session, holder, report)):
            target = _job_folder(server, holder) / "checkpoints" / report.name
            hashes = {name: file.sha256 for name, file in report.files.items()}
            hashes[MANIFEST] = report.manifest_sha256
            await uploads.in_thread(_place_checkpoint, uploads, holder, report, hashes, target)
        yield
        await uploads.in_thread(
            uploads.forget,
            holder.job_id,
            {report.manifest_sha256, *(file.sha256 for file in report.files.values())},
        )


@contextlib.asynccontextmanager
async def result_in_place(server: Server, holder: Holder, word: Finish) -> AsyncIterator[None]:
    """Put an uploaded result in its place; write the job's end within. Raises Invalid naming what is not there."""
    if not word.uploaded or word.state != "succeeded":
        yield
        return
    uploads = server.uploads
    hashes = {name: file.sha256 for name, file in word.files.items()}
    with uploads.lock(holder.job_id):
        if await server.db.read(lambda session: held(session, holder)) is not None:
            target = _job_folder(server, holder) / "results"
            await uploads.in_thread(_place, uploads, holder, word.files, hashes, target)
        yield
        await uploads.in_thread(uploads.forget, holder.job_id, set(hashes.values()))


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


def _place_checkpoint(
    uploads: Uploads, holder: Holder, report: CheckpointReport, hashes: dict[str, str], target: Path
) -> None:
    placed = target / MANIFEST
    if placed.is_file() and hash_of(placed) == report.manifest_sha256 and _has_sizes(target, report.files):
        return  # the answer to the same report was lost
    manifest = uploads.blob(holder.job_id, report.manifest_sha256)
    if not manifest.is_file():
        raise _missing(MANIFEST, report.manifest_sha256)
    _check_manifest(manifest, report)
    _place(uploads, holder, report.files, hashes, target)


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


def _place(
    uploads: Uploads, holder: Holder, files: dict[str, ManifestFile], hashes: dict[str, str], target: Path
) -> None:
    for name, sha256 in hashes.items():
        blob = uploads.blob(holder.job_id, sha256)
        expected = files[name].bytes if name in files else None
        if not blob.is_file() or expected not in (None, blob.stat().st_size):
            raise _missing(name, sha256)
    parent = target.parent
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    stage, trash = parent / f".stage-{target.name}-{holder.attempt}", parent / f".trash-{target.name}"
    for left in (stage, trash):  # of a server that was killed here
        shutil.rmtree(left, ignore_errors=True)
    for name, sha256 in hashes.items():
        path = stage / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.link(uploads.blob(holder.job_id, sha256), path)
    for folder in [*(path for path in stage.rglob("*") if path.is_dir()), stage]:
        fsync(folder)
    if target.exists():
        target.rename(trash)
    stage.rename(target)
    fsync(parent)
    fsync(parent.parent)
    shutil.rmtree(trash, ignore_errors=True)


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
