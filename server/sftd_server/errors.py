"""What the server answers when something is wrong: one tree of classes, one shape.

Every error, from a validation mistake to an unknown path, is `{"error": {"message", "type", "param", "code"}}`.
Raise the narrowest class; the message says what happened, with the values, then what to do about it. Under /v1
`error_answer` gives it the statuses and types that OpenAI's clients know: nothing else need think of that.
"""

import errno
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from sftd.schemas import ErrorAnswer, ErrorBody
from sftd_server.engines import Failure, failure
from sftd_server.mistakes import Mistake, mistakes_of

ERROR_MEANINGS = {
    400: "The request can not be understood.",
    401: "No key, a wrong key or an expired one.",
    403: "The key's role does not allow this, or the request was sent by another site's page.",
    404: "No such thing.",
    408: "The body did not arrive.",
    409: "The thing is in the wrong state for this.",
    413: "Larger than the limit.",
    415: "A kind of content that is not taken.",
    416: "The batch does not begin where the stream ends; X-Expected-Seq says where to go on.",
    422: "The request is malformed; the message lists every mistake.",
    426: "The worker speaks a version of the protocol that this server does not serve.",
    429: "A limit of the key is reached; or too many wrong keys came from this address, and Retry-After says how long to wait.",
    500: "Our fault; the server's log has the request id.",
    503: "Not now; try again.",
    507: "The disk is full; reading goes on.",
}
_EXAMPLES = {
    401: {
        "error": {
            "message": "The key is not known here.",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_key",
        }
    },
    422: {
        "error": {
            "message": "learnin_rate: unknown field; did you mean learning_rate?",
            "type": "invalid_request",
            "param": "learnin_rate",
            "code": "invalid_spec",
        }
    },
}


OPENAI = "/v1"  # where OpenAI's surface stands
_OPENAI_TYPES = dict.fromkeys(("invalid_request", "not_found", "too_large"), "invalid_request_error")


class ApiError(HTTPException):
    """Base of all expected errors. It is an HTTPException so that FastAPI lets it pass while it reads a body."""

    status = 500
    kind = "server_error"
    may_pass = False  # the same call may succeed soon, so that a client may try again by itself

    def __init__(
        self, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(self.status, detail=message, headers=headers)
        self.message = message
        self.code = code
        self.param = param


class Unauthorized(ApiError):
    """401: no key, a wrong one, or an expired one."""

    status = 401
    kind = "authentication_error"


class Forbidden(ApiError):
    """403: the key is good, but not for this."""

    status = 403
    kind = "permission_error"


class NotFound(ApiError):
    """404: no such thing."""

    status = 404
    kind = "not_found"


class RequestTimeout(ApiError):
    """408: the body did not arrive."""

    status = 408
    kind = "invalid_request"
    may_pass = True


class Conflict(ApiError):
    """409: the thing is in the wrong state for this."""

    status = 409
    kind = "conflict"

    def __init__(
        self, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code, param=param, headers=headers)
        self.may_pass = code in ("changed_meanwhile", "job_stopping")  # it will be over soon


class TooLarge(ApiError):
    """413: larger than a limit."""

    status = 413
    kind = "too_large"


class UnsupportedMedia(ApiError):
    """415: a kind of content that is not taken."""

    status = 415
    kind = "invalid_request"


class SequenceGap(ApiError):
    """416: a batch does not begin where its stream ends. The header X-Expected-Seq says where to go on."""

    status = 416
    kind = "sequence_gap"

    def __init__(self, message: str, *, expected: int) -> None:
        super().__init__(message, code="sequence_gap", param="seq", headers={"x-expected-seq": str(expected)})


class Invalid(ApiError):
    """422: the request is malformed. The message lists every mistake, one a line."""

    status = 422
    kind = "invalid_request"
    mistakes: Sequence[Mistake] = ()  # one by one, where there may be several

    @classmethod
    def of(cls, mistakes: list[Mistake], *, code: str = "invalid_request") -> "Invalid":
        error = cls("\n".join(map(str, mistakes)), code=code, param=mistakes[0].field)
        error.mistakes = mistakes
        return error


class UpgradeRequired(ApiError):
    """426: the caller speaks another version of the worker protocol than this server serves."""

    status = 426
    kind = "invalid_request"

    def __init__(self, message: str, *, code: str, protocol: int) -> None:
        headers = {"upgrade": f"sftd-worker/{protocol}"}
        super().__init__(message, code=code, param="protocol", headers=headers)


class TooManyFailures(ApiError):
    """429: too many wrong keys came from this address."""

    status = 429
    kind = "authentication_error"

    def __init__(self, seconds: float) -> None:
        wait = max(1, math.ceil(seconds))
        super().__init__(
            f"Too many wrong keys came from your address; try again in {wait} s. A good key works meanwhile.",
            code="too_many_failures",
            headers={"retry-after": str(wait)},
        )


class LimitReached(ApiError):
    """429: a limit of the caller's key. Waiting a moment would not help, so clients are told not to try again."""

    status = 429
    kind = "limit_error"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, code="limit_reached", param=param, headers={"x-should-retry": "false"})


