"""The database: one writer thread that commits in groups, and readers of their own.

`await db.write(fn)` puts `fn(session)` in a queue; the writer drains it, up to 256 items to a transaction, a savepoint
for each, one COMMIT (one fdatasync), and answers only then. An item that raises takes back its own work and no
other's. `await db.read(fn)` sees one consistent snapshot and cannot write. Neither may return anything lazy.

On PostgreSQL other servers write as well. Work that decides on what it reads locks those rows (`with_for_update`, which
means nothing on SQLite); where another server comes between all the same, the work is done anew, by itself. So `fn` may be
called more than once: it makes the rows that it adds, and keeps nothing from one call to the next.
"""

import asyncio
import logging
import queue
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from sqlmodel import Session

from sftd_server.engines import NUM_READERS, Failure, failure, in_transaction, is_shared
from sftd_server.engines import make_engine as make_engine
from sftd_server.notices import Listener, announce

T = TypeVar("T")
MAX_BATCH = 256
MAX_TRIES = 10  # of one piece of work, where other servers are in its way; about 8 s
_TOUCHED = "touched"  # in session.info: the topics that this transaction changes

# An UPDATE leaves the objects that were read before it as they were read; a SELECT reads anew.
_PLAIN = {"synchronize_session": False, "populate_existing": True}

log = logging.getLogger("sftd.server")


def touch(session: Session, *topics: str) -> None:
    """Wake those who wait for these topics, once this transaction is committed."""
    session.info.setdefault(_TOUCHED, set()).update(topics)


class Witness(Protocol):
    """Adds its own to what is written on somebody's behalf, in the same transaction."""

    def attend(self, work: Callable[[Session], T]) -> tuple[Callable[[Session], T], Callable[[], None]]:
        """The work with what is added to it, and what to call once that is committed."""


# Of the request that is being served, if what it writes shall be witnessed.
witness: ContextVar[Witness | None] = ContextVar("witness", default=None)


class DatabaseClosed(Exception):
    """The server is stopping: nothing more is written."""


@dataclass(eq=False)
class _Item(Generic[T]):
    """One piece of work for the writer, and the place for its answer."""

    work: Callable[[Session], T]
    answer: "asyncio.Future[T]"
    loop: asyncio.AbstractEventLoop
    tries: int = 0  # that another server has overtaken
    was_taken: bool = False  # a unique value was there already; it has been looked for since
    due: float = 0.0  # not to be tried again before (monotonic)
    bulk: bool = False
    has_had_room: bool = False  # the disk was full, and room was made for it


class _Overtaken(Exception):
    """An item has met another server's write, and the whole transaction is given up for it: its locks stand in the
    way, perhaps."""

    def __init__(self, item: _Item[Any]) -> None:  # any result type
        self.item = item


