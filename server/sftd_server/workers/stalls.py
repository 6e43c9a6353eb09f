"""Jobs whose trainer hangs: begun again from their last checkpoint, so many times without getting on."""

from sqlmodel import Session, col, func, select

from sftd.schemas import FailureReason
from sftd_server.tables import CheckpointRow, EventRow, JobRow


def stalls_with_this(session: Session, row: JobRow) -> int:
    """How often in a row a job has stalled, with this time: a checkpoint since the last time begins the count anew."""
    # Whether it got on is told by attempts, which only grow: a checkpoint of a later one was committed later.
    stalled_in = max(_attempts_that_stalled(session, row), default=0)
    newest = select(func.max(CheckpointRow.attempt)).where(
        CheckpointRow.job == row.number, col(CheckpointRow.corrupt).is_(False)
    )
    saved_in = session.exec(newest).one() or 0
    return 1 if saved_in > stalled_in else row.stalls + 1


def _attempts_that_stalled(session: Session, row: JobRow) -> list[int]:
    query = select(EventRow).where(EventRow.job == row.number, EventRow.type == "retrying")
    return [
        event.attempt for event in session.exec(query) if event.data.get("reason") == FailureReason.STALLED
    ]
