"""Routes for workers, under /worker. Each translates a message to one call of `leases` or `reports`."""

import functools
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from sqlmodel import Session

from sftd.protocol import (
    PROTOCOL,
    TOKEN_HEADER,
    CheckpointReport,
    Claim,
    Directive,
    EventBatch,
    Finish,
    Heartbeat,
    Hello,
    Lease,
    LogBatch,
    MetricsBatch,
    NextSeq,
    Ok,
    Release,
    Welcome,
)
from sftd_server.artifacts.placing import checkpoint_to_place, result_to_place
from sftd_server.auth import CallerDep
from sftd_server.db import MAX_BATCH
from sftd_server.errors import Unavailable, error_responses
from sftd_server.server import Server, ServerDep
from sftd_server.strict_json import StrictRoute
from sftd_server.workers import claims, endings, leases, registration, reports, versions
from sftd_server.workers.leases import Holder
from sftd_server.workers.reaper import settle_clock

MAX_PACE_SECONDS = 30.0

JobId = Annotated[str, Path(max_length=64)]
Token = Annotated[
    str, Header(alias=TOKEN_HEADER, max_length=128, description="The lease's token, from the claim's answer.")
]


async def steady_clock(server: ServerDep) -> None:
    """A jump of the clock is made good before anything of a worker is looked at."""
    await settle_clock(server)


router = APIRouter(
    prefix="/worker",
    tags=["worker protocol"],
    route_class=StrictRoute,
    responses=error_responses(413),
    dependencies=[Depends(steady_clock)],
)


@router.post("/register", response_model=Welcome, responses=error_responses(409, 413, 426))
async def register(hello: Hello, server: ServerDep) -> Response:
    """Say who a worker is, and which dead process it replaces: what that one held goes on at once. 409 where the worker
    sees another data folder than the server's, 426 where it is of a version that is not served."""
    _check_protocol(hello, server)
    registration.check_installation(hello, server.installation_id)
    work = functools.partial(
        registration.register, hello=hello, settings=server.settings, now=server.clock.now()
    )
    await server.db.write(work)
    welcome = Welcome(
        lease_seconds=server.settings.lease_seconds,
        installation_id=server.installation_id,
        protocol=PROTOCOL,
        refused_means_down=server.refused_means_down,
    )
    return versions.answer(welcome, protocol=hello.protocol)


@router.post(
    "/claim",
    response_model=Lease,
    responses={
        204: {"description": "There is no job for this worker now."},
        **error_responses(409, 413, 426),
    },
)
async def claim(request: Request, message: Claim, server: ServerDep, caller: CallerDep) -> Response:
    """Take the next job. Held open up to `wait_seconds`; the same `request_id` again brings the same lease."""
    _check_protocol(message, server)

    async def take() -> Lease | None:
        if server.stopping:
            raise Unavailable("The server is stopping; claim again in a moment.", code="stopping")
        server.disk.require_room()  # a job would only come to harm
        await settle_clock(server)  # again: the call may have been held
        now = server.clock.now()
        work = functools.partial(
            claims.claim,
            claim=message,
            key_name=caller.name,
            secret=server.secret,
            settings=server.settings,
            now=now,
        )
        return await server.db.write(work)

    async def take_if_any() -> Lease | None:
        if await request.is_disconnected():  # a job must not go to a worker that has hung up
            return None
        now = server.clock.now()
        look = functools.partial(claims.is_claimable, claim=message, settings=server.settings, now=now)
        return await take() if await server.db.read(look) else None

    lease = await take() or await server.wait_for("queue", take_if_any, seconds=message.wait_seconds)
    return versions.answer(lease, protocol=message.protocol) if lease else Response(status_code=204)


