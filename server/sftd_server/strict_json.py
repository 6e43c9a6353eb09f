"""JSON bodies, read strictly: what is accepted here can be stored, logged and sent back without surprises.

Refused are NaN and Infinity as bare words, duplicate keys, integers beyond 64 bits, halves of surrogate pairs, and
absurd depth or width. NUL, which PostgreSQL has no place for, is refused from users, and taken for U+FFFD from workers,
who send what a trainer printed. `StrictRoute` makes a router's bodies go through it.
"""

import json
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from sftd_server.errors import Invalid

MAX_INTEGER = 2**63 - 1
MAX_DEPTH = 100
MAX_KEYS = 10_000  # in one object
# In a whole body: a few megabytes of small lists would take seconds and hundreds of megabytes to read. The largest
# batch that a worker sends has some 30,000.
MAX_VALUES = 50_000
_CODE = "invalid_json"
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

Json = Any  # a JSON value: open by nature


def read_json(body: bytes, *, replace_nul: bool = False) -> Json:
    """The value of a JSON text. Raises Invalid, saying what is wrong and where."""
    num_opened = body.count(b"{") + body.count(b"[")
    if num_opened + body.count(b",") > MAX_VALUES and _has_too_many_values(body):
        raise Invalid(f"The body holds more than {MAX_VALUES:,} values.", code=_CODE)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise Invalid(f"The body is not UTF-8 (byte {error.start + 1}).", code=_CODE) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Invalid(f"The body is not JSON: {error.msg} ({where}).", code=_CODE) from None
    except RecursionError:
        raise Invalid("The body is nested too deeply.", code=_CODE) from None
    if num_opened > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in body:  # only an escape can bring in what UTF-8 cannot
        _check_texts(value, allow_nul=replace_nul)
        if replace_nul and b"\\u0000" in body:
            return _without_nul(value)
    return value


class StrictRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Json:
        return read_json(await self.body(), replace_nul=self.url.path.startswith("/worker/"))


class StrictRoute(APIRoute):
    """A route whose JSON body is read strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    if len(pairs) > MAX_KEYS:
        raise Invalid(f"An object of the body has more than {MAX_KEYS:,} keys.", code=_CODE)
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add returns None on purpose
        raise Invalid(f"The key {json.dumps(twice)[:80]} stands twice in one object; keep one.", code=_CODE)
    return found


def _no_constant(text: str) -> None:
    raise Invalid(f"{text} is not JSON; write a number.", code=_CODE)


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > MAX_INTEGER:
        raise Invalid(f"The integer {text[:24]}… is beyond 64 bits.", code=_CODE)
    return int(text)


def _has_too_many_values(body: bytes) -> bool:
    """Counted without what stands in strings, where looking costs little: log lines may hold nothing but commas."""
    if len(body) > 1024 * 1024:
        return True
    bare = _STRING.sub(b"", body)
    return bare.count(b"{") + bare.count(b"[") + bare.count(b",") > MAX_VALUES


def _check_depth(value: Json) -> None:
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [below for item in layer for below in _below(item) if type(below) in (dict, list)]
        if not layer:
            return
    raise Invalid(f"The body is nested more than {MAX_DEPTH} deep.", code=_CODE)


def _without_nul(value: Json) -> Json:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    return [_without_nul(item) for item in value] if isinstance(value, list) else value


def _check_texts(value: Json, *, allow_nul: bool) -> None:
    """Every string can be written as UTF-8."""
    if isinstance(value, str):
        _check_text(value, allow_nul=allow_nul)
    for item in _below(value):
        _check_texts(item, allow_nul=allow_nul)
    if isinstance(value, dict):
        for key in value:
            _check_text(key, allow_nul=allow_nul)


def _below(value: Json) -> Iterable[Json]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_text(text: str, *, allow_nul: bool) -> None:
    if text.isascii():
        if not allow_nul and "\x00" in text:
            raise Invalid("A string holds a NUL character (\\u0000); remove it.", code=_CODE)
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid(
            "A string holds half of a surrogate pair (\\ud800-\\udfff); write the whole character.",
            code=_CODE,
        ) from None
    if not allow_nul and "\x00" in text:
        raise Invalid("A string holds a NUL character (\\u0000); remove it.", code=_CODE)
