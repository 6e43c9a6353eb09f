"""The data folder: what lies where, who may read it, and one server at a time.

sftd.db  admin.key  worker.key  server.secret  installation.id
blobs/sha256/<2>/<sha>  jobs/<id>/  models/  locks/  cache/  tmp/
"""

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

_FOLDERS = ("blobs/sha256", "jobs", "models", "locks", "cache", "tmp")


class DataFolderInUse(Exception):
    """Another server runs on this data folder."""


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

    def clear_tmp(self) -> None:
        """Remove what uploads left behind when a server died. Call it under the lock."""
        for left in self.tmp.glob("upload-*"):
            left.unlink(missing_ok=True)

    def lock(self) -> int:
        """Take the folder for this process; the lock ends with it. Raises DataFolderInUse."""
        handle = os.open(self.path / "locks" / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise DataFolderInUse(
                f"Another sftd-server runs on {self.path}; stop it, or choose another folder with --data."
            ) from None
        return handle

    def secret(self, name: str, *, prefix: str = "", bits: int = 256) -> str:
        """The content of a secret file, made at first use, readable by the owner only."""
        path = self.path / name
        try:
            found = path.read_text().strip()
            if found:
                return found
        except FileNotFoundError:
            pass
        made = prefix + secrets.token_hex(bits // 8)
        self.write_secret(name, made)
        return made

    def write_secret(self, name: str, text: str) -> None:
        """Write a file that only the owner reads, whole or not at all."""
        temporary = self.path / f".{name}.new"
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


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
