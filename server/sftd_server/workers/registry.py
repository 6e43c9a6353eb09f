"""Which workers there are, which of them take new jobs, and which are served at all."""

from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, select, update

from sftd.protocol import OLDEST_PROTOCOL, PROTOCOL, Claim, Hello
from sftd.schemas import Page, Worker
from sftd_server.db import touch
from sftd_server.errors import Conflict, NotFound, UpgradeRequired
from sftd_server.jobs.scheduling import ALIVE_SECONDS
from sftd_server.jobs.states import LEASED
from sftd_server.tables import AttemptRow, JobRow, WorkerRow

FORGOTTEN_SECONDS = 86400.0  # a process that was not heard of for so long is taken off the list


def check_protocol(worker_id: str, protocol: int) -> None:
    """Raises UpgradeRequired where the worker's version of the protocol is not served here."""
    if protocol < OLDEST_PROTOCOL:
        raise UpgradeRequired(
            f"Worker {worker_id} speaks version {protocol} of the worker protocol; this server serves versions"
            f" {OLDEST_PROTOCOL} to {PROTOCOL}: install the server's version of sftd on the worker.",
            code="worker_too_old",
            protocol=PROTOCOL,
        )
    if protocol > PROTOCOL:
        raise UpgradeRequired(
            f"Worker {worker_id} speaks version {protocol} of the worker protocol; this server knows versions up to"
            f" {PROTOCOL}: bring the server up to date first.",
            code="worker_too_new",
            protocol=PROTOCOL,
        )


def check_installation(hello: Hello, installation_id: str) -> None:
    """A worker that names another installation sees other files than the server does. Raises Conflict."""
    if hello.installation_id not in (None, installation_id):
        raise Conflict(
            f"Worker {hello.worker_id} sees the data folder {hello.installation_id}, the server has {installation_id}:"
            " start the worker with the server's data folder (--data).",
            code="other_installation",
            param="installation_id",
        )


def register(session: Session, *, hello: Hello, now: datetime) -> None:
    """Remember a worker, or what is new about it."""
    same_name = session.exec(select(WorkerRow).where(WorkerRow.id == hello.worker_id).with_for_update()).all()
    known = next((row.registered_at for row in same_name if row.boot_id == hello.boot_id), None)
    draining = any(row.draining for row in same_name)  # a worker that is started again drains on
    session.merge(
        WorkerRow(
            id=hello.worker_id,
            boot_id=hello.boot_id,
            gpus=hello.gpus,
            device=hello.device,
            labels=hello.labels,
            versions=hello.versions,
            registered_at=known or now,
            seen_at=now,
            protocol=hello.protocol,
            gpu_memory_gb=hello.gpu_memory_gb,
            gpu_names=hello.gpu_names,
            shares_data=hello.installation_id is not None or hello.protocol == 1,
            draining=draining,
        )
    )


def asked(session: Session, claim: Claim, now: datetime) -> None:
    """Note that a worker asked for a job, and what it has free."""
    here = (col(WorkerRow.id) == claim.worker_id, col(WorkerRow.boot_id) == claim.boot_id)
    values = {"seen_at": now, "free_gpus": claim.gpus, "disk_free_bytes": claim.disk_free_bytes}
    session.exec(update(WorkerRow).where(*here).values(**values))


def seen(session: Session, attempt: AttemptRow, now: datetime) -> None:
    """Note that the worker of an attempt was heard of."""
    here = (col(WorkerRow.id) == attempt.worker_id, col(WorkerRow.boot_id) == attempt.boot_id)
    session.exec(update(WorkerRow).where(*here).values(seen_at=now))


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
    live = (col(AttemptRow.job) == col(JobRow.number), col(AttemptRow.attempt) == col(JobRow.attempt))
    query = (
        select(AttemptRow.worker_id, AttemptRow.boot_id, JobRow.id)
        .join(JobRow, live[0] & live[1])
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
