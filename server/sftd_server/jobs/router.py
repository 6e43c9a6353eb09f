"""Routes of jobs. Each translates a request to one call of `service`, `changes`, `again`, `removal`, `queries`, `stream` or
`downloads`."""

import asyncio
import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlmodel import Session

from sftd.schemas import (
    Attempt,
    Checkpoint,
    Evaluation,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    MoveRequest,
    Page,
    PinRequest,
    RetryRequest,
)
from sftd_server.auth import Caller, CallerDep
from sftd_server.errors import Invalid, error_responses
from sftd_server.jobs import (
    again,
    changes,
    downloads,
    metrics,
    posting,
    queries,
    removal,
    service,
    submission,
)
from sftd_server.jobs.queries import JobFilter
from sftd_server.jobs.stream import PAGE, starting_point, stream
from sftd_server.server import Server, ServerDep
from sftd_server.strict_json import MAX_INTEGER, StrictRoute, read_json

JobId = Annotated[str, Path(max_length=64, examples=["job_7k2mq9x4w3pz"])]
Step = Annotated[int, Path(ge=0, le=MAX_INTEGER)]
After = Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Go on after this id.")]
Limit = Annotated[int, Query(ge=1, le=10_000, description="At most so many.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Made once per call and sent again with each retry: the job is then made once.",
    ),
]
OfAttempt = Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="Only of this attempt.")]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="Go on after this id; a browser sends it by itself."),
]

