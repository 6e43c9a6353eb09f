"""Files that a worker without the shared folder sends, in pieces: `uploads/<job>/<sha256>`, `….part` until it is whole.

How far a part has come is how long it is on disk: so an upload goes on after a kill of either side. A whole one has
been hashed and fsynced. `placing` says how they become a checkpoint or a result. Calls block but where they are async.
"""

import asyncio
import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sftd_server.datafolder import PARTS_PREFIX, DataFolder
from sftd_server.disk import fsync, hash_of, try_lock
from sftd_server.errors import DiskFull, Invalid, TooLarge, Unavailable
from sftd_server.settings import Settings

T = TypeVar("T")
RESERVE_BYTES = 64 * 1024**2  # of the disk is left to the database
UNUSED_SECONDS = 24 * 3600.0
NUM_THREADS = 8
_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


@dataclass(frozen=True)
class Span:
    """A Content-Range: which bytes came, of how many. `start` is None where it only asks how far the upload is."""

    start: int | None
    end: int  # behind the last byte
    size: int


@dataclass(frozen=True)
class Progress:
    """How much of a blob is there."""

    num_bytes: int
    whole: bool


def span_of(header: str) -> Span:
    """The span that a Content-Range header names. Raises Invalid."""
    found = _RANGE.fullmatch(header)
    if found is None:
        raise _invalid("must be `bytes <first>-<last>/<size>`, or `bytes */<size>` to ask how much is there")
    size = int(found[3])
    if found[1] is None:
        return Span(None, 0, size)
    start, end = int(found[1]), int(found[2]) + 1
    if not start < end <= size:
        raise _invalid(f"{header!r} does not lie within the blob")
    return Span(start, end, size)


