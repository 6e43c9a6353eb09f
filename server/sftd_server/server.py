"""What lives as long as the server: settings, database, keys, and the wish to stop. Passed to everything."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from sftd_server.auth import Keyring
from sftd_server.ballast import DiskRoom
from sftd_server.clock import Clock
from sftd_server.datafolder import DataFolder
from sftd_server.db import Database
from sftd_server.settings import Settings

T = TypeVar("T")


class Server:
    """One server over one data folder."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self.folder = DataFolder(settings.data)
        self.db = Database(settings.database_url)
        self.disk = DiskRoom(settings)
        self.db.make_room = self.disk.make_room
        self.keyring = Keyring(self.db, clock)
        self.secret = ""  # tokens of leases are derived from it
        self.installation_id = ""
        self.file_changes = asyncio.Lock()  # held while a blob and its row appear or go together
        self._stopping = False
        self._background: set[asyncio.Task[None]] = set()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run on that no request waits for, such as deleting files."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @property
    def stopping(self) -> bool:
        return self._stopping

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
