"""What every request passes before routing: a request id, the key, and limits on its body.

It stands before routing so that an unknown path, a wrong method or a bad body is refused without a key like
anything else, and so that nothing of a stranger's is looked at.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sftd_server import db
from sftd_server.audit.service import Recorder, is_audited
from sftd_server.auth import OPEN_PATHS, Caller
from sftd_server.db import DatabaseClosed
from sftd_server.errors import (
    ApiError,
    DiskFull,
    Invalid,
    NotFound,
    RequestTimeout,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
    error_answer,
    is_database_away,
    is_database_busy,
    is_disk_full,
)
from sftd_server.files.upload import MAX_PART_BYTES
from sftd_server.server import Server

MULTIPART_BYTES = 64 * 1024  # room for the frame around an uploaded file
DRAIN_BYTES = 32 * 1024 * 1024  # of a refused body this much is read, so that the client sees the answer
DRAIN_SECONDS = 5
# A body that comes more slowly than this, after its first minute, is given up.
SLOWEST_BYTES_PER_SECOND = 1024

log = logging.getLogger("sftd.server")


class InternalError(ApiError):
    """500: our fault."""

    status = 500
    kind = "server_error"
    may_pass = True


class Gate:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        body = _Body(self._server, scope, receive)
        answer = _Answer(send, body)
        try:
            await self._serve(scope, body, answer)
        except ApiError as error:
            await self._refuse(error, scope, body, answer)
        except DatabaseClosed:
            await self._refuse(
                Unavailable("The server is stopping; try again.", code="stopping"), scope, body, answer
            )
        except Exception as error:
            fault = _fault(error, answer.request_id)
            if isinstance(fault, InternalError):
                log.exception("request %s: %s %r", answer.request_id, scope["method"], scope["path"])
            else:  # a full disk, or no database: a traceback for each request would drown the rest
                log.warning("request %s: %r", answer.request_id, getattr(error, "orig", error))
            if isinstance(error, OSError) and is_disk_full(error):
                await asyncio.to_thread(self._server.disk.look)
            if answer.started:
                raise  # the connection breaks off, so that half an answer is not taken for a whole one
            await self._refuse(fault, scope, body, answer)

    async def _serve(self, scope: Scope, body: "_Body", answer: "_Answer") -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        self._server.hosts.check(scope["method"], headers)
        witness: Recorder | None = None
        if path not in OPEN_PATHS:
            caller = scope.setdefault("state", {})["caller"] = self._admit(scope, headers)
            if is_audited(scope["method"], path):
                witness = Recorder(
                    scope,
                    caller,
                    address=self._server.throttle.origin(scope, headers),
                    request_id=answer.request_id,
                    clock=self._server.clock,
                )
            self._server.disk.admit(scope["method"], path, headers.get("content-length"))
        _check_target(path, scope["query_string"])
        body.check_announced(headers)
        token = db.witness.set(witness)
        try:
            await self._app(scope, body.receive, answer.send)
        finally:
            db.witness.reset(token)
        if body.refused is not None and not answer.started:
            raise body.refused

    def _admit(self, scope: Scope, headers: Headers) -> Caller:
        try:
            return self._server.keyring.admit(scope["path"], headers)
        except Unauthorized as error:
            if error.code == "invalid_key":
                self._server.throttle.note(scope, headers)
            raise

    async def _refuse(self, error: ApiError, scope: Scope, body: "_Body", answer: "_Answer") -> None:
        if not answer.started:
            await error_answer(error, scope["path"])(scope, body.receive, answer.send)


class _Answer:
    """Adds what every answer carries."""

    def __init__(self, send: Send, body: "_Body") -> None:
        self._send = send
        self._body = body
        self.started = False
        self.request_id = f"req_{secrets.token_hex(12)}"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            if message["status"] >= 400:
                await self._body.drain()
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            headers.setdefault("content-security-policy", "default-src 'none'; sandbox")
            headers["cross-origin-resource-policy"] = "same-origin"
            headers["referrer-policy"] = "no-referrer"
            headers["x-frame-options"] = "DENY"
        await self._send(message)


class _Body:
    """Counts a request's body, and gives up on one that stalls."""

    def __init__(self, server: Server, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._seconds = server.settings.body_seconds
        self._limit = _limit(server, scope)
        self._began_at = time.monotonic()
        self._num_bytes = 0
        self._whole = False
        self._held_back = "expect" in Headers(scope=scope)  # the client sends nothing before it is asked to
        self.refused: ApiError | None = None

    def check_announced(self, headers: Headers) -> None:
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):  # a small body that swells to a large one is not taken
            raise UnsupportedMedia(
                f"A body in Content-Encoding {coding[:40]!r} is not taken; send it as it is.",
                code="unsupported_encoding",
            )
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience()):
                self._held_back = False
                message = await self._receive()
        except TimeoutError:
            self._held_back = True  # nothing more will come of it
            self.refused = RequestTimeout(
                f"The body stalled for {self._seconds:g} s, or came too slowly.", code="body_timeout"
            )
            raise self.refused from None
        self._note(message)
        if self._num_bytes > self._limit:
            self.refused = self._too_large()
            raise self.refused
        return message

    def _patience(self) -> float:
        """How long to wait for the next piece: a body that comes in drops must not hold its connection for ever."""
        allowed = self._seconds + self._num_bytes / SLOWEST_BYTES_PER_SECOND
        return max(0.0, min(self._seconds, self._began_at + allowed - time.monotonic()))

    async def drain(self) -> None:
        """Read on through a refused body, within bounds: else the client may never see why it was refused."""
        if self._held_back:
            return
        until = self._num_bytes + DRAIN_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._whole and self._num_bytes < until:
                    self._note(await self._receive())

    def _note(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        else:
            self._whole = True

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is larger than the limit of {self._limit:,} bytes.", code="too_large")


def _check_target(path: str, query: bytes) -> None:
    """No NUL, which is in no id and no name, and which not every database can even be asked for."""
    if "\x00" in path:
        raise NotFound(
            f"There is no {json.dumps(path)} here; GET /docs lists the routes.", code="unknown_route"
        )
    if b"%00" in query or b"\x00" in query:
        raise Invalid("The query holds a NUL character (%00); remove it.", code="invalid_request")


def _fault(error: Exception, request_id: str) -> ApiError:
    """What to answer where nothing was expected to fail."""
    if is_disk_full(error):
        return DiskFull()
    if is_database_busy(error):
        return Unavailable("Another process holds the server's database; try again.", code="database_busy")
    if is_database_away(error):
        return Unavailable("The server's database cannot be reached; try again.", code="database_away")
    return InternalError(
        f"Something went wrong here; the server's log has request {request_id}.", code="internal"
    )


def _limit(server: Server, scope: Scope) -> int:
    path = scope["path"]
    if path in ("/files", "/v1/files") and scope["method"] == "POST":
        return server.settings.max_upload_bytes + MULTIPART_BYTES
    if path.startswith("/v1/uploads/") and path.endswith("/parts"):
        return MAX_PART_BYTES + MULTIPART_BYTES
    if path.startswith("/worker/"):
        return server.settings.max_worker_body_bytes
    return server.settings.max_body_bytes