class Uploads:
    """All uploads below one data folder."""

    def __init__(self, folder: DataFolder, settings: Settings) -> None:
        self.folder = folder
        self._settings = settings
        self._free_threads = asyncio.Semaphore(NUM_THREADS)

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run blocking work of this package in a thread of its own: hashing takes seconds, a store may hang for longer,
        and neither may hold up other requests, or the end of the process."""
        async with self._free_threads:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[T] = loop.create_future()

            def settle(result: T | None, error: BaseException | None) -> None:
                if answer.done():  # whoever asked has left
                    return
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)  # type: ignore[arg-type]  # None only where T holds it

            def run() -> None:
                result, error = None, None
                try:
                    result = work(*arguments)
                except BaseException as caught:  # the edge of a thread: whoever asked gets it
                    error = caught
                with contextlib.suppress(RuntimeError):  # the loop is gone
                    loop.call_soon_threadsafe(settle, result, error)

            threading.Thread(target=run, name="artifacts", daemon=True).start()
            return await answer

    def of_job(self, job_id: str) -> Path:
        return self.folder.uploads / job_id

    def blob(self, job_id: str, sha256: str) -> Path:
        return self.of_job(job_id) / sha256

    @contextlib.contextmanager
    def lock(self, job_id: str) -> Iterator[None]:
        """One at a time for a job, in whichever server process. Raises Unavailable where another is at it."""
        self.of_job(job_id).mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.of_job(job_id) / ".lock"
        busy = Unavailable("Another call works on this job's uploads; try again.", code="upload_busy")
        handle = try_lock(path)
        if handle is None:
            raise busy
        try:
            if not _lies_at(handle, path):  # the sweep took it away between the two
                raise busy
            yield
        finally:
            os.close(handle)

    def look(self, job_id: str, sha256: str, size: int, recorded: list[str]) -> Progress:
        """How much is there. `recorded`: files that are on record with this hash, and need not be sent again."""
        with self.lock(job_id):
            blob = self.blob(job_id, sha256)
            if not blob.exists():
                for name in recorded:
                    if _link_if_right(self.folder.path / name, blob, sha256):
                        break
            if _size(blob) == size:
                return Progress(size, whole=True)
            self._check_size(job_id, sha256, size)
            return self._finished_if_whole(job_id, sha256, size)

    def append(self, job_id: str, sha256: str, span: Span, piece: bytes) -> Progress:
        """Take a piece if it begins where the upload stands; else say where that is. Raises Invalid, TooLarge, DiskFull."""
        with self.lock(job_id):
            if _size(self.blob(job_id, sha256)) == span.size:
                return Progress(span.size, whole=True)
            self._check_size(job_id, sha256, span.size)
            part = self._part(job_id, sha256)
            if span.start != (_size(part) or 0):
                return self._finished_if_whole(job_id, sha256, span.size)
            if shutil.disk_usage(self.folder.uploads).free < RESERVE_BYTES + len(piece):
                raise DiskFull
            with part.open("ab") as file:
                file.write(piece)
            return self._finished_if_whole(job_id, sha256, span.size)

    def forget(self, job_id: str, hashes: set[str]) -> None:
        """Remove uploads that have been put in their place."""
        for sha256 in hashes:
            self.blob(job_id, sha256).unlink(missing_ok=True)

    def sweep(self, *, now: float | None = None) -> int:
        """Remove what nobody has added to or used for a day. Returns the number of files."""
        before = (time.time() if now is None else now) - UNUSED_SECONDS
        num_removed = 0
        for folder in self.folder.uploads.iterdir():
            if folder.name.startswith(PARTS_PREFIX):  # a user's, which files/parts.py looks after
                continue
            with contextlib.suppress(Unavailable, NotADirectoryError), self.lock(folder.name):
                for path in folder.iterdir():
                    if path.name != ".lock" and path.stat().st_mtime < before:
                        path.unlink()
                        num_removed += 1
                if [path.name for path in folder.iterdir()] == [".lock"]:
                    shutil.rmtree(folder)
        return num_removed

    # ---------------------------------------------------------------- how

    def _part(self, job_id: str, sha256: str) -> Path:
        return self.of_job(job_id) / f"{sha256}.part"

    def _check_size(self, job_id: str, sha256: str, size: int) -> None:
        most = self._settings.max_blob_bytes
        if size > most:
            raise TooLarge(f"The blob has {size:,} bytes; the limit is {most:,}.", code="too_large")
        own = self._part(job_id, sha256)
        others = sum(path.stat().st_size for path in self.of_job(job_id).iterdir() if path != own)
        if others + size > self._settings.max_uploads_bytes:
            raise TooLarge(
                f"The uploads of {job_id} have {others:,} bytes, and this blob {size:,}; together they may have"
                f" {self._settings.max_uploads_bytes:,}.",
                code="uploads_too_large",
            )

    def _finished_if_whole(self, job_id: str, sha256: str, size: int) -> Progress:
        """Hash a part that is as long as it should be, and give it its name. Raises Invalid where the hash is wrong."""
        part = self._part(job_id, sha256)
        if size == 0:
            part.touch()
        num_bytes = _size(part) or 0
        if num_bytes < size:
            return Progress(num_bytes, whole=False)
        if num_bytes > size or hash_of(part) != sha256:
            part.unlink()
            raise Invalid(
                f"What was uploaded as {sha256} has another hash, or is longer than {size:,} bytes; it was dropped."
                " Send it again.",
                code="wrong_hash",
                param="sha256",
            )
        fsync(part)
        part.rename(self.blob(job_id, sha256))
        fsync(self.of_job(job_id))
        return Progress(size, whole=True)


def _lies_at(handle: int, path: Path) -> bool:
    """Whether an opened file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _link_if_right(found: Path, blob: Path, sha256: str) -> bool:
    """Take a file that is on record as the blob, if it still is what the record says."""
    try:
        if found.is_symlink() or hash_of(found) != sha256:
            return False
        os.link(found, blob)
        os.utime(blob)  # the sweep goes by it
    except OSError:
        return False
    return True


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _invalid(message: str) -> Invalid:
    return Invalid(f"Content-Range: {message}", code="invalid_request", param="Content-Range")
