"""What can be done to a job: submit it, cancel, pause and resume it; and `move`, the only way a state changes.

Every change is one guarded UPDATE whose WHERE names what was seen, with its event in the same transaction. An attempt
that ends is paid for here, and a job that ends without success takes with it those that wait for it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import func
from sqlmodel import Session, col, select, update

from sftd.protocol import BaseRef, InputFile
from sftd.schemas import FailureReason, JobState, PauseReason, Want
from sftd.spec import JOB_REFERENCE, JobSpec
from sftd_server.audit import service as audit
from sftd_server.auth import Caller
from sftd_server.db import touch
from sftd_server.errors import Conflict, Invalid, NotFound
from sftd_server.ids import new_id
from sftd_server.jobs import accounts, dependencies, limits
from sftd_server.jobs.states import LEASED, TERMINAL, Facts, Trigger, next_state
from sftd_server.tables import CheckpointRow, EventRow, FileRow, JobRow

ADAPTERS = ("lora", "qlora")  # methods whose result stands on another model
ENDED = "ended"  # the topic of jobs that are over
KEY_LIFETIME = timedelta(hours=24)  # of an Idempotency-Key; then it may be used anew
# Within this a retry without a key is one of the same call. OpenAI's clients wait ten minutes for an answer and then try
# again, twice, up to a minute later each: 22 minutes from the first try to the last. Some are told to wait or try for longer.
RETRY_LIFETIME = timedelta(hours=1)
_OF_RETRY = "\x1f"  # begins the key of a job whose retry came before its first try; no header can hold it
_MADE_BY = re.compile(r"^jobs/(?P<job_id>[^/]+)/")
CHECKPOINT_PATH = re.compile(r"^jobs/(?P<job_id>[^/]+)/checkpoints/(?P<name>[^/]+)$")


class JobInputs(BaseModel):
    """What a job reads, pinned when it is posted. A base that is the result of a job in `after` is pinned when that
    is done: at the claim."""

    training_file: InputFile
    validation_file: InputFile | None
    base: BaseRef | None
    base_sha256: str | None = None  # of a base model in a folder, as the first attempt found it

    @property
    def files(self) -> dict[str, InputFile]:
        """The uploaded files, by the spec's field."""
        named = {"training_file": self.training_file, "validation_file": self.validation_file}
        return {field: file for field, file in named.items() if file is not None}


@dataclass(frozen=True)
class Submission:
    """A job that has been checked and can be queued."""

    spec: JobSpec
    inputs: JobInputs
    owner: str
    idempotency_key: str | None
    body_sha256: str
    origin: "Origin | None" = None
    suffix: str | None = None
    one_of_tries: "Try | None" = None


@dataclass(frozen=True)
class Try:
    """One try of a call whose client sends it again without a key of its own."""

    is_retry: bool
    arrived_at: datetime


@dataclass(frozen=True)
class Origin:
    """The job that a new one was made from, and the checkpoint to begin with."""

    verb: str  # what its `queued` event tells
    retry_of: str | None = None
    clone_of: str | None = None
    seed_job: int | None = None
    seed_checkpoint: str | None = None
    suffix: str | None = None


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


