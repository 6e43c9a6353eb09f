"""The network between workers, users and the server: a proxy that loses, delays, cuts and stops what passes, and notes it.

Each worker has a `Link` of its own. Requests and answers are read whole, so that an answer can be lost after the server
has committed, and a request can arrive long after its sender is gone. What passes is handed to a `Recorder`.
"""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
OPEN, DROP, REJECT, DEAF = "open", "drop", "reject", "deaf"
# open: all passes; drop: nothing does, without a word (what is under way may arrive later, or never); reject: every
# connection is reset; deaf: requests arrive, answers do not.


@dataclass(frozen=True)
class Call:
    """One request and its answer, as the network saw them. Times are of the monotonic clock."""

    link: str
    method: str
    path: str
    body: Any  # JSON, or None
    status: int
    code: str  # of an error
    answer: Any  # JSON, or None
    sent_at: float
    arrived_at: float
    answered_at: float
    lost: bool  # the sender did not get this answer

    @property
    def leased_job(self) -> str | None:
        """The job of a worker's call under a lease."""
        return self._under_lease()[0]

    @property
    def kind(self) -> str | None:
        """What a worker's call under a lease is: heartbeat, metrics, finish, …"""
        return self._under_lease()[1]

    def _under_lease(self) -> tuple[str, str] | tuple[None, None]:
        parts = urlsplit(self.path).path.split("/")
        return (parts[3], parts[4]) if len(parts) == 5 and parts[1:3] == ["worker", "jobs"] else (None, None)


Recorder = Callable[[Call], None]


@dataclass
class Faults:
    """What a link does to traffic; may be changed at any time. Shares are probabilities per call."""

    mode: str = OPEN
    lose_answers: float = 0.0
    lose_requests: float = 0.0
    hold: float = 0.0  # a request is kept back for a while, then delivered whoever still waits
    hold_seconds: tuple[float, float] = (0.5, 6.0)
    latency_seconds: float = 0.0  # each way


@dataclass
class _Message:
    head: bytes
    body: bytes
    first: str  # line
    headers: dict[str, str] = field(default_factory=dict)


class Network:
    """An event loop in a thread, with all links of one world."""

    def __init__(self, server_ports: list[int], record: Recorder, *, seed: int) -> None:
        self.server_ports = server_ports  # of several a call takes any that answers, as behind a balancer
        self.record = record
        self.random = random.Random(f"network {seed}")
        self.links: list[Link] = []
        self.num_lost_answers = 0
        self.num_held = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def link(self, name: str) -> "Link":
        """A new way to the server; give its port to whoever shall use it."""
        link = Link(self, name)
        self.links.append(link)
        self.run(link.open())
        return link

    def run(self, awaitable: Awaitable[T]) -> T:
        """Run something in the network's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(30)  # type: ignore[arg-type]

    def refuse(self) -> None:
        """Nothing listens any more: as where the server's own machine refuses, because the server is gone."""
        for link in self.links:
            self.run(link.shut())

    def listen(self) -> None:
        """Listen again on every link."""
        for link in self.links:
            self.run(link.open())

    def heal(self) -> None:
        """No more faults."""
        for link in self.links:
            link.faults = Faults()

    def close(self) -> None:
        """End of the world."""
        self.refuse()
        self.run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Link:
    """One way to the server."""

    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self.port = 0
        self.faults = Faults()
        self._network = network
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself does not keep them alive

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, limit=2**26, reuse_address=True
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Stop listening, and break every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def reset(self) -> None:
        """Break every connection, as a router that was switched off and on."""
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        self._keep(asyncio.current_task())
        upstream: _Upstream | None = None
        try:
            if self.faults.mode == REJECT:
                return
            upstream = _Upstream(self._network)
            while (request := await _read(reader)) is not None:
                if not await self._pass(request, writer, upstream):
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            return  # cancelled: the world ends
        finally:
            self._open.discard(writer)
            if upstream is not None:
                upstream.close()
            writer.transport.abort()

    def _keep(self, task: "asyncio.Task[Any] | None") -> None:
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, request: _Message, writer: asyncio.StreamWriter, upstream: "_Upstream") -> bool:
        """Carry one request to the server and its answer back. False: the connection is over."""
        sent_at = time.monotonic()
        faults, dice = self.faults, self._network.random
        if faults.mode == REJECT or dice.random() < faults.lose_requests:
            return False
        if dice.random() < faults.hold:
            # Its sender may give up and go; the request arrives all the same.
            late = asyncio.create_task(
                self._deliver_late(request, sent_at, dice.uniform(*faults.hold_seconds))
            )
            self._keep(late)
            return False
        while self.faults.mode == DROP:
            await asyncio.sleep(0.02)
            if self.faults.mode != DROP and dice.random() < 0.5:
                return False
        await asyncio.sleep(faults.latency_seconds)
        arrived_at = time.monotonic()
        answer = await upstream.ask(request)
        lost = answer is not None and (self.faults.mode == DEAF or dice.random() < self.faults.lose_answers)
        self._note(request, answer, sent_at, arrived_at, lost=lost)
        if answer is None:
            return False
        if lost:
            self._network.num_lost_answers += 1
            while self.faults.mode == DEAF:
                await asyncio.sleep(0.02)
            return False
        await asyncio.sleep(faults.latency_seconds)
        writer.write(answer.head + answer.body)
        await writer.drain()
        return True

    async def _deliver_late(self, request: _Message, sent_at: float, seconds: float) -> None:
        self._network.num_held += 1
        upstream = _Upstream(self._network)
        try:
            await asyncio.sleep(seconds)
            arrived_at = time.monotonic()
            answer = await upstream.ask(request)
            self._note(request, answer, sent_at, arrived_at, lost=True)
        finally:
            upstream.close()

    def _note(
        self, request: _Message, answer: _Message | None, sent_at: float, arrived_at: float, *, lost: bool
    ) -> None:
        if answer is None:
            return
        method, path, _ = request.first.split(" ", 2)
        told = _json(answer)
        error = told.get("error") if isinstance(told, dict) else None
        self._network.record(
            Call(
                link=self.name,
                method=method,
                path=path,
                body=_json(request),
                status=int(answer.first.split(" ", 2)[1]),
                code=str(error.get("code", "")) if isinstance(error, dict) else "",
                answer=told,
                sent_at=sent_at,
                arrived_at=arrived_at,
                answered_at=time.monotonic(),
                lost=lost,
            )
        )


class _Upstream:
    """A connection to the server, made when it is needed."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: _Message) -> _Message | None:
        """The server's answer; None if there was none."""
        try:
            if self._streams is None:
                self._streams = await self._connect()
            reader, writer = self._streams
            writer.write(request.head + request.body)
            await writer.drain()
            return await _read(reader)
        except (OSError, asyncio.IncompleteReadError):
            return None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ports = list(self._network.server_ports)
        self._network.random.shuffle(ports)
        for port in ports[:-1]:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        return await asyncio.open_connection("127.0.0.1", ports[-1], limit=2**26)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()


async def _read(reader: asyncio.StreamReader) -> _Message | None:
    """One whole message; None where the connection ended before it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while True:
            size_line = await reader.readuntil(b"\r\n")
            rest = await reader.readexactly(int(size_line.split(b";")[0], 16) + 2)
            body += size_line + rest
            if size_line.strip() == b"0":
                break
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return _Message(head, body, first, headers)


def _json(message: _Message) -> Any:  # of any shape
    if "json" not in message.headers.get("content-type", "") or not message.body:
        return None
    with contextlib.suppress(ValueError):
        return json.loads(message.body)
    return None
