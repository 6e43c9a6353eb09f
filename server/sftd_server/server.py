"""What lives as long as the server: settings, database, keys, and the wish to stop. Passed to everything."""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from sqlalchemy import text
from sqlmodel import Session

from sftd_server.artifacts.restore import Restorer
from sftd_server.artifacts.shelf import Shelf
from sftd_server.artifacts.store import open_store
from sftd_server.artifacts.uploads import Uploads
from sftd_server.audit import service as audit
from sftd_server.auth import Keyring
from sftd_server.ballast import DiskRoom
from sftd_server.clock import Clock, ClockWatch, DatabaseClock
from sftd_server.datafolder import DataFolder, FolderLock
from sftd_server.db import Database
from sftd_server.files.checks import Checks
from sftd_server.hosts import Hosts
from sftd_server.settings import Settings
from sftd_server.throttle import Throttle

T = TypeVar("T")
MAX_LOOK_SECONDS = 1.0  # a look at the clock that took longer says too little


class Server:
    """One server process: alone over its data folder, or one of several over a database that they share."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.folder = DataFolder(settings.data)
        self.db = Database(settings.database_url)
        self.clock = clock or (DatabaseClock() if self.db.shared else Clock())
        self.clock_watch = ClockWatch(self.clock)
        self.clock_change = asyncio.Lock()  # held while a jump of the clock is made good
        self.disk = DiskRoom(settings)
        self.db.make_room = self.disk.make_room
        audit.watch(self.db.engine)
        self.keyring = Keyring(self.db, self.clock)
        self.hosts = Hosts(settings.host, settings.allowed_hosts)
        self.throttle = Throttle(
            self.clock, limit=settings.max_wrong_keys, trusted_proxies=settings.trusted_proxies
        )
        self.secret = ""  # tokens of leases are derived from it
        self.installation_id = ""
        # Held while a blob and its row appear or go together.
        self.file_changes = FolderLock(self.folder.path / "locks" / "files.lock", shared=self.db.shared)
        self.checks = Checks(self.folder.path / "cache")
        self.store = open_store(settings)  # a copy of all files, such as in S3; None: there is none
        self.shelf = Shelf(settings.data, self.store)
        self.uploads = Uploads(self.folder, settings)
        self.restorer = Restorer(self.shelf, self.uploads)
        self._stopping = False
        self._background: set[asyncio.Task[None]] = set()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run on that no request waits for, such as deleting files."""
        # In a context of its own: what it writes later is not the request's.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def refused_means_down(self) -> bool:
        """Whether a refused connection shows a worker that nobody can hand its job on (docs/decisions/0007)."""
        return not self.db.shared

    async def set_clock(self) -> None:
        """Look at the database's clock again, where that is the one that counts."""
        if isinstance(self.clock, DatabaseClock):
            await self.db.read(functools.partial(_look_at_clock, clock=self.clock))

    def begin_stop(self) -> None:
        """Refuse new work and wake everybody who waits. Called in the event loop."""
        self._stopping = True
        self.db.wake_all()

    async def wait_for(
        self, topic: str, ask: Callable[[], Awaitable[T | None]], *, seconds: float
    ) -> T | None:
        """Ask until there is an answer: now, and again whenever the topic is touched; None when time is up."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        while True:
            signal = self.db.signal(topic)
            found = await ask()
            left = deadline - clock()
            if found is not None or left <= 0 or self._stopping:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await signal.wait()


def server_of(request: Request) -> Server:
    """The server that this request came to."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


ServerDep = Annotated[Server, Depends(server_of)]


def _look_at_clock(session: Session, clock: DatabaseClock) -> None:
    """In UTC, and taken for the middle of the look: off by half a round trip at most."""
    session.connection()
    before = clock.monotonic()
    wall = session.connection().execute(text("SELECT clock_timestamp() AT TIME ZONE 'UTC'")).scalar_one()
    after = clock.monotonic()
    if not clock.is_set or after - before < MAX_LOOK_SECONDS:
        clock.set(wall.replace(tzinfo=UTC), (before + after) / 2)
