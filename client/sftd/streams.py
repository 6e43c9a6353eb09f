"""Server-sent events: bytes to events, and following one across lost connections."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from sftd._transport import Transport, backoff_seconds
from sftd.errors import ApiError, SftdError, may_pass
from sftd.schemas import Event, LogLine

T = TypeVar("T", Event, LogLine)

SILENCE_SECONDS = 60.0  # the server sends a comment more often than this


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a stream. `id` is where to go on after it."""

    id: str | None
    name: str
    data: str


def read_events(pieces: Iterator[bytes]) -> Iterator[ServerSentEvent]:
    """Events of a `text/event-stream` body. An event that was cut off is not one."""
    event_id: str | None = None
    name, data = "message", list[str]()
    for line in _lines(pieces):
        if not line:
            if data:
                yield ServerSentEvent(event_id, name, "\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\x00" not in value:
            event_id = value


def follow(
    transport: Transport, path: str, kind: type[T], *, after: int, pause: Callable[[float], object]
) -> Iterator[T]:
    """Items of a stream, each once and in order, across lost connections, until the server says that it is over."""
    num_failures = 0
    while True:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        at_least = 0.0
        try:
            with transport.stream(path, headers=headers, silence_seconds=SILENCE_SECONDS) as pieces:
                for event in read_events(pieces):
                    num_failures = 0
                    if event.name == "end":
                        return
                    item = _item(event, kind)
                    if item is not None and item.id > after:
                        after = item.id
                        yield item
        except SftdError as error:
            if not may_pass(error):
                raise
            if isinstance(error, ApiError):
                at_least = error.retry_after_seconds or 0.0
        # Also a stream that simply ended was cut short: the server is being restarted.
        pause(max(at_least, backoff_seconds(num_failures, first=0.2, most=10.0)))
        num_failures += 1


def _item(event: ServerSentEvent, kind: type[T]) -> T | None:
    try:
        return kind.model_validate_json(event.data)
    except ValidationError:
        return None  # a newer server may send events of other kinds on the same stream


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """Lines by \\n or \\r\\n only: str.splitlines would also break at U+2028, which may stand in a log line."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", errors="replace")
