"""Data to count: asked for by plans and previews, claimed by a worker, kept by a hash of what was asked.

The same question is counted once. A worker holds it under a lease that it renews; where it vanishes another one counts.
"""

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement
from sqlmodel import Session, and_, col, delete, func, or_, select, update

from sftd.protocol import Analysis, AnalysisReport, AnalysisRequest, AnalysisTask
from sftd.schemas import ManifestFile
from sftd.spec import JobSpec
from sftd_server.db import touch
from sftd_server.errors import ApiError, Conflict, NotFound
from sftd_server.jobs.queries import StoredFiles
from sftd_server.jobs.scheduling import ALIVE_SECONDS
from sftd_server.tables import AnalysisRow, WorkerRow
from sftd_server.workers.registry import Unregistered

LEASE_SECONDS = 60.0
MAX_TRIES = 3
FRESH_SECONDS = 86400.0  # a model's folder may have been changed since
KEPT_SECONDS = 7 * 86400.0  # without having been asked for
MOST_KEPT = 500  # those asked for last
RETRY_SECONDS = 10.0  # what failed may go well once something has been mended
ABANDONED_SECONDS = 600.0  # nobody has asked again: it is not counted any more
MOST_WANTED = 8  # of one owner, at a time
TOPIC = "analyses"

# What decides on the rows, the steps and the shape of the model. The rest of a spec is the server's business.
_COUNTED_BY = (
    "base_model",
    "method",
    "training_file",
    "validation_file",
    "validation_split",
    "max_seq_length",
    "batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "warmup_ratio",
    "max_steps",
    "num_epochs",
    "save_steps",
    "eval_steps",
    "seed",
    "precision",
    "packing",
    "max_tokens_per_step",
    "train_on",
    "on_overlong",
    "lora",
    "gpus",
)


class TooManyPlans(ApiError):
    """429: an owner asks for more than is counted at a time."""

    status = 429
    kind = "limit_error"
    may_pass = True

    def __init__(self, message: str) -> None:
        super().__init__(message, code="too_many_plans", headers={"retry-after": "5"})


def counted_by(spec: JobSpec) -> JobSpec:
    """The spec without what does not change the count, so that plans that differ in that share one."""
    fields = spec.model_dump(mode="json", include=set(_COUNTED_BY), exclude_none=True)
    return JobSpec.model_validate(fields)


def id_of(request: AnalysisRequest) -> str:
    """A hash of what is asked."""
    return "count_" + hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:32]


def ask(session: Session, request: AnalysisRequest, owner: str, now: datetime) -> str:
    """Have something counted, unless it has been, or is being, counted. Returns its id. Raises TooManyPlans."""
    asked = id_of(request)
    row = session.exec(select(AnalysisRow).where(AnalysisRow.id == asked).with_for_update()).first()
    if row is not None and not _is_stale(row, now):
        session.exec(update(AnalysisRow).where(col(AnalysisRow.id) == asked).values(used_at=now))
        return asked
    _require_place(session, owner, now)
    anew: dict[str, Any] = {
        "owner": owner,
        "state": "wanted",
        "tries": 0,
        "result": None,
        "error": None,
        "created_at": now,
        "used_at": now,
    }
    if row is not None:
        session.exec(update(AnalysisRow).where(col(AnalysisRow.id) == asked).values(**anew))
    else:
        session.add(AnalysisRow(id=asked, request=request.model_dump(mode="json"), **anew))
        session.flush()
    touch(session, TOPIC)
    return asked


def _require_place(session: Session, owner: str, now: datetime) -> None:
    """One owner's questions must not keep all others waiting."""
    waiting = select(func.count()).where(_claimable(now), AnalysisRow.owner == owner)
    if session.exec(waiting).one() >= MOST_WANTED:
        raise TooManyPlans(
            f"{MOST_WANTED} plans or previews of yours wait to be counted; ask again when they are done."
        )


def _is_stale(row: AnalysisRow, now: datetime) -> bool:
    """Whether it is to be counted anew. What found no model is tried again soon: the hub may have been away."""
    age = (now - row.created_at).total_seconds()
    if row.state == "done":
        whole = row.result and (row.result.get("model") or row.result.get("rows"))
        return age > (FRESH_SECONDS if whole else RETRY_SECONDS)
    return row.state == "failed" and age > RETRY_SECONDS


def outcome(session: Session, asked: str) -> AnalysisReport | None:
    """What was counted, or why it could not be; None while it is not."""
    row = session.exec(select(AnalysisRow).where(AnalysisRow.id == asked)).first()
    if row is None or row.state not in ("done", "failed"):
        return None
    analysis = Analysis.model_validate(row.result) if row.result is not None else None
    return AnalysisReport(analysis=analysis, error=row.error)


def is_wanted(session: Session, now: datetime) -> bool | None:
    """Whether there is something to count; None where there is not, for those who wait."""
    return session.exec(select(AnalysisRow.id).where(_claimable(now)).limit(1)).first() is not None or None


def has_counters(session: Session, now: datetime) -> bool:
    """Whether a worker is there."""
    alive_since = now - timedelta(seconds=ALIVE_SECONDS)
    query = select(WorkerRow.id).where(
        col(WorkerRow.gone_at).is_(None), col(WorkerRow.seen_at) >= alive_since
    )
    return session.exec(query.limit(1)).first() is not None