class Database:
    """This process's way to the database. Made before the event loop runs; `start` and `stop` belong to the app's life."""

    def __init__(self, url: str) -> None:
        self.id = secrets.token_hex(8)  # of this process, among those that share the database
        self.shared = is_shared(url)
        self.engine = make_engine(url)
        self._url = url
        self._read_engine = make_engine(url, query_only=True)
        self._queue: queue.SimpleQueue[_Item[Any] | None] = queue.SimpleQueue()  # any result type
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        self._writer = threading.Thread(target=self._write_forever, name="writer", daemon=True)
        self._signals: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._listener: Listener | None = None
        self._again: list[_Item[Any]] = []  # the writer's own: overtaken by other servers, to be done anew
        self._closed = False
        self.make_room: Callable[[], bool] = lambda: (
            False
        )  # asked where SQLite's disk is full; True: try again
        self.num_commits = 0
        self.num_writes = 0

    @property
    def num_waiting(self) -> int:
        """Writes that wait in the queue."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin to write, and to hear what other servers write. Called in the event loop."""
        self._writer.start()
        if self.shared:
            call = asyncio.get_running_loop().call_soon_threadsafe
            self._listener = Listener(
                self._url,
                self.id,
                lambda topics: _unless_gone(call, self._wake, topics),
                lambda: _unless_gone(call, self.wake_all),
            )
            self._listener.start()

    async def stop(self) -> None:
        """Finish what is queued, fold the WAL into the database, close. Later writes raise DatabaseClosed."""
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        if self._listener is not None:
            await asyncio.to_thread(self._listener.close)
        self._read_engine.dispose()
        if not self.shared:
            with self.engine.connect() as connection:
                connection.rollback()
                raw = connection.connection.driver_connection
                assert raw is not None
                try:
                    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                except (
                    sqlite3.OperationalError
                ) as error:  # no room: the log is whole, and read at the next start
                    log.warning("the write-ahead log could not be folded into the database: %s", error)
        self.engine.dispose()

    async def write(self, work: Callable[[Session], T], *, bulk: bool = False) -> T:
        """Run `work` in the writer's next transaction; its result, once that is on disk.

        On a full disk `bulk` work fails, so that what room can still be made goes to the rest, which is done anew.
        """
        attending = witness.get()
        if attending is None:
            return await self._write(work, bulk=bulk)
        work, committed = attending.attend(work)
        result = await self._write(work, bulk=bulk)
        committed()
        return result

    async def _write(self, work: Callable[[Session], T], *, bulk: bool) -> T:
        if self._closed:
            raise DatabaseClosed("the server is stopping")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Item(work, answer, loop, bulk=bulk))
        return await answer

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` on a connection that only reads, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def signal(self, topic: str) -> asyncio.Event:
        """Set at the next commit that touches the topic. Take it before reading, so that no change is missed."""
        event = self._signals.get(topic)
        if event is None or event.is_set():
            event = self._signals[topic] = asyncio.Event()
        return event

    def wake_all(self) -> None:
        """Wake everybody who waits: the server is stopping."""
        for waiting in list(self._signals.values()):
            waiting.set()

    def _read(self, work: Callable[[Session], T]) -> T:
        with Session(self._read_engine) as session:
            return work(session)

    def _write_forever(self) -> None:
        closing = False
        while not closing or self._again:
            items, closed = self._take(closing)
            closing = closing or closed
            while items:
                items = self._transact(items)
            # One by one between the batches: what stands in their way must not hold up the others.
            late = min(self._again, key=lambda item: item.due, default=None)
            if late is not None and late.due <= time.monotonic():
                self._again.remove(late)
                self._transact([late])

    def _take(self, closing: bool) -> tuple[list[_Item[Any]], bool]:  # items of any result type
        """What is in the queue now; at least one item, unless one is to be tried again. And whether it was closed."""
        items: list[_Item[Any]] = []
        wait = None
        if self._again:
            wait = max(0.0, min(item.due for item in self._again) - time.monotonic())
        try:
            if closing:
                time.sleep(wait or 0)
                return [], True
            item = self._queue.get(timeout=wait)
            while item is not None:
                items.append(item)
                if len(items) == MAX_BATCH:
                    return items, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return items, False
        return items, True

    def _try_again(self, item: _Item[Any], *, wait: bool) -> None:
        item.tries += 1
        item.due = time.monotonic()
        if wait:
            item.due += min(1.0, 0.05 * 2.0**item.tries) * random.uniform(0.5, 1.0)
        self._again.append(item)

    def _transact(self, items: list[_Item[Any]]) -> list[_Item[Any]]:
        """One transaction, and its answers. Returns what is left of it, to be done at once: nothing of that happened."""
        outcomes: list[Callable[[], None]] = []
        topics: set[str] = set()
        left: list[_Item[Any]] = []
        try:
            with Session(self.engine, expire_on_commit=False, execution_options=_PLAIN) as session:
                for item in items:
                    outcome = self._write_one(session, item, topics)
                    if outcome is not None:
                        outcomes.append(outcome)
                if self.shared and topics:
                    announce(session, self.id, topics)
                session.commit()
        except _Overtaken as overtaken:
            self._try_again(overtaken.item, wait=True)
            return [item for item in items if item is not overtaken.item and item not in self._again]
        except Exception as error:  # the commit itself failed: none of them happened
            why = failure(error)
            if why is Failure.FULL and not self.shared and self.make_room():
                left = [item for item in items if not item.bulk and not item.has_had_room]
                for item in left:
                    item.has_had_room = True
            if why in (Failure.AWAY, Failure.BUSY, Failure.OVERTAKEN, Failure.FULL):
                log.warning("%d writes are refused, the database is %s: %s", len(items), why, error)
            else:
                log.exception("a transaction of %d writes failed", len(items))
            self._again = [item for item in self._again if item not in items]
            outcomes = [_failure(item, error) for item in items if item not in left]
            topics = set()
        self.num_commits += 1
        self.num_writes += len(outcomes)
        for loop in {item.loop for item in items}:
            if not _unless_gone(loop.call_soon_threadsafe, self._answer, outcomes, topics):
                log.warning("%d writes were done after their askers had left", len(items))
        return left

    def _write_one(self, session: Session, item: _Item[Any], topics: set[str]) -> Callable[[], None] | None:
        """Do one item's work, behind a savepoint; its answer, or None where it is to be done anew."""
        session.info[_TOUCHED] = set()
        savepoint = session.begin_nested()
        connection = session.connection()
        try:
            result = item.work(session)
            session.flush()
        except Exception as error:
            why = failure(error)
            if not in_transaction(connection):  # all of it is given up, as when SQLite's disk is full
                if not connection.invalidated:
                    connection.invalidate()  # else SQLAlchemy goes back to a savepoint that is no more
                raise
            if self.shared and why is Failure.OVERTAKEN and item.tries < MAX_TRIES:
                raise _Overtaken(item) from error
            if why is Failure.FULL and not self.shared:
                raise  # the others will hardly do better: room is made, and they begin anew
            savepoint.rollback()
            if self.shared and why is Failure.TAKEN and not item.was_taken:
                item.was_taken = True
                self._try_again(item, wait=False)
                return None
            return _failure(item, error)
        finally:
            session.expunge_all()
        savepoint.commit()
        topics |= session.info[_TOUCHED]
        return lambda: None if item.answer.done() else item.answer.set_result(result)

    def _answer(self, outcomes: list[Callable[[], None]], topics: set[str]) -> None:
        for outcome in outcomes:
            outcome()
        self._wake(topics)

    def _wake(self, topics: Iterable[str]) -> None:
        for topic in topics:
            event = self._signals.pop(topic, None)
            if event is not None:
                event.set()


def _unless_gone(call: Callable[..., object], *arguments: object) -> bool:
    """Call into an event loop; False where the loop has ended, and with it whoever waits there."""
    try:
        call(*arguments)
    except RuntimeError:
        return False
    return True


def _failure(item: _Item[Any], error: Exception) -> Callable[[], None]:
    return lambda: None if item.answer.done() else item.answer.set_exception(error)
