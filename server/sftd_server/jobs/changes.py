"""What can be changed of a job after it was posted: when and where it runs, what it is called; its place in the queue;
the names of its checkpoints. What it trains is fixed: for that there is a clone."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlmodel import Session, col, func, select, update

from sftd.schemas import Checkpoint, JobState, MoveRequest, PinRequest
from sftd.spec import SCHEDULING_FIELDS, JobSpec
from sftd_server.audit import service as audit
from sftd_server.auth import Caller
from sftd_server.db import touch
from sftd_server.errors import Conflict, Forbidden, Invalid
from sftd_server.jobs import dependencies, scheduling
from sftd_server.jobs.queries import checkpoint_answer, whole_checkpoint
from sftd_server.jobs.service import (
    JobInputs,
    Note,
    add_event,
    changeable_columns,
    own_job,
    unpinned_maker,
    update_seen,
)
from sftd_server.jobs.states import TERMINAL
from sftd_server.jobs.submission import base_of_result
from sftd_server.mistakes import Mistake, mistakes_of
from sftd_server.settings import Settings
from sftd_server.tables import CheckpointRow, JobRow

_AT_ANY_TIME = {"name", "metadata", "keep_checkpoints"}
CHANGEABLE = _AT_ANY_TIME | SCHEDULING_FIELDS


def change(
    session: Session, job_id: str, changes: Any, caller: Caller, now: datetime
) -> None:  # JSON as posted
    """Set fields of the spec; null stands for the default. Raises Invalid with every mistake, Conflict."""
    row = own_job(session, job_id, caller)
    spec = _changed_spec(row, changes)
    changed = sorted(name for name in changes if json.loads(row.spec).get(name) != _json(spec).get(name))
    if not changed:
        return
    for_later = sorted(set(changed) - _AT_ANY_TIME)
    if for_later and row.state in TERMINAL:
        raise Conflict(
            f"{job_id} has {row.state}: its {', '.join(for_later)} can not change any more; retry or clone it.",
            code="job_finished",
            param=for_later[0],
        )
    if "after" in changed and row.state != JobState.QUEUED:
        raise Conflict(
            f"after: {job_id} is {row.state}; what a job waits for can change only while it is queued.",
            code="wrong_state",
            param="after",
        )
    columns = changeable_columns(spec)
    if "after" in changed:
        _require_no_circle(session, row, spec)
        dependencies.replace(session, row, spec.after)
        columns |= _pinned_base(session, row, spec)
    if "priority" in changed:
        columns["queue_rank"] = 0  # its rank was among jobs of the other priority
    update_seen(session, row, columns)
    told = ", ".join(f"{name} to {json.dumps(_json(spec).get(name), ensure_ascii=False)}" for name in changed)
    add_event(session, row, Note("changed", f"{caller.name} changed {told}.", {"fields": changed}), now)
    audit.describe(session, fields=changed)
    touch(session, "queue")


def _changed_spec(row: JobRow, changes: dict[str, Any]) -> JobSpec:  # JSON as posted
    mistakes = [
        Mistake(name, "can not be changed after a job was posted; clone the job with another value")
        for name in changes
        if name in JobSpec.model_fields and name not in CHANGEABLE
    ]
    fields = {name: value for name, value in json.loads(row.spec).items() if value is not None}
    for name, value in changes.items():
        fields[name] = value
        if value is None:
            del fields[name]
            if name not in JobSpec.model_fields:
                fields[name] = value  # an unknown field is told as one
    try:
        spec = JobSpec.model_validate(fields)
    except ValidationError as error:
        named = {mistake.field for mistake in mistakes}
        found = mistakes_of(error.errors(include_url=False), JobSpec)
        raise Invalid.of(
            [*mistakes, *(mistake for mistake in found if mistake.field not in named)], code="invalid_spec"
        ) from None
    if mistakes:
        raise Invalid.of(mistakes, code="invalid_spec")
    return spec


def _require_no_circle(session: Session, row: JobRow, spec: JobSpec) -> None:
    """Posted jobs can only name older ones, but a change can name any: then none of the circle would ever run."""
    behind = dependencies.all_behind(session, row) | {row.id}
    wrong = [
        Mistake(f"after[{i}]", f"{job_id} waits for {row.id} itself; leave it out")
        for i, job_id in enumerate(spec.after)
        if job_id in behind
    ]
    if wrong:
        raise Invalid.of(wrong, code="invalid_spec")


def _pinned_base(session: Session, row: JobRow, spec: JobSpec) -> dict[str, Any]:  # columns
    """A base that was still being made when the job was posted, where `after` no longer waits for it: pinned if it is
    done by now. Raises Invalid where it is not."""
    maker = unpinned_maker(row)
    if maker is None or maker in spec.after:
        return {}
    made_by = session.exec(select(JobRow).where(JobRow.id == maker).with_for_update(read=True)).first()
    if made_by is None or made_by.state != JobState.SUCCEEDED:
        state = "gone" if made_by is None else made_by.state
        raise Invalid(
            f"after: the result of {maker} is the base of {row.id}, and {maker} is {state}; leave it in, or clone the"
            " job with another base_model.",
            code="invalid_spec",
            param="after",
        )
    inputs = JobInputs.model_validate(row.inputs).model_copy(update={"base": base_of_result(made_by)})
    return {"inputs": inputs.model_dump(mode="json")}


def _json(spec: JobSpec) -> dict[str, Any]:  # JSON: open by nature
    return spec.model_dump(mode="json")


# ---------------------------------------------------------------- the queue


def reorder(
    session: Session, job_id: str, wanted: MoveRequest, caller: Caller, settings: Settings, now: datetime
) -> None:
    """Put a queued job elsewhere among those of its priority. Going ahead of somebody else's job needs an admin."""
    if sum(part is not None for part in (wanted.position, wanted.before, wanted.after)) != 1:
        raise Invalid(
            "position: give one of position (first or last), before (an id) and after (an id)",
            code="invalid_request",
            param="position",
        )
    row = own_job(session, job_id, caller)
    if row.state != JobState.QUEUED:
        raise Conflict(
            f"{job_id} is {row.state}; only a queued job has a place in the queue.", code="wrong_state"
        )
    queue = _queue(session, row, settings, now)
    if wanted.position == "last":
        last = max(0, session.exec(select(func.max(JobRow.queue_rank)).where(*_beside(row))).one() or 0)
        update_seen(session, row, {"queue_rank": last + 1})
    else:
        _put(session, row, queue, wanted, caller)
    where = f"{wanted.position}" if wanted.position else f"before {wanted.before}"
    where = f"after {wanted.after}" if wanted.after else where
    add_event(session, row, Note("moved", f"{caller.name} moved it {where}.", {"where": where}), now)
    audit.describe(session, where=where)
    touch(session, "queue")


