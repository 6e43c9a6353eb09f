"""Room on the disk: how much there is, a reserve below which only what must be written is, and a ballast.

On a full disk SQLite can write nothing, not even that a job has failed or that a lease goes on. So a file of no use
lies beside the database, `ballast`. It is deleted when a write finds no room, which leaves leases, endings and cancels
enough of it, while reports, uploads and claims are answered 507; and it is made again when there is space.
"""

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path

from sqlalchemy import make_url

from sftd_server.errors import DiskFull, is_disk_full
from sftd_server.settings import Settings

NAME = "ballast"
SPARE_BYTES = 1024**2  # less than this is a full disk
_PIECE = 1024**2

_BULK = ("/metrics", "/logs", "/events")  # a worker's reports; it keeps them until they are taken
_GOES_ON = ("/cancel", "/pause")  # a user ends something
_SMALL = ("/storage/", "/workers/")  # frees space, or steers workers

log = logging.getLogger("sftd.server")


class DiskRoom:
    """The disks that a server writes to. Every method may be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders = {settings.data, database_folder(settings)}
        self._lock = threading.Lock()
        self.path = database_folder(settings) / NAME
        self.low = False  # below the reserve: nothing large is taken
        self.room_bytes = 2**62  # on the fuller disk, with what the ballast holds; as of the last look
        self.num_spent = 0  # how often the ballast was given up

    def begin(self) -> None:
        """At a start, before anything is written: a disk that is full already gets the ballast's room."""
        with self._lock:
            if self._free() < SPARE_BYTES:
                self._spend()
            self._measure()

    def look(self) -> None:
        """Measure, and make the ballast again where there is space for it."""
        with self._lock:
            made = self._make()
            self._measure(is_full=not made)

    def make_room(self) -> bool:
        """A write found the disk full. True: there may be room now, so try again what must be written."""
        with self._lock:
            spent = self._spend()
            self._measure()
            return spent or self.room_bytes >= SPARE_BYTES

    def require_room(self, num_bytes: int = 0) -> None:
        """Raise DiskFull where the reserve is touched, would be by so much more, or the ballast is given up."""
        if self.low or self.room_bytes - num_bytes < self._settings.disk_reserve_bytes:
            raise DiskFull(
                f"The server's disk has {self.room_bytes:,} bytes of room, of which"
                f" {self._settings.disk_reserve_bytes:,} are kept in reserve; its owner frees space, then try again."
            )

    def admit(self, method: str, path: str, announced: str | None) -> None:
        """Let a request pass, or raise DiskFull. `announced` is the length of its body as it says."""
        if needs_room(method, path):
            is_large = path.startswith(("/worker/blobs", "/v1/uploads/")) or path in ("/files", "/v1/files")
            self.require_room(int(announced) if is_large and announced and announced.isdigit() else 0)

    # ------------------------------------------------------------ under the lock

    def _measure(self, *, is_full: bool = False) -> None:
        self.room_bytes = min(self._room(folder) for folder in self._folders)
        low = is_full or self.room_bytes < self._settings.disk_reserve_bytes or not self._is_balanced()
        if low != self.low:
            said = "is nearly full: reports, uploads and claims wait" if low else "has room again"
            log.warning("the disk %s (%d bytes of room)", said, self.room_bytes)
        self.low = low

    def _is_balanced(self) -> bool:
        """The ballast is there, or can be made at the next look."""
        return _size(self.path) == self._settings.ballast_bytes or self._can_make()

    def _can_make(self) -> bool:
        wanted = self._settings.ballast_bytes
        least = max(self._settings.disk_reserve_bytes, wanted + SPARE_BYTES) if wanted else 0
        return self._room(self.path.parent) >= least

    def _free(self) -> int:
        return min(_free(folder) for folder in self._folders)

    def _room(self, folder: Path) -> int:
        """Free bytes, and what the ballast would give back."""
        free = _free(folder)
        with contextlib.suppress(OSError):
            ballast = self.path.stat()
            if ballast.st_dev == folder.stat().st_dev:
                free += ballast.st_blocks * 512
        return free

    def _spend(self) -> bool:
        try:
            self.path.unlink()
        except OSError:
            return False
        self.num_spent += 1
        log.warning("the disk is full: the ballast was given up for what must be written")
        return True

    def _make(self) -> bool:
        """Make the ballast if it is not there and there is space beyond the reserve. False: the disk would not take it."""
        wanted = self._settings.ballast_bytes
        if _size(self.path) == wanted or not wanted:
            return True
        if not self._can_make():
            return True
        try:
            _write_noise(self.path, wanted)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            if not is_disk_full(error):
                log.warning("the ballast %s could not be made: %s", self.path, error)
            return not is_disk_full(error)
        return True


def needs_room(method: str, path: str) -> bool:
    """Whether a request waits while the disk is nearly full. What reads, deletes, ends or keeps a lease goes on."""
    if method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return False
    if path.startswith("/worker/"):
        return path == "/worker/claim" or path.startswith("/worker/blobs") or path.endswith(_BULK)
    return not path.endswith(_GOES_ON) and not path.startswith(_SMALL)


def database_folder(settings: Settings) -> Path:
    """Where the SQLite file lies; the data folder where the database is a server."""
    url = make_url(settings.database_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return settings.data
    return Path(url.database).absolute().parent


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # not there yet, or not to be asked: then nothing is known against it
        return 2**62


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_noise(path: Path, num_bytes: int) -> None:
    """A file that really takes its size: noise, which no file system stores for less."""
    with path.open("wb") as file:
        for begin in range(0, num_bytes, _PIECE):
            file.write(os.urandom(min(_PIECE, num_bytes - begin)))
        file.flush()
        os.fsync(file.fileno())
