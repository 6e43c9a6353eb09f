"""Checks a posted spec: its own mistakes and those of what it refers to, told together.

Refers to: uploaded files, a local model under an allowed root, or another job's result or checkpoint.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlmodel import Session, col, select

from sftd.protocol import BaseRef, InputFile
from sftd.spec import JOB_REFERENCE, JobSpec
from sftd_server.artifacts.mirror import stored_of
from sftd_server.datafolder import DataFolder
from sftd_server.errors import Invalid
from sftd_server.jobs import dependencies
from sftd_server.jobs.service import ADAPTERS, JobInputs, invalid_file
from sftd_server.jobs.states import TERMINAL
from sftd_server.mistakes import Mistake, mistakes_of
from sftd_server.tables import CheckpointRow, FileRow, JobRow


@dataclass(frozen=True)
class Sources:
    """Where the inputs of a job may lie."""

    folder: DataFolder
    model_roots: tuple[Path, ...]
    has_store: bool = False  # what the data folder has lost can be brought back from the artifact store


@dataclass
class _Found:
    """What the spec refers to, as far as it was found."""

    files: dict[str, InputFile] = field(default_factory=dict)
    base: BaseRef | None = None
    mistakes: list[Mistake] = field(default_factory=list)

    def note(self, name: str, message: str) -> None:
        self.mistakes.append(Mistake(name, message))


@dataclass(frozen=True)
class Look:
    """A posted spec, and what is wrong with it or with what it refers to."""

    spec: JobSpec | None  # None: it is not valid
    files: dict[str, InputFile]  # by field, as far as they were found
    base: BaseRef | None
    mistakes: list[Mistake]


def look(session: Session, value: Any, sources: Sources) -> Look:  # value: any JSON
    """The spec and what it refers to, as far as they can be made out."""
    if not isinstance(value, dict):
        return Look(None, {}, None, [Mistake("body", "must be a JSON object, the job spec")])
    spec, mistakes = _parse(value)
    found = _Found()
    for name in ("training_file", "validation_file"):
        if isinstance(value.get(name), str):
            _find_file(session, found, name, value[name], sources.folder)
    base_model = value.get("base_model")
    after = spec.after if spec else []
    found.mistakes += dependencies.mistakes(session, after)
    if isinstance(base_model, str) and not any(mistake.field == "base_model" for mistake in mistakes):
        _find_base(session, found, base_model, value.get("method", "lora"), spec, sources)
    named = {mistake.field for mistake in mistakes}
    mistakes += [mistake for mistake in found.mistakes if mistake.field not in named]
    return Look(spec, found.files, found.base, mistakes)


def check(session: Session, value: Any, sources: Sources) -> tuple[JobSpec, JobInputs]:  # value: any JSON
    """The spec and its inputs. Raises Invalid with every mistake at once."""
    looked = look(session, value, sources)
    if looked.mistakes or looked.spec is None:
        raise Invalid.of(looked.mistakes, code="invalid_spec")
    inputs = JobInputs(
        training_file=looked.files["training_file"],
        validation_file=looked.files.get("validation_file"),
        base=looked.base,
    )
    return looked.spec, inputs


def _parse(value: dict[str, Any]) -> tuple[JobSpec | None, list[Mistake]]:
    try:
        return JobSpec.model_validate(value), []
    except ValidationError as error:
        return None, mistakes_of(error.errors(include_url=False), JobSpec)


def _find_file(session: Session, found: _Found, name: str, file_id: str, folder: DataFolder) -> None:
    row = session.exec(select(FileRow).where(FileRow.id == file_id)).first()
    if row is None:
        found.note(name, f"there is no file {file_id[:80]!r}; upload it with POST /files and give its id")
    elif row.purpose != "fine-tune":
        found.note(name, f"{file_id} was uploaded for {row.purpose!r}; upload it with purpose fine-tune")
    elif row.status == "error":
        found.note(name, invalid_file(row.id, row.status_details))
    else:
        found.files[name] = InputFile(
            file_id=row.id,
            filename=row.filename,
            sha256=row.sha256,
            bytes=row.bytes,
            path=folder.blob_name(row.sha256),
        )


def _find_base(
    session: Session,
    found: _Found,
    base_model: str,
    method: Any,
    spec: JobSpec | None,
    sources: Sources,
) -> None:  # method: as posted, perhaps no string
    reference = JOB_REFERENCE.match(base_model)
    if reference:
        step = reference["step"]
        row = session.exec(select(JobRow).where(JobRow.id == reference["job_id"])).first()
        if row is None:
            found.note("base_model", f"there is no job {reference['job_id']!r}; GET /jobs lists them")
            return
        if step is None and spec is not None and row.id in spec.after and row.state not in TERMINAL:
            _check_method(found, row, method, spec)  # its result is there when this job's turn comes
            return
        path = _path_in_job(session, found, row, None if step is None else int(step), sources)
        if path is not None:
            found.base = base_of(row, path)
            _check_method(found, row, method, spec)
    elif base_model.startswith("/"):
        _check_local(found, Path(base_model), sources.model_roots)
    else:
        folders = [root / base_model for root in sources.model_roots]
        local = next((folder for folder in folders if folder.is_dir()), None)
        if local is not None:
            _check_local(found, local, sources.model_roots)


def _path_in_job(
    session: Session, found: _Found, row: JobRow, step: int | None, sources: Sources
) -> str | None:
    """The folder of a job's result or checkpoint, relative to the data folder. It may be gone there and whole in the store:
    the job's worker has it brought back."""
    job_name = sources.folder.job_name(row.id)
    if step is None:
        if row.state != "succeeded":
            found.note(
                "base_model",
                f"{row.id} is {row.state}; wait until it has succeeded, name it in after as well, or name a checkpoint:"
                f" job:{row.id}@<step>",
            )
            return None
        if row.result_deleted_at is not None:
            found.note(
                "base_model",
                f"the model that {row.id} made has been deleted; train it again, or choose another",
            )
            return None
        path, files, hashes = f"{job_name}/results", row.result or {}, set[str]()
    else:
        query = (
            select(CheckpointRow)
            .where(CheckpointRow.job == row.number, CheckpointRow.step == step)
            .where(col(CheckpointRow.corrupt).is_(False), col(CheckpointRow.deleted_at).is_(None))
            .order_by(col(CheckpointRow.attempt).desc())
        )
        checkpoint = session.exec(query).first()
        if checkpoint is None:
            found.note(
                "base_model",
                f"{row.id} has no checkpoint of step {step}; GET /jobs/{row.id}/checkpoints lists them",
            )
            return None
        path, files = f"{job_name}/checkpoints/{checkpoint.name}", checkpoint.files
        hashes = {checkpoint.manifest_sha256}
    if (sources.folder.path / path).is_dir():
        return path
    hashes |= {str(file["sha256"]) for file in files.values()}
    if not files or stored_of(session, hashes) != hashes:
        found.note(
            "base_model",
            f"{row.id} has no files at {path} any more, nor whole in an artifact store; have them put back there from a"
            " backup, or choose another checkpoint",
        )
    elif not sources.has_store:
        found.note(
            "base_model",
            f"{row.id} has no files at {path} any more; they are in the artifact store, which this server does not use:"
            " have SFTD_ARTIFACTS_URL set, or choose another checkpoint",
        )
    else:
        return path
    return None


