"""Routes of plans and previews, and those by which workers count data for them."""

import functools
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from sftd.plan import Plan, RenderedRows
from sftd.protocol import TOKEN_HEADER, AnalysisClaim, AnalysisReport, AnalysisRequest, AnalysisTask, Ok
from sftd.spec import JOB_REFERENCE, JobSpec
from sftd_server.artifacts.router import sent
from sftd_server.auth import Caller, CallerDep
from sftd_server.errors import Conflict, Invalid, error_responses
from sftd_server.files import store
from sftd_server.jobs import posting, submission
from sftd_server.jobs.router import SPEC_BODY
from sftd_server.jobs.submission import Look
from sftd_server.plans import service
from sftd_server.plans.assembly import Parts, assemble
from sftd_server.plans.devices import KINDS, known_kind
from sftd_server.server import Server, ServerDep
from sftd_server.strict_json import MAX_INTEGER, StrictRoute, read_json

MAX_NAMED = 16  # types of GPU in one plan

AnalysisId = Annotated[str, Path(max_length=64)]
Token = Annotated[str, Header(alias=TOKEN_HEADER, max_length=128, description="From the claim's answer.")]
Wait = Annotated[
    float, Query(ge=0, le=60, description="How long to wait for the data to be counted, in seconds.")
]

router = APIRouter(tags=["plans"], route_class=StrictRoute, responses=error_responses())
worker_router = APIRouter(
    prefix="/worker/analyses",
    tags=["worker protocol"],
    route_class=StrictRoute,
    responses=error_responses(409, 413),
)


@router.post("/jobs/plan", openapi_extra=SPEC_BODY, responses=error_responses(413, 429))
async def plan(
    request: Request,
    server: ServerDep,
    caller: CallerDep,
    gpu: Annotated[
        list[str] | None,
        Query(
            description="Plan for this type of GPU as well, such as `H100`; may be repeated.", max_length=64
        ),
    ] = None,
    wait: Wait = 20,
) -> Plan:
    """What can be known of a job before it runs; nothing is queued. The same body as `POST /jobs`.

    Mistakes are part of the answer, all of them, with line and remedy. The data is counted by a worker, once for each
    tokenizer: where that takes longer than `wait`, the answer has `complete: false` and can be asked for again.
    """
    named = _known(gpu or [])
    value = read_json(await request.body())
    if not isinstance(value, dict):
        raise Invalid("body: must be a JSON object, the job spec", code="invalid_spec", param="body")
    sources = posting.sources(server)
    look = await server.db.read(lambda session: submission.look(session, value, sources))
    counted = look.spec or _without_mistakes(value, look)
    asked = _request(counted, look)
    report, incomplete = await _counted(server, caller, asked, wait)
    parts = Parts(look, counted, report, incomplete, named)
    now = server.clock.now()
    return await server.db.read(lambda session: assemble(session, parts, server.settings, now))


@router.get("/files/{file_id}/preview", responses=error_responses(404, 409, 429))
async def preview(
    file_id: Annotated[str, Path(max_length=64)],
    base_model: Annotated[str, Query(min_length=1, max_length=1024, description="Whose chat template.")],
    server: ServerDep,
    caller: CallerDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="Go on after this line.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 3,
    train_on: Annotated[str, Query(max_length=32)] = "completion",
    max_seq_length: Annotated[int, Query(ge=2, le=4_194_304)] = 2048,
    wait: Wait = 20,
) -> RenderedRows:
    """Rows as the model will see them, through its chat template, with what carries the loss marked.

    A worker renders them: where that takes longer than `wait`, the answer has `complete: false` and can be asked for again.
    """
    await server.db.read(lambda session: store.file(session, file_id))  # a 404 where there is none
    value = {
        "base_model": base_model,
        "training_file": file_id,
        "train_on": train_on,
        "max_seq_length": max_seq_length,
    }
    sources = posting.sources(server)
    look = await server.db.read(lambda session: submission.look(session, value, sources))
    asked = _request(look.spec, look)
    if look.mistakes or asked is None:
        raise Invalid.of(look.mistakes)
    lines = list(range(after + 1, after + 1 + limit))
    report, incomplete = await _counted(server, caller, asked.model_copy(update={"lines": lines}), wait)
    if report is None:
        return RenderedRows(complete=False, incomplete=incomplete, data=[], problems=[])
    if report.analysis is None:
        raise Conflict(f"The rows could not be rendered: {report.error}", code="not_counted")
    analysis = report.analysis
    return RenderedRows(complete=True, incomplete=None, data=analysis.rows, problems=analysis.problems)


