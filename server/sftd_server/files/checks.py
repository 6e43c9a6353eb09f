"""Checking the rows of uploaded files: where it is done, and how many at once.

A small file is checked in a thread; a process takes longer to start. A larger one has a process of its own, so that
neither the event loop nor the interpreter's lock is held for minutes, and what a hostile file costs in memory is not
the server's. `checker` decides which files are checked when.
"""

import asyncio
import contextlib
import functools
import json
import logging
import sys
from collections import OrderedDict
from pathlib import Path

from sftd.tether import tethered
from sftd_server.files.rowcheck import Verdict, verdict_on

SMALL_BYTES = 256 * 1024
NUM_THREADS, NUM_PROCESSES = 4, 4
NUM_REMAKES = 1  # of marks; checks that jobs wait for have turns of their own
NUM_PREVIEWS = 2  # a page may hold a row of many megabytes
NUM_COUNTS = 2
MAX_KNOWN = 256  # verdicts that are remembered, of some KB at most

log = logging.getLogger("sftd.server")


class CheckFailed(Exception):
    """A check came to no end; the file is not to blame, as far as is known."""


class Checks:
    """The checks of one server.

    What it has found is remembered for later uploads of the same content. Not beyond its end: what an older release has
    found wrong, another may read.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._threads = asyncio.Semaphore(NUM_THREADS)
        self._processes = asyncio.Semaphore(NUM_PROCESSES)
        self._remakes = asyncio.Semaphore(NUM_REMAKES)
        self._remaking: dict[str, asyncio.Task[None]] = {}  # by hash
        self._known: OrderedDict[str, Verdict] = OrderedDict()  # by hash
        self.previews = asyncio.Semaphore(NUM_PREVIEWS)
        self.counts = asyncio.Semaphore(NUM_COUNTS)

    def marks(self, sha256: str) -> Path:
        """Where the marks of a file's rows lie. What is in the cache may be deleted at any time."""
        return self._cache / f"rows-{sha256}"

    async def verdict(self, path: Path, *, num_bytes: int, sha256: str) -> Verdict:
        """What is to be said of a file's rows. Raises CheckFailed, OSError."""
        if num_bytes <= SMALL_BYTES:
            async with self._threads:
                found = await asyncio.to_thread(verdict_on, path)
        else:
            async with self._processes:
                found = await self._in_process(path, self.marks(sha256))
        self._known[sha256] = found
        self._known.move_to_end(sha256)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return found

    def known(self, sha256: str) -> Verdict | None:
        """What has been found before, if that is remembered."""
        return self._known.get(sha256)

    async def remake_marks(self, path: Path, *, sha256: str) -> None:
        """Make marks that are gone: once for all who ask meanwhile. Raises CheckFailed."""
        task = self._remaking.get(sha256)
        if task is None:
            task = self._remaking[sha256] = asyncio.create_task(self._remake(path, sha256))
            task.add_done_callback(functools.partial(self._remade, sha256))
        await asyncio.shield(task)  # whoever asked first may leave

    async def _remake(self, path: Path, sha256: str) -> None:
        async with self._remakes:
            await self._in_process(path, self.marks(sha256))

    def _remade(self, sha256: str, task: asyncio.Task[None]) -> None:
        del self._remaking[sha256]
        if not task.cancelled():
            task.exception()  # told to those who still wait, if any

    async def _in_process(self, path: Path, marks: Path) -> Verdict:
        command = [sys.executable, "-m", "sftd_server.files.rowcheck", str(path), str(marks)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *tethered(command), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
        try:
            told, complaint = await process.communicate()
        finally:
            if process.returncode is None:  # nobody waits for it any more
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            said = complaint.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise CheckFailed(f"its process ended with {process.returncode} {' '.join(said)[:500]}")
        try:
            return Verdict(**json.loads(told))
        except (ValueError, TypeError) as error:
            raise CheckFailed(f"its process told nothing that can be understood: {error}") from None
