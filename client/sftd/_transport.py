"""HTTP: build, send, retry, raise. The only file that imports httpx.

What may be sent again, and when, is decided in `_pause_before_retry`; what an answer means is decided in `_error_of`.
The client and the worker both speak through a `Transport`; it is safe to use from several threads.
"""

import errno
import math
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from sftd import __version__
from sftd.errors import (
    NOT_OURS,
    ApiError,
    ConfigurationError,
    ConnectionFailed,
    SequenceGap,
    SftdError,
    error_class,
    may_pass,
)
from sftd.schemas import ErrorAnswer

T = TypeVar("T")
Param = str | int | float | Sequence[str] | None  # several: the name is repeated
Params = Mapping[str, Param]
Body = BaseModel | Mapping[str, Any]  # a message, or a job spec that the server validates

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 1.0
MAX_RETRY_AFTER_SECONDS = 60.0
_NO_WAY = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH}  # no IPv6 here, for one
_YES_OR_NO = {"true": True, "false": False}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Reply:
    """A successful answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def parse(self, kind: type[T]) -> T:
        """The body as `kind`. A body that is not one comes from something else than our server."""
        try:
            return TypeAdapter(kind).validate_json(self.content)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the body"
            raise ConnectionFailed(
                f"The answer is not what an sftd server sends ({where}: {error.errors()[0]['msg']}); check the address."
            ) from error


class Transport:
    """Calls to one server with one key."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_seconds: float = 30.0,
        max_retries: int = 2,
        pause: Callable[[float], object] = time.sleep,
        wire: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = _checked_url(url)
        self._max_retries = max_retries
        self._pause = pause
        headers = {"User-Agent": f"sftd/{__version__}", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {_checked_key(key)}"
        self._timeout_seconds = timeout_seconds
        # A proxy from the environment cannot reach this machine's own loopback address.
        trust_env = urlsplit(self.url).hostname not in _LOOPBACK
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=_timeouts(timeout_seconds),
            trust_env=trust_env,
            transport=wire,
        )

    def close(self) -> None:
        self._http.close()

    def nothing_listens(self) -> bool:
        """Do all of the server's addresses refuse a connection? Asked directly: a proxy or one of several addresses
        may refuse while the server lives."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        answers = [_refuses(family, address) for family, _, _, _, address in found]
        return True in answers and False not in answers

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
    ) -> Reply:
        """Send a call and return its answer; raise an SftdError otherwise."""
        sent = dict(headers or {})
        content = None
        if body is not None:
            content = _json(body)
            sent["Content-Type"] = "application/json"

        def send() -> httpx.Response:
            return self._http.request(
                method,
                path,
                params=_without_none(params),
                content=content,
                headers=sent,
                timeout=_timeouts(timeout_seconds or self._timeout_seconds),
            )

        return self._with_retries(send, self._max_retries if max_retries is None else max_retries)

    def upload(
        self, path: str, *, file: BinaryIO, filename: str, fields: Mapping[str, str], timeout_seconds: float
    ) -> Reply:
        """Send a file as multipart form data, streamed from disk."""

        def send() -> httpx.Response:
            file.seek(0)
            files = {"file": (filename, file, "application/octet-stream")}
            return self._http.post(path, files=files, data=dict(fields), timeout=_timeouts(timeout_seconds))

        return self._with_retries(send, self._max_retries)

    def put_piece(
        self,
        path: str,
        piece: bytes,
        *,
        params: Params,
        headers: Mapping[str, str],
        timeout_seconds: float,
    ) -> Reply:
        """Send a piece of something large. Not retried; 308 is an answer here: so far, go on."""

        def send() -> httpx.Response:
            return self._http.put(
                path,
                params=_without_none(params),
                content=piece,
                headers={**headers, "Content-Type": "application/octet-stream"},
                timeout=_timeouts(timeout_seconds),
            )

        return self._once(send, goes_on=308)

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        params: Params | None = None,
        headers: Mapping[str, str] | None = None,
        silence_seconds: float = 60.0,
    ) -> Iterator[Iterator[bytes]]:
        """Open a GET and hand out its body in pieces as they come. Not retried: the caller knows where to go on."""
        try:
            with self._http.stream(
                "GET",
                path,
                params=_without_none(params),
                headers=dict(headers or {}),
                timeout=_timeouts(silence_seconds),
            ) as response:
                if not response.is_success:
                    response.read()
                    raise _error_of(response)
                yield response.iter_bytes()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _connection_failed(error, self.url) from error

    def _with_retries(self, send: Callable[[], httpx.Response], max_retries: int) -> Reply:
        for num_failures in range(max_retries + 1):
            try:
                return self._once(send)
            except SftdError as error:
                pause = _pause_before_retry(error, num_failures)
                if pause is None or num_failures == max_retries:
                    raise
            self._pause(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, send: Callable[[], httpx.Response], *, goes_on: int | None = None) -> Reply:
        try:
            response = send()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _connection_failed(error, self.url) from error
        if not response.is_success and response.status_code != goes_on:
            raise _error_of(response)
        return Reply(response.status_code, response.headers, response.content)


def backoff_seconds(num_failures: int, *, first: float, most: float) -> float:
    """Full jitter: anywhere between zero and a bound that doubles with each failure."""
    return random.uniform(0, min(most, first * 2 ** min(num_failures, 30)))


def _pause_before_retry(error: SftdError, num_failures: int) -> float | None:
    """Seconds to wait before the call is sent again, or None: it must not be. Other 4xx would fail again."""
    if not may_pass(error):
        return None
    if isinstance(error, ApiError) and error.retry_after_seconds is not None:
        return error.retry_after_seconds
    return backoff_seconds(num_failures, first=0.5, most=8.0)


def _error_of(response: httpx.Response) -> SftdError:
    """The exception that an unsuccessful answer stands for."""
    if response.status_code < 400:
        target = response.headers.get("location", "another address")
        return ConnectionFailed(f"The server answered with a redirect to {target}; use that address.")
    try:
        body = ErrorAnswer.model_validate_json(response.content).error
        message, code, param = body.message, body.code, body.param
    except ValidationError:  # a proxy's page, most likely
        message, code, param = f"The server answered {response.status_code}.", NOT_OURS, None
    error = error_class(response.status_code)(
        message,
        status=response.status_code,
        code=code,
        param=param,
        request_id=response.headers.get("x-request-id"),
        retry_after_seconds=_retry_after(response.headers),
        should_retry=_YES_OR_NO.get(response.headers.get("x-should-retry", "").strip().lower()),
    )
    if isinstance(error, SequenceGap):
        error.expected = int(_number(response.headers.get("x-expected-seq")) or 0)
    return error


def _connection_failed(error: Exception, url: str) -> ConnectionFailed:
    refused = False
    cause: BaseException | None = error
    while cause is not None and not refused:
        refused = isinstance(cause, ConnectionRefusedError)
        cause = cause.__cause__ or cause.__context__
    if refused:
        return ConnectionFailed(
            f"Nothing listens at {url}; start the server, or check the address.", refused=True
        )
    if isinstance(error, httpx.TimeoutException):
        return ConnectionFailed(f"{url} did not answer in time ({type(error).__name__}).")
    return ConnectionFailed(
        f"The connection to {url} failed: {str(error).rstrip('.') or type(error).__name__}."
    )


def _json(body: Body) -> bytes:
    if isinstance(body, BaseModel):
        return body.model_dump_json().encode()
    return TypeAdapter(dict[str, Any]).dump_json(dict(body))


def _without_none(params: Params | None) -> dict[str, str | int | float | Sequence[str]]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _timeouts(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After, a number or a date, within reason: a proxy may ask for hours."""
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is None and text:
        until = _date(text)
        # By the server's own clock, where it tells the time: this machine's may be wrong.
        now = _date(headers.get("date")) or datetime.now(UTC)
        seconds = max(0.0, (until - now).total_seconds()) if until else None
    return None if seconds is None else min(seconds, MAX_RETRY_AFTER_SECONDS)


def _date(text: str | None) -> datetime | None:
    """The time in a header: `Wed, 21 Oct 2026 07:28:00 GMT`."""
    try:
        at = parsedate_to_datetime(text or "")
    except (ValueError, IndexError, OverflowError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _number(text: str | None) -> float | None:
    """The number in a header."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None


def _refuses(family: int, address: Any) -> bool | None:  # address: as getaddrinfo gives it
    """Does nothing listen there? None where this machine has no way to the address at all."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(PROBE_SECONDS)
            probe.connect(address)
    except ConnectionRefusedError:
        return True
    except OSError as error:
        return None if error.errno in _NO_WAY else False
    return False


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"{url!r} is not an address of a server; write it as http://host:port.")
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "The address holds a user or a password, which would show in logs and reports; give the key apart."
        )
    return url.rstrip("/")


def _checked_key(key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "The key holds characters that no key has; copy it again, without line breaks."
        )
    return key
