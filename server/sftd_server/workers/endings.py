"""How an attempt ends: its worker's last word, a job given back, a worker that vanished or is known to be dead."""

from datetime import datetime

from sqlmodel import Session, and_, col, func, select

from sftd.protocol import Finish, Release
from sftd.schemas import FailureReason, JobState, Want
from sftd_server.db import touch
from sftd_server.errors import Conflict
from sftd_server.jobs import accounts
from sftd_server.jobs.accounts import is_newest_attempt
from sftd_server.jobs.queries import whole_checkpoints
from sftd_server.jobs.service import Note, move
from sftd_server.jobs.states import LEASED, Trigger
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, JobRow, LogLineRow
from sftd_server.workers import registry
from sftd_server.workers.leases import Holder, StaleLease, backoff, fenced
from sftd_server.workers.space import held
from sftd_server.workers.stalls import stalls_with_this

RETRYABLE = {FailureReason.TRAINER_DIED, FailureReason.WORKER_ERROR, FailureReason.DISK_FULL}
LOG_TAIL_LINES = 20
_FINISH = {
    "succeeded": Trigger.FINISH_SUCCEEDED,
    "failed": Trigger.FINISH_FAILED,
    "cancelled": Trigger.FINISH_CANCELLED,
    "paused": Trigger.FINISH_PAUSED,
}


def finish(session: Session, holder: Holder, word: Finish, *, settings: Settings, now: datetime) -> None:
    """The attempt's last word. The same word again is accepted; another one is not."""
    if _already_ended(session, holder, word.state):
        return
    row = fenced(session, holder)
    reason = word.reason or FailureReason.TRAINER_ERROR
    trigger = _FINISH[word.state]
    values: dict[str, object] = {"needs_disk_bytes": None}  # what it went on with counts for one attempt
    may_retry = False
    if word.state == "failed":
        if reason is FailureReason.STALLED:
            counter, count = "stalls", stalls_with_this(session, row)
            may_retry = count <= settings.max_stalls
        else:
            counter, count = "failures", row.failures + 1
            may_retry = reason in RETRYABLE and count < settings.max_failures
        values |= _failure_values(session, row, reason, word.message, word.log_tail) | {counter: count}
        if may_retry:
            values["not_before"] = now + backoff(settings, count)
    elif word.state == "succeeded":
        values["result"] = {name: file.model_dump() for name, file in word.files.items()}
    ends_cancelled = word.state == "paused" and row.want == Want.CANCEL
    note = Note("cancelled" if ends_cancelled else word.state, _last_words(row, word, reason))
    if word.state == "failed":
        comes_to = {Want.RUN: "retrying", Want.PAUSE: "paused"} if may_retry else {}
        note = Note(comes_to.get(Want(row.want), "failed"), note.message, {"reason": reason})
    if word.state == "paused" and word.pause_reason == "disk_low":
        trigger = Trigger.HOLD
        note, changes = held(row, word)
        values |= changes
    pause_reason = str(values.get("pause_reason") or row.pause_reason or "") or None
    moved = move(
        session,
        row,
        trigger,
        now=now,
        notes=[note],
        values=values,
        may_retry=may_retry,
        outcome=word.state,
        reason=reason if word.state == "failed" else pause_reason if word.state == "paused" else None,
        message=word.message,
        half_life_seconds=settings.fair_share_half_life_seconds,
    )
    if moved is None:
        raise Conflict(
            f"{row.id} can not end as {word.state}: it is {row.state} and its user wants it to {row.want}.",
            code="wrong_state",
        )


def release(session: Session, holder: Holder, word: Release, *, settings: Settings, now: datetime) -> None:
    """Give the job back: it goes on elsewhere, before all others of its priority. No failure.

    One that made room for another waits its turn like the rest: at the head it would take its place right back.
    """
    preempted = word.reason == "preempted"
    outcome = "preempted" if preempted else "released"
    if _already_ended(session, holder, outcome):
        return
    row = fenced(session, holder)
    notes = [Note("released", f"Given back by its worker: {word.message}", {"reason": word.reason})]
    values: dict[str, object] = {"not_before": now, "queue_rank": _head_rank(session)}
    if preempted:
        notes = [Note("preempted", f"Made room for {row.yield_to}.", {"make_room_for": row.yield_to})]
        values = {"not_before": now, "queue_rank": 0, "queued_at": now}
    if row.want != Want.RUN:
        notes.append(_settled_note(row))
        values = {}
    moved = move(
        session,
        row,
        Trigger.RELEASE,
        now=now,
        notes=notes,
        values=values,
        outcome=outcome,
        reason=word.reason,
        message=word.message,
        half_life_seconds=settings.fair_share_half_life_seconds,
    )
    if moved is None:
        raise StaleLease


def _already_ended(session: Session, holder: Holder, outcome: str) -> bool:
    query = (
        select(AttemptRow.outcome)
        .join(JobRow, and_(col(JobRow.number) == col(AttemptRow.job), col(JobRow.id) == holder.job_id))
        .where(AttemptRow.attempt == holder.attempt, AttemptRow.token_sha256 == holder.token_sha256)
    )
    return session.exec(query.with_for_update(of=AttemptRow)).first() == outcome


