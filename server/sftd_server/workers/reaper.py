"""The loop that takes jobs back from silent workers. It never trusts a clock that has jumped, nor its own absence."""

import asyncio
import functools
import logging
import shutil

from sftd_server.db import DatabaseClosed
from sftd_server.jobs.service import Note
from sftd_server.server import Server
from sftd_server.workers import endings, leases, space
from sftd_server.workers.upkeep import upkeep

JUMP_SECONDS = 2.0
SPACE_SECONDS = 3.0  # how often space is looked for that jobs wait for

log = logging.getLogger("sftd.server")


class Reaper:
    """One a server. `tick` is one look; `run` looks for ever."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._wall = server.clock.now()
        self._monotonic = server.clock.monotonic()
        self._started = self._monotonic
        self._space_at = float("-inf")

    async def begin(self) -> None:
        """After a start every live lease has its full time: a long outage must not requeue healthy jobs."""
        await self._extend(None)

    async def run(self) -> None:
        """Tick until cancelled. An error is logged and the loop goes on."""
        while True:
            await asyncio.sleep(self._server.settings.reap_seconds)
            try:
                await self.tick()
            except DatabaseClosed:
                return
            except Exception:
                log.exception("looking for expired leases failed; trying again")

    async def tick(self) -> int:
        """Look once; return how many jobs were taken back.

        Nothing is taken back while the server stops: its socket is closed then, and a worker that is refused may
        rely on keeping its job until the next start, which extends every lease.
        """
        if self._server.stopping:
            return 0
        wall, monotonic = self._server.clock.now(), self._server.clock.monotonic()
        before, elapsed = self._wall, monotonic - self._monotonic
        jump = (wall - before).total_seconds() - elapsed
        self._wall, self._monotonic = wall, monotonic
        if abs(jump) > JUMP_SECONDS:
            log.warning("the clock jumped by %.1f s; all leases are extended", jump)
            note = Note("clock_jump", f"The server's clock jumped by {jump:.1f} s; the lease was extended.")
            await self._extend(note)
            return 0
        db, settings = self._server.db, self._server.settings
        await db.write(functools.partial(endings.wake_due, now=wall, since=before))
        if monotonic - self._space_at >= SPACE_SECONDS:
            self._space_at = monotonic
            await self._look_for_space()
        if monotonic - self._started < settings.lease_seconds:
            return 0
        num_lost = await db.write(functools.partial(endings.reap, settings=settings, now=wall))
        await db.write(functools.partial(upkeep, settings=settings, now=wall))
        return num_lost

    async def _look_for_space(self) -> None:
        """Jobs that were put aside because the disk was full go on when it is not."""
        data = self._server.settings.data
        jobs = data / "jobs"  # may be a volume of its own
        free = (await asyncio.to_thread(shutil.disk_usage, jobs if jobs.is_dir() else data)).free
        work = functools.partial(space.resume_where_space, free_bytes=free, now=self._server.clock.now())
        await self._server.db.write(work)

    async def _extend(self, note: Note | None) -> None:
        work = functools.partial(
            leases.extend_all, settings=self._server.settings, now=self._server.clock.now(), note=note
        )
        await self._server.db.write(work)
