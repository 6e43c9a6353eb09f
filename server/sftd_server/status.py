"""Routes about the server itself: is it up, its workers, its figures for Prometheus."""

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from sqlmodel import Session, col, func, select

import sftd
from sftd.schemas import JobState, Page, Worker
from sftd_server.auth import Caller, CallerDep
from sftd_server.errors import error_responses
from sftd_server.jobs.scheduling import ALIVE_SECONDS
from sftd_server.server import Server, ServerDep
from sftd_server.tables import JobRow, WorkerRow
from sftd_server.workers import registry

WorkerId = Annotated[str, Path(max_length=128, examples=["gpu-box"])]
router = APIRouter(tags=["server"])


class Health(BaseModel):
    """The server answers."""

    status: str
    version: str


@router.get("/healthz", openapi_extra={"security": []})
async def healthz() -> Health:
    """Is the server up? Needs no key."""
    return Health(status="ok", version=sftd.__version__)


@router.get("/workers", responses=error_responses())
async def list_workers(server: ServerDep) -> Page[Worker]:
    """Processes of workers that have registered, the newest first, with the jobs they hold."""
    now = server.clock.now()
    return await server.db.read(lambda session: registry.workers(session, now))


@router.post("/workers/{worker_id}/drain", responses=error_responses(404))
async def drain(worker_id: WorkerId, server: ServerDep, caller: CallerDep) -> Page[Worker]:
    """Let a worker take no new jobs and give back those it runs, for admins. It stays so until it is undrained, over
    restarts too. May be repeated."""
    return await _set_draining(server, worker_id, caller, draining=True)


@router.post("/workers/{worker_id}/undrain", responses=error_responses(404))
async def undrain(worker_id: WorkerId, server: ServerDep, caller: CallerDep) -> Page[Worker]:
    """Let a worker take jobs again, for admins. May be repeated."""
    return await _set_draining(server, worker_id, caller, draining=False)


async def _set_draining(server: Server, worker_id: str, caller: Caller, *, draining: bool) -> Page[Worker]:
    """The processes of that name, as they are now."""
    caller.require_admin()
    await server.db.write(lambda session: registry.drain(session, worker_id, draining=draining))
    page = await list_workers(server)
    return page.model_copy(update={"data": [worker for worker in page.data if worker.id == worker_id]})


@router.get("/metrics", response_class=PlainTextResponse, responses=error_responses())
async def metrics(server: ServerDep) -> PlainTextResponse:
    """Figures in the text format of Prometheus."""
    since = server.clock.now() - timedelta(seconds=ALIVE_SECONDS)
    text = await server.db.read(lambda session: _figures(session, since))
    db = server.db
    text += _figure("sftd_write_queue", "gauge", "Writes that wait for the database.", {"": db.num_waiting})
    text += _figure("sftd_writes_total", "counter", "Writes done since the start.", {"": db.num_writes})
    text += _figure(
        "sftd_commits_total", "counter", "Transactions they were grouped in.", {"": db.num_commits}
    )
    disk = server.disk
    text += _figure("sftd_disk_room_bytes", "gauge", "Room on the disk.", {"": disk.room_bytes})
    text += _figure("sftd_disk_low", "gauge", "1 while reports wait for room.", {"": int(disk.low)})
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _figures(session: Session, since: datetime) -> str:
    counts = dict(session.exec(select(JobRow.state, func.count()).group_by(col(JobRow.state))).all())
    jobs = {f'{{state="{state}"}}': counts.get(state, 0) for state in JobState}
    alive = session.exec(select(func.count()).where(WorkerRow.seen_at >= since)).one()
    version = {f'{{version="{sftd.__version__}"}}': 1}
    return (
        _figure("sftd_info", "gauge", "The server's version.", version)
        + _figure("sftd_jobs", "gauge", "Jobs by state.", jobs)
        + _figure("sftd_workers", "gauge", f"Workers heard of in the last {ALIVE_SECONDS:g} s.", {"": alive})
    )


def _figure(name: str, kind: str, meaning: str, values: dict[str, int]) -> str:
    lines = [f"{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *lines, ""])
