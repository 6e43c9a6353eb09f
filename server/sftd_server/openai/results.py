"""The result file of a job: a CSV of its steps, as OpenAI makes one. Made once a job is over, beside the requests.

It is an uploaded file like others, of the purpose `fine-tune-results`. Its id follows from the job's, so that two servers, or
one that died in between, make one. What is missing at a start is made then.
"""

import asyncio
import contextlib
import csv
import functools
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TextIO

from sqlmodel import Session, col, select

from sftd.schemas import Evaluation
from sftd_server.db import DatabaseClosed
from sftd_server.files import store
from sftd_server.garbage import RESULTS_PURPOSE
from sftd_server.ids import result_file_id
from sftd_server.jobs import metrics, queries, removal
from sftd_server.jobs.service import ENDED
from sftd_server.jobs.states import TERMINAL
from sftd_server.server import Server
from sftd_server.tables import EventRow, FileRow, GoneRow, JobRow

FILENAME = "step_metrics.csv"
AGAIN_SECONDS = 30.0  # after something went wrong, such as a full disk
# OpenAI's columns. Training does not measure the second one.
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_ROWS = 2000  # of a page
_EVENTS = 500
_LATE_EVENTS = 1000  # other servers may commit a lower number later: so many are looked at again

log = logging.getLogger("sftd.server")


@dataclass(frozen=True)
class Ended:
    """A job that is over, and whose result file is missing."""

    job_id: str
    owner: str
    number: int


class ResultFiles:
    """One a server. `make_missing` is one look; `run` looks whenever a job has ended."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._looked_at = 0  # the newest ending that was seen to

    async def run(self) -> None:
        """Look until cancelled. An error is logged and it goes on."""
        has_finished = False
        while not self._server.stopping:
            signal, wait = self._server.db.signal(ENDED), None
            try:
                if not has_finished:
                    await self._finish_deletions()
                    has_finished = True
                await self.make_missing()
            except DatabaseClosed:
                return
            except Exception as error:
                log.warning("result files could not be made; trying again: %s", error)
                wait = AGAIN_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await signal.wait()

    async def make_missing(self) -> None:
        """Make the result files of all jobs that have ended and have none."""
        while True:
            since = max(0, self._looked_at - _LATE_EVENTS)
            last, missing = await self._server.db.read(functools.partial(_missing, since=since))
            failure: Exception | None = None
            for job in missing:
                try:
                    await self._make(job)
                except DatabaseClosed:
                    raise
                except Exception as error:  # what is wrong with one must not keep the others from theirs
                    failure = error
            if failure is not None:
                raise failure
            if last <= self._looked_at:
                return
            self._looked_at = last

    async def _make(self, job: Ended) -> None:
        server = self._server
        server.disk.require_room()
        # The name tells a start what uploads left behind.
        handle, name = tempfile.mkstemp(prefix="upload-", dir=server.folder.tmp)
        path = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                await self._write(job, file)
            await self._keep(job, path)
        finally:
            path.unlink(missing_ok=True)

    async def _write(self, job: Ended, file: TextIO) -> None:
        read, out = self._server.db.read, csv.writer(file)
        names = await read(lambda session: metrics.names(session, job.number))
        others = sorted(set(names) - {"loss"})
        evaluated = await read(lambda session: _evaluations(session, job))
        out.writerow([*COLUMNS, *others])
        after, more = -1, True
        while more:
            start = after
            look = functools.partial(metrics.page, number=job.number, names=[], after=start, limit=_ROWS)
            page = await read(look)
            more = page.has_more
            after = max(page.points) if more else metrics.LAST_STEP
            steps = sorted({*page.points, *(step for step in evaluated if start < step <= after)})
            rows = [_row(step, page.points.get(step, {}), evaluated.get(step), others) for step in steps]
            await asyncio.to_thread(out.writerows, rows)

    async def _keep(self, job: Ended, path: Path) -> None:
        server, size = self._server, path.stat().st_size
        with path.open("rb") as file:
            sha256 = (await asyncio.to_thread(file_digest, file, "sha256")).hexdigest()
        blob = server.folder.path / server.folder.blob_name(sha256)
        now = server.clock.now()

        def work(session: Session) -> None:
            file_id = result_file_id(job.job_id)
            here = select(JobRow.id).where(JobRow.id == job.job_id).with_for_update(read=True)
            if session.exec(here).first() is None or _known(session, [file_id]):
                return  # deleted meanwhile, or made by another server
            session.add(
                FileRow(
                    id=file_id,
                    owner=job.owner,
                    filename=FILENAME,
                    purpose=RESULTS_PURPOSE,
                    bytes=size,
                    sha256=sha256,
                    status="processed",
                    format=None,
                    num_rows=None,
                    created_at=now,
                )
            )

        async with server.file_changes:
            await asyncio.to_thread(store.publish, path, blob)
            await server.db.write(work, bulk=True)

    async def _finish_deletions(self) -> None:
        """Put away the results of models that were deleted when a server died. What cannot be stays until the next start."""
        jobs = self._server.folder.path / "jobs"
        query = select(JobRow.id).where(col(JobRow.result_deleted_at).is_not(None))
        for job_id in await self._server.db.read(lambda session: list(session.exec(query))):
            try:
                trash = await asyncio.to_thread(removal.put_result_away, jobs / job_id)
            except OSError as error:
                log.warning("the deleted model of %s stays on disk: %s", job_id, error)
                continue
            if trash is not None:
                await asyncio.to_thread(removal.empty, trash)


def _missing(session: Session, since: int) -> tuple[int, list[Ended]]:
    """The next endings: the last of them, and the jobs among them that have trained and have no result file."""
    query = (
        select(EventRow.id, JobRow)
        .join(JobRow, col(JobRow.number) == col(EventRow.job))
        .where(col(EventRow.type).in_([str(state) for state in TERMINAL]), col(EventRow.id) > since)
        .order_by(col(EventRow.id))
        .limit(_LATE_EVENTS + _EVENTS)
    )
    found = session.exec(query).all()
    known = _known(session, [result_file_id(row.id) for _, row in found])
    missing = [
        Ended(row.id, row.owner, row.number)
        for _, row in found
        if row.number is not None and row.step > 0 and result_file_id(row.id) not in known
    ]
    return max((number or 0 for number, _ in found), default=0), missing


def _known(session: Session, file_ids: Sequence[str]) -> set[str]:
    """Those that are there, and those that their owners have deleted."""
    there = select(FileRow.id).where(col(FileRow.id).in_(file_ids))
    gone = select(GoneRow.id).where(col(GoneRow.id).in_(file_ids))
    return {*session.exec(there), *session.exec(gone)}


def _evaluations(session: Session, job: Ended) -> dict[int, Evaluation]:
    here = select(JobRow.id).where(JobRow.id == job.job_id)
    if session.exec(here).first() is None:  # deleted meanwhile
        return {}
    return {one.step: one for one in queries.evaluations(session, job.job_id).data}


def _row(
    step: int, values: Mapping[str, float], evaluated: Evaluation | None, others: Sequence[str]
) -> list[str]:
    valid = (evaluated.eval_loss, evaluated.token_accuracy) if evaluated else (None, None)
    cells = [values.get("loss"), None, *valid, *(values.get(name) for name in others)]
    return [str(step), *map(_cell, cells)]


def _cell(value: float | None) -> str:
    if value is None or math.isfinite(value):
        return "" if value is None else repr(value)
    return str(metrics.to_json({"": value})[""])
