"""What an attempt reads, verified before any device is used: input files, the base model, the checkpoint to resume from.

`prepare` turns a lease into the trainer's `job.json`. Nothing outside the data folder and the allowed model roots is
ever handed to a trainer.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from sftd.protocol import (
    TRAINER_JOB_FILE,
    ArtifactPath,
    BaseRef,
    CheckpointRef,
    CheckpointReport,
    InputFile,
    Lease,
    TrainerJob,
)
from sftd.schemas import FailureReason, ManifestFile
from sftd_worker.disk import is_full, naming
from sftd_worker.settings import WorkerSettings

if TYPE_CHECKING:  # which imports this module
    from sftd_worker.transfer import Transfer

MANIFEST = "manifest.json"
CHUNK_BYTES = 4 * 1024 * 1024

Check = Callable[[], None]  # called between pieces of long work; raises when the work is not wanted any more


class PrepareFailed(Exception):
    """The attempt cannot start: why, and what to do."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Manifest(BaseModel):
    """manifest.json of a checkpoint: what it holds. A folder without one is not a checkpoint."""

    model_config = ConfigDict(extra="ignore")

    step: int
    files: dict[ArtifactPath, ManifestFile]


@dataclass(frozen=True)
class Prepared:
    """A job that can start, and what was found on the way."""

    job: TrainerJob
    corrupt: list[CheckpointReport] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    base_sha256: str | None = None  # of a base model in a folder that no job has made


def job_folder(data: Path, lease: Lease) -> Path:
    """The job's folder, made if it is not there."""
    folder = below(data, lease.folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder


def prepare(
    lease: Lease, settings: WorkerSettings, *, check: Check, transfer: "Transfer | None" = None
) -> Prepared:
    """Bring what is missing, and verify everything the job reads. Raises PrepareFailed."""
    data = settings.data
    folder = job_folder(data, lease)
    if transfer is not None:
        _bring(lease, transfer, check)
    training = _verified_input(data, lease.training_file, check)
    validation = _verified_input(data, lease.validation_file, check) if lease.validation_file else None
    model, adapter = base_paths(lease.spec.base_model, lease.base, settings)
    base_sha256 = _same_model(Path(model), lease, check) if _is_own_folder(model, data) else None
    resume_from, corrupt, notices = _checkpoint(lease, data, check, transfer)
    job = TrainerJob(
        job_id=lease.job_id,
        attempt=lease.attempt,
        spec=lease.spec,
        model_path=model,
        adapter_path=adapter,
        training_path=str(training),
        training_name=lease.training_file.filename,
        validation_path=str(validation) if validation else None,
        validation_name=lease.validation_file.filename if lease.validation_file else None,
        output_dir=str(folder),
        cache_dir=str(data / "cache"),
        resume_from=str(resume_from) if resume_from else None,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        local_files_only=settings.offline,
        # The same in every attempt, so that a resumed job goes on in the same W&B run.
        wandb_run_id=lease.job_id if lease.spec.wandb else None,
    )
    return Prepared(job, corrupt, notices, base_sha256)


def write_job(job: TrainerJob) -> None:
    """Write job.json whole or not at all."""
    folder = Path(job.output_dir)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".job-")
    with naming(folder), os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(job.model_dump_json(indent=2))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / TRAINER_JOB_FILE)


def _bring(lease: Lease, transfer: "Transfer", check: Check) -> None:
    for file in (lease.training_file, lease.validation_file):
        if file is not None:
            transfer.bring_input(file, check)
    if lease.base is not None:
        for path in dict.fromkeys([lease.base.path, lease.base.base_model]):
            transfer.bring_base(path, check)


# ---------------------------------------------------------------- input files


def _verified_input(data: Path, file: InputFile, check: Check) -> Path:
    path = below(data, file.path)
    try:
        size, sha256 = path.stat().st_size, _sha256(path, check)
    except OSError as error:
        raise PrepareFailed(
            FailureReason.WORKER_ERROR,
            f"{file.filename} ({file.file_id}) cannot be read on the worker: {error.strerror or error}. Check that"
            " worker and server share the data folder.",
        ) from error
    if size != file.bytes or sha256 != file.sha256:
        raise PrepareFailed(
            FailureReason.WORKER_ERROR,
            f"{file.filename} ({file.file_id}) is not what was uploaded: its hash differs. Check the disk, then"
            " upload it again.",
        )
    return path


# ---------------------------------------------------------------- base model


def base_paths(name: str, base: BaseRef | None, settings: WorkerSettings) -> tuple[str, str | None]:
    """(model, adapter): folders or hub ids to load from."""
    if base is None:
        return _model(name, settings), None
    path = below(settings.data, base.path)
    if not path.is_dir():
        raise PrepareFailed(
            FailureReason.MODEL_NOT_FOUND,
            f"{name}: its folder {path} is gone; train it again or name another model.",
        )
    if not base.is_adapter:
        return str(path), None
    # What an adapter stands on may itself be the result of a job.
    below_jobs = base.base_model.startswith("jobs/") and (settings.data / base.base_model).is_dir()
    if below_jobs:
        return str(below(settings.data, base.base_model)), str(path)
    return _model(base.base_model, settings), str(path)


