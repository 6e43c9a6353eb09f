"""Which workers there are, and which of them take new jobs. How they come to be known is in `registration`."""

from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, select, update

from sftd.protocol import Claim
from sftd.schemas import Page, Worker
from sftd_server.db import touch
from sftd_server.errors import Conflict, NotFound
from sftd_server.jobs.accounts import is_newest_attempt
from sftd_server.jobs.scheduling import ALIVE_SECONDS
from sftd_server.jobs.states import LEASED
from sftd_server.tables import AttemptRow, JobRow, WorkerRow

FORGOTTEN_SECONDS = 86400.0  # a process that was not heard of for so long is taken off the list


class Replaced(Conflict):
    """409: another process of the worker has said that this one is dead. It gets no jobs any more."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(
            f"This process of worker {worker_id} was replaced by a newer one; start it again.",
            code="worker_replaced",
        )


class Unregistered(Conflict):
    """409: nothing is known of the process; it registers (again) and goes on."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(
            f"This process of worker {worker_id} is not known here: POST /worker/register, then claim again.",
            code="worker_unregistered",
        )


def asked(session: Session, claim: Claim, now: datetime) -> WorkerRow:
    """Note that a worker asked for a job, and what it has free; return what is known of it. Raises Replaced or
    Unregistered."""
    here = (col(WorkerRow.id) == claim.worker_id, col(WorkerRow.boot_id) == claim.boot_id)
    values = {"seen_at": now, "free_gpus": claim.gpus, "disk_free_bytes": claim.disk_free_bytes}
    statement = update(WorkerRow).where(*here).values(**values).returning(WorkerRow)
    row: WorkerRow | None = session.execute(statement).scalars().first()
    if row is None:
        raise Unregistered(claim.worker_id)
    if row.gone_at is not None:
        raise Replaced(claim.worker_id)
    return row


def seen(session: Session, attempt: AttemptRow, now: datetime, disk_free_bytes: int | None) -> None:
    """Note that the worker of an attempt was heard of, and what room it has if it said so."""
    here = (col(WorkerRow.id) == attempt.worker_id, col(WorkerRow.boot_id) == attempt.boot_id)
    values: dict[str, object] = {"seen_at": now}
    if disk_free_bytes is not None:
        values["disk_free_bytes"] = disk_free_bytes
    session.exec(update(WorkerRow).where(*here).values(**values))


def heard_at(session: Session, attempt: AttemptRow) -> datetime | None:
    """When the worker of an attempt was heard of last, if that is known."""
    here = (WorkerRow.id == attempt.worker_id, WorkerRow.boot_id == attempt.boot_id)
    return session.exec(select(WorkerRow.seen_at).where(*here)).first()


def is_draining(session: Session, attempt: AttemptRow) -> bool:
    """Whether the worker of an attempt shall give its jobs back and take no new ones."""
    here = (WorkerRow.id == attempt.worker_id, WorkerRow.boot_id == attempt.boot_id)
    return bool(session.exec(select(WorkerRow.draining).where(*here)).first())


def drain(session: Session, worker_id: str, *, draining: bool) -> None:
    """Let all processes of a worker take no new jobs and give back those they run; or take jobs again."""
    named = col(WorkerRow.id) == worker_id
    if not session.exec(update(WorkerRow).where(named).values(draining=draining)).rowcount:
        raise NotFound(f"There is no worker {worker_id!r}; GET /workers lists them.", code="unknown_worker")
    held = select(JobRow.id).where(JobRow.worker_id == worker_id, col(JobRow.state).in_(LEASED))
    touch(session, "queue", *(f"want:{job_id}" for job_id in session.exec(held)))


def forget(session: Session, now: datetime) -> None:
    """Take processes off the list that were not heard of for a day."""
    long_ago = now - timedelta(seconds=FORGOTTEN_SECONDS)
    session.exec(delete(WorkerRow).where(col(WorkerRow.seen_at) < long_ago))


def workers(session: Session, now: datetime) -> Page[Worker]:
    """All worker processes, the newest first."""
    held: dict[tuple[str, str], list[str]] = {}
    query = (
        select(AttemptRow.worker_id, AttemptRow.boot_id, JobRow.id)
        .join(JobRow, is_newest_attempt())
        .where(col(JobRow.state).in_(LEASED))
        .order_by(col(JobRow.number))
    )
    for worker_id, boot_id, job_id in session.exec(query):
        held.setdefault((worker_id, boot_id), []).append(job_id)
    alive_since = now - timedelta(seconds=ALIVE_SECONDS)
    newest_first = (col(WorkerRow.registered_at).desc(), col(WorkerRow.id), col(WorkerRow.boot_id))
    rows = session.exec(select(WorkerRow).order_by(*newest_first))
    data = [
        Worker(
            id=row.id,
            boot_id=row.boot_id,
            gpus=row.gpus,
            device=row.device,
            labels=row.labels,
            versions=row.versions,
            seen_at=row.seen_at,
            job_ids=held.get((row.id, row.boot_id), []),
            gpu_memory_gb=row.gpu_memory_gb,
            draining=row.draining,
            alive=row.gone_at is None and row.seen_at >= alive_since,
        )
        for row in rows
    ]
    return Page[Worker](data=data, has_more=False, next_after=None)
