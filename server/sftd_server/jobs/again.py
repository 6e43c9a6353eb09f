"""New jobs made from old ones: the same again, from scratch or from a checkpoint; or the same with other settings."""

import json
from typing import Any

from sqlmodel import Session, col, select

from sftd.schemas import JobState, RetryRequest
from sftd.spec import JOB_REFERENCE, JobSpec
from sftd_server.errors import Conflict
from sftd_server.jobs import submission
from sftd_server.jobs.queries import whole_checkpoint, whole_checkpoints
from sftd_server.jobs.service import JobInputs, Origin, find_job
from sftd_server.jobs.states import TERMINAL
from sftd_server.jobs.submission import Sources
from sftd_server.tables import CheckpointRow, JobRow

# Of these only one may stand in a spec: who gives one means it in place of the other.
_INSTEAD_OF = {
    "max_steps": "num_epochs",
    "num_epochs": "max_steps",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
    "validation_file": "validation_split",
    "validation_split": "validation_file",
}


def retried(
    session: Session, job_id: str, request: RetryRequest, sources: Sources
) -> tuple[JobSpec, JobInputs, Origin]:
    """The same job again, checked like a new one. Raises Conflict where the old one is not over."""
    row = find_job(session, job_id)
    if row.state not in TERMINAL:
        raise Conflict(
            f"{job_id} is {row.state}; it can be tried again when it is over. Cancel it first, or clone it.",
            code="wrong_state",
        )
    seed = _seed(session, row, request)
    spec, inputs = _checked(session, row, {}, sources)
    verb = f"Tries {job_id} again from scratch; waiting for a worker."
    if seed is not None:
        began_with = JobInputs.model_validate(row.inputs).base_sha256
        inputs = inputs.model_copy(update={"base_sha256": began_with})
        verb = f"Tries {job_id} again from its checkpoint of step {seed.step}; waiting for a worker."
    elif request.start == "checkpoint":
        verb = f"Tries {job_id} again from scratch, as it has no checkpoint; waiting for a worker."
    origin = Origin(
        verb,
        retry_of=job_id,
        seed_job=seed.job if seed else None,
        seed_checkpoint=seed.name if seed else None,
        suffix=row.suffix,
    )
    return spec, inputs, origin


def cloned(
    session: Session, job_id: str, overrides: dict[str, Any], sources: Sources
) -> tuple[JobSpec, JobInputs, Origin]:  # overrides: JSON as posted
    """A job with the same spec but for these fields, checked like a new one."""
    row = find_job(session, job_id)
    spec, inputs = _checked(session, row, overrides, sources)
    verb = f"A copy of {job_id}; waiting for a worker."
    return spec, inputs, Origin(verb, clone_of=job_id, suffix=row.suffix)


def _checked(
    session: Session, row: JobRow, overrides: dict[str, Any], sources: Sources
) -> tuple[JobSpec, JobInputs]:
    fields = {name: value for name, value in json.loads(row.spec).items() if value is not None}
    fields["after"] = _still_waited_for(session, fields.get("after", []))
    fields["base_model"] = _base_made_by_now(session, fields["base_model"])
    for name, value in overrides.items():
        if value is None:
            fields.pop(name, None)
            continue
        fields[name] = value
        if name in _INSTEAD_OF and overrides.get(_INSTEAD_OF[name]) is None:
            fields.pop(_INSTEAD_OF[name], None)
    return submission.check(session, fields, sources)


def _still_waited_for(session: Session, after: list[str]) -> list[str]:
    """What a copy of a job has to wait for: not for what has succeeded or is gone; for the retry of what failed."""
    wanted = []
    for job_id in after:
        row = _newest_retry(session, job_id)
        if row is not None and row.state != JobState.SUCCEEDED:
            wanted.append(row.id)
    return list(dict.fromkeys(wanted))


def _base_made_by_now(session: Session, base_model: str) -> str:
    """The base of a copy: where the job whose result it was to be has failed, that of its retry."""
    reference = JOB_REFERENCE.match(base_model)
    if reference is None or reference["step"] is not None:
        return base_model
    row = _newest_retry(session, reference["job_id"])
    return base_model if row is None else f"job:{row.id}"


def _newest_retry(session: Session, job_id: str) -> JobRow | None:
    """The job; where it has ended without success and was tried again, the newest of these tries."""
    row = session.exec(select(JobRow).where(JobRow.id == job_id)).first()
    while row is not None and row.state in (JobState.FAILED, JobState.CANCELLED):
        newer = select(JobRow).where(JobRow.retry_of == row.id).order_by(col(JobRow.number).desc())
        retry = session.exec(newer).first()
        if retry is None:
            break
        row = retry
    return row


def _seed(session: Session, row: JobRow, request: RetryRequest) -> CheckpointRow | None:
    """The checkpoint to go on from; None means from scratch."""
    if request.start == "scratch":
        return None
    if row.state == JobState.SUCCEEDED and request.step is None:
        raise Conflict(
            f"{row.id} has succeeded: there is nothing left to do after its newest checkpoint. Retry it from scratch,"
            " or name a step.",
            code="wrong_state",
            param="from",
        )
    if request.step is None:
        found = _newest(session, row)
        if found is not None or row.seed_job is None:
            return found
        # It never got as far as a checkpoint of its own: what it went on from is gone on from again.
        query = select(CheckpointRow).where(
            CheckpointRow.job == row.seed_job, CheckpointRow.name == row.seed_checkpoint
        )
        seed = session.exec(query).first()
        return seed if seed and not seed.corrupt and seed.deleted_at is None else None
    return whole_checkpoint(session, row, request.step)


def _newest(session: Session, row: JobRow) -> CheckpointRow | None:
    return next(reversed(whole_checkpoints(session, row.number)), None)
