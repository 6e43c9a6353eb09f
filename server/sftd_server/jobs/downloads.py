"""Files that jobs made: one by one, or a result as a tar that is made while it is sent.

A file is found by its name in a manifest, never by a path that somebody sends, and opened without following links.
"""

import os
import tarfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from urllib.parse import quote

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sftd.schemas import ManifestFile
from sftd_server.datafolder import open_beneath
from sftd_server.errors import Conflict, NotFound
from sftd_server.jobs.queries import StoredFiles

PIECE = 1024 * 1024
_END = b"\0" * (2 * tarfile.BLOCKSIZE)


class _FileStream(StreamingResponse):
    """Sends an open file and closes it, also when the client hangs up before the first piece was asked for."""

    def __init__(self, content: FileIO, size: int, headers: dict[str, str]) -> None:
        super().__init__(_pieces(content, size), media_type="application/octet-stream", headers=headers)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._content:
            await super().__call__(scope, receive, send)


def one_file(data: Path, stored: StoredFiles, name: str) -> StreamingResponse:
    """One file of a manifest."""
    file = stored.files.get(name)
    if file is None:
        raise NotFound(f"There is no file {name[:200]!r} in this manifest.", code="unknown_file")
    content = _open(data, stored, name, file)
    headers = _headers(name.rsplit("/", 1)[-1], file.bytes)
    return _FileStream(content, file.bytes, headers)


def archive(data: Path, stored: StoredFiles, top: str) -> StreamingResponse:
    """All files of a manifest as a tar below one folder. Its length is known before, so a cut one shows."""
    for name, file in stored.files.items():
        _open(data, stored, name, file).close()
    heads = {name: _head(f"{top}/{name}", file.bytes) for name, file in sorted(stored.files.items())}
    length = sum(len(head) + _padded(stored.files[name].bytes) for name, head in heads.items()) + len(_END)
    headers = _headers(f"{top}.tar", length)
    return StreamingResponse(_tar(data, stored, heads), media_type="application/x-tar", headers=headers)


def plain_file(path: Path, filename: str) -> StreamingResponse:
    """A file of the server's own, such as an uploaded one."""
    try:
        content = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        raise NotFound(f"{filename} is no longer on disk.", code="file_gone") from None
    size = os.fstat(content.fileno()).st_size
    headers = _headers(filename, size)
    return _FileStream(content, size, headers)


def _open(data: Path, stored: StoredFiles, name: str, file: ManifestFile) -> FileIO:
    try:
        content = FileIO(open_beneath(data / stored.folder, name))
    except OSError:
        raise NotFound(f"{name} is no longer on disk.", code="file_gone") from None
    size = os.fstat(content.fileno()).st_size
    if size != file.bytes:
        content.close()
        raise Conflict(
            f"{name} has {size} bytes on disk, {file.bytes} on record: it was changed.", code="file_changed"
        )
    return content


def _tar(data: Path, stored: StoredFiles, heads: dict[str, bytes]) -> Iterator[bytes]:
    for name, head in heads.items():
        size = stored.files[name].bytes
        yield head
        yield from _pieces(_open(data, stored, name, stored.files[name]), size)
        yield b"\0" * (_padded(size) - size)
    yield _END


def _head(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _pieces(content: FileIO, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes. Raises OSError if the file has become shorter: the connection then breaks off."""
    with content as file:
        while size > 0:
            piece = file.read(min(PIECE, size))
            if not piece:
                raise OSError("a file became shorter while it was sent")
            size -= len(piece)
            yield piece


def _headers(filename: str, length: int) -> dict[str, str]:
    plain = "".join(
        char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in filename
    )
    return {
        "content-length": str(length),
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
    }
