"""Receives a multipart upload as it comes: the file goes to disk and is hashed on the way, nothing is held in memory."""

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from sftd_server.errors import Invalid, TooLarge

if TYPE_CHECKING:  # the library has this name for type checkers only
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 1024
MAX_PARTS = 10
_FIELDS = ("file", "purpose")


@dataclass
class Upload:
    """A file that has arrived, under a temporary name."""

    path: Path
    filename: str
    purpose: str
    bytes: int
    sha256: str


async def receive(request: Request, folder: Path, *, max_bytes: int) -> Upload:
    """Take the parts `file` and `purpose` of a multipart body. Raises Invalid or TooLarge, and leaves nothing behind."""
    handle, name = tempfile.mkstemp(prefix="upload-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            form = _Form(file, max_bytes)
            await _parse(request, form)
        if form.filename is None:
            raise _invalid("file", "is required; send it as multipart/form-data: curl -F file=@rows.jsonl")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    purpose = bytes(form.purpose).decode("utf-8", "replace") if form.purpose is not None else "fine-tune"
    return Upload(path, _label(form.filename), purpose, form.num_bytes, form.digest.hexdigest())


async def _parse(request: Request, form: "_Form") -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _invalid("file", "must be sent as multipart/form-data: curl -F file=@rows.jsonl")
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

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._part = _Part()
        self._num_parts = 0
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.filename: str | None = None
        self.purpose: bytearray | None = None
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
        if name not in _FIELDS:
            raise _invalid(name[:64] or "body", f"unknown field; the fields are {' and '.join(_FIELDS)}")
        if name == "file":
            if self.filename is not None:
                raise _invalid("file", "stands twice; upload one file at a time")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            self.purpose = bytearray()
        self._part.name = name

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part.name == "file":
            self.num_bytes += len(piece)
            if self.num_bytes > self._max_bytes:
                raise TooLarge(
                    f"file: is larger than the limit of {self._max_bytes:,} bytes; split it",
                    code="too_large",
                    param="file",
                )
            self.digest.update(piece)
            self._file.write(piece)
        elif self.purpose is not None:
            self.purpose += piece
            if len(self.purpose) > MAX_FIELD_BYTES:
                raise _invalid(self._part.name, "is too long")

    def _end(self) -> None:
        self.ended = True


def _label(filename: str) -> str:
    """A file's name is a label for people, never a path: its last part, without anything unprintable."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char for char in last if char.isprintable()).strip(" .")
    return shown[:255] or "upload"


def _invalid(field: str, message: str) -> Invalid:
    return Invalid(f"{field}: {message}", code="invalid_request", param=field)
