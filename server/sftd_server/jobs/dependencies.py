"""Which job waits for which. Ids must exist when they are named, so that no circle can be made."""

import functools
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, delete, select

from sftd.schemas import JobState
from sftd_server.errors import Invalid
from sftd_server.jobs.states import TERMINAL
from sftd_server.mistakes import Mistake
from sftd_server.tables import DependencyRow, JobRow

_LOST = (JobState.FAILED, JobState.CANCELLED)


def mistakes(session: Session, after: Sequence[str]) -> list[Mistake]:
    """What is wrong with the field `after`."""
    found: list[Mistake] = []
    rows = {row.id: row for row in session.exec(select(JobRow).where(col(JobRow.id).in_(after)))}
    for i, job_id in enumerate(after):
        row = rows.get(job_id)
        if row is None:
            found.append(Mistake(f"after[{i}]", f"there is no job {job_id!r}; GET /jobs lists them"))
        elif row.state in _LOST:
            verb = "has failed" if row.state == JobState.FAILED else "was cancelled"
            found.append(Mistake(f"after[{i}]", f"{job_id} {verb}; retry it and name the new job"))
        elif job_id in after[:i]:
            found.append(Mistake(f"after[{i}]", f"{job_id} stands there twice; name it once"))
    return found


def replace(session: Session, row: JobRow, after: Sequence[str]) -> None:
    """Let a job wait for these jobs and no others. Raises Invalid where one is gone or has ended without success."""
    assert row.number is not None
    session.exec(delete(DependencyRow).where(col(DependencyRow.job) == row.number))
    if not after:
        return
    query = select(JobRow.id).where(col(JobRow.id).in_(after)).order_by(col(JobRow.number))
    session.exec(query.with_for_update()).all()  # none of them ends before this transaction does
    wrong = mistakes(session, after)
    if wrong:
        raise Invalid.of(wrong, code="invalid_spec")
    for number in session.exec(select(JobRow.number).where(col(JobRow.id).in_(after))):
        assert number is not None
        session.add(DependencyRow(job=row.number, needs=number))
    session.flush()


@functools.lru_cache(maxsize=4)  # every claim asks; an alias takes milliseconds to make
def are_met(job: Any = JobRow) -> ColumnElement[bool]:  # job: JobRow or an alias of it
    """A condition: all that the job needs has succeeded."""
    needed = aliased(JobRow)
    open_ = (
        select(DependencyRow.job)
        .join(needed, col(needed.number) == col(DependencyRow.needs))
        .where(col(DependencyRow.job) == job.number, col(needed.state) != JobState.SUCCEEDED)
    )
    return ~open_.exists()


def unmet(session: Session, row: JobRow) -> list[JobRow]:
    """The jobs that this one still waits for."""
    query = (
        select(JobRow)
        .join(DependencyRow, col(DependencyRow.needs) == col(JobRow.number))
        .where(DependencyRow.job == row.number, JobRow.state != JobState.SUCCEEDED)
        .order_by(col(JobRow.number))
    )
    return list(session.exec(query))


def is_needed(session: Session, row: JobRow) -> bool:
    """Whether any job waits, or has waited, for this one."""
    return (
        session.exec(select(DependencyRow.job).where(DependencyRow.needs == row.number)).first() is not None
    )


def needed_by(session: Session, row: JobRow) -> str | None:
    """The id of a job that is not over and names this one in `after`."""
    query = (
        select(JobRow.id)
        .join(DependencyRow, col(DependencyRow.job) == col(JobRow.number))
        .where(DependencyRow.needs == row.number, col(JobRow.state).not_in(list(TERMINAL)))
    )
    return session.exec(query).first()


def failed_need(session: Session, row: JobRow) -> str | None:
    """The id of a job that this one needs and that has ended without success."""
    return next((needed.id for needed in unmet(session, row) if needed.state in _LOST), None)


def waiting_for(session: Session, row: JobRow) -> list[tuple[JobRow, str]]:
    """The queued jobs that wait for this one, and those that wait for them: each with the id of the job that it needs.

    A paused one stays as it is, with those behind it: it is looked at again when it is resumed.
    """
    found: dict[int | None, tuple[JobRow, str]] = {}
    ends = [row]
    while ends:
        needed = ends.pop(0)
        query = (
            select(JobRow)
            .join(DependencyRow, col(DependencyRow.job) == col(JobRow.number))
            .where(DependencyRow.needs == needed.number, JobRow.state == JobState.QUEUED)
            .order_by(col(JobRow.number))
        )
        for waiting in session.exec(query.with_for_update(of=JobRow)):
            if waiting.number not in found:
                found[waiting.number] = (waiting, needed.id)
                ends.append(waiting)
    return list(found.values())
