"""What a worker reports under its lease: metrics, log lines, events, checkpoints.

Metrics, logs and events are numbered streams: a batch sent twice lands once, and none can be left out.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import text
from sqlmodel import Session, col, func, select, update

from sftd.protocol import (
    MAX_METRIC_NAMES,
    CheckpointReport,
    EventBatch,
    LogBatch,
    MetricsBatch,
    Point,
    TrainerEvent,
)
from sftd_server.db import touch
from sftd_server.errors import Conflict, Invalid, SequenceGap
from sftd_server.jobs.metrics import to_json, to_storage
from sftd_server.jobs.service import Note, add_event
from sftd_server.mistakes import mistakes_of
from sftd_server.tables import (
    AttemptRow,
    CheckpointRow,
    EvaluationRow,
    JobMetricRow,
    JobRow,
    LogLineRow,
    MetricNameRow,
    StreamRow,
)
from sftd_server.workers.leases import Holder, attempt_of, fenced, keep_budget

TOLD_OF_DIFFERENCES = 2  # a worker of an earlier protocol would take that for the end of its lease
CHECKPOINTS = "checkpoints"  # topic: one was recorded


class RunData(BaseModel):
    """The data of a `run` event that the server reads; the rest is kept as it is."""

    model_config = ConfigDict(extra="ignore")
    start_step: int = Field(-1, ge=-1, lt=2**53)
    total_steps: int | None = Field(None, ge=0, lt=2**53)


class EvaluationData(BaseModel):
    """The data of an `evaluation` event."""

    model_config = ConfigDict(extra="ignore")
    step: int = Field(ge=0, lt=2**53)
    eval_loss: float
    perplexity: float
    token_accuracy: float
    num_tokens: int = Field(ge=0, lt=2**53)


def metrics(session: Session, holder: Holder, batch: MetricsBatch, now: datetime) -> int:
    """Store points; return the number the stream goes on with."""

    def store(row: JobRow) -> None:
        ids = _name_ids(session, row, batch.points)
        values = [
            (row.number, ids[name], point.step, holder.attempt, to_storage(value))
            for point in batch.points
            for name, value in point.values.items()
        ]
        if values:
            _store_values(session, values)
        _set_start(session, row, holder.attempt, min(point.step for point in batch.points) - 1)
        _set_progress(session, row, batch.points)
        if row.max_tokens is not None:
            fresh = fenced(session, holder)
            keep_budget(session, fresh, attempt_of(session, fresh), now)

    return _append(session, holder, "metrics", batch, len(batch.points), store)


def logs(session: Session, holder: Holder, batch: LogBatch, now: datetime) -> int:
    """Store log lines; return the number the stream goes on with."""

    def store(row: JobRow) -> None:
        assert row.number is not None
        number = row.number
        lines = [
            {"job": number, "attempt": holder.attempt, "text": line, "created_at": now}
            for line in batch.lines
        ]
        session.execute(LogLineRow.__table__.insert(), lines)  # type: ignore[attr-defined]  # SQLModel hides the table
        touch(session, f"job:{row.id}")

    return _append(session, holder, "logs", batch, len(batch.lines), store)


def events(session: Session, holder: Holder, batch: EventBatch, now: datetime) -> int:
    """Store what the trainer announced; return the number the stream goes on with."""

    def store(row: JobRow) -> None:
        for i, event in enumerate(batch.events):
            if event.type == "run":
                _run(session, row, holder.attempt, _data(RunData, event, i))
            elif event.type == "evaluation":
                _evaluation(session, row, holder.attempt, _data(EvaluationData, event, i), now)
            add_event(session, row, Note(event.type, event.message, event.data), now)

    return _append(session, holder, "events", batch, len(batch.events), store)


def checkpoint(session: Session, holder: Holder, report: CheckpointReport, now: datetime) -> None:
    """Put a whole checkpoint on record, or strike one that does not verify any more. Steps only grow."""
    row = fenced(session, holder)
    if report.corrupt:
        _strike(session, row, report, now)
        return
    query = select(CheckpointRow).where(CheckpointRow.job == row.number, CheckpointRow.name == report.name)
    known = session.exec(query.with_for_update()).first()
    if known is not None and known.manifest_sha256 == report.manifest_sha256 and not known.corrupt:
        return
    newest = session.exec(
        select(func.max(CheckpointRow.step)).where(
            CheckpointRow.job == row.number, CheckpointRow.attempt == holder.attempt
        )
    ).one()
    if newest is not None and report.step <= newest:
        raise Conflict(
            f"Attempt {holder.attempt} has a checkpoint of step {newest}; one of step {report.step} can not follow it.",
            code="checkpoint_backwards",
            param="step",
        )
    assert row.number is not None
    session.merge(
        CheckpointRow(
            job=row.number,
            name=report.name,
            step=report.step,
            attempt=holder.attempt,
            manifest_sha256=report.manifest_sha256,
            files={name: file.model_dump() for name, file in report.files.items()},
            metrics=to_json(report.metrics),
            pinned=known.pinned if known is not None else None,  # the same step again: the name stays on it
            created_at=now,
        )
    )
    touch(session, CHECKPOINTS)
    num_bytes = sum(file.bytes for file in report.files.values())
    data = {"step": report.step, "name": report.name, "bytes": num_bytes}
    add_event(session, row, Note("checkpoint", f"Checkpoint of step {report.step} saved.", data), now)


# ---------------------------------------------------------------- streams


def _append(
    session: Session,
    holder: Holder,
    kind: str,
    batch: MetricsBatch | LogBatch | EventBatch,
    num_items: int,
    store: Callable[[JobRow], None],
) -> int:
    """Take a batch exactly once: it must begin where the stream ends, or lie behind it entirely. Of the newest it is known
    what it held: the same number with anything else is no repetition. Raises SequenceGap or Conflict."""
    row = fenced(session, holder)
    here = (
        col(StreamRow.job) == row.number,
        col(StreamRow.attempt) == holder.attempt,
        col(StreamRow.kind) == kind,
    )
    seq, after = batch.seq, batch.seq + num_items
    content = batch.model_dump_json(exclude={"attempt", "seq"}, exclude_defaults=True)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    taken: dict[str, object] = {"next_seq": after}
    if num_items:
        taken |= {"last_seq": seq, "last_sha256": sha256}
    advanced = session.exec(update(StreamRow).where(*here, col(StreamRow.next_seq) == seq).values(**taken))
    if advanced.rowcount == 1:
        if num_items:
            store(row)
        return after
    known = session.exec(select(StreamRow).where(*here)).one()
    expected = known.next_seq
    differs = (seq, after) == (known.last_seq, expected) and sha256 != known.last_sha256
    if differs and attempt_of(session, row).protocol >= TOLD_OF_DIFFERENCES:
        raise Conflict(
            f"The {kind} of this attempt with the numbers {seq} to {after - 1} are on record with another content.",
            code="batch_differs",
            param="seq",
        )
    if after <= expected:
        return expected
    raise SequenceGap(
        f"The {kind} of this attempt go on with number {expected}; a batch of {seq} to {after - 1} does not fit.",
        expected=expected,
    )


# ---------------------------------------------------------------- metrics


def _name_ids(session: Session, row: JobRow, points: Sequence[Point]) -> dict[str, int]:
    """Ids of the batch's metric names; new ones are made. Raises Invalid where a job has too many."""
    names = {name for point in points for name in point.values}
    if len(names) > MAX_METRIC_NAMES:  # more than a query takes, perhaps
        raise _too_many_names(f"this batch has {len(names)}")
    known = _known_ids(session, row, names)
    fresh = sorted(names - known.keys())
    if not fresh:
        return known
    count = session.exec(select(func.count()).where(JobMetricRow.job == row.number)).one()
    if count + len(fresh) > MAX_METRIC_NAMES:
        raise _too_many_names(f"this one has {count} and {len(fresh)} more came")
    connection = session.connection()
    connection.execute(
        text("INSERT INTO metric_name (name) VALUES (:name) ON CONFLICT (name) DO NOTHING"),
        [{"name": name} for name in fresh],
    )
    connection.execute(
        text("INSERT INTO job_metric (job, name_id) SELECT :job, id FROM metric_name WHERE name = :name"),
        [{"job": row.number, "name": name} for name in fresh],
    )
    return _known_ids(session, row, names)