def _model(name: str, settings: WorkerSettings) -> str:
    roots = [root.resolve() for root in settings.model_roots]
    if name.startswith("/"):
        folder = Path(name).resolve()
        if not any(folder.is_relative_to(root) for root in roots):
            raise PrepareFailed(
                FailureReason.MODEL_NOT_FOUND,
                f"{name} is not under an allowed folder ({', '.join(map(str, roots))}); put it there, or have the"
                " box's owner add its folder to SFTD_MODEL_ROOTS.",
            )
        if not folder.is_dir():
            raise PrepareFailed(FailureReason.MODEL_NOT_FOUND, f"{name} is not a folder on the worker.")
        return str(folder)
    for root in roots:
        folder = (root / name).resolve()
        if folder.is_relative_to(root) and folder != root and folder.is_dir():
            return str(folder)
    return name  # a hub id; the trainer loads it, from its cache or from the hub


def _is_own_folder(model: str, data: Path) -> bool:
    """Whether a model is a folder of somebody's, rather than of the hub or a job's result (which are verified by name)."""
    path = Path(model)
    return path.is_absolute() and not path.is_relative_to((data / "jobs").resolve())


def _same_model(folder: Path, lease: Lease, check: Check) -> str:
    """The hash of all that lies in a model's folder. Raises PrepareFailed where the checkpoints come from another one."""
    try:
        found = _folder_sha256(folder, check)
    except OSError as error:
        raise PrepareFailed(
            FailureReason.MODEL_NOT_FOUND,
            f"{folder} cannot be read on the worker: {error.strerror or error}.",
        ) from error
    if lease.checkpoints and lease.base_sha256 not in (None, found):
        raise PrepareFailed(
            FailureReason.WORKER_ERROR,
            f"{folder} is not the model that this job began with: its files have changed. Put them back, or post a new job"
            " that begins with these.",
        )
    return found


# What loading a model may read; not cards and licences.
_READ_OF_MODELS = {".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
# By size, times and inode: weights seldom change.
_hashes: dict[Path, tuple[tuple[int, ...], str]] = {}


def _folder_sha256(folder: Path, check: Check) -> str:
    """Of names and content of a model's files: those that loading may read, wherever their links lead."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix in _READ_OF_MODELS:
            stat = path.stat()
            state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            known = _hashes.get(path)
            sha256 = known[1] if known is not None and known[0] == state else _sha256(path, check)
            _hashes[path] = state, sha256
            digest.update(f"{sha256}  {path.name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------- checkpoints


def _checkpoint(
    lease: Lease, data: Path, check: Check, transfer: "Transfer | None"
) -> tuple[Path | None, list[CheckpointReport], list[str]]:
    """The newest checkpoint that verifies, and a report and a notice for each newer one that does not."""
    corrupt: list[CheckpointReport] = []
    broken: list[str] = []
    for ref in lease.checkpoints:
        try:
            path = _brought_checkpoint(lease, data, ref, check, transfer)
            notices = [f"{what}; the run goes on from {ref.name}. Check the disk." for what in broken]
            return path, corrupt, notices
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_full(error):
                raise  # nothing is wrong with the checkpoint: there was no room to fetch it
            broken.append(f"{ref.name} is damaged ({error}) and is not used")
            corrupt.append(
                CheckpointReport(
                    attempt=lease.attempt,
                    step=ref.step,
                    name=ref.name,
                    manifest_sha256=ref.manifest_sha256,
                    files={},
                    corrupt=True,
                )
            )
    if corrupt:
        raise PrepareFailed(
            FailureReason.CHECKPOINT_CORRUPT,
            f"None of the {len(corrupt)} recorded checkpoints verifies. {broken[0]}.",
        )
    return None, corrupt, []


def _brought_checkpoint(
    lease: Lease, data: Path, ref: CheckpointRef, check: Check, transfer: "Transfer | None"
) -> Path:
    """A checkpoint that verifies, brought again if the one that is here does not. Raises ValueError or OSError."""
    folder = below(data, ref.folder or lease.folder)  # of the job that this one tries again, perhaps
    try:
        return _verified_checkpoint(folder, ref, check)
    except (OSError, ValueError):
        if transfer is None or not transfer.bring_checkpoint(ref, check):
            raise
    return _verified_checkpoint(folder, ref, check)


def _verified_checkpoint(job: Path, ref: CheckpointRef, check: Check) -> Path:
    """The checkpoint's folder below that of the job which wrote it, every byte as recorded. Raises ValueError or
    OSError."""
    path = job / "checkpoints" / ref.name
    content = (path / MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != ref.manifest_sha256:
        raise ValueError("its manifest is not the recorded one")
    try:
        manifest = Manifest.model_validate(json.loads(content))
    except ValidationError as error:
        raise ValueError("its manifest cannot be read") from error
    if manifest.step != ref.step:
        raise ValueError(f"its manifest is of step {manifest.step}")
    for name, file in manifest.files.items():
        if (path / name).stat().st_size != file.bytes:
            raise ValueError(f"{name} has another size")
        if _sha256(path / name, check) != file.sha256:
            raise ValueError(f"{name} has another hash")
    return path


# ---------------------------------------------------------------- paths and hashes


def below(data: Path, relative: str) -> Path:
    path = (data / relative).resolve()
    if not path.is_relative_to(data.resolve()):
        raise PrepareFailed(
            FailureReason.WORKER_ERROR, f"{relative!r} lies outside the data folder; refused."
        )
    return path


def _sha256(path: Path, check: Check) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            check()
    return digest.hexdigest()