def base_of_result(row: JobRow) -> BaseRef:
    """What a job that has succeeded made, as the base of another job."""
    return base_of(row, f"jobs/{row.id}/results")


def base_of(row: JobRow, path: str) -> BaseRef:
    """A job's result or checkpoint as the base of another job."""
    if row.method not in ADAPTERS:
        return BaseRef(path=path, is_adapter=False, base_model=path)
    earlier = JobInputs.model_validate(row.inputs).base
    return BaseRef(path=path, is_adapter=True, base_model=earlier.base_model if earlier else row.base_model)


def _check_method(found: _Found, row: JobRow, method: Any, spec: JobSpec | None) -> None:  # method: as posted
    if row.method not in ADAPTERS:
        return
    if method == "full":
        found.note(
            "method",
            f"full can not train the adapter that {row.id} made; use lora or qlora to continue it, or the base model {row.base_model}",
        )
    elif spec is not None:
        earlier = JobSpec.model_validate_json(row.spec).lora
        if spec.lora != earlier:
            found.note(
                "lora",
                f"differs from that of {row.id}, whose adapter is continued; give {earlier.model_dump_json()}",
            )


def _check_local(found: _Found, path: Path, model_roots: tuple[Path, ...]) -> None:
    """A folder with safetensors weights under an allowed root, wherever its links lead."""
    real = Path(os.path.realpath(path))
    roots = [Path(os.path.realpath(root)) for root in model_roots]
    if not any(real.is_relative_to(root) and real != root for root in roots):
        allowed = ", ".join(map(str, model_roots))
        found.note(
            "base_model", f"is not under an allowed root ({allowed}); put the model there, or name a hub id"
        )
    elif not (real / "config.json").is_file():
        found.note(
            "base_model", f"{path} holds no config.json; give a folder with a whole model, or a hub id"
        )
    elif not any(real.glob("*.safetensors")):
        found.note("base_model", f"{path} holds no .safetensors weights; other formats are not read")
