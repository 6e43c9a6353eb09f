"""Routes of files."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from sftd.schemas import File, Page, RowPreview
from sftd_server.auth import CallerDep
from sftd_server.errors import error_responses
from sftd_server.files import preview, store
from sftd_server.files.upload import LIFETIME_FIELDS, form_body, receive
from sftd_server.server import ServerDep
from sftd_server.strict_json import MAX_INTEGER

FileId = Annotated[str, Path(max_length=64, examples=["file_7k2mq9x4w3pz"])]

_FORM = form_body(
    {
        "file": {"type": "string", "format": "binary", "description": "JSONL or a JSON array."},
        "purpose": {"type": "string", "enum": list(store.PURPOSES), "default": "fine-tune"},
        **LIFETIME_FIELDS,
    },
    required=["file"],
)

router = APIRouter(prefix="/files", tags=["files"], responses=error_responses(404))


@router.post("", openapi_extra=_FORM, responses=error_responses(413))
async def upload(request: Request, server: ServerDep, caller: CallerDep) -> File:
    """Upload a data file: `curl -F file=@rows.jsonl`.

    JSONL or a JSON array of rows: `messages`, `prompt` + `completion`, `instruction` (+ `input`) + `output`,
    ShareGPT `conversations`, or `text`. Every row is checked; a 422 names line, field and remedy of what is wrong.
    Files of another `purpose` than `fine-tune` are kept as they are. With `expires_after[anchor]=created_at` and
    `expires_after[seconds]` the file is deleted by itself.
    """
    received = await receive(request, server.folder.tmp, max_bytes=server.settings.max_upload_bytes)
    try:
        return await store.keep(server, received, caller)
    finally:
        received.path.unlink(missing_ok=True)


@router.get("")
async def list_files(
    server: ServerDep,
    after: Annotated[str | None, Query(max_length=64, description="The id of the last file seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[File]:
    """All files, newest first."""
    return await server.db.read(lambda session: store.files(session, after=after, limit=limit))


@router.get("/{file_id}")
async def retrieve(file_id: FileId, server: ServerDep) -> File:
    """One file's record."""
    return await server.db.read(lambda session: store.file(session, file_id))


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


@router.get("/{file_id}/rows", response_model=Page[RowPreview], responses=error_responses(404, 409))
async def rows(
    file_id: FileId,
    server: ServerDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Go on after this line.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Rows of a data file as they were understood, by line (by item where the file is a JSON array): messages with their
    weights, tools, or text; and what is wrong with a row. A page of long rows may hold fewer than `limit`."""
    page = await preview.rows(server, file_id, after=after, limit=limit)
    return Response(page.model_dump_json(), media_type="application/json")


@router.delete("/{file_id}", status_code=204, responses=error_responses(404, 409))
async def delete(file_id: FileId, server: ServerDep, caller: CallerDep) -> None:
    """Delete a file. Refused with 409 while a job that is not over needs it."""
    await store.remove(server, file_id, caller)
