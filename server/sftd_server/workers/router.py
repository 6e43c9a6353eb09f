"""Routes for workers, under /worker. Each translates a message to one call of `leases` or `reports`."""

import functools
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from sqlmodel import Session

from sftd.protocol import (
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
from sftd_server.errors import Unavailable, error_responses
from sftd_server.server import Server, server_of
from sftd_server.strict_json import StrictRoute
from sftd_server.workers import claims, endings, leases, registry, reports
from sftd_server.workers.leases import Holder

T = TypeVar("T")
ServerDep = Annotated[Server, Depends(server_of)]
JobId = Annotated[str, Path(max_length=64)]
Token = Annotated[
    str, Header(alias=TOKEN_HEADER, max_length=128, description="The lease's token, from the claim's answer.")
]

router = APIRouter(
    prefix="/worker", tags=["worker protocol"], route_class=StrictRoute, responses=error_responses(413)
)


@router.post("/register", responses=error_responses(409, 413))
async def register(hello: Hello, server: ServerDep) -> Welcome:
    """Say who a worker is, and which dead process it replaces: what that one held goes on at once. 409 where the worker
    sees another data folder than the server's."""
    registry.check_installation(hello, server.installation_id)
    work = functools.partial(registry.register, hello=hello, settings=server.settings, now=server.clock.now())
    await server.db.write(work)
    return Welcome(lease_seconds=server.settings.lease_seconds, installation_id=server.installation_id)


@router.post(
    "/claim",
    response_model=Lease,
    responses={204: {"description": "There is no job for this worker now."}, **error_responses(409, 413)},
)
async def claim(request: Request, message: Claim, server: ServerDep) -> Lease | Response:
    """Take the next job. Held open up to `wait_seconds`; the same `request_id` again brings the same lease."""

    async def take() -> Lease | None:
        if server.stopping:
            raise Unavailable("The server is stopping; claim again in a moment.", code="stopping")
        now = server.clock.now()
        work = functools.partial(
            claims.claim, claim=message, secret=server.secret, settings=server.settings, now=now
        )
        return await server.db.write(work)

    async def take_if_any() -> Lease | None:
        if await request.is_disconnected():  # a job must not go to a worker that has hung up
            return None
        look = functools.partial(claims.is_claimable, gpus=message.gpus, now=server.clock.now())
        return await take() if await server.db.read(look) else None

    lease = await take() or await server.wait_for("queue", take_if_any, seconds=message.wait_seconds)
    return lease or Response(status_code=204)


@router.post("/jobs/{job_id}/heartbeat", responses=error_responses(409, 413))
async def heartbeat(job_id: JobId, message: Heartbeat, token: Token, server: ServerDep) -> Directive:
    """Renew the lease and hear what the user wants; the answer waits until that differs from `seen_want`."""
    holder = leases.holder(job_id, message.attempt, token)

    async def beat(message: Heartbeat) -> Directive:
        now = server.clock.now()
        work = functools.partial(
            leases.heartbeat, holder=holder, beat=message, settings=server.settings, now=now
        )
        want = await server.db.write(work)
        return Directive(want=want, lease_seconds=server.settings.lease_seconds)

    directive = await beat(message)
    if directive.want != message.seen_want or message.wait_seconds == 0:
        return directive
    look = functools.partial(leases.differing_want, holder=holder, seen=message.seen_want)
    differs = await server.wait_for(
        f"want:{job_id}", lambda: server.db.read(look), seconds=message.wait_seconds
    )
    return directive if differs is None else await beat(message)


@router.post("/jobs/{job_id}/metrics", responses=error_responses(409, 413, 416))
async def metrics(job_id: JobId, message: MetricsBatch, token: Token, server: ServerDep) -> NextSeq:
    """Report metric points. A batch sent twice lands once."""
    return await _append(server, reports.metrics, job_id, message, token)


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
    await server.db.write(lambda session: reports.checkpoint(session, holder, message, now))
    return Ok()


@router.post("/jobs/{job_id}/finish", responses=error_responses(409, 413))
async def finish(job_id: JobId, message: Finish, token: Token, server: ServerDep) -> Ok:
    """The attempt's last word; the same word may be sent again."""
    holder = leases.holder(job_id, message.attempt, token)
    now = server.clock.now()
    await server.db.write(
        lambda session: endings.finish(session, holder, message, settings=server.settings, now=now)
    )
    return Ok()


@router.post("/jobs/{job_id}/release", responses=error_responses(409, 413))
async def release(job_id: JobId, message: Release, token: Token, server: ServerDep) -> Ok:
    """Give the job back unfinished; it goes on elsewhere."""
    holder = leases.holder(job_id, message.attempt, token)
    now = server.clock.now()
    await server.db.write(lambda session: endings.release(session, holder, message, now=now))
    return Ok()


Batch = TypeVar("Batch", MetricsBatch, LogBatch, EventBatch)


async def _append(
    server: Server, store: Callable[[Session, Holder, Batch], int], job_id: str, batch: Batch, token: str
) -> NextSeq:
    holder = leases.holder(job_id, batch.attempt, token)
    return NextSeq(next_seq=await server.db.write(lambda session: store(session, holder, batch)))
