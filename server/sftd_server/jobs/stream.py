"""Server-sent events: a job's events and log lines as they come, until the job is over and all has been sent."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

from fastapi.responses import StreamingResponse
from sqlmodel import Session

from sftd.schemas import Event, JobState, LogLine, Page
from sftd_server.errors import Invalid, NotFound
from sftd_server.jobs.service import find_job
from sftd_server.server import Server

PAGE = 500
Pages = Callable[[Session, int], Page[Event] | Page[LogLine]]  # (session, after) → the next items


def stream(server: Server, job_id: str, pages: Pages, *, after: int) -> StreamingResponse:
    """Follow a job from `after` on. The last event is `end`, with the job's state."""
    return StreamingResponse(
        _follow(server, job_id, pages, after),
        media_type="text/event-stream",
        headers={"x-accel-buffering": "no"},  # nginx would hold events back
    )


def starting_point(after: int, last_event_id: str | None) -> int:
    """Where a stream begins: after the last event that the client has, if it says so. Raises Invalid."""
    if last_event_id is None or not last_event_id.strip():
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 18):
        raise Invalid(
            f"Last-Event-ID: must be the id of an event, not {last_event_id[:40]!r}",
            code="invalid_request",
            param="Last-Event-ID",
        )
    return int(last_event_id)


async def _follow(server: Server, job_id: str, pages: Pages, after: int) -> AsyncIterator[str]:
    def look(session: Session) -> tuple[JobState, Page[Event] | Page[LogLine]]:
        return JobState(find_job(session, job_id).state), pages(session, after)

    yield ": open\n\n"
    while not server.stopping:
        signal = server.db.signal(f"job:{job_id}")
        try:
            state, page = await server.db.read(look)  # one snapshot: nothing can come after a terminal state
        except NotFound:  # the job was deleted meanwhile
            yield f"event: end\ndata: {json.dumps({'state': 'deleted'})}\n\n"
            return
        for item in page.data:
            after = item.id
            yield _frame(item)
        if page.has_more:
            continue
        if state.terminal:
            yield f"event: end\ndata: {json.dumps({'state': state})}\n\n"
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(server.settings.keepalive_seconds):
                await signal.wait()
                continue
        yield ": still here\n\n"


def _frame(item: Event | LogLine) -> str:
    name = item.type if isinstance(item, Event) else "log"
    return f"id: {item.id}\nevent: {name}\ndata: {item.model_dump_json()}\n\n"
