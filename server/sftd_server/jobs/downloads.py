"""Files that jobs made: one by one, or a result as a tar that is made while it is sent.

A file is found by its name in a manifest, never by a path that somebody sends. `Shelf` opens it: it may be in the store
alone, so that all of this blocks; run it in a thread.
"""

import tarfile
from collections.abc import Iterator
from urllib.parse import quote

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sftd.schemas import ManifestFile
from sftd_server.artifacts.shelf import Content, Shelf
from sftd_server.errors import NotFound
from sftd_server.jobs.queries import StoredFiles

_END = b"\0" * (2 * tarfile.BLOCKSIZE)


class _FileStream(StreamingResponse):
    """Sends opened content and closes it, also when the client hangs up before the first piece was asked for."""

    def __init__(self, content: Content, headers: dict[str, str]) -> None:
        super().__init__(content.pieces(), media_type="application/octet-stream", headers=headers)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._content:
            await super().__call__(scope, receive, send)


def one_file(shelf: Shelf, stored: StoredFiles, name: str) -> StreamingResponse:
    """One file of a manifest."""
    file = stored.files.get(name)
    if file is None:
        raise NotFound(f"There is no file {name[:200]!r} in this manifest.", code="unknown_file")
    content = shelf.open(stored.folder, name, file)
    return _FileStream(content, _headers(name.rsplit("/", 1)[-1], file.bytes))


def archive(shelf: Shelf, stored: StoredFiles, top: str) -> StreamingResponse:
    """All files of a manifest as a tar below one folder. Its length is known before, so a cut one shows."""
    for name, file in stored.files.items():
        shelf.open(stored.folder, name, file).close()
    heads = {name: _head(f"{top}/{name}", file.bytes) for name, file in sorted(stored.files.items())}
    length = sum(len(head) + _padded(stored.files[name].bytes) for name, head in heads.items()) + len(_END)
    headers = _headers(f"{top}.tar", length)
    return StreamingResponse(_tar(shelf, stored, heads), media_type="application/x-tar", headers=headers)


def plain_file(shelf: Shelf, folder: str, name: str, file: ManifestFile, filename: str) -> StreamingResponse:
    """A file of the server's own, such as an uploaded one, under the name that its user knows."""
    try:
        content = shelf.open(folder, name, file)
    except NotFound:
        raise NotFound(f"{filename} is no longer on disk.", code="file_gone") from None
    return _FileStream(content, _headers(filename, content.size))


def _tar(shelf: Shelf, stored: StoredFiles, heads: dict[str, bytes]) -> Iterator[bytes]:
    for name, head in heads.items():
        size = stored.files[name].bytes
        yield head
        yield from shelf.open(stored.folder, name, stored.files[name]).pieces()
        yield b"\0" * (_padded(size) - size)
    yield _END


def _head(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _headers(filename: str, length: int) -> dict[str, str]:
    plain = "".join(
        char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in filename
    )
    return {
        "content-length": str(length),
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
    }
