"""The loop that has the rows of uploaded files checked, and writes down what was found, with what it means for jobs.

What is to be checked stands in the database, so that a check goes on after a restart. Of several servers one checks a
content: the one that holds a lock on its blob, which ends with the process. What it found is written once, to the
files that are still unchecked.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sqlalchemy import ColumnElement
from sqlmodel import Session, and_, col, func, select, update
from sqlmodel.sql.expression import SelectOfScalar

from sftd.schemas import JobState
from sftd_server.db import DatabaseClosed
from sftd_server.disk import try_lock
from sftd_server.files import store
from sftd_server.files.checks import NUM_PROCESSES, NUM_THREADS, SMALL_BYTES, CheckFailed
from sftd_server.files.rowcheck import Verdict
from sftd_server.files.store import CHECKED, NOT_CHECKED, UNCHECKED
from sftd_server.jobs import service
from sftd_server.jobs.service import JobInputs
from sftd_server.server import Server
from sftd_server.tables import FileRow, JobRow

LOOK_SECONDS = 5.0  # another server's check may have ended with it
MAX_STARTED = 1000  # checks that are begun or wait for their turn
MAX_TRIES = 3
MAX_LEFT_BEHIND = 100  # jobs in one write

log = logging.getLogger("sftd.server")


class Checker:
    """One a server. `look` begins what is to be done; `run` looks for ever."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._started: dict[str, asyncio.Task[None]] = {}  # by hash
        self._tries: Counter[str] = Counter()
        # Before a content is opened: those that wait for their turn hold no file.
        self._turns = {True: asyncio.Semaphore(NUM_THREADS), False: asyncio.Semaphore(NUM_PROCESSES)}

    async def run(self) -> None:
        """Look whenever a file has come, and now and then. An error is logged and it goes on."""
        try:
            while not self._server.stopping:
                signal = self._server.db.signal(UNCHECKED)
                try:
                    await self.look()
                except DatabaseClosed:
                    return
                except Exception as error:  # no database just now, perhaps
                    log.warning("files to check could not be looked for: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await signal.wait()
        finally:
            for task in self._started.values():
                task.cancel()
            await asyncio.gather(*self._started.values(), return_exceptions=True)

    async def look(self) -> None:
        """Begin the checks that nobody is at, as far as is known here. No job shall wait for one that is over."""
        for sha256, num_bytes in await self._server.db.read(unchecked):
            if sha256 not in self._started and len(self._started) < MAX_STARTED:
                task = asyncio.create_task(self._check(sha256, num_bytes))
                self._started[sha256] = task
                task.add_done_callback(functools.partial(self._ended, sha256))
        jobs = await self._server.db.read(left_behind)
        if jobs:
            work = functools.partial(settle_left_behind, jobs=jobs, now=self._server.clock.now())
            await self._server.db.write(work)

    def _ended(self, sha256: str, task: asyncio.Task[None]) -> None:
        self._started.pop(sha256, None)

    async def _check(self, sha256: str, num_bytes: int) -> None:
        """Check one content, unless another server is at it. Never raises: what fails is tried again at a later look."""
        blob = self._server.folder.path / self._server.folder.blob_name(sha256)
        try:
            async with self._turns[num_bytes <= SMALL_BYTES]:
                try:
                    handle = await asyncio.to_thread(try_lock, blob, make=False)
                except FileNotFoundError:
                    await self._miss(blob, sha256)
                    return
                if handle is None:
                    return
                try:
                    await self._check_held(blob, sha256, num_bytes)
                finally:
                    os.close(handle)
        except DatabaseClosed:
            return
        except Exception as error:
            log.warning("the rows of %s could not be checked: %s", sha256, error)

    async def _check_held(self, blob: Path, sha256: str, num_bytes: int) -> None:
        """The lock is held until what was found is written down: whoever gets it then sees that."""
        if not await self._server.db.read(functools.partial(is_unchecked, sha256=sha256)):
            return  # another server has been at it, or it was deleted
        verdict = await self._found(blob, sha256, num_bytes)
        if verdict is not None:
            await self._settle(sha256, verdict)
        self._tries.pop(sha256, None)
        await store.drop_unused_marks(self._server, sha256)

    async def _found(self, blob: Path, sha256: str, num_bytes: int) -> Verdict | None:
        """What is to be said of a content; None where it was deleted meanwhile."""
        known = self._server.checks.known(sha256)
        if known is not None:
            return known
        try:
            return await self._server.checks.verdict(blob, num_bytes=num_bytes, sha256=sha256)
        except (CheckFailed, FileNotFoundError) as error:
            if not blob.exists():
                return None
            self._tries[sha256] += 1
            if self._tries[sha256] < MAX_TRIES:
                raise
            return Verdict(None, None, f"{NOT_CHECKED}: {error}; upload it again, or in smaller files")

    async def _miss(self, blob: Path, sha256: str) -> None:
        """The content is not there. Mostly its last file has just been deleted; where one is on record all the same, it
        is told so. Neither comes or goes meanwhile."""
        async with self._server.file_changes:
            if not blob.exists():
                why = f"{NOT_CHECKED}: its content is no longer on disk; upload it again"
                await self._settle(sha256, Verdict(None, None, why))

    async def _settle(self, sha256: str, verdict: Verdict) -> None:
        work = functools.partial(settle, sha256=sha256, verdict=verdict, now=self._server.clock.now())
        await self._server.db.write(work)


def unchecked(session: Session) -> list[tuple[str, int]]:
    """(hash, bytes) of what is to be checked, the oldest first."""
    query = (
        select(FileRow.sha256, func.max(FileRow.bytes))
        .where(FileRow.status == "uploaded", col(FileRow.purpose).in_(CHECKED))
        .group_by(col(FileRow.sha256))
        .order_by(func.min(FileRow.number))
    )
    return [(sha256, num_bytes) for sha256, num_bytes in session.exec(query)]


def is_unchecked(session: Session, sha256: str) -> bool:
    """Whether a content is still to be checked."""
    return session.exec(select(FileRow.id).where(_to_check(sha256))).first() is not None


def settle(session: Session, sha256: str, verdict: Verdict, now: datetime) -> None:
    """Write down what a check found, where nobody has yet; the jobs that waited for it go on, or fail.

    The files' rows are locked before jobs are looked at: a job that is being posted meanwhile waits for that lock, or
    holds it and is seen here.
    """
    here = _to_check(sha256)
    query = select(FileRow.id).where(here).order_by(col(FileRow.number))
    session.exec(query.with_for_update()).all()
    # Of these alone the ids: a file that is committed after the look above is found here as well.
    written = update(FileRow).where(here).values(**store.columns_of(verdict)).returning(col(FileRow.id))
    ids = set(session.exec(written).scalars())
    for job in session.exec(_waiting_jobs(JobState.QUEUED, JobState.PAUSED).with_for_update()):
        if ids & _files_of(job):
            service.settle_files(session, job, now)


def _to_check(sha256: str) -> ColumnElement[bool]:
    return and_(
        col(FileRow.sha256) == sha256, col(FileRow.status) == "uploaded", col(FileRow.purpose).in_(CHECKED)
    )


def left_behind(session: Session) -> list[str]:
    """The ids of queued jobs, the oldest of them, that wait for checks that are over. A paused one looks for itself when
    it is resumed."""
    waiting = {job.id: _files_of(job) for job in session.exec(_waiting_jobs(JobState.QUEUED))}
    if not waiting:
        return []
    being_checked = set(session.exec(select(FileRow.id).where(FileRow.status == "uploaded")))
    ids = [job_id for job_id, files in waiting.items() if being_checked.isdisjoint(files)]
    return ids[:MAX_LEFT_BEHIND]


def settle_left_behind(session: Session, jobs: Sequence[str], now: datetime) -> None:
    """Let such jobs go on, or fail."""
    here = _waiting_jobs(JobState.QUEUED).where(col(JobRow.id).in_(jobs))
    for job in session.exec(here.with_for_update()):
        service.settle_files(session, job, now)


def _waiting_jobs(*states: JobState) -> SelectOfScalar[JobRow]:
    query = select(JobRow).where(col(JobRow.checking_files).is_(True), col(JobRow.state).in_(states))
    return query.order_by(col(JobRow.number))


def _files_of(job: JobRow) -> set[str]:
    return {file.file_id for file in JobInputs.model_validate(job.inputs).files.values()}
