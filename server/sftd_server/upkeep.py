"""What is looked at every second: how much room the disk has, and the write-ahead log, which is folded into the database.

SQLite folds the log by itself every thousand pages, but only as far as no reader stands in the way, and not when
nothing is written. So it is folded when it is quiet, and with a little insistence where readers have let it grow.
"""

import asyncio
import logging
import sqlite3
from pathlib import Path

from sqlalchemy import make_url

from sftd_server.server import Server

LOOK_SECONDS = 1.0
HURRIED_SECONDS = 0.25  # between looks while the log is large
LARGE_WAL_BYTES = 8 * 1024**2  # from here on it is folded under load too
STUBBORN_WAL_BYTES = 16 * 1024**2  # from here on readers are waited for, so that it can begin anew
HUGE_WAL_BYTES = 40 * 1024**2  # and from here on longer
WAIT_MILLISECONDS, LONG_WAIT_MILLISECONDS = 200, 1000  # at most: writes wait meanwhile

log = logging.getLogger("sftd.server")


class Upkeep:
    """One a server. `tick` is one look; `run` looks for ever."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._writes_seen = -1
        self._writes_folded = -1
        self._hurried = False

    async def run(self) -> None:
        """Tick until cancelled. An error is logged and the loop goes on."""
        while True:
            try:
                await self.tick()
            except Exception:
                log.exception("looking after disk and database failed; trying again")
            await asyncio.sleep(HURRIED_SECONDS if self._hurried else LOOK_SECONDS)

    async def tick(self) -> None:
        """Measure the disk's room; fold the log if nothing was written since the last tick, or if it is large."""
        await asyncio.to_thread(self._server.disk.look)
        path, writes = wal_of(self._server.settings.database_url), self._server.db.num_writes
        if path is None or self._server.stopping:
            return
        idle = writes == self._writes_seen and writes != self._writes_folded
        size = size_of(path)
        self._writes_seen = writes
        if size and (idle or size >= LARGE_WAL_BYTES):
            await asyncio.to_thread(fold, path, wait_milliseconds=_patience(size))
            self._writes_folded = writes
        self._hurried = size >= LARGE_WAL_BYTES


def wal_of(database_url: str) -> Path | None:
    """The write-ahead log; None where the database is no SQLite file."""
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    return Path(f"{url.database}-wal")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _patience(size: int) -> int:
    """How long to wait for readers, by the size of the log."""
    if size < STUBBORN_WAL_BYTES:
        return 0
    return WAIT_MILLISECONDS if size < HUGE_WAL_BYTES else LONG_WAIT_MILLISECONDS


def fold(wal: Path, *, wait_milliseconds: int = 0) -> None:
    """Fold the log into the database, on a connection of its own: a passive fold holds up neither writer nor readers.

    With a time to wait, readers are waited for and writes held up, so that the log begins anew; it is cut to nothing.
    """
    how = "TRUNCATE" if wait_milliseconds else "PASSIVE"
    connection = sqlite3.connect(str(wal).removesuffix("-wal"), isolation_level=None)
    try:
        connection.execute(f"PRAGMA busy_timeout={wait_milliseconds}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
    except sqlite3.OperationalError as error:  # busy, or the disk is full: the log is still whole
        log.info("the write-ahead log could not be folded now: %s", error)
    finally:
        connection.close()