def require_registered(session: Session, worker_id: str, boot_id: str) -> None:
    """Raises Unregistered."""
    here = (WorkerRow.id == worker_id, WorkerRow.boot_id == boot_id)
    if session.exec(select(WorkerRow.id).where(*here)).first() is None:
        raise Unregistered(worker_id)


def claim(session: Session, *, worker_id: str, boot_id: str, now: datetime) -> AnalysisTask | None:
    """Hand out what was asked for first. Raises Unregistered."""
    require_registered(session, worker_id, boot_id)
    query = select(AnalysisRow).where(_claimable(now)).order_by(col(AnalysisRow.created_at))
    row = session.exec(query.limit(1).with_for_update(skip_locked=True)).first()
    if row is None:
        return None
    if row.tries >= MAX_TRIES:
        told = f"{row.tries} workers vanished while they counted it; see their logs"
        _end(session, row.id, {"state": "failed", "error": told}, now)
        return None
    token = secrets.token_hex(24)
    statement = (
        update(AnalysisRow)
        .where(col(AnalysisRow.id) == row.id, _claimable(now))
        .values(
            state="claimed",
            worker_id=worker_id,
            token_sha256=_hash(token),
            lease_until=now + timedelta(seconds=LEASE_SECONDS),
            tries=row.tries + 1,
        )
    )
    if session.exec(statement).rowcount != 1:
        return None
    request = AnalysisRequest.model_validate(row.request)
    return AnalysisTask(id=row.id, token=token, lease_seconds=LEASE_SECONDS, request=request)


def input_file(session: Session, asked: str, token: str, sha256: str) -> StoredFiles:
    """A file that is to be counted, for the worker that counts it: a manifest of one. Raises Conflict, NotFound."""
    row = session.exec(select(AnalysisRow).where(*_held(asked, token))).first()
    if row is None:
        raise _not_held(asked)
    request = AnalysisRequest.model_validate(row.request)
    for file in (request.training_file, request.validation_file):
        if file is not None and file.sha256 == sha256:
            folder, _, name = file.path.rpartition("/")
            return StoredFiles(folder, {name: ManifestFile(bytes=file.bytes, sha256=file.sha256)})
    raise NotFound(f"{asked} reads no file of hash {sha256[:80]!r}.", code="unknown_file")


def renew(session: Session, asked: str, token: str, now: datetime) -> None:
    """Its worker is still at it. Raises Conflict where another one is, or it is done."""
    values = {"lease_until": now + timedelta(seconds=LEASE_SECONDS)}
    if session.exec(update(AnalysisRow).where(*_held(asked, token)).values(**values)).rowcount != 1:
        raise _not_held(asked)


def finish(session: Session, asked: str, token: str, report: AnalysisReport, now: datetime) -> None:
    """Keep what was counted. Raises Conflict where another worker counts it now."""
    if report.may_retry:  # it was stopped in order, which is none of the tries
        values: dict[str, object] = {"state": "wanted", "tries": col(AnalysisRow.tries) - 1}
    else:
        result = report.analysis.model_dump(mode="json") if report.analysis is not None else None
        values = {"state": "failed" if result is None else "done", "result": result, "error": report.error}
    held = _held(asked, token)
    if session.exec(select(AnalysisRow.id).where(*held).with_for_update()).first() is None:
        raise _not_held(asked)
    _end(session, asked, values, now)


def any_unused(session: Session, now: datetime) -> bool:
    """Whether there is something that nobody has asked for in a while."""
    return session.exec(select(AnalysisRow.id).where(_unused(now)).limit(1)).first() is not None


def sweep(session: Session, now: datetime) -> int:
    """Forget that; how many."""
    return session.exec(delete(AnalysisRow).where(_unused(now))).rowcount


def _unused(now: datetime) -> ColumnElement[bool]:
    by_use = select(AnalysisRow.id).order_by(col(AnalysisRow.used_at).desc(), col(AnalysisRow.id))
    beyond = by_use.offset(MOST_KEPT).limit(MOST_KEPT)
    long_ago = now - timedelta(seconds=KEPT_SECONDS)
    return or_(col(AnalysisRow.used_at) < long_ago, col(AnalysisRow.id).in_(beyond))


def _claimable(now: datetime) -> ColumnElement[bool]:
    """A condition: somebody still asks for it, and nobody counts it."""
    vanished = and_(col(AnalysisRow.state) == "claimed", col(AnalysisRow.lease_until) < now)
    asked_for = col(AnalysisRow.used_at) >= now - timedelta(seconds=ABANDONED_SECONDS)
    return and_(or_(col(AnalysisRow.state) == "wanted", vanished), asked_for)


def _held(asked: str, token: str) -> tuple[ColumnElement[bool], ...]:
    return (
        col(AnalysisRow.id) == asked,
        col(AnalysisRow.state) == "claimed",
        col(AnalysisRow.token_sha256) == _hash(token),
    )


def _end(session: Session, asked: str, values: dict[str, object], now: datetime) -> None:
    free = {"token_sha256": None, "lease_until": None, "created_at": now}  # its age counts from here
    session.exec(update(AnalysisRow).where(col(AnalysisRow.id) == asked).values(**free, **values))
    touch(session, TOPIC, f"analysis:{asked}")


def _not_held(asked: str) -> Conflict:
    return Conflict(f"{asked} is not counted by this worker any more.", code="stale_lease")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
