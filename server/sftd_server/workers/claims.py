"""Claims: a worker takes the next job. Asked twice, the same request brings the same lease."""

import hashlib
import hmac
from datetime import datetime

from sqlmodel import Session, col, select, update

from sftd.protocol import CheckpointRef, Claim, Lease
from sftd.schemas import JobState
from sftd.spec import JobSpec
from sftd_server.errors import Conflict
from sftd_server.jobs import dependencies, limits, scheduling
from sftd_server.jobs.queries import whole_checkpoints
from sftd_server.jobs.scheduling import Place
from sftd_server.jobs.service import JobInputs, Note, fail_waiting, move, unpinned_maker
from sftd_server.jobs.states import TERMINAL, Trigger
from sftd_server.jobs.submission import base_of_result
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, CheckpointRow, JobRow, StreamRow, WorkerRow
from sftd_server.workers.leases import deadlines, sha256, start_by
from sftd_server.workers.registry import asked

STREAMS = ("metrics", "logs", "events")


def is_claimable(session: Session, *, claim: Claim, settings: Settings, now: datetime) -> bool | None:
    """True where there is a job to claim, else None: a look that costs no write."""
    known = select(WorkerRow).where(WorkerRow.id == claim.worker_id, WorkerRow.boot_id == claim.boot_id)
    row = session.exec(known).first()
    if row is None:
        return True  # it has to hear that it is not known
    place = _place(claim, row)
    if place.draining:
        return None
    return True if next(scheduling.next_jobs(session, place, settings, now), None) else None


def claim(
    session: Session, claim: Claim, *, key_name: str, secret: str, settings: Settings, now: datetime
) -> Lease | None:
    """Take the next job, or the same one again where the answer to the same request was lost. The event says which
    worker took it, and with whose key."""
    place = _place(claim, asked(session, claim, now))
    earlier = session.exec(
        select(AttemptRow)
        .where(AttemptRow.worker_id == claim.worker_id, AttemptRow.request_id == claim.request_id)
        .with_for_update()
    ).first()
    if earlier is not None:
        return _claim_again(session, earlier, secret=secret, settings=settings, now=now)
    found = _next_job(session, place, settings, now)
    if found is None:
        return None
    row, inputs = found
    attempt = row.attempt + 1
    token = _token(secret, row.id, attempt, claim.request_id)
    values = {
        "attempt": attempt,
        "token_sha256": sha256(token),
        "worker_id": claim.worker_id,
        "queue_rank": 0,
        "inputs": inputs.model_dump(mode="json"),
    }
    note = Note(
        "claimed", f"Taken by worker {claim.worker_id}.", {"worker_id": claim.worker_id, "key": key_name}
    )
    moved = move(
        session,
        row,
        Trigger.CLAIM,
        now=now,
        notes=[note],
        values={**values, **deadlines(settings, now), "start_by": start_by(settings, now)},
    )
    if moved is None:
        return None
    _open_attempt(session, row, attempt, claim, sha256(token), now)
    return _lease(session, row, inputs, attempt, token, settings, next_seq=dict.fromkeys(STREAMS, 0))


def _next_job(
    session: Session, place: Place, settings: Settings, now: datetime
) -> tuple[JobRow, JobInputs] | None:
    """The first job for this worker that no other claim is taking at this moment, locked; and what it reads."""
    if place.draining:
        return None
    for found in scheduling.next_jobs(session, place, settings, now):
        if not limits.may_start(session, found.owner, now):
            continue  # another server has just started one of the owner's
        query = select(JobRow).where(JobRow.number == found.number, scheduling.is_ready(now))
        row = session.exec(query.with_for_update(skip_locked=True, of=JobRow)).first()
        inputs = _pinned(session, row, now) if row is not None else None
        if row is not None and inputs is not None:
            return row, inputs
    return None


def _place(claim: Claim, row: WorkerRow) -> Place:
    """Who asks, with what is free there."""
    free, disk = claim.gpus, claim.disk_free_bytes
    return Place(
        id=row.id,
        boot_id=row.boot_id,
        gpus=max(row.gpus, free),
        free=free,
        protocol=claim.protocol,
        gpu_memory_gb=row.gpu_memory_gb,
        labels=row.labels,
        draining=row.draining,
        # Of a disk that the server sees too it has a newer word itself (space.py): a held claim may be half a minute old.
        disk_free_bytes=None if row.shares_data else disk,
    )