@router.post("/jobs/{job_id}/heartbeat", response_model=Directive, responses=error_responses(409, 413))
async def heartbeat(job_id: JobId, message: Heartbeat, token: Token, server: ServerDep) -> Response:
    """Renew the lease and hear what is wanted; the answer waits until that differs from what the worker has seen."""
    holder = leases.holder(job_id, message.attempt, token)

    async def beat() -> tuple[Directive, int]:
        await settle_clock(server)  # again: the call may have been held
        now = server.clock.now()
        work = functools.partial(
            leases.heartbeat, holder=holder, beat=message, settings=server.settings, now=now
        )
        directive, protocol = await server.db.write(work)
        told = {"next_upload_seconds": _pace(server), "refused_means_down": server.refused_means_down}
        return directive.model_copy(update=told), protocol

    directive, protocol = await beat()
    if not leases.differs(directive, message) and message.wait_seconds > 0:
        look = functools.partial(leases.has_news, holder=holder, beat=message, settings=server.settings)
        topic = f"want:{job_id}"
        if await server.wait_for(topic, lambda: server.db.read(look), seconds=message.wait_seconds):
            directive, protocol = await beat()
    return versions.answer(directive, protocol=protocol)


@router.post("/jobs/{job_id}/metrics", responses=error_responses(409, 413, 416))
async def metrics(job_id: JobId, message: MetricsBatch, token: Token, server: ServerDep) -> NextSeq:
    """Report metric points. A batch sent twice lands once."""
    store = functools.partial(reports.metrics, now=server.clock.now())
    return await _append(server, store, job_id, message, token)


@router.post("/jobs/{job_id}/logs", responses=error_responses(409, 413, 416))
async def logs(job_id: JobId, message: LogBatch, token: Token, server: ServerDep) -> NextSeq:
    """Report log lines. A batch sent twice lands once."""
    return await _append(
        server, functools.partial(reports.logs, now=server.clock.now()), job_id, message, token
    )


@router.post("/jobs/{job_id}/events", responses=error_responses(409, 413, 416))
async def events(job_id: JobId, message: EventBatch, token: Token, server: ServerDep) -> NextSeq:
    """Report what the trainer announced. A batch sent twice lands once."""
    store = functools.partial(reports.events, now=server.clock.now())
    return await _append(server, store, job_id, message, token)


@router.post("/jobs/{job_id}/checkpoints", responses=error_responses(409, 413))
async def checkpoints(job_id: JobId, message: CheckpointReport, token: Token, server: ServerDep) -> Ok:
    """Put a whole checkpoint on record, or strike one that does not verify any more."""
    holder = leases.holder(job_id, message.attempt, token)
    now = server.clock.now()
    async with checkpoint_to_place(server, holder, message) as put:

        def write(session: Session) -> None:
            reports.checkpoint(session, holder, message, now)
            put(session)

        await server.db.write(write)
    return Ok(ok=True)


@router.post("/jobs/{job_id}/finish", responses=error_responses(409, 413))
async def finish(job_id: JobId, message: Finish, token: Token, server: ServerDep) -> Ok:
    """The attempt's last word; the same word may be sent again."""
    holder = leases.holder(job_id, message.attempt, token)
    now = server.clock.now()
    async with result_to_place(server, holder, message) as put:

        def write(session: Session) -> None:
            put(session)
            endings.finish(session, holder, message, settings=server.settings, now=now)

        await server.db.write(write)
    return Ok(ok=True)


@router.post("/jobs/{job_id}/release", responses=error_responses(409, 413))
async def release(job_id: JobId, message: Release, token: Token, server: ServerDep) -> Ok:
    """Give the job back unfinished; it goes on elsewhere."""
    holder = leases.holder(job_id, message.attempt, token)
    now = server.clock.now()
    await server.db.write(
        lambda session: endings.release(session, holder, message, settings=server.settings, now=now)
    )
    return Ok(ok=True)


def _check_protocol(message: Hello | Claim, server: Server) -> None:
    registration.check_protocol(
        message.worker_id, message.protocol, refused_means_down=server.refused_means_down
    )


def _pace(server: Server) -> float | None:
    """How far apart a worker shall report while more writes wait than one transaction takes."""
    waiting = server.db.num_waiting
    return None if waiting < MAX_BATCH else min(MAX_PACE_SECONDS, waiting / MAX_BATCH)


Batch = TypeVar("Batch", MetricsBatch, LogBatch, EventBatch)


async def _append(
    server: Server, store: Callable[[Session, Holder, Batch], int], job_id: str, batch: Batch, token: str
) -> NextSeq:
    holder = leases.holder(job_id, batch.attempt, token)
    next_seq = await server.db.write(lambda session: store(session, holder, batch), bulk=True)
    return NextSeq(next_seq=next_seq)
