"""Files that the database says are there: uploads, whole checkpoints, results; in the data folder, or in the store."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlmodel import Session, col, select

from sftd.schemas import ManifestFile
from sftd_server.artifacts.store import Store, StoreError, WrongContent, open_store
from sftd_server.datafolder import DataFolder
from sftd_server.disk import hash_of
from sftd_server.settings import Settings
from sftd_server.tables import CheckpointRow, FileRow, JobRow, StoredRow


@dataclass(frozen=True)
class RecordedFile:
    """A file on record. `path` is relative to the data folder."""

    path: str
    bytes: int
    sha256: str
    belongs_to: str  # for a person
    in_store: bool  # it is in the artifact store as well, and need not lie here


def recorded_files(session: Session, folder: DataFolder) -> Iterator[RecordedFile]:
    """All files on record."""
    stored = set(
        session.exec(select(StoredRow.sha256).where(col(StoredRow.bytes) >= 0))
    )  # others are leaving
    seen: set[str] = set()
    for file in session.exec(select(FileRow).order_by(col(FileRow.number))):
        path = folder.blob_name(file.sha256)
        if path not in seen:
            seen.add(path)
            yield RecordedFile(path, file.bytes, file.sha256, f"file {file.id}", file.sha256 in stored)
    kept = (
        select(CheckpointRow, JobRow.id)
        .join(JobRow, col(JobRow.number) == col(CheckpointRow.job))
        .where(col(CheckpointRow.corrupt).is_(False), col(CheckpointRow.deleted_at).is_(None))
        .order_by(col(CheckpointRow.job), col(CheckpointRow.step))
    )
    for checkpoint, job_id in session.exec(kept):
        below = f"{folder.job_name(job_id)}/checkpoints/{checkpoint.name}"
        for name, value in checkpoint.files.items():
            found = ManifestFile.model_validate(value)
            owner = f"job {job_id}, checkpoint of step {checkpoint.step}"
            yield RecordedFile(f"{below}/{name}", found.bytes, found.sha256, owner, found.sha256 in stored)
    for job_id, result in session.exec(select(JobRow.id, JobRow.result).order_by(col(JobRow.number))):
        for name, value in (result or {}).items():
            found = ManifestFile.model_validate(value)
            path = f"{folder.job_name(job_id)}/results/{name}"
            yield RecordedFile(
                path, found.bytes, found.sha256, f"job {job_id}, result", found.sha256 in stored
            )


def only_stored(files: Iterable[RecordedFile], data: Path) -> list[RecordedFile]:
    """Those that are in the artifact store and not below `data`."""
    return [file for file in files if file.in_store and not (data / file.path).exists()]


class StoreCheck:
    """Looks whether files are in the artifact store. One that does not answer is asked once, not for each file."""

    def __init__(self, settings: Settings, *, deep: bool) -> None:
        self._store = open_store(settings)
        self._deep = deep
        self._unknown = "" if self._store else "but SFTD_ARTIFACTS_URL, which says where that is, is not set"

    def fault_of(self, file: RecordedFile) -> str | None:
        """What is wrong with a file that lies there alone; None where nothing is. Deep: its content is read and hashed."""
        try:
            if self._store is not None and not self._unknown:
                return self._look(self._store, file)
        except StoreError as error:
            self._unknown = f"which does not answer: {error}"
        return f"lies only in the artifact store, {self._unknown}"

    def _look(self, store: Store, file: RecordedFile) -> str | None:
        size = store.size(file.sha256)
        if size is None:
            return "is neither there nor in the artifact store"
        if size != file.bytes:
            return f"lies only in the artifact store, and has {size} bytes there, {file.bytes} are on record"
        try:
            for _ in store.pieces(file.sha256, size=size) if self._deep else ():
                pass
        except WrongContent:
            return "lies only in the artifact store, and has another hash there than is on record"
        return None


def fault_of(file: RecordedFile, data: Path, *, deep: bool) -> str | None:
    """What is wrong with a recorded file below `data`; None where nothing is, or where it is `only_stored`. `deep`: its
    content is hashed."""
    path = data / file.path
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"has {size} bytes, {file.bytes} are on record"
        if deep and hash_of(path) != file.sha256:
            return "differs from what is on record: its hash is another"
    except FileNotFoundError:
        return None if file.in_store else "is not there"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
