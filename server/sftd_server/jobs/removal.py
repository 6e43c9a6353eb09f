"""Deleting jobs: their rows in one transaction, then their folders.

A note is left beside the folders before the rows go, and taken away when the folder is renamed out of sight; so a
server that dies in between finds at its next start what is left to remove.
"""

import logging
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from sqlalchemy import null
from sqlmodel import Session, col, delete, select

from sftd.schemas import JobState
from sftd_server.audit import service as audit
from sftd_server.auth import Caller
from sftd_server.cursors import bury
from sftd_server.db import touch
from sftd_server.errors import Conflict, NotFound
from sftd_server.ids import new_id, result_file_id
from sftd_server.jobs import dependencies
from sftd_server.jobs.service import JobInputs, Note, add_event, find_job, makers, own_job, update_seen
from sftd_server.jobs.states import TERMINAL
from sftd_server.tables import FileRow, JobRow

TRASH = ".trash-"
_NOTE = ".delete-"
_JOB_ID = re.compile(r"^[A-Za-z0-9_-]{1,64}$")

log = logging.getLogger("sftd.server")


def require_removable(session: Session, job_id: str, caller: Caller) -> None:
    """A look before anything is begun. Raises NotFound, Forbidden, or Conflict while the job runs."""
    row = find_job(session, job_id)
    caller.require_owner(row.owner)
    _require_at_rest(row)


def _require_at_rest(row: JobRow) -> None:
    if row.state not in (*TERMINAL, JobState.PAUSED, JobState.QUEUED):
        raise Conflict(f"{row.id} is {row.state}; cancel it first, then delete it.", code="wrong_state")


def remove(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Take a job and all that is recorded of it out of the database, with its result file, whose content the janitor
    takes. Raises Conflict while it runs or is needed."""
    row = own_job(session, job_id, caller)
    _require_at_rest(row)
    needed_by = dependencies.needed_by(session, row) or _referred_to_by(session, row)
    if needed_by is not None:
        raise Conflict(
            f"{job_id} is needed by {needed_by}, which is not over; cancel that one or wait for it.",
            code="job_needed",
        )
    here = (col(JobRow.number) == row.number, col(JobRow.state) == row.state)
    if session.exec(delete(JobRow).where(*here, col(JobRow.attempt) == row.attempt)).rowcount != 1:
        raise Conflict(f"{job_id} has just changed; try again.", code="changed_meanwhile")
    bury(session, job_id, row.number, now)
    _remove_result_file(session, job_id, now)
    touch(session, f"job:{job_id}", "queue")
    audit.describe(session, name=row.name, owner=row.owner, state=row.state)


def _remove_result_file(session: Session, job_id: str, now: datetime) -> None:
    file_id = result_file_id(job_id)
    number = session.exec(select(FileRow.number).where(FileRow.id == file_id).with_for_update()).first()
    if number is not None:
        bury(session, file_id, number, now)
        session.exec(delete(FileRow).where(col(FileRow.id) == file_id))


def remove_result(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Take what a job made off the record: its model. Raises NotFound, Forbidden, and Conflict while a job that is not
    over needs it."""
    row = own_job(session, job_id, caller)
    if row.result is None:
        raise NotFound(f"{job_id} has no model (any more).", code="unknown_model", param="model")
    needed_by = _result_needed_by(session, row)
    if needed_by is not None:
        raise Conflict(
            f"The model of {job_id} is needed by {needed_by}, which is not over; cancel that one or wait for it.",
            code="model_needed",
            param="model",
        )
    update_seen(session, row, {"result": null(), "result_deleted_at": now})
    add_event(session, row, Note("result_deleted", f"{caller.name} deleted the model that it made."), now)
    audit.describe(session, target=job_id, owner=row.owner)


def _result_needed_by(session: Session, row: JobRow) -> str | None:
    """The id of a job that is not over and has this one's result as its base, or the base of its base."""
    result = f"jobs/{row.id}/results"
    theirs = (col(JobRow.state).not_in(list(TERMINAL)), col(JobRow.number) != row.number)
    for other in session.exec(select(JobRow).where(*theirs, col(JobRow.base_model).like("job:%"))):
        base = JobInputs.model_validate(other.inputs).base
        if base is None and row.id in makers(
            session, other.base_model, JobInputs.model_validate(other.inputs)
        ):
            return other.id
        if base is not None and result in (base.path, base.base_model):
            return other.id
    return None


def _referred_to_by(session: Session, row: JobRow) -> str | None:
    """The id of a job that is not over and reads this one's files: as its base, or as the run that it goes on with."""
    theirs = (col(JobRow.state).not_in(list(TERMINAL)), col(JobRow.number) != row.number)
    seeded = session.exec(select(JobRow.id).where(*theirs, JobRow.seed_job == row.number)).first()
    if seeded is not None:
        return seeded
    for other in session.exec(select(JobRow).where(*theirs, col(JobRow.base_model).like("job:%"))):
        if row.id in makers(session, other.base_model, JobInputs.model_validate(other.inputs)):
            return other.id
    return None


# ---------------------------------------------------------------- folders


def note(jobs: Path, job_id: str) -> Path:
    """Write down that a job's folder is to go with its rows."""
    path = jobs / f"{_NOTE}{job_id}"
    path.touch(mode=0o600)
    return path


def put_away(jobs: Path, job_id: str) -> Path | None:
    """Rename a job's folder out of sight, and take the note back. Where it is now; None if there was none."""
    trash: Path | None = jobs / f"{TRASH}{job_id}-{new_id('t')}"
    assert trash is not None
    try:
        os.rename(jobs / job_id, trash)
    except FileNotFoundError:
        trash = None
    (jobs / f"{_NOTE}{job_id}").unlink(missing_ok=True)
    return trash


def empty(trash: Path) -> None:
    """Delete a folder that was put away. What cannot be deleted is tried again at the next start."""
    shutil.rmtree(trash, onerror=lambda _, path, error: log.warning("%s stays: %s", path, error[1]))


def put_result_away(job: Path) -> Path | None:
    """Rename a job's result out of sight. Where it is now; None if there was none. What is left there by a server that
    dies then, the janitor takes."""
    trash = job / f"{TRASH}results-{new_id('t')}"
    try:
        os.rename(job / "results", trash)
    except FileNotFoundError:
        return None
    return trash


def noted(jobs: Path) -> list[str]:
    """Ids of jobs whose folder was to go when a server died."""
    ids = [path.name.removeprefix(_NOTE) for path in jobs.glob(f"{_NOTE}*")]
    return [job_id for job_id in ids if _JOB_ID.match(job_id)]


def existing(session: Session, job_ids: list[str]) -> set[str]:
    """Those of the jobs that are still on record."""
    return set(session.exec(select(JobRow.id).where(col(JobRow.id).in_(job_ids))))


def sweep(jobs: Path, found: list[str], kept: set[str]) -> None:
    """At a start: finish what was begun. `found` were noted then, and those in `kept` not deleted after all. A note that
    has come since is another's, whose job may live."""
    for job_id in found:
        if job_id in kept:
            (jobs / f"{_NOTE}{job_id}").unlink(missing_ok=True)
        else:
            put_away(jobs, job_id)
    for trash in jobs.glob(f"{TRASH}*"):
        empty(trash)
