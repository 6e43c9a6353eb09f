"""`client.files`: upload, list, look up, fetch, delete; and `unpack` and `write_file`, which write downloads safely."""

import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from sftd._transport import Transport
from sftd.errors import ConfigurationError, ConnectionFailed, FileFailed, WaitTimeout
from sftd.paging import pages
from sftd.plan import RenderedRows
from sftd.schemas import File, RowPreview

UPLOAD_TIMEOUT_SECONDS = 600.0  # the server reads and checks every row before it answers
POLL_SECONDS = 0.5


class Files:
    """Uploaded data files."""

    def __init__(self, transport: Transport, *, pause: Callable[[float], object] = time.sleep) -> None:
        self._transport = transport
        self._pause = pause

    def upload(self, path: str | Path, *, purpose: str = "fine-tune") -> File:
        """Send a data file; the server checks every row: `client.files.upload("rows.jsonl").id`."""
        path = Path(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
        with file:
            return self._send(file, filename=path.name, purpose=purpose)

    def create(
        self, *, file: str | Path | BinaryIO, purpose: str = "fine-tune", filename: str | None = None
    ) -> File:
        """The same for an open binary file too: `client.files.create(file=io.BytesIO(rows), filename="rows.jsonl")`."""
        if isinstance(file, str | Path):
            return self.upload(file, purpose=purpose)
        name = filename or Path(str(getattr(file, "name", "rows.jsonl"))).name
        return self._send(file, filename=name, purpose=purpose)

    def list(self, *, limit: int | None = None) -> Iterator[File]:
        """All files, newest first."""
        return pages(self._transport, "/files", File, limit=limit)

    def retrieve(self, file_id: str) -> File:
        """One file's record: `client.files.retrieve("file_…").num_rows`."""
        return self._transport.request("GET", _path(file_id)).parse(File)

    def content(self, file_id: str) -> bytes:
        """The file as it was uploaded, in memory; `download` writes a large one to disk."""
        with self._transport.stream(f"{_path(file_id)}/content") as pieces:
            return b"".join(pieces)

    def download(self, file_id: str, path: str | Path) -> Path:
        """Write the file as it was uploaded, checked by its hash: `client.files.download("file_…", "rows.jsonl")`."""
        path = Path(path)
        if path.is_dir():
            raise ConfigurationError(f"{path} is a folder; name the file to write.")
        file = self.retrieve(file_id)
        with self._transport.stream(f"{_path(file_id)}/content") as pieces:
            return write_file(path.parent, path.name, pieces, sha256=file.sha256)

    def rows(
        self, file_id: str, *, after: int | None = None, limit: int | None = None
    ) -> Iterator[RowPreview]:
        """Rows as they were understood, by line: `[row.line for row in client.files.rows("file_…", limit=3)]`."""
        return pages(self._transport, f"{_path(file_id)}/rows", RowPreview, after=after, limit=limit)

    def preview(
        self,
        file_id: str,
        *,
        base_model: str,
        after: int = 0,
        limit: int = 3,
        train_on: str = "completion",
        max_seq_length: int = 2048,
        timeout_seconds: float = 60.0,
    ) -> RenderedRows:
        """Rows through a model's chat template, with what carries the loss marked:
        `client.files.preview("file_…", base_model="Qwen/Qwen2.5-7B-Instruct").data[0].segments`.

        Raises WaitTimeout where no worker has rendered them in time.
        """
        params: dict[str, str | int] = {
            "base_model": base_model,
            "after": after,
            "limit": limit,
            "train_on": train_on,
            "max_seq_length": max_seq_length,
        }
        deadline = time.monotonic() + timeout_seconds
        while True:
            asked_at = time.monotonic()
            found = self._transport.request("GET", f"{_path(file_id)}/preview", params=params).parse(
                RenderedRows
            )
            if found.complete:
                return found
            if time.monotonic() >= deadline:
                raise WaitTimeout(found.incomplete or f"{file_id} is still being counted.")
            self._pause(max(0.0, POLL_SECONDS - (time.monotonic() - asked_at)))

    def wait(self, file_id: str, *, timeout_seconds: float | None = None) -> File:
        """Wait until the rows of a file are checked and return it; raise FileFailed where they are wrong."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            file = self.retrieve(file_id)
            if file.status == "error":
                raise FileFailed(f"{file.filename}: {file.status_details or 'its rows are wrong'}", file=file)
            if file.status != "uploaded":
                return file
            left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{file_id} is still being checked after {timeout_seconds or 0:g} s.")
            self._pause(min(POLL_SECONDS, left))

    def delete(self, file_id: str) -> None:
        """Delete a file. Refused while a job that is not done needs it."""
        self._transport.request("DELETE", _path(file_id))

    def _send(self, file: BinaryIO, *, filename: str, purpose: str) -> File:
        return self._transport.upload(
            "/files",
            file=file,
            filename=filename,
            fields={"purpose": purpose},
            timeout_seconds=UPLOAD_TIMEOUT_SECONDS,
        ).parse(File)


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


def _path(file_id: str) -> str:
    return f"/files/{quote(file_id, safe='')}"


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
