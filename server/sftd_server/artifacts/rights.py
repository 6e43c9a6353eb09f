"""What a lease gives a right to read and to send: the files that its job reads, by their records alone.

Everything here runs on a connection that cannot write.
"""

from dataclasses import dataclass
from typing import Literal

from sqlmodel import Session, col, select

from sftd.schemas import ManifestFile
from sftd_server.errors import NotFound
from sftd_server.jobs.queries import StoredFiles, whole_checkpoints
from sftd_server.jobs.service import JobInputs
from sftd_server.jobs.states import LEASED
from sftd_server.tables import CheckpointRow, JobRow
from sftd_server.workers.leases import Holder, StaleLease

Kind = Literal["checkpoints", "results"]
RESULTS = "results"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Readable:
    """A checkpoint or result on record, and the hash of its manifest.json where it has one."""

    stored: StoredFiles
    manifest_sha256: str | None


def held(session: Session, holder: Holder) -> JobRow | None:
    """The job, if this holder has its lease. A look for reading: `leases.fenced` is what writes begin with."""
    query = select(JobRow).where(
        JobRow.id == holder.job_id,
        JobRow.attempt == holder.attempt,
        JobRow.token_sha256 == holder.token_sha256,
        col(JobRow.state).in_(LEASED),
    )
    return session.exec(query).first()


def require_held(session: Session, holder: Holder) -> JobRow:
    """The job of a lease. Raises StaleLease."""
    row = held(session, holder)
    if row is None:
        raise StaleLease
    return row


def input_file(session: Session, holder: Holder, sha256: str) -> StoredFiles:
    """A file that the job reads, by its hash: a manifest of one. Raises StaleLease, NotFound."""
    inputs = JobInputs.model_validate(require_held(session, holder).inputs)
    for file in (inputs.training_file, inputs.validation_file):
        if file is not None and file.sha256 == sha256:
            folder, _, name = file.path.rpartition("/")
            return StoredFiles(folder, {name: ManifestFile(bytes=file.bytes, sha256=file.sha256)})
    raise NotFound(f"{holder.job_id} reads no file of hash {sha256[:80]!r}.", code="unknown_file")


def readable(session: Session, holder: Holder, kind: Kind, name: str, of: str | None) -> Readable:
    """A checkpoint or result that the job may read: its own, and those that it begins from. Raises NotFound."""
    row = require_held(session, holder)
    source = row if of in (None, row.id) else _source(session, row, kind, name, of)
    found = _on_record(session, source, kind, name) if source is not None else None
    if found is None:
        raise NotFound(
            f"{holder.job_id} reads no {kind}/{name[:80]} of {(of or holder.job_id)[:80]}.",
            code="unknown_checkpoint",
        )
    return found


def recorded_as(session: Session, row: JobRow, sha256: str, size: int) -> list[str]:
    """Paths, relative to the data folder, under which this job has a file of that hash on record already."""
    return [
        f"jobs/{row.id}/checkpoints/{found.name}/{name}"
        for found in whole_checkpoints(session, row.number)
        for name, file in found.files.items()
        if file["sha256"] == sha256 and file["bytes"] == size
    ]


def _source(session: Session, row: JobRow, kind: Kind, name: str, of: str) -> JobRow | None:
    other = session.exec(select(JobRow).where(JobRow.id == of)).first()
    if other is None:
        return None
    if kind == "checkpoints" and other.number == row.seed_job:
        return other
    base = JobInputs.model_validate(row.inputs).base
    path = f"jobs/{of}/results" if kind == RESULTS else f"jobs/{of}/checkpoints/{name}"
    return other if base is not None and path in (base.path, base.base_model) else None


def _on_record(session: Session, row: JobRow, kind: Kind, name: str) -> Readable | None:
    if kind == RESULTS:
        if name != RESULTS or not row.result:
            return None
        return Readable(StoredFiles(f"jobs/{row.id}/results", _manifest(row.result)), None)
    found = session.exec(
        select(CheckpointRow).where(CheckpointRow.job == row.number, CheckpointRow.name == name)
    ).first()
    if found is None or found.corrupt or found.deleted_at is not None:
        return None
    folder = f"jobs/{row.id}/checkpoints/{found.name}"
    return Readable(StoredFiles(folder, _manifest(found.files)), found.manifest_sha256)


def _manifest(files: dict[str, dict[str, object]]) -> dict[str, ManifestFile]:
    return {name: ManifestFile.model_validate(file) for name, file in files.items()}


def no_such_file(name: str) -> NotFound:
    """What to answer where a manifest does not have a name."""
    return NotFound(f"There is no file {name[:200]!r} in this manifest.", code="unknown_file")
