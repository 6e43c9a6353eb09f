"""Which job waits for which. A posted job can only name those before it; a change of `after` is looked at for circles."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, delete, select

from sftd.schemas import JobState
from sftd_server.errors import Invalid
from sftd_server.jobs.states import TERMINAL
from sftd_server.mistakes import Mistake
from sftd_server.tables import DependencyRow, JobRow

_LOST = (JobState.FAILED, JobState.CANCELLED)

# Made once: SQLAlchemy takes longer to make an alias of a wide table than SQLite to answer the query.
_needed = aliased(JobRow)
_ARE_MET = ~(
    select(DependencyRow.job)
    .join(_needed, col(_needed.number) == col(DependencyRow.needs))
    .where(col(DependencyRow.job) == col(JobRow.number), col(_needed.state) != JobState.SUCCEEDED)
    .correlate(JobRow)
    .exists()
)


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
    session.exec(query.with_for_update(read=True)).all()  # none of them ends before this transaction does
    wrong = mistakes(session, after)
    if wrong:
        raise Invalid.of(wrong, code="invalid_spec")
    for number in session.exec(select(JobRow.number).where(col(JobRow.id).in_(after))):
        assert number is not None
        session.add(DependencyRow(job=row.number, needs=number))
    session.flush()


def add(session: Session, row: JobRow, needed: JobRow) -> None:
    """Let a job wait for one more."""
    assert row.number is not None
    assert needed.number is not None
    session.merge(DependencyRow(job=row.number, needs=needed.number))
    session.flush()


def are_met() -> ColumnElement[bool]:
    """A condition on a job: all that it needs has succeeded."""
    return _ARE_MET


def unmet(session: Session, row: JobRow) -> list[JobRow]:
    """The jobs that this one still waits for."""
    query = (
        select(JobRow)
        .join(DependencyRow, col(DependencyRow.needs) == col(JobRow.number))
        .where(DependencyRow.job == row.number, JobRow.state != JobState.SUCCEEDED)
        .order_by(col(JobRow.number))
    )
    return list(session.exec(query))


def all_unmet(session: Session) -> list[tuple[int, JobRow]]:
    """(number of a queued job, a job that it still waits for)."""
    waiting = aliased(JobRow)
    query = (
        select(DependencyRow.job, JobRow)
        .join(JobRow, col(DependencyRow.needs) == col(JobRow.number))
        .join(waiting, col(waiting.number) == col(DependencyRow.job))
        .where(JobRow.state != JobState.SUCCEEDED, waiting.state == JobState.QUEUED)
        .order_by(col(JobRow.number))
    )
    return list(session.exec(query).all())


def hold_needed(session: Session, row: JobRow) -> None:
    """Let none of the jobs that this one needs change before this write is done: one that fails meanwhile would not yet
    see that this one waits for it."""
    query = (
        select(JobRow.id)
        .join(DependencyRow, col(DependencyRow.needs) == col(JobRow.number))
        .where(DependencyRow.job == row.number)
        .order_by(col(JobRow.number))
    )
    session.exec(query.with_for_update(read=True, of=JobRow)).all()


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
    return _behind(session, row, col(JobRow.state) == JobState.QUEUED)


def all_behind(session: Session, row: JobRow) -> set[str]:
    """The ids of all jobs that are not over and wait for this one, paused ones and those behind them as well."""
    found = _behind(session, row, col(JobRow.state).not_in(list(TERMINAL)))
    return {waiting.id for waiting, _ in found}


def _behind(session: Session, row: JobRow, which: ColumnElement[bool]) -> list[tuple[JobRow, str]]:
    """Locked: two changes at once that would make a circle together meet at one of these rows."""
    found: dict[int | None, tuple[JobRow, str]] = {}
    ends = [row]
    while ends:
        needed = ends.pop(0)
        query = (
            select(JobRow)
            .join(DependencyRow, col(DependencyRow.job) == col(JobRow.number))
            .where(DependencyRow.needs == needed.number, which)
            .order_by(col(JobRow.number))
        )
        for waiting in session.exec(query.with_for_update(of=JobRow)):
            if waiting.number not in found:
                found[waiting.number] = (waiting, needed.id)
                ends.append(waiting)
    return list(found.values())