_SPEC = {
    "base_model": "Qwen/Qwen2.5-7B-Instruct",
    "method": "lora",
    "training_file": "file_0123456789ab",
    "validation_split": 0.05,
    "learning_rate": 2e-5,
    "max_steps": 1000,
    "lora": {"rank": 16, "alpha": 32},
    "metadata": {"team": "q"},
}
SPEC_BODY: dict[str, Any] = {  # OpenAPI: open by nature
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}, "example": _SPEC}
        },
    }
}
_FIELDS_BODY: dict[str, Any] = {  # OpenAPI: open by nature
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "description": "Fields of the job spec.",
                    "additionalProperties": True,
                },
                "example": {"priority": 5},
            }
        },
    }
}
_POSTED: dict[int | str, dict[str, Any]] = {  # OpenAPI: open by nature
    200: {
        "content": {
            "application/json": {
                "example": {
                    "id": "job_7k2mq9x4w3pz",
                    "object": "job",
                    "state": "queued",
                    "want": "run",
                    "owner": "ci",
                    "base_model": "Qwen/Qwen2.5-7B-Instruct",
                    "method": "lora",
                    "created_at": "2030-01-01T00:00:00Z",
                    "queue_position": 1,
                    "step": 0,
                    "progress": 0.0,
                }
            }
        }
    }
}
_METADATA_PARAMETER: dict[str, Any] = {  # OpenAPI: open by nature
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "description": "Jobs with this metadata: `metadata[team]=q`. May be given several times.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {  # OpenAPI: open by nature
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
_BYTES: dict[int | str, dict[str, Any]] = {  # OpenAPI: open by nature
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
MAX_METADATA_FILTERS = 16  # as many as a job has pairs
_METADATA_NAME = re.compile(r"^metadata\[(.{1,64})\]$", re.DOTALL)

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute, responses=error_responses(404))


@router.post("", openapi_extra=SPEC_BODY, responses={**_POSTED, **error_responses(413)})
async def submit(
    request: Request,
    server: ServerDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Post a fine-tuning job: the job spec as one flat JSON object.

    All of it is checked at once, with the files and the model that it names; a 422 lists every mistake. The answer is
    the job, `queued`. With an `Idempotency-Key` the same call again answers with the same job.
    """
    value = read_json(await request.body())

    def check(session: Session) -> posting.Checked:
        spec, inputs = submission.check(session, value, posting.sources(server))
        return spec, inputs, None

    return await _submit(server, caller, idempotency_key, value, check)


@router.get("", openapi_extra=_METADATA_PARAMETER)
async def list_jobs(
    request: Request,
    server: ServerDep,
    state: Annotated[list[JobState] | None, Query(description="Only these states; may be repeated.")] = None,
    owner: Annotated[str | None, Query(max_length=128, description="Only this owner's.")] = None,
    after: Annotated[str | None, Query(max_length=64, description="The id of the last job seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Page[Job]:
    """Jobs, newest first. `next_after` is the `after` of the next page."""
    wanted = JobFilter(states=state or [], owner=owner, metadata=metadata_filters(request))
    context = queries.Context(server.settings, server.clock.now())
    return await server.db.read(
        lambda session: queries.jobs(session, wanted, context, after=after, limit=limit)
    )


@router.get("/{job_id}")
async def retrieve(job_id: JobId, server: ServerDep) -> Job:
    """One job as it stands: state, progress, loss, and why it failed if it did."""
    return await _job(server, job_id)


@router.post("/{job_id}/cancel", responses=error_responses(404, 409))
async def cancel(job_id: JobId, server: ServerDep, caller: CallerDep) -> Job:
    """End a job for good. A running one ends within seconds; what it has saved is kept. May be repeated."""
    return await _steer(server, service.cancel, job_id, caller)


@router.post("/{job_id}/pause", responses=error_responses(404, 409))
async def pause(job_id: JobId, server: ServerDep, caller: CallerDep) -> Job:
    """Put a job aside: a running one saves a checkpoint and frees its device. May be repeated."""
    return await _steer(server, service.pause, job_id, caller)


@router.post("/{job_id}/resume", responses=error_responses(404, 409))
async def resume(job_id: JobId, server: ServerDep, caller: CallerDep) -> Job:
    """Queue a paused job again; it goes on from its newest checkpoint. May be repeated."""
    return await _steer(server, service.resume, job_id, caller)


@router.post("/{job_id}/retry", responses=error_responses(404, 409, 413))
async def retry(
    job_id: JobId,
    server: ServerDep,
    caller: CallerDep,
    message: RetryRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Try a job that is over again: a new job with the same spec, linked by `retry_of`.

    It goes on from the old job's newest checkpoint, or from that of `step`; with `{"from": "scratch"}`, or where there is
    no checkpoint, it begins anew. Its result is that of a run that was never interrupted.
    """
    request = message or RetryRequest()
    sources = posting.sources(server)
    asked = {"retry": job_id, **request.model_dump(by_alias=True)}
    return await _submit(
        server,
        caller,
        idempotency_key,
        asked,
        lambda session: again.retried(session, job_id, request, sources),
    )


@router.post("/{job_id}/clone", openapi_extra=_FIELDS_BODY, responses=error_responses(404, 409, 413))
async def clone(
    request: Request,
    job_id: JobId,
    server: ServerDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Post a job with the same spec but for the fields in the body: `{"learning_rate": 1e-4}`; null stands for a field's
    default. It is checked like any new job and linked by `clone_of`."""
    overrides = await _fields(request)
    sources = posting.sources(server)
    asked = {"clone": job_id, "overrides": overrides}
    return await _submit(
        server,
        caller,
        idempotency_key,
        asked,
        lambda session: again.cloned(session, job_id, overrides, sources),
    )


@router.patch("/{job_id}", openapi_extra=_FIELDS_BODY, responses=error_responses(404, 409, 413))
async def change(request: Request, job_id: JobId, server: ServerDep, caller: CallerDep) -> Job:
    """Change fields of a job: `name`, `metadata` and `keep_checkpoints` at any time; `priority`, `requires`, `max_seconds`,
    `max_gpu_seconds` and `max_tokens` until it is over; `after` while it is queued. Null stands for a field's default."""
    fields = await _fields(request)
    now = server.clock.now()
    await server.db.write(lambda session: changes.change(session, job_id, fields, caller, now))
    return await _job(server, job_id)


@router.post("/{job_id}/move", responses=error_responses(404, 409, 413))
async def move(message: MoveRequest, job_id: JobId, server: ServerDep, caller: CallerDep) -> Job:
    """Put a queued job elsewhere among those of its priority: `{"position": "first"}` or `"last"`, `{"before": id}`,
    `{"after": id}`. Its owner may; going ahead of somebody else's job needs an admin."""
    now, settings = server.clock.now(), server.settings
    await server.db.write(lambda session: changes.reorder(session, job_id, message, caller, settings, now))
    return await _job(server, job_id)


@router.delete("/{job_id}", status_code=204, responses=error_responses(404, 409))
async def delete(
    job_id: JobId,
    server: ServerDep,
    caller: CallerDep,
    keep_files: Annotated[bool, Query(description="Leave its folder where it is.")] = False,
) -> None:
    """Delete a job that is over, paused or queued: all that is recorded of it, and its folder. 409 while it runs (cancel it
    first), and while a job that is not over needs it."""
    jobs = server.folder.path / "jobs"
    # No note of what never was, or what may not go.
    await server.db.read(lambda session: removal.require_removable(session, job_id, caller))
    left = None if keep_files else await asyncio.to_thread(removal.note, jobs, job_id)
    now = server.clock.now()
    try:
        await server.db.write(lambda session: removal.remove(session, job_id, caller, now))
    except Exception:
        if left is not None:
            left.unlink(missing_ok=True)
        raise
    if not keep_files:
        trash = await asyncio.to_thread(removal.put_away, jobs, job_id)
        if trash is not None:
            server.in_background(asyncio.to_thread(removal.empty, trash))


@router.get("/{job_id}/attempts")
async def list_attempts(job_id: JobId, server: ServerDep) -> Page[Attempt]:
    """How often workers have taken the job: which, when, how each attempt ended and why."""
    now = server.clock.now()
    return await server.db.read(lambda session: queries.attempts(session, job_id, now))


@router.get("/{job_id}/metrics", response_model=Page[MetricPoint])
async def list_metrics(
    job_id: JobId,
    server: ServerDep,
    names: Annotated[
        list[str] | None, Query(description="Only these; separated by commas, or repeated.")
    ] = None,
    after: Annotated[int, Query(ge=-1, le=MAX_INTEGER, description="Go on after this step.")] = -1,
    limit: Limit = 1000,
    points: Annotated[
        int | None, Query(ge=1, le=10_000, description="Thin to about so many steps, evenly spaced.")
    ] = None,
) -> Response:
    """Metrics in step order, one flat object a step: `{"step": 1, "loss": 2.3, …}`.

    A job that was interrupted shows the history of an uninterrupted run. NaN and infinities are the strings `NaN`,
    `Infinity` and `-Infinity`.
    """
    wanted = [name for part in names or [] for name in part.split(",") if name]

    def look(session: Session) -> str:
        number = service.find_job(session, job_id).number
        if points is None:
            return metrics.page(session, number, wanted, after=after, limit=limit).to_json()
        return metrics.thinned(session, number, wanted, after=after, points=points).to_json()

    return Response(await server.db.read(look), media_type="application/json")


@router.get("/{job_id}/logs", response_model=Page[LogLine], responses=_EVENT_STREAM)
async def list_logs(
    request: Request,
    job_id: JobId,
    server: ServerDep,
    after: After = 0,
    limit: Limit = 1000,
    attempt: OfAttempt = None,
    last_event_id: LastEventId = None,
) -> Response:
    """The job's log, oldest line first.

    With `Accept: text/event-stream` lines are sent as they come, until the job is over: `event: log` with an `id` to
    go on from, at last `event: end`.
    """
    if _wants_stream(request):
        pages = functools.partial(queries.logs, attempt=attempt)
        return await _stream(server, job_id, pages, starting_point(after, last_event_id))
    page = await server.db.read(
        lambda session: queries.logs(session, job_id, after=after, limit=limit, attempt=attempt)
    )
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/{job_id}/events", response_model=Page[Event], responses=_EVENT_STREAM)
async def list_events(
    request: Request,
    job_id: JobId,
    server: ServerDep,
    after: After = 0,
    limit: Limit = 1000,
    attempt: OfAttempt = None,
    last_event_id: LastEventId = None,
) -> Response:
    """What happened to the job, oldest first.

    With `Accept: text/event-stream` events are sent as they come, until the job is over: `event: <type>` with an `id`
    to go on from, at last `event: end`.
    """
    if _wants_stream(request):
        pages = functools.partial(queries.events, attempt=attempt)
        return await _stream(server, job_id, pages, starting_point(after, last_event_id))
    page = await server.db.read(
        lambda session: queries.events(session, job_id, after=after, limit=limit, attempt=attempt)
    )
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(job_id: JobId, server: ServerDep) -> Page[Checkpoint]:
    """Whole checkpoints by step, each with its files."""
    return await server.db.read(lambda session: queries.checkpoints(session, job_id))


@router.post("/{job_id}/checkpoints/{step}/pin", responses=error_responses(404, 409, 413))
async def pin(
    message: PinRequest, job_id: JobId, step: Step, server: ServerDep, caller: CallerDep
) -> Checkpoint:
    """Keep a checkpoint under a name, whatever the server's rules for old ones. May be repeated."""
    return await server.db.write(lambda session: changes.pin(session, job_id, step, message, caller))


@router.post("/{job_id}/checkpoints/{step}/unpin", responses=error_responses(404, 409))
async def unpin(job_id: JobId, step: Step, server: ServerDep, caller: CallerDep) -> Checkpoint:
    """Let a checkpoint be removed like any other again. May be repeated."""
    return await server.db.write(lambda session: changes.unpin(session, job_id, step, caller))


@router.get("/{job_id}/evaluations")
async def list_evaluations(job_id: JobId, server: ServerDep) -> Page[Evaluation]:
    """Evaluations by step."""
    return await server.db.read(lambda session: queries.evaluations(session, job_id))


@router.get(
    "/{job_id}/checkpoints/{step}/files/{name:path}",
    response_class=StreamingResponse,
    responses={**_BYTES, **error_responses(404, 409)},
)
async def checkpoint_file(job_id: JobId, step: Step, name: str, server: ServerDep) -> Response:
    """One file of a checkpoint, by its name in the checkpoint's `files`."""
    stored = await server.db.read(lambda session: queries.checkpoint_files(session, job_id, step))
    return await server.uploads.in_thread(downloads.one_file, server.shelf, stored, name)


@router.get(
    "/{job_id}/result/files/{name:path}",
    response_class=StreamingResponse,
    responses={**_BYTES, **error_responses(404, 409)},
)
async def result_file(job_id: JobId, name: str, server: ServerDep) -> Response:
    """One file of the result."""
    stored = await server.db.read(lambda session: queries.result_files(session, job_id))
    return await server.uploads.in_thread(downloads.one_file, server.shelf, stored, name)


@router.get(
    "/{job_id}/archive",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
        **error_responses(404, 409),
    },
)
async def archive(job_id: JobId, server: ServerDep) -> Response:
    """The result as a tar, streamed; 409 while there is none."""
    stored = await server.db.read(lambda session: queries.result_files(session, job_id))
    return await server.uploads.in_thread(downloads.archive, server.shelf, stored, job_id)


def metadata_filters(request: Request) -> dict[str, str]:
    """What `metadata[k]=v` in the query asks for. Raises Invalid where that is more than a job can have."""
    metadata = {
        found[1]: value
        for name, value in request.query_params.multi_items()
        if (found := _METADATA_NAME.match(name))
    }
    if len(metadata) > MAX_METADATA_FILTERS:
        raise Invalid(
            f"metadata: a job has at most {MAX_METADATA_FILTERS} pairs; {len(metadata)} were asked for",
            code="invalid_request",
            param="metadata",
        )
    return metadata


Steering = Callable[[Session, str, Caller, datetime], None]
Listing = Callable[..., Any]  # queries.logs or queries.events


async def _job(server: Server, job_id: str) -> Job:
    context = queries.Context(server.settings, server.clock.now())
    return await server.db.read(lambda session: queries.job(session, job_id, context))


async def _submit(
    server: Server,
    caller: Caller,
    idempotency_key: str | None,
    asked: object,
    check: Callable[[Session], posting.Checked],
) -> Job:
    """Make a job of what was asked, once per idempotency key."""
    call = posting.Post(asked, idempotency_key)
    job_id = await posting.post(server, caller, call, functools.partial(server.db.read, check))
    return await _job(server, job_id)


async def _fields(request: Request) -> dict[str, Any]:  # JSON: open by nature
    """Fields of a spec, still unchecked."""
    value = read_json(await request.body())
    if not isinstance(value, dict):
        raise Invalid("body: must be a JSON object, the fields to change", code="invalid_spec", param="body")
    return value


async def _steer(server: Server, act: Steering, job_id: str, caller: Caller) -> Job:
    await server.db.write(lambda session: act(session, job_id, caller, server.clock.now()))
    return await _job(server, job_id)


async def _stream(server: Server, job_id: str, pages: Listing, after: int) -> Response:
    await server.db.read(lambda session: service.find_job(session, job_id))  # a 404 now, not in the stream
    return stream(
        server, job_id, lambda session, after: pages(session, job_id, after=after, limit=PAGE), after=after
    )


def _wants_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")