def _known(named: Sequence[str]) -> list[str]:
    """Types of GPU that are known here. Raises Invalid."""
    if len(named) > MAX_NAMED:
        raise Invalid(f"gpu: at most {MAX_NAMED} types", code="invalid_request", param="gpu")
    for name in named:
        if known_kind(name) is None:
            known = ", ".join(dict.fromkeys(kind.name for kind in KINDS))
            raise Invalid(
                f"gpu: {name[:60]!r} is not a type that is known here; known are {known}",
                code="invalid_request",
                param="gpu",
            )
    return list(dict.fromkeys(named))


def _without_mistakes(value: dict[str, Any], look: Look) -> JobSpec | None:  # value: JSON
    """The spec without the fields that are wrong: the data can be counted all the same, and its mistakes told."""
    wrong = {mistake.field.partition(".")[0].partition("[")[0] for mistake in look.mistakes}
    fields = {name: field for name, field in value.items() if name not in wrong}
    try:
        return JobSpec.model_validate(fields)
    except ValueError:  # what it cannot do without is wrong
        return None


def _request(spec: JobSpec | None, look: Look) -> AnalysisRequest | None:
    """What is to be counted; None where there is nothing that could be."""
    training = look.files.get("training_file")
    if spec is None or training is None or any(m.field == "base_model" for m in look.mistakes):
        return None
    if look.base is None and JOB_REFERENCE.match(spec.base_model):
        return None  # the result of a job that it waits for
    return AnalysisRequest(
        spec=service.counted_by(spec),
        training_file=training,
        validation_file=look.files.get("validation_file") if spec.validation_file else None,
        base=look.base,
    )


async def _counted(
    server: Server, caller: Caller, asked: AnalysisRequest | None, wait: float
) -> tuple[AnalysisReport | None, str | None]:
    """(what was counted, what is missing and why)."""
    if asked is None:
        return None, (
            "The data is counted when base_model and training_file are right, and a base that another job makes is there."
        )
    request = asked
    now = server.clock.now()
    key = await server.db.write(lambda session: service.ask(session, request, caller.name, now))
    look = functools.partial(service.outcome, asked=key)
    report = await server.db.read(look)
    if report is not None:
        return report, None
    if not await server.db.read(lambda session: service.has_counters(session, server.clock.now())):
        return None, ("No worker that could count the data is there: start one, then ask again.")
    report = await server.wait_for(f"analysis:{key}", lambda: server.db.read(look), seconds=wait)
    if report is not None:
        return report, None
    return None, f"The data is still being counted after {wait:g} s; ask again in a moment."


# ---------------------------------------------------------------- for workers


@worker_router.post(
    "/claim",
    response_model=AnalysisTask,
    responses={204: {"description": "There is nothing to count now."}, **error_responses(409, 413)},
)
async def claim(request: Request, message: AnalysisClaim, server: ServerDep) -> Response:
    """Take data to count, for plans and previews. Held open up to `wait_seconds`."""

    async def take() -> AnalysisTask | None:
        if server.stopping or await request.is_disconnected():
            return None
        now = server.clock.now()
        if not await server.db.read(lambda session: service.is_wanted(session, now)):
            return None
        work = functools.partial(service.claim, worker_id=message.worker_id, boot_id=message.boot_id, now=now)
        return await server.db.write(work)

    await server.db.read(
        lambda session: service.require_registered(session, message.worker_id, message.boot_id)
    )
    task = await server.wait_for(service.TOPIC, take, seconds=message.wait_seconds)
    if task is None:
        return Response(status_code=204)
    return Response(task.model_dump_json(), media_type="application/json")


@worker_router.get(
    "/{analysis_id}/inputs/{sha256}",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **error_responses(404, 409),
    },
)
async def input_file(
    analysis_id: AnalysisId,
    sha256: Annotated[str, Path(max_length=64)],
    token: Token,
    server: ServerDep,
) -> Response:
    """A file that is to be counted, for a worker that does not see the server's data folder."""
    stored = await server.db.read(lambda session: service.input_file(session, analysis_id, token, sha256))
    ((name, file),) = stored.files.items()
    content = await server.uploads.in_thread(server.shelf.open, stored.folder, name, file)
    return sent(content, None)


@worker_router.post("/{analysis_id}/renew")
async def renew(analysis_id: AnalysisId, token: Token, server: ServerDep) -> Ok:
    """Say that it is still being counted."""
    now = server.clock.now()
    await server.db.write(lambda session: service.renew(session, analysis_id, token, now))
    return Ok(ok=True)


@worker_router.post("/{analysis_id}/finish")
async def finish(analysis_id: AnalysisId, message: AnalysisReport, token: Token, server: ServerDep) -> Ok:
    """Say what was counted, or why it could not be."""
    now = server.clock.now()
    await server.db.write(lambda session: service.finish(session, analysis_id, token, message, now))
    return Ok(ok=True)
