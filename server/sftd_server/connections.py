"""Connections: how many, how long they may say nothing, and which one goes when there are too many.

Uvicorn gives a connection that never finishes a request's head all the time in the world, so a thousand of them would
take every file descriptor. Here a head must be whole in time, and where an address (or everybody together) has too many
connections, the one that has been idle longest makes room. One that is being answered never has to: a heartbeat, a long
poll or a stream is not cut off by strangers.
"""

import asyncio
import logging
import resource
import time
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sftd_server.throttle import is_within, networks

_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_REFUSAL_BODY = (
    b'{"error":{"message":"There are too many open connections; try again.","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
BACKLOG = 256  # asyncio takes in so many at once, before any of them can be turned away
_SPARE_FILES = (
    3 * BACKLOG + 256
)  # descriptors kept for those, the database, files that are sent, and the rest
_SAY_SECONDS = 60.0  # at most one log line in this time

log = logging.getLogger("sftd.server")


class Connections:
    """All open connections of this process, by address."""

    def __init__(
        self, *, most: int, most_per_address: int, head_seconds: float, trusted_proxies: Sequence[str] = ()
    ) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self.head_seconds = head_seconds
        self._proxies = networks(trusted_proxies)  # many people come by one of these
        self.num_open = 0
        self._by_address: dict[str, dict[GuardedProtocol, None]] = {}  # each: idle longest first
        self._said_at = -_SAY_SECONDS

    def add(self, connection: "GuardedProtocol") -> bool:
        """Take a connection in; False where there is no room for it."""
        address = connection.address
        many = len(self._by_address.get(address, ())) >= self.most_per_address
        if many and not is_within(address, self._proxies):
            room = self._make_room(address)
        elif self.num_open >= self.most:
            room = self._make_room(max(self._by_address, key=lambda one: len(self._by_address[one])))
        else:
            room = True
        if room:
            self._by_address.setdefault(address, {})[connection] = None
            self.num_open += 1
        return room

    def remove(self, connection: "GuardedProtocol") -> None:
        """A connection is gone. Safe to call twice."""
        own = self._by_address.get(connection.address, {})
        if connection in own:
            del own[connection]
            self.num_open -= 1
        if not own:
            self._by_address.pop(connection.address, None)

    def rested(self, connection: "GuardedProtocol") -> None:
        """A connection has become idle: it stands at the end of the line now."""
        own = self._by_address.get(connection.address, {})
        if connection in own:
            del own[connection]
            own[connection] = None

    def _make_room(self, address: str) -> bool:
        among = self._by_address[address]
        idle = next((connection for connection in among if not connection.busy), None)
        now = time.monotonic()
        if now - self._said_at >= _SAY_SECONDS:
            self._said_at = now
            log.warning("there are %d open connections, %d of them of %s", self.num_open, len(among), address)
        if idle is None:
            return False
        self.remove(idle)
        idle.transport.abort()
        return True


class GuardedProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, under the eyes of `Connections`."""

    guard: Connections  # set by `protocol_for`

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # as uvicorn gives them
        super().__init__(*args, **kwargs)
        self.address = ""
        self._head_timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """A whole request has come and is not answered to its end."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if self.guard.add(self):
            self._await_head()
        else:
            transport.write(_REFUSAL % (len(_REFUSAL_BODY), _REFUSAL_BODY))
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.busy:
            self._unset_head_timer()
        elif self._head_timer is None:
            self._await_head()

    def on_response_complete(self) -> None:
        self.guard.rested(self)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_head_timer()
        self.guard.remove(self)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.guard.head_seconds, self._give_up)

    def _unset_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.busy and self.timeout_keep_alive_task is None:
            self.transport.abort()


def protocol_for(connections: Connections) -> type[GuardedProtocol]:
    """What uvicorn's setting `http` takes."""
    return type("Protocol", (GuardedProtocol,), {"guard": connections})


def allow_files(num_connections: int) -> int:
    """Let this process have as many open files as so many connections take; how many connections it can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return (
        num_connections
        if soft == resource.RLIM_INFINITY
        else max(1, min(num_connections, soft - _SPARE_FILES))
    )
