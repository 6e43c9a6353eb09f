"""The loop that takes jobs back from silent workers. It never trusts a clock that has jumped, nor its own absence."""

import asyncio
import functools
import logging
import shutil
from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, select, update

import sftd
from sftd_server.db import DatabaseClosed
from sftd_server.engines import Turn, take_turn
from sftd_server.errors import is_database_away, is_database_busy
from sftd_server.server import Server
from sftd_server.settings import Settings
from sftd_server.tables import ServerRow
from sftd_server.workers import endings, leases, preemption, registry, space

SPACE_SECONDS = 3.0  # how often space is looked for that jobs wait for
_FORGET = 100  # leases after which a server that was killed is forgotten

log = logging.getLogger("sftd.server")


class Reaper:
    """One a server. `tick` is one look; `run` looks for ever."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._wall = server.clock.now()
        self._space_at = float("-inf")

    async def begin(self) -> None:
        """Put this server on record. After a start every live lease has its full time: a long outage must not requeue
        healthy jobs. Where other servers were there all the time, there was no outage."""
        self._server.clock_watch.begin()
        await self._server.db.write(functools.partial(_arrive, server=self._server))

    async def end(self) -> None:
        """Take this server off the record: it stops."""
        try:
            await self._server.db.write(functools.partial(_leave, server_id=self._server.db.id))
        except Exception as error:  # the others see by its time that it is gone
            log.warning("this server could not be taken off the record: %s", error)

    async def run(self) -> None:
        """Tick until cancelled. An error is logged and the loop goes on."""
        while True:
            await asyncio.sleep(self._server.settings.reap_seconds)
            try:
                await self.tick()
            except DatabaseClosed:
                return
            except Exception as error:
                if is_database_away(error) or is_database_busy(error):
                    log.warning("expired leases cannot be looked for: %s", error)
                else:
                    log.exception("looking for expired leases failed; trying again")

    async def tick(self) -> int:
        """Look once; return how many jobs were taken back.

        Nothing is taken back while the server stops: its socket is closed then, and a worker that is refused may
        rely on keeping its job until the next start, which extends every lease.
        """
        if self._server.stopping:
            return 0
        await self._server.set_clock()
        wall, monotonic = self._server.clock.now(), self._server.clock.monotonic()
        before, self._wall = self._wall, wall
        if await settle_clock(self._server):
            return 0
        self._server.clock_watch.settle()
        db, settings = self._server.db, self._server.settings
        if db.shared:
            await db.write(functools.partial(_be_seen, server=self._server))
        await db.write(functools.partial(endings.wake_due, now=wall, since=before))
        if monotonic - self._space_at >= SPACE_SECONDS:
            self._space_at = monotonic
            await self._look_for_space()
        if monotonic - self._server.clock_watch.steady_since < settings.lease_seconds:
            return 0
        num_lost = await db.write(functools.partial(endings.reap, settings=settings, now=wall))
        await db.write(functools.partial(_look_after_queue, settings=settings, now=wall))
        return num_lost

    async def _look_for_space(self) -> None:
        """Jobs that were put aside because the disk was full go on when it is not."""
        data = self._server.settings.data
        jobs = data / "jobs"  # may be a volume of its own
        free = (await asyncio.to_thread(shutil.disk_usage, jobs if jobs.is_dir() else data)).free
        work = functools.partial(space.resume_where_space, free_bytes=free, now=self._server.clock.now())
        await self._server.db.write(work)


async def settle_clock(server: Server) -> bool:
    """Make good a jump of the clock that nobody has seen yet; whether there was one. Every call of a worker begins so:
    none is charged for, or fenced by, time that passed on the clock alone."""
    if not server.clock_watch.jump():
        return False
    async with server.clock_change:
        jump = server.clock_watch.jump()
        if jump:
            log.warning("the clock jumped by %.1f s; all leases are extended", jump)
            make_good = functools.partial(
                leases.make_good,
                settings=server.settings,
                now=server.clock.now(),
                jump=jump,
                server_id=server.db.id,
            )
            await server.db.write(make_good)
            server.clock_watch.settle()
    return True


def _look_after_queue(session: Session, *, settings: Settings, now: datetime) -> None:
    """Have room made for jobs that wait, and take workers off the list that are long gone."""
    preemption.make_room(session, settings, now)
    registry.forget(session, now)


# ---------------------------------------------------------------- which servers there are


def _arrive(session: Session, *, server: Server) -> None:
    """Put a server on record, and extend all leases unless another was alive all along."""
    now = server.clock.now()
    lease = timedelta(seconds=server.settings.lease_seconds)
    others = False
    if server.db.shared:  # one after the other: of two that start at once, the second finds the first
        take_turn(session.connection(), Turn.ARRIVAL)
        alive = select(ServerRow.id).where(ServerRow.id != server.db.id, col(ServerRow.seen_at) > now - lease)
        others = session.exec(alive).first() is not None
        session.exec(delete(ServerRow).where(col(ServerRow.seen_at) < now - _FORGET * lease))
    else:
        session.exec(delete(ServerRow))
    _be_seen(session, server=server)
    if not others:
        leases.extend_all(session, settings=server.settings, now=now)


def _be_seen(session: Session, *, server: Server) -> None:
    now = server.clock.now()
    here = col(ServerRow.id) == server.db.id
    if session.exec(update(ServerRow).where(here).values(seen_at=now)).rowcount == 0:
        session.add(ServerRow(id=server.db.id, version=sftd.__version__, started_at=now, seen_at=now))


def _leave(session: Session, *, server_id: str) -> None:
    session.exec(delete(ServerRow).where(col(ServerRow.id) == server_id))
