"""The data folder: what lies where, who may read it, and one server at a time.

sftd.db  admin.key  worker.key  installation.id  (server.secret: of older installations)
blobs/sha256/<2>/<sha>  jobs/<id>/  models/  uploads/<id>/  locks/  cache/  tmp/
"""

import asyncio
import os
import random
import re
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sftd_server.disk import try_lock

_FOLDERS = ("blobs/sha256", "jobs", "models", "uploads", "locks", "cache", "tmp")


_NETWORK_TYPES = {
    *(
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ncpfs",
        "afs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "davfs",
    ),
    *(
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph-fuse",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.rclone",
        "fuse.goofys",
    ),
    *("fuse.mount-s3", "fuse.juicefs", "fuse.curlftpfs", "fuse.smbnetfs", "fuse.nfs", "fuse.davfs2"),
}
_OCTAL = re.compile(r"\\([0-7]{3})")  # how a list of mounts writes a space
PARTS_PREFIX = "upload_"  # of folders in uploads/: files that users send in parts; the others are of jobs
_ABANDONED_SECONDS = 3600.0  # an upload that stalls is given up long before
_LEAST_WAIT, _MOST_WAIT = 0.002, 0.03  # between looks at a lock that another server holds, in seconds
_MOST_STREAK = 0.5  # seconds for which tasks of one server hand a lock on among them


class StartRefused(Exception):
    """The server does not start. The message says why and what to do."""


class DataFolderInUse(StartRefused):
    """Another server runs on this data folder."""


class OtherInstallation(StartRefused):
    """The data folder and the database belong to different installations."""


class NetworkFileSystem(StartRefused):
    """SQLite would lie on a network file system, whose locks and caches it cannot rely on."""


@dataclass(frozen=True)
class DataFolder:
    """Paths below the data folder."""

    path: Path

    @property
    def admin_key(self) -> Path:
        return self.path / "admin.key"

    @property
    def worker_key(self) -> Path:
        return self.path / "worker.key"

    @property
    def tmp(self) -> Path:
        return self.path / "tmp"

    @property
    def uploads(self) -> Path:
        return self.path / "uploads"

    def blob_name(self, sha256: str) -> str:
        """Where a blob lies, relative to the data folder."""
        return f"blobs/sha256/{sha256[:2]}/{sha256}"

    def job_name(self, job_id: str) -> str:
        """Where a job's folder lies, relative to the data folder."""
        return f"jobs/{job_id}"

    def prepare(self) -> None:
        """Make what is missing; remove what uploads left behind when a server died."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _FOLDERS:
            (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def clear_tmp(self, *, shared: bool = False) -> None:
        """Remove what uploads left behind when a server died. Call it under the lock.

        Where other servers may be using the folder, only what nobody has written to for long is surely left behind.
        """
        before = time.time() - _ABANDONED_SECONDS if shared else float("inf")
        for left in self.tmp.glob("upload-*"):
            try:
                if left.stat().st_mtime < before:
                    left.unlink()
            except FileNotFoundError:  # another server was quicker
                continue

    def lock(self, *, shared: bool = False) -> int:
        """Take the folder for this process, or with others that share a database; the lock ends with the process.

        Raises DataFolderInUse.
        """
        handle = try_lock(self.path / "locks" / "server.lock", shared=shared)
        if handle is None:
            raise DataFolderInUse(
                f"Another sftd-server runs on {self.path}; stop it, or choose another folder with --data."
            )
        return handle

    def read(self, name: str) -> str | None:
        """What stands in a secret file; None where there is none."""
        try:
            return (self.path / name).read_text().strip() or None
        except FileNotFoundError:
            return None

    def secret(self, name: str, *, prefix: str = "", bits: int = 256) -> str:
        """The content of a secret file, made at first use, readable by the owner only."""
        found = self.read(name)
        if found is not None:
            return found
        made = prefix + secrets.token_hex(bits // 8)
        self.write_secret(name, made)
        return made

    def write_secret(self, name: str, text: str) -> None:
        """Write a file that only the owner reads, whole or not at all. Servers that share the folder may do it at once."""
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


class FolderLock:
    """A lock among the tasks of this process and, where it is shared, among all servers on the folder.

    `async with lock: …`; what is held ends with the process. Waiting holds no thread: what the holder of one lock waits
    for may need the threads that those who wait for another would hold.
    """

    def __init__(self, path: Path, *, shared: bool) -> None:
        self._path = path
        self._shared = shared
        self._here = asyncio.Lock()
        self._handle = -1
        # Of this process's holding it, one task after another.
        self._streak_began = self._released = float("-inf")

    async def __aenter__(self) -> None:
        await self._here.acquire()
        if self._shared:
            try:
                self._handle = await self._take()
            except BaseException:
                self._here.release()
                raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shared:
            os.close(self._handle)
            self._released = time.monotonic()
        self._here.release()

    async def _take(self) -> int:
        """Ask again and again: at first often, for most are held for milliseconds."""
        await self._let_others_in()
        wait = _LEAST_WAIT
        while (handle := try_lock(self._path)) is None:
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _MOST_WAIT)
        return handle

    async def _let_others_in(self) -> None:
        """Others see a lock that is handed on at once only as held: after a while there is a gap."""
        now = time.monotonic()
        if now - self._released > _LEAST_WAIT:
            self._streak_began = now
        elif now - self._streak_began > _MOST_STREAK:
            await asyncio.sleep(2 * _MOST_WAIT)
            self._streak_began = time.monotonic()


def require_local(file: Path, mounts: str | None = None) -> None:
    """Refuse a database file on a network file system. Raises NetworkFileSystem.

    `mounts` is the text of /proc/self/mountinfo, where it is not to be read.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
        except OSError:
            return  # another system; it cannot be told
    real = Path(os.path.realpath(file))
    kind, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split(" ")[4]))
        if real.is_relative_to(point) and len(point.parts) >= longest:  # a later mount covers an earlier one
            kind, longest = after.split(" ")[0], len(point.parts)
    if kind in _NETWORK_TYPES:
        raise NetworkFileSystem(
            f"{file} would lie on a network file system ({kind}), where SQLite can lose data: put the data folder on a"
            " local disk, give SFTD_DATABASE_URL=sqlite:///<path on a local disk>, or use PostgreSQL."
        )


def open_beneath(folder: Path, name: str) -> int:
    """Open a plain file below a folder for reading, following no symbolic link on the way. Raises OSError."""
    parts = name.split("/")
    if not all(parts) or any(part in (".", "..") or "\x00" in part for part in parts):
        raise FileNotFoundError(name)
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