class Unavailable(ApiError):
    """503: not now; try again."""

    status = 503
    kind = "server_error"
    may_pass = True

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code, headers={"retry-after": "1"})


class DiskFull(ApiError):
    """507: there is no room. Nothing that was acknowledged is lost; reading goes on."""

    status = 507
    kind = "server_error"
    may_pass = True

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message or "The server's disk is full; its owner frees space, then try again.",
            code="disk_full",
            headers={"retry-after": "3"},
        )


def is_database_busy(error: Exception) -> bool:
    """Whether other processes held what the database needed for longer than we wait."""
    return failure(error) in (Failure.BUSY, Failure.OVERTAKEN)


def is_database_away(error: Exception) -> bool:
    """Whether the database could not be reached, or broke off."""
    return failure(error) is Failure.AWAY


def is_disk_full(error: Exception) -> bool:
    """Whether there was no room, in the words of the database or of the system."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return failure(error) is Failure.FULL


def is_openai(path: str) -> bool:
    """Whether a path belongs to OpenAI's surface."""
    return path == OPENAI or path.startswith(f"{OPENAI}/")


def error_answer(error: ApiError, path: str) -> JSONResponse:
    """The one shape. OpenAI's clients know a malformed request as a 400, and are told what they need not try again."""
    status, kind, headers = error.status, error.kind, dict(error.headers or {})
    if is_openai(path):
        status = 400 if status == 422 else status
        kind = _OPENAI_TYPES.get(kind, kind)
        headers["x-should-retry"] = "true" if error.may_pass else "false"
    body = ErrorBody(message=error.message, type=kind, param=error.param, code=error.code)
    return JSONResponse(ErrorAnswer(error=body).model_dump(), status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error that can leave the app the one shape."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_answer(error, request.url.path)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return error_answer(_translated(request, error), request.url.path)

    async def on_invalid_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        invalid = Invalid.of(mistakes_of(error.errors(), _body_model(request)))
        return error_answer(invalid, request.url.path)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(StarletteHTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)


def error_responses(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The errors of a route, for its documentation. Those that any route can answer with are added by `docs`."""
    return {
        status: {
            "model": ErrorAnswer,
            "description": ERROR_MEANINGS[status],
            "content": {"application/json": {"example": _EXAMPLES.get(status)}}
            if status in _EXAMPLES
            else {},
        }
        for status in sorted({401, 403, 422, *statuses})
    }


def _translated(request: Request, error: StarletteHTTPException) -> ApiError:
    """An error of the framework, as one of ours."""
    answer: ApiError
    path, method = json.dumps(request.url.path), request.method
    if error.status_code == 404:
        answer = NotFound(f"There is no {path} here; GET /docs lists the routes.", code="unknown_route")
    elif error.status_code == 405:
        allowed = ", ".join(_methods(request)) or (error.headers or {}).get("Allow", "another method")
        answer = ApiError(
            f"{method} is not possible on {path}; use {allowed}.",
            code="method_not_allowed",
            headers={"allow": allowed},
        )
        answer.kind = "invalid_request"
    else:
        answer = ApiError(str(error.detail), code="bad_request" if error.status_code < 500 else "internal")
        answer.kind = "invalid_request" if error.status_code < 500 else "server_error"
    answer.status = answer.status_code = error.status_code
    return answer


def _methods(request: Request) -> list[str]:
    """The methods that a path has: `/keys/me` has its own, not those of `/keys/{key_id}` as well."""
    path = request.url.path
    found: dict[str, set[str]] = {}
    for route in _flat(request.app.routes):
        pattern = getattr(route, "path_regex", None)
        if pattern is not None and pattern.match(path):
            found.setdefault(route.path, set()).update(route.methods or ())
    return sorted(found.get(path) or set().union(*found.values()))


def _flat(
    routes: Iterable[Any],
) -> Iterator[Any]:  # Starlette's routes, FastAPI's, and routers that hold more
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from _flat(router.routes)


def _body_model(request: Request) -> type[BaseModel] | None:
    """The model of the route's body, which knows the names of its fields."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = field.field_info.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
