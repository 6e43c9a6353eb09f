"""What can be done to a job: submit it, cancel, pause and resume it; and `move`, the only way a state changes.

Every change is one guarded UPDATE whose WHERE names what was seen, with its event in the same transaction.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from sqlmodel import Session, col, select, update

from sftd.protocol import BaseRef, InputFile
from sftd.schemas import JobState, Want
from sftd.spec import JobSpec
from sftd_server.auth import Caller
from sftd_server.db import touch
from sftd_server.errors import Conflict, Invalid, NotFound
from sftd_server.ids import new_id
from sftd_server.jobs.states import LEASED, TERMINAL, Facts, Trigger, next_state
from sftd_server.tables import AttemptRow, EventRow, FileRow, JobRow


class JobInputs(BaseModel):
    """What a job reads, pinned when it is posted."""

    training_file: InputFile
    validation_file: InputFile | None
    base: BaseRef | None


@dataclass(frozen=True)
class Submission:
    """A job that has been checked and can be queued."""

    spec: JobSpec
    inputs: JobInputs
    owner: str
    idempotency_key: str | None
    body_sha256: str


@dataclass(frozen=True)
class Note:
    """An event to write."""

    type: str
    message: str
    data: dict[str, Any] | None = None  # differs by type


def body_hash(value: object) -> str:
    """A hash of a JSON value that does not depend on spaces or the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_submitted(session: Session, *, owner: str, idempotency_key: str, body_sha256: str) -> str | None:
    """The id of the job that this call made before, if it was made before. Raises Invalid if it was another call."""
    query = select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == idempotency_key)
    row = session.exec(query).first()
    if row is None:
        return None
    if row.body_sha256 != body_sha256:
        raise Invalid(
            f"The Idempotency-Key {idempotency_key!r} was used for {row.id} with another body; use a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return row.id


def submit(session: Session, submission: Submission, now: datetime) -> str:
    """Queue a job, once per idempotency key. Returns its id."""
    if submission.idempotency_key is not None:
        earlier = find_submitted(
            session,
            owner=submission.owner,
            idempotency_key=submission.idempotency_key,
            body_sha256=submission.body_sha256,
        )
        if earlier:
            return earlier
    _require_files(session, submission.inputs)
    spec = submission.spec
    row = JobRow(
        id=new_id("job"),
        owner=submission.owner,
        idempotency_key=submission.idempotency_key,
        body_sha256=submission.body_sha256,
        name=spec.name,
        priority=spec.priority,
        gpus=spec.gpus,
        base_model=spec.base_model,
        method=spec.method,
        spec=spec.model_dump_json(),
        labels=spec.metadata,
        inputs=submission.inputs.model_dump(mode="json"),
        created_at=now,
        state=JobState.QUEUED,
        queued_at=now,
        not_before=now,
        requires=spec.requires.model_dump(mode="json") if spec.requires else None,
        max_seconds=spec.max_seconds,
        max_gpu_seconds=spec.max_gpu_seconds,
        max_tokens=spec.max_tokens,
    )
    session.add(row)
    session.flush()
    add_event(session, row, Note("queued", "Waiting for a worker."), now)
    touch(session, "queue")
    return row.id


def _require_files(session: Session, inputs: JobInputs) -> None:
    """The files are still there: they may have been deleted since they were looked up."""
    for field, file in (("training_file", inputs.training_file), ("validation_file", inputs.validation_file)):
        if file and not session.exec(select(FileRow.id).where(FileRow.id == file.file_id)).first():
            raise Invalid(f"{field}: there is no file {file.file_id!r}.", code="invalid_spec", param=field)


# ---------------------------------------------------------------- the user's wishes


def find_job(session: Session, job_id: str) -> JobRow:
    """The row of a job. Raises NotFound."""
    row = session.exec(select(JobRow).where(JobRow.id == job_id)).first()
    if row is None:
        raise NotFound(f"There is no job {job_id!r}; GET /jobs lists them.", code="unknown_job")
    return row


def cancel(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """End a job: at once where no worker holds it, else as soon as the worker hears of it."""
    row = find_job(session, job_id)
    caller.require_owner(row.owner)
    if row.state == JobState.CANCELLED or (row.state in LEASED and row.want == Want.CANCEL):
        return
    if row.state in LEASED:
        _wish(session, row, Want.CANCEL, Note("cancel_requested", f"{caller.name} asked to cancel."), now)
        return
    note = Note("cancelled", f"Cancelled by {caller.name}.")
    _require(
        move(session, row, Trigger.CANCEL, now=now, notes=[note], values={"want": Want.CANCEL}), row, "cancel"
    )


def pause(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Put a job aside; a running one saves a checkpoint first."""
    row = find_job(session, job_id)
    caller.require_owner(row.owner)
    if row.state == JobState.PAUSED or (row.state in LEASED and row.want == Want.PAUSE):
        return
    if row.state in LEASED and row.want == Want.RUN:
        _wish(session, row, Want.PAUSE, Note("pause_requested", f"{caller.name} asked to pause."), now)
        return
    note = Note("paused", f"Paused by {caller.name}.")
    _require(
        move(session, row, Trigger.PAUSE, now=now, notes=[note], values={"want": Want.PAUSE}), row, "pause"
    )


def resume(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Queue a paused job again, or take back a pause that no worker has heard of yet."""
    row = find_job(session, job_id)
    caller.require_owner(row.owner)
    holds = row.state in (JobState.QUEUED, JobState.CLAIMED, JobState.RUNNING)
    if holds and row.want == Want.RUN:
        return
    if holds and row.want == Want.PAUSE:
        _wish(session, row, Want.RUN, Note("resumed", f"{caller.name} took the pause back."), now)
        return
    note = Note("queued", f"Resumed by {caller.name}; waiting for a worker.")
    values = {"want": Want.RUN, "not_before": now}
    _require(move(session, row, Trigger.RESUME, now=now, notes=[note], values=values), row, "resume")


def _wish(session: Session, row: JobRow, want: Want, note: Note, now: datetime) -> None:
    """Tell the holder of the lease what the user wants."""
    statement = (
        update(JobRow)
        .where(
            col(JobRow.number) == row.number,
            col(JobRow.state) == row.state,
            col(JobRow.want) == row.want,
            col(JobRow.attempt) == row.attempt,
        )
        .values(want=want)
    )
    if session.exec(statement).rowcount != 1:
        raise Conflict(f"{row.id} has just changed; try again.", code="changed_meanwhile")
    add_event(session, row, note, now)
    touch(session, f"want:{row.id}")


def _require(state: JobState | None, row: JobRow, verb: str) -> None:
    if state is not None:
        return
    if row.state in TERMINAL:
        raise Conflict(f"{row.id} has {row.state}; it can not {verb} any more.", code="job_finished")
    if row.state == JobState.STOPPING or row.want == Want.CANCEL:
        doing = "cancelled" if row.want == Want.CANCEL else "paused"
        raise Conflict(
            f"{row.id} is being {doing} (state {row.state}); it can not {verb} until that is done.",
            code="job_stopping",
        )
    raise Conflict(f"{row.id} is {row.state}; it can not {verb}.", code="wrong_state")


# ---------------------------------------------------------------- moving


def move(
    session: Session,
    row: JobRow,
    trigger: Trigger,
    *,
    now: datetime,
    notes: list[Note],
    values: dict[str, Any] | None = None,  # columns to set besides
    lost_too_often: bool = False,
    may_retry: bool = False,
    makes_room: bool = False,
    outcome: str | None = None,
) -> JobState | None:
    """Carry out a row of the state table; None where there is none for this, or the job has changed meanwhile.

    `notes` become events. `outcome` is what the attempt is said to have ended with.
    """
    facts = Facts(Want(row.want), lost_too_often=lost_too_often, may_retry=may_retry, makes_room=makes_room)
    to = next_state(JobState(row.state), trigger, facts)
    if to is None:
        return None
    changes: dict[str, Any] = {"state": to, **_settled(to, now), **(values or {})}
    statement = (
        update(JobRow)
        .where(
            col(JobRow.number) == row.number,
            col(JobRow.state) == row.state,
            col(JobRow.want) == row.want,
            col(JobRow.attempt) == row.attempt,
            col(JobRow.token_sha256).is_not_distinct_from(row.token_sha256),
        )
        .values(**changes)
    )
    if session.exec(statement).rowcount != 1:
        return None
    if row.state in LEASED and to not in LEASED:
        _end_attempt(session, row, outcome or str(to), now)
    attempt = changes.get("attempt", row.attempt)
    for note in notes:
        add_event(session, row, note, now, attempt=attempt)
    touch(session, f"want:{row.id}", *(["queue"] if to is JobState.QUEUED else []))
    return to


def _settled(to: JobState, now: datetime) -> dict[str, Any]:
    """Columns that follow from the new state."""
    if to in LEASED:
        return {}
    settled: dict[str, Any] = {"token_sha256": None, "lease_until": None, "start_by": None}
    if to in TERMINAL:
        settled["finished_at"] = now
    else:
        settled["worker_id"] = None
    return settled


def _end_attempt(session: Session, row: JobRow, outcome: str, now: datetime) -> None:
    statement = (
        update(AttemptRow)
        .where(
            col(AttemptRow.job) == row.number,
            col(AttemptRow.attempt) == row.attempt,
            col(AttemptRow.outcome).is_(None),
        )
        .values(outcome=outcome, ended_at=now)
    )
    session.exec(statement)


def add_event(
    session: Session, row: JobRow, note: Note, now: datetime, *, attempt: int | None = None
) -> None:
    """Write an event and wake those who follow the job."""
    assert row.number is not None
    session.add(
        EventRow(
            job=row.number,
            attempt=row.attempt if attempt is None else attempt,
            type=note.type,
            message=note.message,
            data=note.data or {},
            created_at=now,
        )
    )
    session.flush()
    touch(session, f"job:{row.id}")
