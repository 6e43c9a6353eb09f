"""Jobs that were put aside because the disk was nearly full: they go on by themselves when there is space again."""

from datetime import datetime

from sqlmodel import Session, col, select

from sftd.protocol import Finish
from sftd.schemas import JobState, PauseReason, Want
from sftd_server.jobs.service import Note, move
from sftd_server.jobs.states import LEASED, Trigger
from sftd_server.tables import AttemptRow, JobRow, WorkerRow


def held(row: JobRow, word: Finish) -> tuple[Note, dict[str, object]]:
    """The event, and the columns to set, of a job that its worker puts aside."""
    needs = word.needs_disk_bytes or 0
    note = Note(
        "cancelled" if row.want == Want.CANCEL else "paused",
        word.message or f"Paused: the disk is nearly full; goes on when {needs:,} bytes are free.",
        {"pause_reason": PauseReason.DISK_LOW, "needs_disk_bytes": needs},
    )
    if row.want != Want.RUN:  # its user has asked for this, or for more, meanwhile
        return note, {}
    return note, {
        "want": Want.PAUSE,
        "pause_reason": PauseReason.DISK_LOW,
        "needs_disk_bytes": needs,
    }


def resume_where_space(session: Session, *, free_bytes: int, now: datetime) -> list[str]:
    """Queue again what was put aside for want of space and has it now. Returns the ids of the jobs.

    `free_bytes` is what is free where this server's jobs lie. Jobs that went on lately keep what they need until their
    attempt ends: two do not go on into the room of one.
    """
    waiting = (
        select(JobRow)
        .where(
            JobRow.state == JobState.PAUSED,
            JobRow.pause_reason == PauseReason.DISK_LOW,
            col(JobRow.needs_disk_bytes).is_not(None),
        )
        .order_by(col(JobRow.priority).desc(), col(JobRow.number))
        .with_for_update()
    )
    rows = session.exec(waiting).all()
    # Read behind the lock on these: another server may just have let some of them go on.
    reserved = select(JobRow.needs_disk_bytes).where(
        col(JobRow.needs_disk_bytes).is_not(None), col(JobRow.state).in_([JobState.QUEUED, *LEASED])
    )
    left = free_bytes - sum(needs or 0 for needs in session.exec(reserved))
    resumed = []
    for row in rows:
        needs = row.needs_disk_bytes or 0
        elsewhere, free_there = _disk_of_its_worker(session, row)
        if needs > (free_there if elsewhere else left):
            continue
        note = Note("queued", f"There is space again ({needs:,} bytes and more); waiting for a worker.")
        values = {"want": Want.RUN, "pause_reason": None, "not_before": now, "queued_at": now}
        if move(session, row, Trigger.RESUME, now=now, notes=[note], values=values) is None:
            continue
        if not elsewhere:
            left -= needs
        resumed.append(row.id)
    return resumed


def _disk_of_its_worker(session: Session, row: JobRow) -> tuple[bool, int]:
    """(Was it put aside on a disk that is not this server's, what is free there by its worker's last word.)

    A worker that is gone holds nobody up.
    """
    query = select(WorkerRow).where(
        WorkerRow.id == AttemptRow.worker_id,
        WorkerRow.boot_id == AttemptRow.boot_id,
        AttemptRow.job == row.number,
        AttemptRow.attempt == row.attempt,
    )
    worker = session.exec(query).first()
    if worker is None or worker.shares_data or worker.gone_at is not None:
        return False, 0
    return True, worker.disk_free_bytes or 0