def _pinned(session: Session, row: JobRow, now: datetime) -> JobInputs | None:
    """What the job reads. A base that was still being made when the job was posted should be done now: where it is not,
    None, and the job waits for it, or fails with it."""
    inputs, maker = JobInputs.model_validate(row.inputs), unpinned_maker(row)
    if maker is None:
        return inputs
    made_by = session.exec(select(JobRow).where(JobRow.id == maker).with_for_update(read=True)).first()
    if made_by is not None and made_by.state == JobState.SUCCEEDED:
        return inputs.model_copy(update={"base": base_of_result(made_by)})
    if made_by is None or made_by.state in TERMINAL:
        fail_waiting(session, row, maker, now)
    else:
        dependencies.add(session, row, made_by)
    return None


def _claim_again(
    session: Session, earlier: AttemptRow, *, secret: str, settings: Settings, now: datetime
) -> Lease:
    changed = session.exec(
        update(JobRow)
        .where(
            col(JobRow.number) == earlier.job,
            col(JobRow.attempt) == earlier.attempt,
            col(JobRow.token_sha256) == earlier.token_sha256,
            col(JobRow.state) == JobState.CLAIMED,
        )
        # `start_by` stays: a worker that cannot read the answer would else ask for ever, and hold the job.
        .values(**deadlines(settings, now))
    )
    if changed.rowcount != 1:
        raise Conflict(
            f"The claim {earlier.request_id!r} was answered before and its job has moved on; claim with a new request_id.",
            code="claim_over",
            param="request_id",
        )
    row = session.exec(select(JobRow).where(JobRow.number == earlier.job)).one()
    token = _token(secret, row.id, earlier.attempt, earlier.request_id)
    inputs = JobInputs.model_validate(row.inputs)
    here = (StreamRow.job == row.number, StreamRow.attempt == earlier.attempt)
    next_seq = {stream.kind: stream.next_seq for stream in session.exec(select(StreamRow).where(*here))}
    return _lease(session, row, inputs, earlier.attempt, token, settings, next_seq=next_seq)


def _open_attempt(
    session: Session, row: JobRow, attempt: int, claim: Claim, token_sha256: str, now: datetime
) -> None:
    assert row.number is not None
    session.add(
        AttemptRow(
            job=row.number,
            attempt=attempt,
            worker_id=claim.worker_id,
            boot_id=claim.boot_id,
            request_id=claim.request_id,
            token_sha256=token_sha256,
            claimed_at=now,
            gpus=row.gpus,
            protocol=claim.protocol,
        )
    )
    session.flush()
    kinds = [{"job": row.number, "attempt": attempt, "kind": kind, "next_seq": 0} for kind in STREAMS]
    session.execute(StreamRow.__table__.insert(), kinds)  # type: ignore[attr-defined]  # SQLModel hides the table


def _lease(
    session: Session,
    row: JobRow,
    inputs: JobInputs,
    attempt: int,
    token: str,
    settings: Settings,
    *,
    next_seq: dict[str, int],
) -> Lease:
    return Lease(
        job_id=row.id,
        attempt=attempt,
        token=token,
        lease_seconds=settings.lease_seconds,
        spec=JobSpec.model_validate_json(row.spec),
        folder=f"jobs/{row.id}",
        training_file=inputs.training_file,
        validation_file=inputs.validation_file,
        base=inputs.base,
        checkpoints=_checkpoints(session, row, attempt),
        next_seq=next_seq,
        base_sha256=inputs.base_sha256,
    )


def _checkpoints(session: Session, row: JobRow, attempt: int) -> list[CheckpointRef]:
    """What to go on from, newest first: the job's own checkpoints, or those of the job that it goes on from."""
    own = whole_checkpoints(session, row.number) if attempt > 1 else []
    if own or row.seed_job is None:
        return [_ref(found, None) for found in reversed(own)]
    seed = session.exec(select(JobRow.id).where(JobRow.number == row.seed_job)).first()
    first = select(CheckpointRow.step).where(
        CheckpointRow.job == row.seed_job, CheckpointRow.name == row.seed_checkpoint
    )
    last_step = session.exec(first).first() or 0
    theirs = [found for found in whole_checkpoints(session, row.seed_job) if found.step <= last_step]
    return [_ref(found, f"jobs/{seed}") for found in reversed(theirs)]


def _ref(found: CheckpointRow, folder: str | None) -> CheckpointRef:
    return CheckpointRef(
        step=found.step, name=found.name, manifest_sha256=found.manifest_sha256, folder=folder
    )


def _token(secret: str, job_id: str, attempt: int, request_id: str) -> str:
    """Derived, not drawn: the same claim asked twice gets the same token, though only its hash is stored."""
    text = f"{job_id}|{attempt}|{request_id}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()[:32]