def _beside(row: JobRow) -> tuple[Any, ...]:  # conditions of SQLAlchemy
    return col(JobRow.state) == JobState.QUEUED, col(JobRow.priority) == row.priority


def _queue(session: Session, row: JobRow, settings: Settings, now: datetime) -> list[JobRow]:
    """The queued jobs of the same priority, in order, locked."""
    used = scheduling.usage(session, settings, now)
    query = select(JobRow).where(*_beside(row)).order_by(*scheduling.order(settings, used, now))
    return list(session.exec(query.with_for_update()))


def _put(session: Session, row: JobRow, queue: list[JobRow], wanted: MoveRequest, caller: Caller) -> None:
    """Give the job, and all that shall stay before it, ranks below 0 in their order."""
    others = [other for other in queue if other.number != row.number]
    at = _index(others, wanted)
    was_at = next(i for i, other in enumerate(queue) if other.number == row.number)
    overtaken = [other for other in queue[at:was_at] if other.owner != row.owner]
    if overtaken and caller.role != "admin":
        raise Forbidden(
            f"{row.id} would go ahead of {overtaken[0].id}, which belongs to {overtaken[0].owner}; ask an admin.",
            code="admin_only",
        )
    # Those that had such a rank before keep their order behind it.
    ranked = max((i for i, other in enumerate(others) if other.queue_rank < 0), default=-1)
    fixed = [*others[:at], row, *others[at:]][: max(at, ranked + 1) + 1]
    for rank, other in enumerate(fixed, start=-len(fixed)):
        if other.queue_rank != rank:
            session.exec(update(JobRow).where(col(JobRow.number) == other.number).values(queue_rank=rank))


def _index(others: Sequence[JobRow], wanted: MoveRequest) -> int:
    """Where the job is to stand, counted among the others."""
    if wanted.position == "first":
        return 0
    beside = wanted.before or wanted.after
    for i, other in enumerate(others):
        if other.id == beside:
            return i + (wanted.after is not None)
    field = "before" if wanted.before else "after"
    raise Invalid(
        f"{field}: {beside!r} is not another queued job of the same priority; GET /jobs?state=queued lists them",
        code="invalid_request",
        param=field,
    )


# ---------------------------------------------------------------- checkpoints


def pin(session: Session, job_id: str, step: int, request: PinRequest, caller: Caller) -> Checkpoint:
    """Keep a checkpoint under a name. Raises Conflict where another of the job has the name."""
    row = own_job(session, job_id, caller)
    checkpoint = whole_checkpoint(session, row, step)
    query = select(CheckpointRow).where(CheckpointRow.job == row.number, CheckpointRow.pinned == request.name)
    for other in session.exec(query.with_for_update()):
        if other.name != checkpoint.name:
            raise Conflict(
                f"The checkpoint of step {other.step} is pinned as {request.name!r} already; unpin it, or choose"
                " another name.",
                code="name_taken",
                param="name",
            )
    audit.mention(session, name=request.name)
    return _set_pinned(session, job_id, checkpoint, request.name)


def unpin(session: Session, job_id: str, step: int, caller: Caller) -> Checkpoint:
    """Let a checkpoint be removed again like any other."""
    row = own_job(session, job_id, caller)
    return _set_pinned(session, job_id, whole_checkpoint(session, row, step), None)


def _set_pinned(session: Session, job_id: str, checkpoint: CheckpointRow, name: str | None) -> Checkpoint:
    here = (col(CheckpointRow.job) == checkpoint.job, col(CheckpointRow.name) == checkpoint.name)
    there = col(CheckpointRow.deleted_at).is_(None)
    if session.exec(update(CheckpointRow).where(*here, there).values(pinned=name)).rowcount != 1:
        raise Conflict(
            f"The checkpoint of step {checkpoint.step} has just been removed.", code="changed_meanwhile"
        )
    touch(session, f"job:{job_id}")
    return checkpoint_answer(job_id, checkpoint).model_copy(update={"pinned": name})
