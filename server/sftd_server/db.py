"""The database: one writer thread that commits in groups, and readers of their own.

`await db.write(fn)` puts `fn(session)` in a queue; the writer drains it, up to 256 items to a transaction, a savepoint
for each, one COMMIT (one fdatasync), and answers only then. An item that raises takes back its own work and no
other's. `await db.read(fn)` sees one consistent snapshot and cannot write. Neither may return anything lazy.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool
from sqlmodel import Session

from sftd_server.errors import is_disk_full

T = TypeVar("T")
MAX_BATCH = 256
NUM_READERS = 4
_TOUCHED = "touched"  # in session.info: the topics that this transaction changes

# An UPDATE leaves the objects that were read before it as they were read; a SELECT reads anew.
_PLAIN = {"synchronize_session": False, "populate_existing": True}

log = logging.getLogger("sftd.server")


def touch(session: Session, *topics: str) -> None:
    """Wake those who wait for these topics, once this transaction is committed."""
    session.info.setdefault(_TOUCHED, set()).update(topics)


class DatabaseClosed(Exception):
    """The server is stopping: nothing more is written."""


@dataclass
class _Item(Generic[T]):
    """One piece of work for the writer, and the place for its answer."""

    work: Callable[[Session], T]
    answer: "asyncio.Future[T]"
    loop: asyncio.AbstractEventLoop
    bulk: bool = False
    error: Exception | None = None  # of the newest try


class Database:
    """Owns the SQLite file. Made before the event loop runs; `start` and `stop` belong to the app's life."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._read_engine = make_engine(url, query_only=True)
        self._queue: queue.SimpleQueue[_Item[Any] | None] = queue.SimpleQueue()  # any result type
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        self._writer = threading.Thread(target=self._write_forever, name="writer", daemon=True)
        self._signals: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._closed = False
        self.make_room: Callable[[], bool] = lambda: False  # asked on a full disk; True: try again
        self.num_commits = 0
        self.num_writes = 0

    @property
    def num_waiting(self) -> int:
        """Writes that wait in the queue."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin to write."""
        self._writer.start()

    async def stop(self) -> None:
        """Finish what is queued, fold the WAL into the database, close. Later writes raise DatabaseClosed."""
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._read_engine.dispose()
        with self.engine.connect() as connection:
            connection.rollback()
            raw = connection.connection.driver_connection
            assert raw is not None
            try:
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (
                sqlite3.OperationalError
            ) as error:  # a full disk: the log is whole, and read at the next start
                log.warning("the write-ahead log could not be folded into the database: %s", error)
        self.engine.dispose()

    async def write(self, work: Callable[[Session], T], *, bulk: bool = False) -> T:
        """Run `work` in the writer's next transaction; its result, once that is on disk.

        On a full disk `bulk` work fails, so that what room can still be made goes to the rest, which is then run
        once more: it must not bring anything along that the first run has used up, such as a row to add.
        """
        if self._closed:
            raise DatabaseClosed("the server is stopping")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Item(work, answer, loop, bulk))
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
        while not closing:
            items, closing = self._take()
            if items:
                self._write_batch(items)

    def _take(self) -> tuple[list[_Item[Any]], bool]:  # items of any result type
        """What is in the queue now, at least one item; and whether the queue has been closed."""
        items = []
        item = self._queue.get()
        while item is not None:
            items.append(item)
            if len(items) == MAX_BATCH:
                return items, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return items, False
        return items, True

    def _write_batch(self, items: list[_Item[Any]]) -> None:  # items of any result type
        outcomes, topics = self._transact(items)
        full = [i for i, item in enumerate(items) if item.error is not None and is_disk_full(item.error)]
        if full and self.make_room():
            again = [i for i in full if not items[i].bulk]
            second, more = self._transact([items[i] for i in again])
            for i, outcome in zip(again, second, strict=True):
                outcomes[i] = outcome
            topics |= more
        self.num_commits += 1
        self.num_writes += len(items)
        for loop in {item.loop for item in items}:
            try:
                loop.call_soon_threadsafe(self._answer, outcomes, topics)
            except RuntimeError:  # the loop is gone, and with it whoever asked
                log.warning("%d writes were done after their askers had left", len(items))

    def _transact(
        self, items: list[_Item[Any]]
    ) -> tuple[list[Callable[[], None]], set[str]]:  # items of any result type
        """One transaction: what to tell each asker, and the topics to wake."""
        outcomes: list[Callable[[], None]] = []
        topics: set[str] = set()
        try:
            with Session(self.engine, expire_on_commit=False, execution_options=_PLAIN) as session:
                for item in items:
                    outcomes.append(self._write_one(session, item, topics))
                session.commit()
        except Exception as error:  # the commit itself failed: none of them happened
            log.error(
                "a transaction of %d writes failed: %s", len(items), error, exc_info=not is_disk_full(error)
            )
            outcomes = [_failure(item, error) for item in items]
            topics = set()
        return outcomes, topics

    def _write_one(self, session: Session, item: _Item[Any], topics: set[str]) -> Callable[[], None]:
        item.error = None
        session.info[_TOUCHED] = set()
        savepoint = session.begin_nested()
        connection = session.connection()
        try:
            result = item.work(session)
            session.flush()
        except Exception as error:
            if not _in_transaction(connection):  # SQLite gave all of it up, as when the disk is full
                connection.invalidate()  # else SQLAlchemy goes back to a savepoint that is no more
                raise
            savepoint.rollback()
            return _failure(item, error)
        finally:
            session.expunge_all()
        savepoint.commit()
        topics |= session.info[_TOUCHED]
        return lambda: None if item.answer.done() else item.answer.set_result(result)

    def _answer(self, outcomes: list[Callable[[], None]], topics: set[str]) -> None:
        for outcome in outcomes:
            outcome()
        for topic in topics:
            event = self._signals.pop(topic, None)
            if event is not None:
                event.set()


def make_engine(url: str, *, query_only: bool = False) -> Engine:
    """An engine whose connections begin transactions themselves: IMMEDIATE to write, so that none fails midway."""
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=NUM_READERS if query_only else 1,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": 30},
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:  # sqlite3.Connection, and SQLAlchemy's own record
        connection.isolation_level = None  # the driver shall not begin transactions by itself
        pragmas = ["busy_timeout=30000", "foreign_keys=ON"]
        if query_only:
            pragmas.append("query_only=ON")
        else:
            pragmas += ["journal_mode=WAL", "synchronous=FULL", f"journal_size_limit={64 * 1024**2}"]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:  # sqlalchemy.Connection
        connection.exec_driver_sql("BEGIN" if query_only else "BEGIN IMMEDIATE")

    return engine


def _in_transaction(connection: Connection) -> bool:
    """Whether SQLite itself still is in the transaction that SQLAlchemy believes to be in."""
    raw = connection.connection.driver_connection
    return raw is not None and bool(raw.in_transaction)


def _failure(item: _Item[Any], error: Exception) -> Callable[[], None]:
    item.error = error
    return lambda: None if item.answer.done() else item.answer.set_exception(error)
