"""OpenAI's uploads at /v1/uploads: files that come in parts, over `files/parts`."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from sftd.schemas import Request as Body
from sftd_server.auth import CallerDep
from sftd_server.errors import error_responses
from sftd_server.files import parts
from sftd_server.files.parts import Announced, Part, PartedUpload
from sftd_server.files.upload import form_body, lifetime_of
from sftd_server.openai.files import FileObject
from sftd_server.server import ServerDep
from sftd_server.strict_json import StrictRoute

UploadId = Annotated[str, Path(max_length=64, examples=["upload_7k2mq9x4w3pz"])]

_FORM = form_body({"data": {"type": "string", "format": "binary"}}, required=["data"])


class ExpiresAfter(Body):
    """When the file that is made is to be deleted."""

    anchor: str = Field(max_length=64, description="created_at")
    seconds: int = Field(description="From 3600 (an hour) to 2592000 (30 days).")


class UploadRequest(Body):
    """What `POST /v1/uploads` takes."""

    filename: str = Field(min_length=1, max_length=1024)
    purpose: str = Field(max_length=64)
    bytes: int = Field(ge=1, lt=2**53, description="The whole file's.")
    mime_type: str = Field(max_length=255)
    expires_after: ExpiresAfter | None = None


class CompleteRequest(Body):
    """What `POST /v1/uploads/{upload_id}/complete` takes."""

    part_ids: list[str] = Field(min_length=1, max_length=parts.MAX_PARTS, description="In the file's order.")
    md5: str | None = Field(None, pattern=r"^[0-9a-fA-F]{32}$", description="Of the whole file.")


class UploadPart(BaseModel):
    """A part that has arrived."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    upload_id: str
    created_at: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, part: Part) -> "UploadPart":
        return cls(
            id=part.id,
            upload_id=part.upload_id,
            created_at=int(part.created_at.timestamp()),
            bytes=part.bytes,
            sha256=part.sha256,
        )


class UploadObject(BaseModel):
    """An upload as OpenAI shows it, and the parts that have arrived."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None
    parts: list[UploadPart]

    @classmethod
    def of(cls, upload: PartedUpload) -> "UploadObject":
        return cls(
            id=upload.id,
            bytes=upload.bytes,
            created_at=int(upload.created_at.timestamp()),
            expires_at=int(upload.expires_at.timestamp()),
            filename=upload.filename,
            purpose=upload.purpose,
            status=upload.status,
            file=FileObject.of(upload.file) if upload.file else None,
            parts=[UploadPart.of(part) for part in upload.parts],
        )


router = APIRouter(
    prefix="/v1/uploads", tags=["openai"], route_class=StrictRoute, responses=error_responses(404)
)


@router.post("", responses=error_responses(409, 413))
async def create(message: UploadRequest, server: ServerDep, caller: CallerDep) -> UploadObject:
    """Announce a file that comes in parts. What is not completed within an hour expires."""
    wish = message.expires_after
    announced = Announced(
        filename=message.filename,
        purpose=message.purpose,
        bytes=message.bytes,
        mime_type=message.mime_type,
        file_lifetime_seconds=lifetime_of(wish.anchor, wish.seconds) if wish else None,
    )
    return UploadObject.of(await parts.create(server, announced, caller))


@router.get("/{upload_id}")
async def retrieve(upload_id: UploadId, server: ServerDep, caller: CallerDep) -> UploadObject:
    """An upload and the parts that have arrived, so that sending can go on after an interruption."""
    return UploadObject.of(await parts.retrieve(server, upload_id, caller))


@router.post("/{upload_id}/parts", openapi_extra=_FORM, responses=error_responses(404, 409, 413))
async def add_part(request: Request, upload_id: UploadId, server: ServerDep, caller: CallerDep) -> UploadPart:
    """Send a part, of 64 MiB at most, as multipart `data`. Parts may come in any order, and at the same time."""
    return UploadPart.of(await parts.add_part(server, request, upload_id, caller))


@router.post("/{upload_id}/complete", responses=error_responses(404, 409, 413))
async def complete(
    message: CompleteRequest, upload_id: UploadId, server: ServerDep, caller: CallerDep
) -> UploadObject:
    """Make the file of the parts named, in that order. May be repeated: the answer is the same file."""
    done = await parts.complete(server, upload_id, message.part_ids, message.md5, caller)
    return UploadObject.of(done)


@router.post("/{upload_id}/cancel", responses=error_responses(404, 409))
async def cancel(upload_id: UploadId, server: ServerDep, caller: CallerDep) -> UploadObject:
    """Give an upload up and delete what has arrived of it. May be repeated."""
    return UploadObject.of(await parts.cancel(server, upload_id, caller))