def _store_values(session: Session, values: list[tuple[int | None, int, int, int, float | None]]) -> None:
    """Put (job, name_id, step, attempt, value) in the table, the last of a kind in place of any other."""
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(
            "INSERT OR REPLACE INTO metric (job, name_id, step, attempt, value) VALUES (?, ?, ?, ?, ?)",
            values,
        )
        return
    unique = {value[:4]: value for value in values}  # one statement does not write a row twice
    jobs, names, steps, attempts, numbers = zip(*unique.values(), strict=True)
    connection.exec_driver_sql(
        "INSERT INTO metric (job, name_id, step, attempt, value) SELECT * FROM"
        " unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::float8[])"
        " ON CONFLICT (job, name_id, step, attempt) DO UPDATE SET value = excluded.value",
        (list(jobs), list(names), list(steps), list(attempts), list(numbers)),
    )


def _too_many_names(how_many: str) -> Invalid:
    return Invalid(
        f"points: a job has at most {MAX_METRIC_NAMES} metric names; {how_many}.",
        code="too_many_metric_names",
        param="points",
    )


def _known_ids(session: Session, row: JobRow, names: set[str]) -> dict[str, int]:
    query = (
        select(MetricNameRow.name, MetricNameRow.id)
        .join(JobMetricRow, col(JobMetricRow.name_id) == col(MetricNameRow.id))
        .where(JobMetricRow.job == row.number, col(MetricNameRow.name).in_(names))
    )
    return {name: id for name, id in session.exec(query) if id is not None}


