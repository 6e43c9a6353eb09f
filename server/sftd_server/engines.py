"""Connections to SQLite and PostgreSQL, made so that both behave alike; and what a failure of one means.

SQLite: one file, one process that writes. PostgreSQL: any number of server processes; a writer's transactions are READ
COMMITTED and lock the rows that they decide on, a reader sees one snapshot and cannot write.
"""

from enum import IntEnum, StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

NUM_READERS = 4
CONNECT_SECONDS = 5
LOCK_MILLISECONDS = (
    500  # how long a write waits for a row that another server holds before it is tried again, alone
)
STATEMENT_MILLISECONDS = 30_000
# A server that was stopped within a transaction must not hold its rows for ever: less than a lease, more than a machine
# under load takes. A reader holds none.
IDLE_MILLISECONDS, IDLE_READER_MILLISECONDS = 20_000, 60_000
_DRIVER = "postgresql+psycopg"
# The index of the write-ahead log, and a disk that finds out late, have words of their own for it.
_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


class Turn(IntEnum):
    """What only one of the servers on a PostgreSQL database does at a time, by the number of its advisory lock."""

    MIGRATION = 7_305_813_482_001
    ARRIVAL = 7_305_813_482_002  # of a server that starts
    BUILT_IN_KEY = 7_305_813_482_003


class Failure(StrEnum):
    """Why the database did not do what it was told, where that is nobody's mistake."""

    AWAY = "away"  # it cannot be reached
    BUSY = "busy"  # another process holds what is needed
    FULL = "full"  # its disk is full
    OVERTAKEN = (
        "overtaken"  # another server's write came between: the same work may succeed when it is done anew
    )
    TAKEN = "taken"  # a unique value is there already; where servers race, doing the work anew finds it


def database_url(text: str) -> URL:
    """The parsed address of a database. Raises ValueError, whose message never holds a password."""
    try:
        url = make_url(text)
    except Exception:  # SQLAlchemy's own message repeats the text
        raise ValueError(
            "is no address of a database; give sqlite:///<path> or postgresql://user@host/name"
        ) from None
    if url.drivername == "sqlite" and url.database and not url.host:
        return url
    if url.drivername in ("postgresql", "postgres", _DRIVER):
        if not url.database:
            raise ValueError("names no database; give postgresql://user@host/name")
        return url.set(drivername=_DRIVER)
    raise ValueError(
        "only SQLite and PostgreSQL are supported; give sqlite:///<path> or postgresql://user@host/name"
    )


def is_shared(url: str) -> bool:
    """Whether several servers may use this database at once."""
    return database_url(url).get_backend_name() == "postgresql"


def take_turn(connection: Connection, turn: Turn) -> None:
    """Wait until no other server is at it; the turn ends with the transaction. SQLite has one server, and no turns."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({turn:d})")


def make_engine(url: str, *, query_only: bool = False) -> Engine:
    """An engine for one writer, or for readers that see a snapshot and cannot write."""
    parsed = database_url(url)
    if parsed.get_backend_name() == "postgresql":
        return _postgres(parsed, query_only=query_only)
    return _sqlite(parsed, query_only=query_only)


def unhurried(connection: Connection) -> None:
    """Let this transaction take its time: a migration, or a copy of everything."""
    if connection.dialect.name == "postgresql":
        for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {name} = 0")


def failure(error: BaseException) -> Failure | None:
    """What an error of the database means, in one word for both kinds; None where it is a mistake in the statement."""
    if isinstance(error, PoolTimeout):
        return Failure.BUSY
    if not isinstance(error, DBAPIError):
        return None
    if error.connection_invalidated:
        return Failure.AWAY
    state = getattr(error.orig, "sqlstate", "")
    if state == "":  # SQLite says it in words
        return _sqlite_failure(error)
    if state is None:  # psycopg, before or after a connection
        return Failure.AWAY if isinstance(error, OperationalError | InterfaceError) else None
    if state == "23505":
        return Failure.TAKEN
    if state in ("40001", "40P01", "55P03"):  # serialization, deadlock, a lock that was not to be had in time
        return Failure.OVERTAKEN
    if state == "53100":
        return Failure.FULL
    if state == "57014":  # a statement that took too long
        return Failure.BUSY
    return Failure.AWAY if state[:2] in ("08", "53", "57") or state == "25P03" else None


def in_transaction(connection: Connection) -> bool:
    """Whether the database itself still is in the transaction that SQLAlchemy believes to be in."""
    if connection.invalidated:
        return False
    raw: Any = connection.connection.driver_connection  # of sqlite3 or psycopg
    if connection.dialect.name == "sqlite":
        return raw is not None and bool(raw.in_transaction)
    return raw is not None and not raw.closed


def _sqlite_failure(error: DBAPIError) -> Failure | None:
    if not isinstance(error, OperationalError):
        return None
    said = str(error)
    if "database or disk is full" in said or getattr(error.orig, "sqlite_errorname", "") in _NO_ROOM:
        return Failure.FULL
    return Failure.BUSY if "database is locked" in said else None


def _pooled(url: URL, query_only: bool, **options: Any) -> Engine:
    """One connection that writes, or a few that read."""
    return create_engine(
        url,
        hide_parameters=True,  # what users sent is not for the server's log
        poolclass=QueuePool,
        pool_size=NUM_READERS if query_only else 1,
        max_overflow=0,
        **options,
    )


def _sqlite(url: URL, *, query_only: bool) -> Engine:
    """Its connections begin transactions themselves: IMMEDIATE to write, so that none fails midway."""
    engine = _pooled(url, query_only, connect_args={"check_same_thread": False, "timeout": 30})

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


def _postgres(url: URL, *, query_only: bool) -> Engine:
    engine = _pooled(
        url,
        query_only,
        pool_timeout=CONNECT_SECONDS,
        pool_pre_ping=True,  # a connection that the database has closed meanwhile is made anew, not handed out
        connect_args={"connect_timeout": CONNECT_SECONDS, "application_name": "sftd", **_KEEPALIVE},
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:  # psycopg.Connection, and SQLAlchemy's own record
        from psycopg import IsolationLevel

        idle = IDLE_READER_MILLISECONDS if query_only else IDLE_MILLISECONDS
        connection.execute(
            f"SET lock_timeout = {LOCK_MILLISECONDS}; SET statement_timeout = {STATEMENT_MILLISECONDS};"
            f" SET idle_in_transaction_session_timeout = {idle}; SET timezone = 'UTC'"
        )
        connection.commit()
        level = IsolationLevel.REPEATABLE_READ if query_only else IsolationLevel.READ_COMMITTED
        connection.isolation_level = level
        connection.read_only = query_only

    return engine


_KEEPALIVE = {  # a machine that vanished is noticed within half a minute
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
