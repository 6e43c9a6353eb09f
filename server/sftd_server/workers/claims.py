"""Claims: a worker takes the next job. Asked twice, the same request brings the same lease."""

import hashlib
import hmac
from datetime import datetime

from sqlmodel import Session, col, select, update

from sftd.protocol import CheckpointRef, Claim, Lease
from sftd.schemas import JobState, Want
from sftd.spec import JobSpec
from sftd_server.errors import Conflict
from sftd_server.jobs.queries import whole_checkpoints
from sftd_server.jobs.service import JobInputs, Note, move
from sftd_server.jobs.states import Trigger
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, JobRow, StreamRow
from sftd_server.workers.leases import deadlines, seen, sha256, start_by


def is_claimable(session: Session, *, gpus: int, now: datetime) -> bool | None:
    """True where there is a job to claim, else None: a look that costs no write."""
    return True if _next_job(session, gpus=gpus, now=now) else None


def claim(session: Session, claim: Claim, *, secret: str, settings: Settings, now: datetime) -> Lease | None:
    """Take the next job, or the same one again where the answer to the same request was lost."""
    seen(session, claim.worker_id, now)
    earlier = session.exec(
        select(AttemptRow).where(
            AttemptRow.worker_id == claim.worker_id, AttemptRow.request_id == claim.request_id
        )
    ).first()
    if earlier is not None:
        return _claim_again(session, earlier, secret=secret, settings=settings, now=now)
    row = _next_job(session, gpus=claim.gpus, now=now)
    if row is None:
        return None
    attempt = row.attempt + 1
    token = _token(secret, row.id, attempt, claim.request_id)
    values = {
        "attempt": attempt,
        "token_sha256": sha256(token),
        "worker_id": claim.worker_id,
        "queue_rank": 0,
    }
    note = Note("claimed", f"Taken by worker {claim.worker_id}.", {"worker_id": claim.worker_id})
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
    return _lease(session, row, attempt, token, settings)


def _next_job(session: Session, *, gpus: int, now: datetime) -> JobRow | None:
    query = (
        select(JobRow)
        .where(JobRow.state == JobState.QUEUED, JobRow.want == Want.RUN)
        .where(col(JobRow.not_before) <= now, col(JobRow.gpus) <= gpus)
        .order_by(col(JobRow.priority).desc(), col(JobRow.queue_rank), col(JobRow.number))
        .limit(1)
    )
    return session.exec(query).first()


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
    return _lease(session, row, earlier.attempt, token, settings)


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
        )
    )
    session.add_all(
        StreamRow(job=row.number, attempt=attempt, kind=kind) for kind in ("metrics", "logs", "events")
    )
    session.flush()


def _lease(session: Session, row: JobRow, attempt: int, token: str, settings: Settings) -> Lease:
    inputs = JobInputs.model_validate(row.inputs)
    streams = session.exec(select(StreamRow).where(StreamRow.job == row.number, StreamRow.attempt == attempt))
    checkpoints = whole_checkpoints(session, row.number)
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
        checkpoints=[
            CheckpointRef(step=found.step, name=found.name, manifest_sha256=found.manifest_sha256)
            for found in reversed(checkpoints)
        ],
        next_seq={stream.kind: stream.next_seq for stream in streams},
    )


def _token(secret: str, job_id: str, attempt: int, request_id: str) -> str:
    """Derived, not drawn: the same claim asked twice gets the same token, though only its hash is stored."""
    text = f"{job_id}|{attempt}|{request_id}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()[:32]