def _failure_values(
    session: Session, row: JobRow, reason: FailureReason, message: str | None, log_tail: list[str]
) -> dict[str, object]:
    if not log_tail:
        query = (
            select(LogLineRow.text)
            .where(LogLineRow.job == row.number)
            .order_by(col(LogLineRow.id).desc())
            .limit(LOG_TAIL_LINES)
        )
        log_tail = list(session.exec(query))[::-1]
    return {"failure_reason": reason, "failure_message": message, "log_tail": log_tail}


def _last_words(row: JobRow, word: Finish, reason: FailureReason) -> str:
    if word.state == "failed":
        return f"Failed ({reason}): {word.message or 'no message'}"
    said = {"succeeded": "Done.", "cancelled": "Cancelled.", "paused": "Paused."}[word.state]
    return word.message or said


# ---------------------------------------------------------------- the reaper


def wake_due(session: Session, *, now: datetime, since: datetime) -> None:
    """Wake claimers for jobs whose wait ended after `since`."""
    if accounts.month_of(now) != accounts.month_of(since):
        touch(session, "queue")  # GPU-hours are counted anew
    due = select(JobRow.number).where(
        JobRow.state == JobState.QUEUED, col(JobRow.not_before) <= now, col(JobRow.not_before) > since
    )
    if session.exec(due.limit(1)).first() is not None:
        touch(session, "queue")


def reap(session: Session, *, settings: Settings, now: datetime) -> int:
    """Take back what no worker keeps alive. Returns how many jobs that were."""
    silent = select(JobRow).where(col(JobRow.state).in_(LEASED), col(JobRow.lease_until) < now)
    # A job whose row another server holds is being written for, so it is alive; or reaped there.
    silent = silent.order_by(col(JobRow.number)).with_for_update(skip_locked=True)
    lost = list(session.exec(silent))
    for row in lost:
        why = f"Worker {row.worker_id} was silent for {settings.lease_seconds:g} s"
        _lose(session, row, settings, now, event="lease_expired", why=why)
    late = select(JobRow).where(JobRow.state == JobState.CLAIMED, col(JobRow.start_by) < now)
    late = late.order_by(col(JobRow.number)).with_for_update(skip_locked=True)
    unstarted = [row for row in session.exec(late) if row.number not in {gone.number for gone in lost}]
    for row in unstarted:
        notes = [Note("not_started", f"Worker {row.worker_id} took the job but did not start it.")]
        if row.want != Want.RUN:
            notes.append(_settled_note(row))
        move(
            session,
            row,
            Trigger.NOT_STARTED,
            now=now,
            notes=notes,
            outcome="not_started",
            half_life_seconds=settings.fair_share_half_life_seconds,
        )
    return len(lost) + len(unstarted)


def take_back(session: Session, *, worker_id: str, boot_id: str, settings: Settings, now: datetime) -> int:
    """A process of a worker is known to be dead: its jobs go on at once. Returns how many those were."""
    query = (
        select(JobRow)
        .join(AttemptRow, is_newest_attempt())
        .where(
            col(JobRow.state).in_(LEASED), AttemptRow.worker_id == worker_id, AttemptRow.boot_id == boot_id
        )
        .with_for_update(of=JobRow)
    )
    held = list(session.exec(query))
    for row in held:
        why = f"Worker {worker_id} was started again"
        _lose(session, row, settings, now, event="worker_restarted", why=why, wait=False)
    return len(held)


def _lose(
    session: Session,
    row: JobRow,
    settings: Settings,
    now: datetime,
    *,
    event: str,
    why: str,
    wait: bool = True,  # before the job runs again
) -> None:
    """A worker has vanished. The count starts again where a newer checkpoint shows that the job gets on."""
    attempt = accounts.live_attempt(session, row, lock=True)
    heard_at = registry.heard_at(session, attempt) if attempt is not None else None
    if attempt is not None and heard_at is not None:
        accounts.count_until(session, attempt, heard_at, now)
    newest = max((found.step for found in whole_checkpoints(session, row.number)), default=-1)
    lost_count = 1 if newest > row.lost_step else row.lost_count + 1
    too_often = lost_count >= settings.max_lost
    values: dict[str, object] = {"lost_count": lost_count, "lost_step": newest}
    notes = [
        Note(event, f"{why} (loss {lost_count}).", {"worker_id": row.worker_id, "lost_count": lost_count})
    ]
    if row.want != Want.RUN:
        notes.append(_settled_note(row))
    elif too_often:
        message = f"{lost_count} workers vanished in a row without a new checkpoint."
        values |= _failure_values(session, row, FailureReason.WORKER_LOST, message, [])
        notes.append(
            Note("failed", f"Failed (worker_lost): {message}", {"reason": FailureReason.WORKER_LOST})
        )
    else:
        values["not_before"] = now + backoff(settings, lost_count) if wait else now
    move(
        session,
        row,
        Trigger.LEASE_EXPIRED,
        now=now,
        notes=notes,
        values=values,
        lost_too_often=too_often,
        outcome="lost",
        reason=FailureReason.WORKER_LOST if too_often and row.want == Want.RUN else None,
        half_life_seconds=settings.fair_share_half_life_seconds,
    )


# ---------------------------------------------------------------- small questions


def _settled_note(row: JobRow) -> Note:
    """What a pause or cancel comes to when the worker is gone."""
    state = "cancelled" if row.want == Want.CANCEL else "paused"
    return Note(state, f"{state.capitalize()}: its worker had given it up.")


def _head_rank(session: Session) -> int:
    lowest = session.exec(select(func.min(JobRow.queue_rank)).where(JobRow.state == JobState.QUEUED)).one()
    return min(0, lowest or 0) - 1
