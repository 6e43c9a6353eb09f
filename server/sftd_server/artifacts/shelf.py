"""Where the content of a recorded file is read from: the data folder, and where it is gone there, the store.

Opened by its name in a manifest, below its folder, without following links. Calls block; run them in a thread.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from sftd.schemas import ManifestFile
from sftd_server.artifacts.store import PIECE, Store, StoreError
from sftd_server.datafolder import open_beneath
from sftd_server.errors import Conflict, NotFound, Unavailable


@dataclass
class Content:
    """An opened file. Close it, also if nothing was read."""

    size: int
    sha256: str
    file: FileIO | None  # None: it is read from the store
    store: Store | None = None

    def pieces(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on. Raises where it is not what is on record: the connection then breaks off."""
        with self:
            if self.file is None:
                assert self.store is not None
                yield from self.store.pieces(self.sha256, start=start, size=self.size)
                return
            self.file.seek(start)
            left = self.size - start
            while left > 0:
                piece = self.file.read(min(PIECE, left))
                if not piece:
                    raise OSError("a file became shorter while it was sent")
                left -= len(piece)
                yield piece

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> "Content":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shelf:
    """The data folder, and the store behind it."""

    def __init__(self, data: Path, store: Store | None) -> None:
        self.data = data
        self.store = store

    def open(self, folder: str, name: str, file: ManifestFile) -> Content:
        """A file of a manifest. `folder` is relative to the data folder. Raises NotFound, Conflict, Unavailable."""
        local = self._local(folder, name)
        if local is None:
            return self._stored(file) or _gone(name)
        size = os.fstat(local.fileno()).st_size
        if size != file.bytes:
            local.close()
            if (stored := self._stored(file)) is not None:
                return stored
            raise Conflict(
                f"{name} has {size} bytes on disk, {file.bytes} on record: it was changed.",
                code="file_changed",
            )
        return Content(size, file.sha256, local)

    def open_unsized(self, folder: str, name: str, sha256: str) -> Content:
        """A file whose size is not on record, as a manifest's own may be. Raises as `open`."""
        local = self._local(folder, name)
        if local is not None:
            return Content(os.fstat(local.fileno()).st_size, sha256, local)
        size = self._stored_size(sha256)
        return _gone(name) if size is None else Content(size, sha256, None, self.store)

    def _local(self, folder: str, name: str) -> FileIO | None:
        with contextlib.suppress(OSError):
            return FileIO(open_beneath(self.data / folder, name))
        return None

    def _stored(self, file: ManifestFile) -> Content | None:
        if self._stored_size(file.sha256) != file.bytes:
            return None
        return Content(file.bytes, file.sha256, None, self.store)

    def _stored_size(self, sha256: str) -> int | None:
        if self.store is None:
            return None
        try:
            return self.store.size(sha256)
        except StoreError as error:
            raise Unavailable(
                f"The file is not on disk, and the store does not answer ({error}); try again.",
                code="store_unavailable",
            ) from None


def _gone(name: str) -> Content:
    raise NotFound(f"{name} is no longer on disk.", code="file_gone")
