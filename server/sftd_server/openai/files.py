"""OpenAI's files at /v1/files, over `files/`. A file is answered before its rows have been checked; its `status` tells."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from sftd.schemas import File
from sftd_server.auth import CallerDep
from sftd_server.errors import error_responses
from sftd_server.files import store
from sftd_server.files.router import FileId
from sftd_server.files.upload import LIFETIME_FIELDS, form_body, receive
from sftd_server.openai.lists import OpenAIList, listed, unix
from sftd_server.server import ServerDep

_FORM = form_body(
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(store.PURPOSES)},
        **LIFETIME_FIELDS,
    },
    required=["file", "purpose"],
)


class FileObject(BaseModel):
    """A file as OpenAI shows it, and what is known here besides."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None
    format: str | None
    num_rows: int | None
    sha256: str

    @classmethod
    def of(cls, file: File) -> "FileObject":
        return cls(
            **file.model_dump(exclude={"created_at", "expires_at"}),
            created_at=int(file.created_at.timestamp()),
            expires_at=unix(file.expires_at),
        )


class FileDeleted(BaseModel):
    """That a file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


router = APIRouter(prefix="/v1/files", tags=["openai"], responses=error_responses(404))


@router.post("", openapi_extra=_FORM, responses=error_responses(413))
async def create(request: Request, server: ServerDep, caller: CallerDep) -> FileObject:
    """Upload a file. One to fine-tune with is `uploaded` first; when its rows have been checked it is `processed`, or
    `error` with `status_details`. A job may name it meanwhile."""
    most = server.settings.max_upload_bytes
    received = await receive(request, server.folder.tmp, max_bytes=most, default_purpose=None)
    try:
        return FileObject.of(await store.keep_unchecked(server, received, caller))
    finally:
        received.path.unlink(missing_ok=True)


@router.get("")
async def list_files(
    server: ServerDep,
    purpose: Annotated[str | None, Query(max_length=64, description="Only these.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By age.")] = "desc",
    after: Annotated[str | None, Query(max_length=64, description="The id of the last file seen.")] = None,
) -> OpenAIList[FileObject]:
    """Files, newest first."""
    page = await server.db.read(
        lambda session: store.files(
            session, after=after, limit=limit, purpose=purpose, oldest_first=order == "asc"
        )
    )
    ids = [file.id for file in page.data]
    return listed([FileObject.of(file) for file in page.data], ids, more=page.has_more)


@router.get("/{file_id}")
async def retrieve(file_id: FileId, server: ServerDep) -> FileObject:
    """One file."""
    return FileObject.of(await server.db.read(lambda session: store.file(session, file_id)))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def content(file_id: FileId, server: ServerDep) -> Response:
    """The file as it was uploaded."""
    return await store.content(server, file_id)


@router.delete("/{file_id}", responses=error_responses(404, 409))
async def delete(file_id: FileId, server: ServerDep, caller: CallerDep) -> FileDeleted:
    """Delete a file. Refused with 409 while a job that is not over needs it."""
    await store.remove(server, file_id, caller)
    return FileDeleted(id=file_id)
