"""Receives a multipart upload as it comes: the file goes to disk and is hashed on the way, nothing is held in memory."""

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from sftd_server.errors import Invalid, TooLarge

if TYPE_CHECKING:  # the library has this name for type checkers only
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 1024
MAX_PARTS = 10
MAX_PART_BYTES = 64 * 1024**2  # of a file that comes in several requests
LIFETIME_SECONDS = (3600, 30 * 86400)  # least and most that `expires_after` may say
PURPOSE, ANCHOR, SECONDS = "purpose", "expires_after[anchor]", "expires_after[seconds]"
LIFETIME_FIELDS: dict[str, Any] = {  # OpenAPI: open by nature
    ANCHOR: {"type": "string", "enum": ["created_at"]},
    SECONDS: {"type": "integer", "minimum": LIFETIME_SECONDS[0], "maximum": LIFETIME_SECONDS[1]},
}


def form_body(fields: dict[str, Any], *, required: list[str]) -> dict[str, Any]:  # OpenAPI: open by nature
    """What a route that takes a form says of its body, as `openapi_extra`."""
    schema = {"type": "object", "required": required, "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass
class Received:
    """A file that has arrived, under a temporary name, and the fields that came with it."""

    path: Path
    filename: str
    fields: dict[str, str]
    bytes: int
    sha256: str


@dataclass
class Upload:
    """A file that may be taken in."""

    path: Path
    filename: str
    purpose: str
    bytes: int
    sha256: str
    lifetime_seconds: int | None = None  # then it is deleted; None: never


async def receive(
    request: Request, folder: Path, *, max_bytes: int, default_purpose: str | None = "fine-tune"
) -> Upload:
    """Take a file and what is said of it from a multipart body. Raises Invalid or TooLarge, and leaves nothing behind."""
    got = await receive_form(
        request, folder, file="file", fields=(PURPOSE, ANCHOR, SECONDS), max_bytes=max_bytes
    )
    try:
        seconds = _whole_number(SECONDS, got.fields.get(SECONDS))
        lifetime = lifetime_of(got.fields.get(ANCHOR), seconds)
        purpose = got.fields.get(PURPOSE, default_purpose)
        if purpose is None:
            raise _invalid(PURPOSE, "is required; fine-tune for data to train on")
    except BaseException:
        got.path.unlink(missing_ok=True)
        raise
    return Upload(got.path, got.filename, purpose, got.bytes, got.sha256, lifetime)


async def receive_form(
    request: Request, folder: Path, *, file: str, fields: tuple[str, ...], max_bytes: int
) -> Received:
    """Take the part `file`, and those of `fields` that are there. Raises Invalid or TooLarge, and leaves nothing behind."""
    handle, name = tempfile.mkstemp(prefix="upload-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as target:
            form = _Form(target, max_bytes, file=file, fields=fields)
            await _parse(request, form)
        if form.filename is None:
            raise _invalid(file, f"is required; send it as multipart/form-data: curl -F {file}=@rows.jsonl")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    values = {name: bytes(value).decode("utf-8", "replace") for name, value in form.values.items()}
    return Received(path, label(form.filename), values, form.num_bytes, form.digest.hexdigest())


def lifetime_of(anchor: str | None, seconds: int | None) -> int | None:
    """How long a file shall live, as `expires_after` says it. Raises Invalid."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise _invalid(ANCHOR, f"must be created_at, not {(anchor or '')[:60]!r}")
    least, most = LIFETIME_SECONDS
    if seconds is None or not least <= seconds <= most:
        raise _invalid(SECONDS, f"must be a whole number from {least} (an hour) to {most} (30 days)")
    return seconds


def label(filename: str) -> str:
    """A file's name is a label for people, never a path: its last part, without anything unprintable."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char for char in last if char.isprintable()).strip(" .")
    return shown[:255] or "upload"


def _whole_number(field: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise _invalid(field, f"must be a whole number of seconds, not {text[:60]!r}")
    return int(text)


async def _parse(request: Request, form: "_Form") -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _invalid(
            form.file_field, f"must be sent as multipart/form-data: curl -F {form.file_field}=@rows.jsonl"
        )
    parser = MultipartParser(boundary, form.callbacks())
    try:
        async for piece in request.stream():
            parser.write(piece)
        parser.finalize()
    except FormParserError as error:
        raise Invalid(f"The body is not multipart/form-data: {error}", code="invalid_multipart") from None
    if not form.ended:
        raise Invalid("The multipart body breaks off before its end.", code="invalid_multipart")


@dataclass
class _Part:
    """The part that is being read."""

    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    name: str = ""


class _Form:
    """What the parser calls: one instance takes one body."""

    def __init__(self, target: BinaryIO, max_bytes: int, *, file: str, fields: tuple[str, ...]) -> None:
        self._target = target
        self.file_field = file
        self._fields = fields
        self._max_bytes = max_bytes
        self._part = _Part()
        self._num_parts = 0
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.filename: str | None = None
        self.values: dict[str, bytearray] = {}
        self.ended = False

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._name_part,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._part = _Part()
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise Invalid(f"The form has more than {MAX_PARTS} parts.", code="invalid_multipart")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _header_end(self) -> None:
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition = bytes(self._part.value)
        self._part.header.clear()
        self._part.value.clear()

    def _name_part(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        known = (self.file_field, *self._fields)
        if name not in known:
            raise _invalid(name[:64] or "body", f"unknown field; known are {', '.join(known)}")
        if name == self.file_field:
            if self.filename is not None:
                raise _invalid(name, "stands twice; upload one file at a time")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            self.values[name] = bytearray()
        self._part.name = name

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part.name == self.file_field:
            self.num_bytes += len(piece)
            if self.num_bytes > self._max_bytes:
                raise TooLarge(
                    f"{self.file_field}: is larger than the limit of {self._max_bytes:,} bytes; split it",
                    code="too_large",
                    param=self.file_field,
                )
            self.digest.update(piece)
            self._target.write(piece)
        else:
            value = self.values[self._part.name]
            value += piece
            if len(value) > MAX_FIELD_BYTES:
                raise _invalid(self._part.name, "is too long")

    def _end(self) -> None:
        self.ended = True


def _invalid(field: str, message: str) -> Invalid:
    return Invalid(f"{field}: {message}", code="invalid_request", param=field)
