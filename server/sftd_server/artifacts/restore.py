"""Brings a folder back from the store that is gone in the data folder, for a worker that shares it.

Each file is verified; the folder appears whole, by one rename.
"""

import asyncio
import logging
import os
import shutil
import time
from pathlib import Path
from uuid import uuid4

from sftd.schemas import ManifestFile
from sftd_server.artifacts.shelf import Shelf
from sftd_server.artifacts.store import Store, StoreError, WrongContent
from sftd_server.artifacts.uploads import Uploads
from sftd_server.disk import fsync, hash_of
from sftd_server.errors import NotFound, Unavailable

MANIFEST = "manifest.json"
ABANDONED_SECONDS = 24 * 3600.0

log = logging.getLogger("sftd.server")


class Restorer:
    """One a server. A folder is brought back once, however many ask."""

    def __init__(self, shelf: Shelf, uploads: Uploads) -> None:
        self._shelf = shelf
        self._uploads = uploads
        self._running: dict[str, asyncio.Future[None]] = {}

    async def bring(
        self, folder: str, files: dict[str, ManifestFile], *, manifest_sha256: str | None, seconds: float
    ) -> bool:
        """Bring a folder back; wait so long. False: it is still coming. Raises NotFound, Unavailable."""
        running = self._running.get(folder)
        if running is None:
            work = self._uploads.in_thread(self._bring, folder, files, manifest_sha256)
            running = self._running[folder] = asyncio.ensure_future(work)
            running.add_done_callback(lambda _: self._running.pop(folder, None))
        try:
            await asyncio.wait_for(asyncio.shield(running), seconds)
        except TimeoutError:
            return False
        return True

    def _bring(self, folder: str, files: dict[str, ManifestFile], manifest_sha256: str | None) -> None:
        target = self._shelf.data / folder
        mark = uuid4().hex[:12]  # another server, on another machine, may be at the same
        stage = target.parent / f".restore-{target.name}-{mark}"
        trash = target.parent / f".trash-{target.name}-{mark}"
        _clear_abandoned(target)
        wanted = {name: file.sha256 for name, file in files.items()}
        if manifest_sha256 is not None:
            wanted[MANIFEST] = manifest_sha256
        shutil.rmtree(stage, ignore_errors=True)
        try:
            for name, sha256 in wanted.items():
                self._fetch(stage / name, target / name, sha256)
            for below in [*(path for path in stage.rglob("*") if path.is_dir()), stage]:
                fsync(below)
            if target.exists():
                target.rename(trash)
            stage.rename(target)
            fsync(target.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            shutil.rmtree(trash, ignore_errors=True)
        log.info("%s: restored from the store", folder)

    def _fetch(self, path: Path, local: Path, sha256: str) -> None:
        """What is still right on disk is kept; the rest comes from the store."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if local.is_file() and not local.is_symlink() and hash_of(local) == sha256:
            os.link(local, path)
            return
        fetch_blob(self._shelf.store, sha256, path)


def _clear_abandoned(target: Path) -> None:
    """Remove what a server that was killed here left; a day later, as another may be at it now."""
    before = time.time() - ABANDONED_SECONDS
    for left in [
        *target.parent.glob(f".restore-{target.name}-*"),
        *target.parent.glob(f".trash-{target.name}-*"),
    ]:
        if left.is_dir() and not left.is_symlink() and left.stat().st_mtime < before:
            shutil.rmtree(left, ignore_errors=True)


def fetch_blob(store: Store | None, sha256: str, path: Path) -> None:
    """Write a blob of the store to a new file, verified and durable. Raises NotFound, Unavailable, OSError."""
    try:
        size = None if store is None else store.size(sha256)
        if store is None or size is None:
            raise NotFound(f"{path.name} is no longer on disk.", code="file_gone")
        with path.open("xb") as file:
            for piece in store.pieces(sha256, size=size):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except WrongContent as error:
        raise NotFound(f"{path.name} is not whole in the store: {error}.", code="file_gone") from None
    except StoreError as error:
        raise Unavailable(f"The store does not answer: {error}.", code="store_unavailable") from None


def bring_blob(shelf: Shelf, folder: str, name: str, sha256: str) -> None:
    """Bring one uploaded file back under its hash. Raises NotFound, Unavailable, OSError."""
    target = shelf.data / folder / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = shelf.data / "tmp" / f"upload-{uuid4().hex}"
    try:
        fetch_blob(shelf.store, sha256, temporary)
        os.replace(temporary, target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
