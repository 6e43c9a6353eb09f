"""OpenAI's fine-tuning jobs: `client.fine_tuning.jobs` of the openai package. Each route translates, and calls what the own
surface calls."""

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from sqlmodel import Session

from sftd.spec import JobSpec
from sftd_server.auth import Caller, CallerDep
from sftd_server.errors import Invalid, error_responses
from sftd_server.files import rowcount
from sftd_server.jobs import posting, queries, service, submission
from sftd_server.jobs.queries import JobFilter
from sftd_server.jobs.router import IdempotencyKey, JobId, metadata_filters
from sftd_server.openai import answers
from sftd_server.openai.answers import FineTuningCheckpoint, FineTuningEvent, FineTuningJob
from sftd_server.openai.lists import OpenAIList
from sftd_server.openai.translation import MAX_SUFFIX, SPEC_FIELDS, needs_rows, translate
from sftd_server.server import Server, ServerDep
from sftd_server.strict_json import read_json

After = Annotated[str | None, Query(max_length=128, description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many.")]
RetryCount = Annotated[
    str | None,
    Header(
        alias="x-stainless-retry-count",
        max_length=64,
        description="Sent by OpenAI's clients: above 0 the same call was made before, and its job is the answer.",
    ),
]
_NO_METADATA = ("null", "")  # as a literal query, and as clients write null

_HYPERPARAMETERS: dict[str, Any] = {  # OpenAPI: open by nature
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "n_epochs": {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]},
        "batch_size": {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]},
        "learning_rate_multiplier": {"anyOf": [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}]},
    },
}
_METHOD = {
    "description": "OpenAI's object, or full, lora or qlora.",
    "anyOf": [
        {"type": "string", "enum": ["full", "lora", "qlora"]},
        {
            "type": "object",
            "required": ["type"],
            "additionalProperties": False,
            "properties": {
                "type": {"const": "supervised"},
                "supervised": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"hyperparameters": _HYPERPARAMETERS},
                },
            },
        },
    ],
}
_INTEGRATIONS = {
    "type": "array",
    "maxItems": 1,
    "items": {
        "type": "object",
        "required": ["type", "wandb"],
        "additionalProperties": False,
        "properties": {
            "type": {"const": "wandb"},
            "wandb": {"$ref": "#/components/schemas/WandbSpec"},
        },
    },
}


def _body() -> dict[str, Any]:  # OpenAPI: open by nature
    """OpenAI's fields, and beside them those of our spec."""
    spec = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    properties: dict[str, Any] = {name: spec[name] for name in SPEC_FIELDS}
    properties |= {
        "model": {
            "type": "string",
            "minLength": 1,
            "maxLength": 1024,
            "description": "A base model, or one that was made here: `ft:…`.",
        },
        "hyperparameters": _HYPERPARAMETERS,
        "method": _METHOD,
        "suffix": {"type": "string", "minLength": 1, "maxLength": MAX_SUFFIX},
        "integrations": _INTEGRATIONS,
    }
    schema = {
        "type": "object",
        "required": ["model", "training_file"],
        "additionalProperties": False,
        "properties": properties,
    }
    example = {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "training_file": "file_0123456789ab",
        "suffix": "q",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        "metadata": {"team": "q"},
    }
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


