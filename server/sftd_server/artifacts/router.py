"""Routes for workers without the server's data folder, under /worker: they fetch what they read, and send what they make."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sftd.protocol import TOKEN_HEADER, FolderFiles, Restore, Restored
from sftd_server.artifacts import rights
from sftd_server.artifacts.restore import bring_blob
from sftd_server.artifacts.rights import Kind
from sftd_server.artifacts.shelf import Content
from sftd_server.artifacts.uploads import Progress, span_of
from sftd_server.errors import ApiError, Invalid, error_responses
from sftd_server.server import ServerDep
from sftd_server.strict_json import StrictRoute
from sftd_server.workers import leases

RESTORE_WAIT_SECONDS = 10.0  # then the worker asks again, and looks after its lease meanwhile
JobId = Annotated[str, Path(max_length=64)]
Hash = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Path(max_length=128)]
Attempt = Annotated[int, Query(ge=0, lt=2**63, description="Of the lease.")]
Of = Annotated[
    str | None, Query(max_length=128, description="The job that made it. Default: the lease's own.")
]
Token = Annotated[
    str, Header(alias=TOKEN_HEADER, max_length=128, description="The lease's token, from the claim's answer.")
]
ByteRange = Annotated[
    str | None, Header(alias="Range", max_length=64, description="`bytes=<first>-`: go on from there.")
]

router = APIRouter(
    prefix="/worker",
    tags=["worker protocol"],
    route_class=StrictRoute,
    responses=error_responses(404, 409, 413, 416),
)


class OutOfRange(ApiError):
    """416: a range that begins behind the end of the file."""

    status = 416
    kind = "invalid_request"


class _ContentStream(StreamingResponse):
    """Sends an opened file from a byte on and closes it, also when the client hangs up first."""

    def __init__(self, content: Content, start: int) -> None:
        headers = {"content-length": str(content.size - start), "accept-ranges": "bytes"}
        if start:
            headers["content-range"] = f"bytes {start}-{content.size - 1}/{content.size}"
        super().__init__(
            content.pieces(start),
            status_code=206 if start else 200,
            media_type="application/octet-stream",
            headers=headers,
        )
        self._opened = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:
            await super().__call__(scope, receive, send)


@router.put(
    "/blobs/{sha256}",
    responses={308: {"description": "So far: `Range: bytes=0-<last>` says what is there; go on behind it."}},
)
async def put_blob(
    request: Request,
    sha256: Hash,
    job_id: Annotated[str, Query(max_length=64, description="Of the lease.")],
    attempt: Attempt,
    token: Token,
    server: ServerDep,
    content_range: Annotated[
        str, Header(max_length=64, description="`bytes <first>-<last>/<size>`; `bytes */<size>` asks only.")
    ],
) -> Response:
    """Send a piece of a file that the job has made, under the hash of the whole; or ask how much of it is there.

    201 when it is whole and its hash is right; 308 with `Range` otherwise (without it: nothing is there). A piece that
    does not begin where the upload stands changes nothing. 422 where the whole has another hash: it is dropped then.
    """
    holder = leases.holder(job_id, attempt, token)
    span = span_of(content_range)
    if span.start is None:
        recorded = await server.db.read(
            lambda session: rights.recorded_as(
                session, rights.require_held(session, holder), sha256, span.size
            )
        )
        progress = await server.uploads.in_thread(
            server.uploads.look, holder.job_id, sha256, span.size, recorded
        )
        return _so_far(progress)
    await server.db.read(lambda session: rights.require_held(session, holder))
    piece = await request.body()
    if len(piece) != span.end - span.start:
        raise Invalid(
            f"Content-Range: names {span.end - span.start:,} bytes, the body has {len(piece):,}",
            code="invalid_request",
            param="Content-Range",
        )
    progress = await server.uploads.in_thread(server.uploads.append, holder.job_id, sha256, span, piece)
    return _so_far(progress)


@router.get("/jobs/{job_id}/inputs/{sha256}", response_class=StreamingResponse)
async def input_file(
    job_id: JobId,
    sha256: Hash,
    attempt: Attempt,
    token: Token,
    server: ServerDep,
    byte_range: ByteRange = None,
) -> Response:
    """A data file that the job reads. `Range: bytes=<first>-` goes on where an earlier call broke off."""
    holder = leases.holder(job_id, attempt, token)
    stored = await server.db.read(lambda session: rights.input_file(session, holder, sha256))
    ((name, file),) = stored.files.items()
    content = await server.uploads.in_thread(server.shelf.open, stored.folder, name, file)
    return sent(content, byte_range)


@router.get("/jobs/{job_id}/files/{kind}/{name}")
async def folder_files(
    job_id: JobId,
    kind: Kind,
    name: Name,
    attempt: Attempt,
    token: Token,
    server: ServerDep,
    of: Of = None,
) -> FolderFiles:
    """The files of a checkpoint or result (`results/results`) that the job reads: its own, or what it begins from."""
    holder = leases.holder(job_id, attempt, token)
    found = await server.db.read(lambda session: rights.readable(session, holder, kind, name, of))
    return FolderFiles(files=found.stored.files, manifest_sha256=found.manifest_sha256)


@router.get("/jobs/{job_id}/files/{kind}/{name}/{path:path}", response_class=StreamingResponse)
async def folder_file(
    job_id: JobId,
    kind: Kind,
    name: Name,
    path: str,
    attempt: Attempt,
    token: Token,
    server: ServerDep,
    of: Of = None,
    byte_range: ByteRange = None,
) -> Response:
    """One of these files, by its name in the manifest; `manifest.json` too."""
    holder = leases.holder(job_id, attempt, token)
    found = await server.db.read(lambda session: rights.readable(session, holder, kind, name, of))
    folder, file = found.stored.folder, found.stored.files.get(path)
    if file is not None:
        content = await server.uploads.in_thread(server.shelf.open, folder, path, file)
    elif path == rights.MANIFEST and found.manifest_sha256 is not None:
        content = await server.uploads.in_thread(
            server.shelf.open_unsized, folder, path, found.manifest_sha256
        )
    else:
        raise rights.no_such_file(path)
    return sent(content, byte_range)


@router.post("/jobs/{job_id}/restore")
async def restore(job_id: JobId, message: Restore, token: Token, server: ServerDep) -> Restored:
    """Bring back from the store what the job reads and the shared folder has lost. Asked again until it is `ready`."""
    holder = leases.holder(job_id, message.attempt, token)
    if message.kind == "inputs":
        stored = await server.db.read(lambda session: rights.input_file(session, holder, message.name))
        ((name, file),) = stored.files.items()
        await server.uploads.in_thread(bring_blob, server.shelf, stored.folder, name, file.sha256)
        return Restored(ready=True)
    kind: Kind = message.kind
    found = await server.db.read(
        lambda session: rights.readable(session, holder, kind, message.name, message.of)
    )
    ready = await server.restorer.bring(
        found.stored.folder,
        found.stored.files,
        manifest_sha256=found.manifest_sha256,
        seconds=RESTORE_WAIT_SECONDS,
    )
    return Restored(ready=ready)


def _so_far(progress: Progress) -> Response:
    if progress.whole:
        return Response(status_code=201)
    headers = {"range": f"bytes=0-{progress.num_bytes - 1}"} if progress.num_bytes else {}
    return Response(status_code=308, headers=headers)


def sent(content: Content, byte_range: str | None) -> Response:
    """A file as it is streamed, from where the range says."""
    start = 0
    if byte_range is not None:
        first, _, last = byte_range.removeprefix("bytes=").partition("-")
        if not byte_range.startswith("bytes=") or not first.isdecimal() or len(first) > 18 or last:
            content.close()
            raise Invalid(
                "Range: only `bytes=<first>-` is served here", code="invalid_request", param="Range"
            )
        start = int(first)
        if start > 0 and start >= content.size:
            content.close()
            raise OutOfRange(f"The file has {content.size:,} bytes.", code="out_of_range", param="Range")
    return _ContentStream(content, start)
