"""Which workers there are."""

from datetime import datetime

from sqlmodel import Session, col, select, update

from sftd.protocol import Hello
from sftd.schemas import Page, Worker
from sftd_server.errors import Conflict, Invalid
from sftd_server.jobs.states import LEASED
from sftd_server.settings import Settings
from sftd_server.tables import JobRow, WorkerRow
from sftd_server.workers.endings import take_back


def check_installation(hello: Hello, installation_id: str) -> None:
    """A worker that names another installation sees other files than the server does. Raises Conflict."""
    if hello.installation_id not in (None, installation_id):
        raise Conflict(
            f"Worker {hello.worker_id} sees the data folder {hello.installation_id}, the server has {installation_id}:"
            " start the worker with the server's data folder (--data).",
            code="other_installation",
            param="installation_id",
        )


def register(session: Session, *, hello: Hello, settings: Settings, now: datetime) -> None:
    """Remember a worker, or what is new about it. What an earlier process of it held goes on at once. Raises Invalid."""
    if hello.replaces_boot_id is not None:
        _replace(session, hello.worker_id, hello.replaces_boot_id, hello.boot_id, settings, now)
    here = (WorkerRow.id == hello.worker_id, WorkerRow.boot_id == hello.boot_id)
    known = session.exec(select(WorkerRow.registered_at).where(*here)).first()
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
        )
    )


def _replace(
    session: Session, worker_id: str, dead: str, boot_id: str, settings: Settings, now: datetime
) -> None:
    if dead == boot_id:
        raise Invalid(
            f"replaces_boot_id: {dead!r} is this process itself; give the boot_id of the one before it, or none.",
            code="replaces_itself",
            param="replaces_boot_id",
        )
    take_back(session, worker_id=worker_id, boot_id=dead, settings=settings, now=now)
    gone = (
        col(WorkerRow.id) == worker_id,
        col(WorkerRow.boot_id) == dead,
        col(WorkerRow.gone_at).is_(None),
    )
    session.exec(update(WorkerRow).where(*gone).values(gone_at=now))


def workers(session: Session) -> Page[Worker]:
    """All workers, the one last heard of first."""
    held: dict[str | None, list[str]] = {}
    for worker_id, job_id in session.exec(
        select(JobRow.worker_id, JobRow.id).where(col(JobRow.state).in_(LEASED)).order_by(col(JobRow.number))
    ):
        held.setdefault(worker_id, []).append(job_id)
    rows = session.exec(select(WorkerRow).order_by(col(WorkerRow.seen_at).desc()))
    data = [
        Worker(
            id=row.id,
            boot_id=row.boot_id,
            gpus=row.gpus,
            device=row.device,
            labels=row.labels,
            versions=row.versions,
            seen_at=row.seen_at,
            job_ids=held.get(row.id, []),
        )
        for row in rows
    ]
    return Page[Worker](data=data, has_more=False, next_after=None)