def find_submitted(
    session: Session, *, owner: str, idempotency_key: str, body_sha256: str, now: datetime
) -> str | None:
    """The id of the job that this call made before, if it was made before. Raises Invalid if it was another call."""
    row = _with_key(session, owner, idempotency_key)
    if row is None or row.created_at <= now - KEY_LIFETIME:
        return None
    if row.body_sha256 != body_sha256:
        raise Invalid(
            f"The Idempotency-Key {idempotency_key!r} was used for {row.id} with another body; use a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return row.id


def find_tried(session: Session, one: Try, *, owner: str, body_sha256: str, now: datetime) -> str | None:
    """The id of the job that another try of this call has made.

    A retry's is the newest with its body that nobody has cancelled: who cancels a job and posts the same again wants another
    one. A first try has one only where its retry has overtaken it: one that was made after this try had arrived. So the same
    body posted twice on purpose makes two jobs.
    """
    query = (
        select(JobRow.id)
        .where(JobRow.owner == owner, JobRow.body_sha256 == body_sha256)
        .where(col(JobRow.created_at) > now - RETRY_LIFETIME)
        .order_by(col(JobRow.number).desc())
    )
    overtaken = col(JobRow.idempotency_key).startswith(_OF_RETRY, autoescape=True)
    if one.is_retry:
        alive = (JobRow.state != JobState.CANCELLED, JobRow.want != Want.CANCEL)
        without_key = col(JobRow.idempotency_key).is_(None)
        return session.exec(query.where(*alive, without_key | overtaken)).first()
    return session.exec(query.where(overtaken, col(JobRow.created_at) >= one.arrived_at)).first()


def _with_key(session: Session, owner: str, idempotency_key: str) -> JobRow | None:
    query = select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == idempotency_key)
    return session.exec(query).first()


