"""`client.files`: upload, list, look up, delete; and `fetch_to`, which writes downloads to disk safely."""

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from sftd._transport import Transport
from sftd.errors import ConfigurationError, ConnectionFailed
from sftd.paging import pages
from sftd.schemas import File

UPLOAD_TIMEOUT_SECONDS = 600.0  # the server reads and checks every row before it answers


class Files:
    """Uploaded data files."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, path: str | Path, *, purpose: str = "fine-tune") -> File:
        """Send a data file; the server checks every row: `client.files.upload("rows.jsonl").id`."""
        path = Path(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
        with file:
            reply = self._transport.upload(
                "/files",
                file=file,
                filename=path.name,
                fields={"purpose": purpose},
                timeout_seconds=UPLOAD_TIMEOUT_SECONDS,
            )
        return reply.parse(File)

    def list(self, *, limit: int | None = None) -> Iterator[File]:
        """All files, newest first."""
        return pages(self._transport, "/files", File, limit=limit)

    def retrieve(self, file_id: str) -> File:
        """One file's record: `client.files.retrieve("file_…").num_rows`."""
        return self._transport.request("GET", f"/files/{quote(file_id, safe='')}").parse(File)

    def delete(self, file_id: str) -> None:
        """Delete a file. Refused while a job that is not done needs it."""
        self._transport.request("DELETE", f"/files/{quote(file_id, safe='')}")


def unpack(pieces: Iterator[bytes], folder: Path, *, top: str) -> list[Path]:
    """Unpack a tar as it arrives, without its `top` folder: plain files below `folder`, nothing else."""
    written = []
    stream = io.BufferedReader(_Pieces(pieces), 1 << 20)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isdir():
                    continue
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise ConnectionFailed(
                        f"The archive holds {member.name!r}, which is not a plain file; refused."
                    )
                written.append(
                    write_file(
                        folder, member.name.removeprefix(f"{top}/"), iter(partial(content.read, 1 << 20), b"")
                    )
                )
    except (tarfile.TarError, EOFError) as error:
        raise ConnectionFailed(f"The archive did not arrive whole ({error}); try again.") from error
    while stream.read(1 << 20):  # raises if the connection broke after the last member
        pass
    return written


def write_file(folder: Path, name: str, pieces: Iterator[bytes], *, sha256: str | None = None) -> Path:
    """Write one file below `folder`, under a temporary name until it is whole and, where given, its hash is right."""
    target = folder.joinpath(*_safe_parts(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(
            f"{target.parent} leads out of {folder} by a link; download into an empty folder."
        )
    digest = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ConnectionFailed(
                f"{name} did not arrive as the server recorded it (its hash differs); try again."
            )
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _safe_parts(name: str) -> tuple[str, ...]:
    """The parts of a name that stays below its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\x00" in name:
        raise ConnectionFailed(
            f"The server named a file {name!r}, which would lie outside the folder; refused."
        )
    return path.parts


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Pieces(io.RawIOBase):
    """Pieces of a body as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(
        self, buffer: Any
    ) -> int:  # any writable buffer; typeshed's name for it is not there at run time
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        num_bytes = min(len(buffer), len(self._rest))
        buffer[:num_bytes] = self._rest[:num_bytes]
        self._rest = self._rest[num_bytes:]
        return num_bytes
