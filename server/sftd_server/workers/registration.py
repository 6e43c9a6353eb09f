"""How a worker's process registers: is its version served, does it see the server's files, whom does it replace."""

from datetime import datetime

from sqlmodel import Session, col, select, update

from sftd.protocol import OLDEST_PROTOCOL, PROTOCOL, Hello
from sftd_server.errors import Conflict, Invalid, UpgradeRequired
from sftd_server.settings import Settings
from sftd_server.tables import WorkerRow
from sftd_server.workers.endings import take_back
from sftd_server.workers.registry import Replaced

FIRST_TOLD_OF_REFUSALS = 2  # older versions take every refused connection for a server that is down


def check_protocol(worker_id: str, protocol: int, *, refused_means_down: bool) -> None:
    """Raises UpgradeRequired where the worker's version of the protocol is not served here."""
    if OLDEST_PROTOCOL <= protocol < FIRST_TOLD_OF_REFUSALS and not refused_means_down:
        raise UpgradeRequired(
            f"Worker {worker_id} speaks version {protocol} of the worker protocol: where several servers may run on one"
            " database (PostgreSQL), it would train on behind a lease that another server has handed on. Install the"
            " server's version of sftd on the worker.",
            code="worker_too_old",
            protocol=PROTOCOL,
        )
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


def register(session: Session, *, hello: Hello, settings: Settings, now: datetime) -> None:
    """Remember a worker, or what is new about it. What an earlier process of it held goes on at once. Raises Invalid."""
    if hello.replaces_boot_id is not None:
        _replace(session, hello.worker_id, hello.replaces_boot_id, hello.boot_id, settings, now)
    same_name = session.exec(select(WorkerRow).where(WorkerRow.id == hello.worker_id).with_for_update()).all()
    here = next((row for row in same_name if row.boot_id == hello.boot_id), None)
    if here is not None and here.gone_at is not None:
        raise Replaced(hello.worker_id)
    known = here.registered_at if here is not None else None
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


def _replace(
    session: Session, worker_id: str, dead: str, boot_id: str, settings: Settings, now: datetime
) -> None:
    if dead == boot_id:
        raise Invalid(
            f"replaces_boot_id: {dead!r} is this process itself; give the boot_id of the one before it, or none.",
            code="replaces_itself",
            param="replaces_boot_id",
        )
    # First of all: a claim of the dead process that is under way either comes before this, and is taken back below, or
    # finds it.
    gone = (
        col(WorkerRow.id) == worker_id,
        col(WorkerRow.boot_id) == dead,
        col(WorkerRow.gone_at).is_(None),
    )
    session.exec(update(WorkerRow).where(*gone).values(gone_at=now))
    take_back(session, worker_id=worker_id, boot_id=dead, settings=settings, now=now)
