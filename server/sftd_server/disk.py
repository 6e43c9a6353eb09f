"""Files and folders on disk: hashed, made to last, held by one process at a time."""

import fcntl
import hashlib
import os
from pathlib import Path


def hash_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content, or the names in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(path: Path, *, shared: bool = False, make: bool = True) -> int | None:
    """Hold a lock file, with others that share it, or alone. None: somebody else holds it.

    The lock ends when the handle is closed, and with the process. A file that is not there is made; without `make` that
    raises FileNotFoundError.
    """
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