def _made_before(session: Session, submission: Submission, now: datetime) -> str | None:
    """The id of the job that this call has made already. An old key is taken from its job, for the new one."""
    owner, key, body = submission.owner, submission.idempotency_key, submission.body_sha256
    if key is not None:
        earlier = find_submitted(session, owner=owner, idempotency_key=key, body_sha256=body, now=now)
        if earlier is None:
            # Of an old job only: another server may have made one with the key since the look.
            old = (col(JobRow.owner) == owner, col(JobRow.created_at) <= now - KEY_LIFETIME)
            of_it = col(JobRow.idempotency_key) == key
            session.exec(update(JobRow).where(*old, of_it).values(idempotency_key=None))
        return earlier
    if submission.one_of_tries is None:
        return None
    if session.connection().dialect.name == "postgresql":  # the other try may be at another server
        session.exec(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{owner} {body}", 0)))).one()
    return find_tried(session, submission.one_of_tries, owner=owner, body_sha256=body, now=now)


def submit(session: Session, submission: Submission, now: datetime) -> str:
    """Queue a job, once per idempotency key or call. Returns its id."""
    earlier = _made_before(session, submission, now)
    if earlier is not None:
        return earlier
    key = submission.idempotency_key
    if key is None and submission.one_of_tries is not None and submission.one_of_tries.is_retry:
        key = new_id(_OF_RETRY)
    limits.require_place(session, submission.owner, now)
    checking_files = _require_files(session, submission.inputs)
    spec, origin = submission.spec, submission.origin or Origin("Waiting for a worker.")
    _require_base(session, spec.base_model, submission.inputs)
    _require_seed(session, origin)
    row = JobRow(
        id=new_id("job"),
        owner=submission.owner,
        idempotency_key=key,
        body_sha256=submission.body_sha256,
        gpus=spec.gpus,
        base_model=spec.base_model,
        method=spec.method,
        **changeable_columns(spec),
        inputs=submission.inputs.model_dump(mode="json"),
        created_at=now,
        state=JobState.QUEUED,
        queued_at=now,
        not_before=now,
        retry_of=origin.retry_of,
        clone_of=origin.clone_of,
        seed_job=origin.seed_job,
        seed_checkpoint=origin.seed_checkpoint,
        suffix=submission.suffix or origin.suffix,
        checking_files=checking_files,
    )
    row.expected_gpu_seconds = accounts.expected_gpu_seconds(session, spec, submission.inputs.training_file)
    session.add(row)
    session.flush()
    dependencies.replace(session, row, spec.after)
    add_event(session, row, Note("queued", origin.verb), now)
    touch(session, "queue")
    audit.describe(session, name=row.name, base_model=row.base_model, method=row.method)
    return row.id


def changeable_columns(spec: JobSpec) -> dict[str, Any]:  # columns of several types
    """The spec as it is stored, and the columns that repeat what may change of it."""
    return {
        "spec": spec.model_dump_json(),
        "name": spec.name,
        "labels": spec.metadata,
        "priority": spec.priority,
        "requires": spec.requires.model_dump(mode="json") if spec.requires else None,
        "max_seconds": spec.max_seconds,
        "max_gpu_seconds": spec.max_gpu_seconds,
        "max_tokens": spec.max_tokens,
    }


def invalid_file(file_id: str, details: str | None) -> str:
    """What to say of a file whose check has found mistakes."""
    return f"{file_id} can not be trained on; mend it and upload it again:\n{details}"


def _require_files(session: Session, inputs: JobInputs) -> bool:
    """The files are still there: they may have been deleted, or found wrong, since they were looked up. Whether one is
    still being checked: whoever writes down what the check found sees this job then."""
    statuses = set()
    for field, file in inputs.files.items():
        here = select(FileRow.status, FileRow.status_details).where(FileRow.id == file.file_id)
        found = session.exec(here.with_for_update(read=True)).first()  # none goes before the job is there
        if found is None:
            raise Invalid(f"{field}: there is no file {file.file_id!r}.", code="invalid_spec", param=field)
        status, details = found
        if status == "error":
            message = f"{field}: {invalid_file(file.file_id, details)}"
            raise Invalid(message, code="invalid_spec", param=field)
        statuses.add(status)
    return "uploaded" in statuses


def makers(session: Session, base_model: str, inputs: JobInputs) -> set[str]:
    """The ids of the jobs whose files a job reads as its base, or will read when it is claimed: the one that it names, and
    the one that an adapter of that stands on."""
    found: set[str] = set()
    base, paths = inputs.base, [inputs.base.path, inputs.base.base_model] if inputs.base else []
    reference = JOB_REFERENCE.match(base_model)
    while reference is not None and reference["job_id"] not in found:
        found.add(reference["job_id"])
        row = session.exec(select(JobRow).where(JobRow.id == reference["job_id"])).first()
        if base is not None or row is None:
            break
        base, reference = JobInputs.model_validate(row.inputs).base, JOB_REFERENCE.match(row.base_model)
        if base is not None and row.method in ADAPTERS:
            paths.append(base.base_model)
    return found | {match["job_id"] for path in paths if (match := _MADE_BY.match(path))}


def unpinned_maker(row: JobRow) -> str | None:
    """The id of the job whose result is to be this one's base, where that is not pinned yet."""
    reference = JOB_REFERENCE.match(row.base_model)
    pinned = JobInputs.model_validate(row.inputs).base is not None
    return None if reference is None or pinned else reference["job_id"]


def _require_base(session: Session, base_model: str, inputs: JobInputs) -> None:
    """The jobs and the checkpoint that a job builds on are still there: they may have been deleted since they were looked
    up. A DELETE looks for jobs that need a row after it has locked it, as this does."""
    named = makers(session, base_model, inputs)
    held = select(JobRow.id).where(col(JobRow.id).in_(named)).order_by(col(JobRow.number))
    there = set(session.exec(held.with_for_update(read=True)))
    if gone := named - there:
        raise Invalid(
            f"base_model: there is no job {min(gone)!r} any more; GET /jobs lists them.",
            code="invalid_spec",
            param="base_model",
        )
    base = inputs.base
    for path in sorted({base.path, base.base_model}) if base else ():
        found = CHECKPOINT_PATH.match(path)
        if found:
            require_checkpoint(session, found["job_id"], found["name"], field="base_model")
        elif made_by := _MADE_BY.match(path):
            _require_result(session, made_by["job_id"])


def _require_result(session: Session, job_id: str) -> None:
    query = select(JobRow.id).where(JobRow.id == job_id, col(JobRow.result_deleted_at).is_not(None))
    if session.exec(query).first() is not None:
        raise Invalid(
            f"base_model: the model that {job_id} made has been deleted; train it again, or choose another.",
            code="invalid_spec",
            param="base_model",
        )


def _require_seed(session: Session, origin: "Origin") -> None:
    """And so is the checkpoint that it goes on from."""
    if origin.seed_job is not None and origin.seed_checkpoint is not None:
        query = select(JobRow.id).where(JobRow.number == origin.seed_job)
        job_id = session.exec(query.with_for_update(read=True)).first()
        if job_id is None:
            raise NotFound("The job to go on from has just been deleted.", code="unknown_job")
        require_checkpoint(session, job_id, origin.seed_checkpoint, field="from")


def require_checkpoint(session: Session, job_id: str, name: str, *, field: str) -> None:
    """Hold a checkpoint for a job that is written in this transaction. Raises Invalid where it is gone.

    Retention looks for jobs that need a checkpoint after it has locked the checkpoint's row, as this does.
    """
    query = (
        select(CheckpointRow.name)
        .join(JobRow, col(JobRow.number) == col(CheckpointRow.job))
        .where(JobRow.id == job_id, CheckpointRow.name == name)
        .where(col(CheckpointRow.deleted_at).is_(None), col(CheckpointRow.corrupt).is_(False))
        .with_for_update(of=CheckpointRow)
    )
    if session.exec(query).first() is None:
        raise Invalid(
            f"{field}: {name} of {job_id} is no longer there; GET /jobs/{job_id}/checkpoints lists those that are.",
            code="invalid_spec",
            param=field,
        )


# ---------------------------------------------------------------- the user's wishes


def find_job(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """The row of a job; locked until the end of the write where a write is decided on it. Raises NotFound."""
    query = select(JobRow).where(JobRow.id == job_id)
    row = session.exec(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"There is no job {job_id!r}; GET /jobs lists them.", code="unknown_job")
    return row


def own_job(session: Session, job_id: str, caller: Caller) -> JobRow:
    """The row of a job that the caller may change, locked. Raises NotFound, Forbidden."""
    row = find_job(session, job_id, lock=True)
    caller.require_owner(row.owner)
    if row.owner != caller.name:
        audit.mention(session, owner=row.owner)
    return row


def cancel(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """End a job: at once where no worker holds it, else as soon as the worker hears of it."""
    row = own_job(session, job_id, caller)
    if row.state == JobState.CANCELLED or (row.state in LEASED and row.want == Want.CANCEL):
        return
    if row.state in LEASED:
        wish(session, row, Want.CANCEL, Note("cancel_requested", f"{caller.name} asked to cancel."), now)
        return
    note = Note("cancelled", f"Cancelled by {caller.name}.")
    _require(
        move(session, row, Trigger.CANCEL, now=now, notes=[note], values={"want": Want.CANCEL}), row, "cancel"
    )


def pause(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Put a job aside; a running one saves a checkpoint first."""
    row = own_job(session, job_id, caller)
    mine = {"pause_reason": PauseReason.USER, "needs_disk_bytes": None}
    if row.state == JobState.PAUSED and row.pause_reason == PauseReason.DISK_LOW:
        update_seen(session, row, mine)  # it shall not go on by itself any more
        add_event(session, row, Note("paused", f"{caller.name} asked to keep it paused."), now)
        return
    if row.state == JobState.PAUSED or (row.state in LEASED and row.want == Want.PAUSE):
        return
    if row.state in LEASED and row.want == Want.RUN:
        note = Note("pause_requested", f"{caller.name} asked to pause.")
        wish(session, row, Want.PAUSE, note, now, values=mine)
        return
    note = Note("paused", f"Paused by {caller.name}.")
    values = {"want": Want.PAUSE, **mine}
    _require(move(session, row, Trigger.PAUSE, now=now, notes=[note], values=values), row, "pause")


def resume(session: Session, job_id: str, caller: Caller, now: datetime) -> None:
    """Queue a paused job again, or take back a pause that no worker has heard of yet. Raises Conflict where a budget
    would pause it again at once."""
    row = own_job(session, job_id, caller)
    holds = row.state in (JobState.QUEUED, JobState.CLAIMED, JobState.RUNNING)
    if holds and row.want == Want.RUN:
        return
    if row.state == JobState.PAUSED or (holds and row.want == Want.PAUSE):
        accounts.require_budget(row, accounts.live_attempt(session, row), now)
    if holds and row.want == Want.PAUSE:
        note = Note("resumed", f"{caller.name} took the pause back.")
        wish(session, row, Want.RUN, note, now, values={"pause_reason": None})
        return
    if row.state == JobState.PAUSED:
        limits.require_place(session, row.owner, now)
    dependencies.hold_needed(session, row)
    note = Note("queued", f"Resumed by {caller.name}; waiting for a worker.")
    # Its user knows better than the disk, which does not tell of quotas.
    values = {"want": Want.RUN, "not_before": now, "queued_at": now, "needs_disk_bytes": None}
    _require(move(session, row, Trigger.RESUME, now=now, notes=[note], values=values), row, "resume")
    if row.checking_files:
        settle_files(session, find_job(session, row.id, lock=True), now)
    lost = dependencies.failed_need(session, row)
    if lost is not None:  # it ended while this one was put aside
        fail_waiting(session, find_job(session, row.id, lock=True), lost, now)


def wish(
    session: Session,
    row: JobRow,
    want: Want,
    note: Note,
    now: datetime,
    *,
    values: dict[str, Any] | None = None,  # columns to set besides
) -> None:
    """Tell the holder of the lease what is wanted of the job."""
    update_seen(session, row, {"want": want, **(values or {})})
    add_event(session, row, note, now)
    touch(session, f"want:{row.id}")


def update_seen(session: Session, row: JobRow, values: dict[str, Any]) -> None:  # columns differ by caller
    """Set columns of a job, if it still stands where it was seen to. Raises Conflict."""
    statement = (
        update(JobRow)
        .where(
            col(JobRow.number) == row.number,
            col(JobRow.state) == row.state,
            col(JobRow.want) == row.want,
            col(JobRow.attempt) == row.attempt,
            col(JobRow.spec) == row.spec,
        )
        .values(**values)
    )
    if session.exec(statement).rowcount != 1:
        raise Conflict(f"{row.id} has just changed; try again.", code="changed_meanwhile")


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
    reason: str | None = None,
    message: str | None = None,
    half_life_seconds: float = accounts.HALF_LIFE_SECONDS,
) -> JobState | None:
    """Carry out a row of the state table; None where there is none for this, or the job has changed meanwhile.

    `notes` become events. `outcome`, `reason` and `message` tell how the attempt ended, where this ends one;
    `half_life_seconds` is that of its owner's usage. A job that fails or is cancelled fails those that wait for it.
    """
    facts = Facts(Want(row.want), lost_too_often=lost_too_often, may_retry=may_retry, makes_room=makes_room)
    to = next_state(JobState(row.state), trigger, facts)
    if to is None:
        return None
    if not _update_moved(session, row, to, now, values or {}):
        return None
    if row.state in LEASED and to not in LEASED:
        told = message or (notes[0].message if notes else None)
        ended = accounts.Ending(outcome or str(to), reason, told, now)
        accounts.end_attempt(session, row, ended, half_life_seconds=half_life_seconds)
    attempt = (values or {}).get("attempt", row.attempt)
    for note in notes:
        add_event(session, row, note, now, attempt=attempt)
    wakes = to is JobState.QUEUED or (to is JobState.SUCCEEDED and dependencies.is_needed(session, row))
    if row.state in LEASED and to not in LEASED and not wakes:
        wakes = limits.bounds_running(session, row.owner)  # another of its owner's may start
    touch(session, f"want:{row.id}", *(["queue"] if wakes else []))
    if to in (JobState.FAILED, JobState.CANCELLED):
        _fail_those_waiting_for(session, row, now)
    return to


def settle_files(session: Session, row: JobRow, now: datetime) -> None:
    """Let a locked job go on, or fail, whose files were being checked. Nothing happens while one still is; a paused job
    does not fail before it is resumed."""
    inputs = JobInputs.model_validate(row.inputs)
    statuses = set()
    for field, file in inputs.files.items():
        here = select(FileRow.status, FileRow.status_details).where(FileRow.id == file.file_id)
        status, details = session.exec(here).first() or ("processed", None)
        if status == "error":
            _fail_for_data(session, row, f"The {field} {invalid_file(file.file_id, details)}", now)
            return
        statuses.add(status)
    if "uploaded" in statuses:
        return
    expected = accounts.expected_gpu_seconds(
        session, JobSpec.model_validate_json(row.spec), inputs.training_file
    )
    session.exec(
        update(JobRow)
        .where(col(JobRow.number) == row.number, col(JobRow.checking_files).is_(True))
        .values(checking_files=False, expected_gpu_seconds=expected)
    )
    touch(session, "queue", f"job:{row.id}")


def _fail_for_data(session: Session, row: JobRow, message: str, now: datetime) -> None:
    reason = FailureReason.BAD_DATA
    values = {"failure_reason": reason, "failure_message": message, "log_tail": [], "checking_files": False}
    note = Note("failed", f"Failed ({reason}): {message}", {"reason": reason})
    move(session, row, Trigger.FILE_INVALID, now=now, notes=[note], values=values)


def fail_waiting(session: Session, row: JobRow, needed: str, now: datetime) -> None:
    """End a queued job that waits for one that has ended without success, and those that wait for it in turn."""
    _fail_waiting(session, row, needed, now)
    _fail_those_waiting_for(session, row, now)


def _fail_those_waiting_for(session: Session, row: JobRow, now: datetime) -> None:
    """One by one, not by recursion: a chain of jobs may be longer than Python can recurse."""
    for waiting, needed in dependencies.waiting_for(session, row):
        _fail_waiting(session, waiting, needed, now)


def _fail_waiting(session: Session, row: JobRow, needed: str, now: datetime) -> None:
    """End a queued job whose turn can never come, since a job that it needs has ended without success."""
    to = next_state(JobState(row.state), Trigger.DEPENDENCY_FAILED, Facts(Want(row.want)))
    reason = FailureReason.DEPENDENCY_FAILED
    message = f"{needed}, which it waits for, has ended without success."
    values = {"failure_reason": reason, "failure_message": message, "log_tail": []}
    if to is not None and _update_moved(session, row, to, now, values):
        note = Note("failed", f"Failed ({reason}): {message}", {"reason": reason, "job_id": needed})
        add_event(session, row, note, now)
        touch(session, f"want:{row.id}")


def _update_moved(
    session: Session, row: JobRow, to: JobState, now: datetime, values: dict[str, Any]
) -> bool:  # values: columns to set besides
    """The guarded UPDATE of a move: whether the job still stood where it was seen to."""
    statement = (
        update(JobRow)
        .where(
            col(JobRow.number) == row.number,
            col(JobRow.state) == row.state,
            col(JobRow.want) == row.want,
            col(JobRow.attempt) == row.attempt,
            col(JobRow.token_sha256).is_not_distinct_from(row.token_sha256),
        )
        .values(**{"state": to, **_settled(to, now), **values})
    )
    moved = session.exec(statement).rowcount == 1
    if moved and to in TERMINAL:
        touch(session, ENDED)
    return moved


def _settled(to: JobState, now: datetime) -> dict[str, Any]:
    """Columns that follow from the new state."""
    if to in LEASED:
        return {}
    settled: dict[str, Any] = {"token_sha256": None, "lease_until": None, "start_by": None, "yield_to": None}
    if to in TERMINAL:
        settled |= {"finished_at": now, "pause_reason": None, "needs_disk_bytes": None}
    else:
        settled["worker_id"] = None
    if to is JobState.QUEUED:
        settled["pause_reason"] = None
    return settled


def add_event(
    session: Session, row: JobRow, note: Note, now: datetime, *, attempt: int | None = None
) -> None:
    """Write an event and wake those who follow the job.

    The job's row must be locked or made by this transaction, so that events appear in the order of their ids: whoever
    follows the job goes on after the last id seen.
    """
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