_METADATA_PARAMETER: dict[str, Any] = {  # OpenAPI: open by nature
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "description": "Jobs with this metadata: `metadata[team]=q`, several times for all of several. "
            "`metadata=null`: jobs without any.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["openai"], responses=error_responses(404))


@router.post("", openapi_extra=_body(), responses=error_responses(413))
async def create(
    request: Request,
    server: ServerDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = None,
) -> FineTuningJob:
    """Post a fine-tuning job. `auto`, and what is left out, is resolved by the rules of docs/openai.md; the answer has the
    numbers. Fields of the own surface's job spec may stand beside OpenAI's (`extra_body` of the openai package).

    A client's own retry of the same call brings the same job, and so does the same `Idempotency-Key` for 24 hours.
    """
    one = service.Try(is_retry=_is_retry(retry_count), arrived_at=server.clock.now())
    body = read_json(await request.body())
    if not isinstance(body, dict):
        raise Invalid("body: must be a JSON object, the job", code="invalid_spec", param="body")
    suffix = body.get("suffix")
    call = posting.Post(
        body, idempotency_key, one_of_tries=one, suffix=suffix if isinstance(suffix, str) else None
    )

    async def check() -> posting.Checked:
        num_rows, sources = await _num_rows(server, body), posting.sources(server)
        return await server.db.read(lambda session: _check(session, body, num_rows, sources))

    try:
        job_id = await posting.post(server, caller, call, check)
    except Invalid as error:
        raise _in_their_names(error) from None
    return await _job(server, job_id)


@router.get("", openapi_extra=_METADATA_PARAMETER)
async def list_jobs(
    request: Request, server: ServerDep, after: After = None, limit: Limit = 20
) -> OpenAIList[FineTuningJob]:
    """Jobs, newest first."""
    without = any(value in _NO_METADATA for value in request.query_params.getlist("metadata"))
    wanted = JobFilter(states=[], owner=None, metadata=metadata_filters(request), without_metadata=without)
    context = queries.Context(server.settings, server.clock.now())
    return await server.db.read(
        lambda session: answers.jobs(session, wanted, context, after=after, limit=limit)
    )


@router.get("/{job_id}")
async def retrieve(job_id: JobId, server: ServerDep) -> FineTuningJob:
    """One job as it stands."""
    return await _job(server, job_id)


@router.post("/{job_id}/cancel", responses=error_responses(404, 409))
async def cancel(job_id: JobId, server: ServerDep, caller: CallerDep) -> FineTuningJob:
    """End a job for good. What it has saved is kept. May be repeated."""
    return await _steer(server, service.cancel, job_id, caller)


@router.post("/{job_id}/pause", responses=error_responses(404, 409))
async def pause(job_id: JobId, server: ServerDep, caller: CallerDep) -> FineTuningJob:
    """Put a job aside: a running one saves a checkpoint first. May be repeated."""
    return await _steer(server, service.pause, job_id, caller)


@router.post("/{job_id}/resume", responses=error_responses(404, 409))
async def resume(job_id: JobId, server: ServerDep, caller: CallerDep) -> FineTuningJob:
    """Queue a paused job again; it goes on from its newest checkpoint. May be repeated."""
    return await _steer(server, service.resume, job_id, caller)


@router.get("/{job_id}/events")
async def list_events(
    job_id: JobId, server: ServerDep, after: After = None, limit: Limit = 20
) -> OpenAIList[FineTuningEvent]:
    """What happened to the job, newest first."""
    return await server.db.read(lambda session: answers.events(session, job_id, after=after, limit=limit))


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: JobId, server: ServerDep, after: After = None, limit: Limit = 10
) -> OpenAIList[FineTuningCheckpoint]:
    """Whole checkpoints, newest first, each with what was measured last before it."""
    return await server.db.read(
        lambda session: answers.checkpoints(session, job_id, after=after, limit=limit)
    )


Steering = Callable[[Session, str, Caller, datetime], None]


async def _job(server: Server, job_id: str) -> FineTuningJob:
    context = queries.Context(server.settings, server.clock.now())
    return await server.db.read(functools.partial(answers.job, job_id=job_id, context=context))


async def _steer(server: Server, act: Steering, job_id: str, caller: Caller) -> FineTuningJob:
    await server.db.write(lambda session: act(session, job_id, caller, server.clock.now()))
    return await _job(server, job_id)


async def _num_rows(server: Server, body: dict[str, Any]) -> int | None:  # JSON as posted
    """Rows of the training file, where they decide on anything."""
    file_id = body.get("training_file")
    if not isinstance(file_id, str) or not needs_rows(body):
        return None
    return await rowcount.num_rows(server, file_id)


def _check(
    session: Session, body: dict[str, Any], num_rows: int | None, sources: submission.Sources
) -> posting.Checked:  # body: JSON as posted
    """The spec that a body asks for. Raises Invalid with every mistake, in the names that its user wrote."""
    to = translate(session, body, num_rows)
    try:
        spec, inputs = submission.check(session, to.spec, sources)
    except Invalid as error:
        raise Invalid.of(to.with_mistakes_of_spec(error.mistakes), code="invalid_spec") from None
    if to.mistakes:
        raise Invalid.of(to.mistakes, code="invalid_spec")
    return spec, inputs, None


def _in_their_names(error: Invalid) -> Invalid:
    """A base that has gone while the job was written is told as the model that it is called here."""
    if error.param != "base_model" or error.mistakes:
        return error
    message = error.message.replace("base_model", "model")
    return Invalid(message, code=error.code, param="model")


def _is_retry(retry_count: str | None) -> bool:
    return retry_count is not None and re.fullmatch(r"0*[1-9][0-9]{0,6}", retry_count) is not None