def _set_progress(session: Session, row: JobRow, points: Sequence[Point]) -> None:
    """Keep the newest values of what a job shows at a glance."""
    changes: dict[str, object] = {"step": max(row.step, points[-1].step)}
    for point in points:
        loss, speed = point.values.get("loss"), point.values.get("tokens_per_second")
        seen = point.values.get("tokens_seen")
        if loss is not None:
            changes["loss"] = to_storage(loss)
        if speed is not None and math.isfinite(speed):
            changes["tokens_per_second"] = speed
        if seen is not None and 0 <= seen < 2**63:
            changes["tokens_seen"] = int(seen)
    session.exec(update(JobRow).where(col(JobRow.number) == row.number).values(**changes))


# ---------------------------------------------------------------- events


def _data(model: type[Any], event: TrainerEvent, index: int) -> Any:  # an instance of `model`
    try:
        return model.model_validate(event.data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [{**line, "loc": ("events", index, "data", *line["loc"])} for line in found]
        raise Invalid.of(mistakes_of(lines), code="invalid_event") from None


def _run(session: Session, row: JobRow, attempt: int, data: RunData) -> None:
    session.exec(
        update(AttemptRow)
        .where(col(AttemptRow.job) == row.number, col(AttemptRow.attempt) == attempt)
        .values(start_step=data.start_step)
    )
    changes = {"total_steps": data.total_steps, "step": max(0, data.start_step)}
    session.exec(update(JobRow).where(col(JobRow.number) == row.number).values(**changes))


def _evaluation(session: Session, row: JobRow, attempt: int, data: EvaluationData, now: datetime) -> None:
    assert row.number is not None
    _set_start(session, row, attempt, data.step - 1)
    session.merge(
        EvaluationRow(
            job=row.number,
            step=data.step,
            attempt=attempt,
            eval_loss=to_storage(data.eval_loss),
            perplexity=to_storage(data.perplexity),
            token_accuracy=to_storage(data.token_accuracy),
            num_tokens=data.num_tokens,
            created_at=now,
        )
    )
    session.flush()


def _set_start(session: Session, row: JobRow, attempt: int, start_step: int) -> None:
    """Where an attempt's history begins, as long as no `run` event has said it."""
    session.exec(
        update(AttemptRow)
        .where(col(AttemptRow.job) == row.number, col(AttemptRow.attempt) == attempt)
        .where(col(AttemptRow.start_step).is_(None))
        .values(start_step=start_step)
    )


# ---------------------------------------------------------------- checkpoints


def _strike(session: Session, row: JobRow, report: CheckpointReport, now: datetime) -> None:
    """Strike a checkpoint: the job's own, or that of the job which it goes on from."""
    wanted = (
        col(CheckpointRow.job).in_([row.number, row.seed_job]),
        col(CheckpointRow.name) == report.name,
        col(CheckpointRow.step) == report.step,
        col(CheckpointRow.manifest_sha256) == report.manifest_sha256,
        col(CheckpointRow.corrupt).is_(False),
        col(CheckpointRow.deleted_at).is_(None),  # what was deleted on purpose is missing, and no damage
    )
    if session.exec(update(CheckpointRow).where(*wanted).values(corrupt=True)).rowcount:
        data = {"step": report.step, "name": report.name}
        message = f"The checkpoint of step {report.step} does not verify any more; it is not used again."
        add_event(session, row, Note("checkpoint_corrupt", message, data), now)
