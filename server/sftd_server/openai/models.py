"""OpenAI's models: the base models that are known here, and what jobs have made of them. Making them is jobs' business."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel
from sqlmodel import Session, col, func, select

from sftd.schemas import JobState
from sftd_server.auth import CallerDep
from sftd_server.errors import Invalid, NotFound, error_responses
from sftd_server.jobs import queries, removal
from sftd_server.openai import names
from sftd_server.openai.lists import OpenAIList, listed, unix
from sftd_server.server import ServerDep
from sftd_server.tables import JobRow

ModelName = Annotated[
    str,
    Path(
        max_length=2048,
        description="As the list has it; a slash in it may be written as %2F.",
        examples=["Qwen/Qwen2.5-7B-Instruct"],
    ),
]
_BASES_OWNER = "system"


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class DeletedModel(BaseModel):
    """What is left of a deleted model."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


router = APIRouter(prefix="/v1/models", tags=["openai"], responses=error_responses(404))


@router.get("")
async def list_models(server: ServerDep) -> OpenAIList[Model]:
    """All models: those of folders under the model roots, the bases of jobs, and the results of jobs, newest first."""
    folders = await asyncio.to_thread(_folders, server.settings.model_roots)
    found = await server.db.read(lambda session: [*_made(session), *_bases(session, folders)])
    return listed(found, [model.id for model in found], more=False)


@router.get("/{model:path}")
async def retrieve(model: ModelName, server: ServerDep) -> Model:
    """One model by its name; a checkpoint is one too."""
    if names.is_made(model):
        return await server.db.read(lambda session: _one_made(session, model))
    folders = await asyncio.to_thread(_folders, server.settings.model_roots)
    found = await server.db.read(lambda session: _bases(session, folders))
    for one in found:
        if one.id == model:
            return one
    raise _unknown(model)


@router.delete("/{model:path}", responses=error_responses(404, 409))
async def delete(model: ModelName, server: ServerDep, caller: CallerDep) -> DeletedModel:
    """Delete the files of a model that a job made; the job stays on record. Its owner and admins may. 409 while a job that
    is not over needs it."""
    job_id = await server.db.read(lambda session: _deletable(session, model))
    now = server.clock.now()
    await server.db.write(lambda session: removal.remove_result(session, job_id, caller, now))
    folder = server.folder.path / server.folder.job_name(job_id)
    trash = await asyncio.to_thread(removal.put_result_away, folder)
    if trash is not None:
        server.in_background(asyncio.to_thread(removal.empty, trash))
    return DeletedModel(id=model)


def _unknown(name: str) -> NotFound:
    return NotFound(
        f"There is no model {name[:200]!r}; GET /v1/models lists them.", code="unknown_model", param="model"
    )


def _deletable(session: Session, name: str) -> str:
    """The id of the job whose result has this name."""
    if not names.is_made(name):
        raise Invalid(
            f"model: {name[:200]!r} is no model that a job made; others can not be deleted here",
            code="base_model",
            param="model",
        )
    made = names.find(session, name)
    if made is None:
        raise _unknown(name)
    if made.step is not None:
        raise Invalid(
            f"model: {name[:200]!r} is a checkpoint; those are kept and removed by the server's own rules, or with their job",
            code="invalid_request",
            param="model",
        )
    return made.job.id


# ---------------------------------------------------------------- what there is


def _made(session: Session) -> list[Model]:
    query = (
        select(JobRow)
        .where(JobRow.state == JobState.SUCCEEDED, col(JobRow.result_deleted_at).is_(None))
        .order_by(col(JobRow.number).desc())
    )
    return [
        Model(id=names.name_of(row), created=unix(row.finished_at) or 0, owned_by=row.owner)
        for row in session.exec(query)
    ]


def _one_made(session: Session, name: str) -> Model:
    made = names.find(session, name)
    if made is None:
        raise _unknown(name)
    if made.step is not None:
        checkpoint = queries.whole_checkpoint(session, made.job, made.step)
        return Model(id=name, created=unix(checkpoint.created_at) or 0, owned_by=made.job.owner)
    if names.result_name(made.job) is None:
        raise _unknown(name)
    return Model(id=name, created=unix(made.job.finished_at) or 0, owned_by=made.job.owner)


def _bases(session: Session, folders: dict[str, datetime]) -> list[Model]:
    """By name. One that is known as a folder is as old as that, else as the first job that named it."""
    query = (
        select(JobRow.base_model, func.min(JobRow.created_at))
        .where(~col(JobRow.base_model).startswith("job:", autoescape=True))
        .group_by(col(JobRow.base_model))
    )
    found = {**dict(session.exec(query).all()), **folders}
    return [Model(id=name, created=unix(found[name]) or 0, owned_by=_BASES_OWNER) for name in sorted(found)]


def _folders(roots: Sequence[FilePath]) -> dict[str, datetime]:
    """Folders with a model in them, by the name that a job gives: `org/name` or `name` below a root."""
    found: dict[str, datetime] = {}
    for root in roots:
        for folder in _below(root):
            for model in (folder, *_below(folder)):
                try:
                    changed = (model / "config.json").stat().st_mtime
                except OSError:
                    continue
                name = str(model.relative_to(root))
                found.setdefault(name, datetime.fromtimestamp(changed, UTC))
    return found


def _below(folder: FilePath) -> Iterator[FilePath]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith("."):
                    yield FilePath(entry.path)
    except OSError:  # not there, or not ours to read
        return
