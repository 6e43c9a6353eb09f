"""Wakes those who wait for a topic on any server of a PostgreSQL database.

A transaction that touches topics ends with NOTIFY; every server listens in a thread. A connection that breaks is made
anew, and then everybody is woken, for nobody knows what was said meanwhile.
"""

import logging
import os
import select
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlmodel import Session

from sftd_server.engines import CONNECT_SECONDS

if TYPE_CHECKING:  # psycopg is there only where PostgreSQL is used
    import psycopg

CHANNEL = "sftd"
MAX_BYTES = 7000  # PostgreSQL takes payloads below 8000
SILENT_SECONDS = 10.0  # after so long without a word the connection is asked whether it is still there
RETRY_SECONDS = 1.0

log = logging.getLogger("sftd.server")


def announce(session: Session, sender: str, topics: Iterable[str]) -> None:
    """Tell all servers, once this transaction is committed. `sender` leaves its own announcements out."""
    for payload in payloads(sender, topics):
        session.connection().execute(
            text("SELECT pg_notify(:channel, :payload)"), {"channel": CHANNEL, "payload": payload}
        )


def payloads(sender: str, topics: Iterable[str]) -> Iterator[str]:
    """The sender and topics, a line each, in as few pieces as fit."""
    piece, size = [sender], len(sender.encode())
    for topic in sorted(topics):
        more = len(topic.encode()) + 1
        if size + more > MAX_BYTES and len(piece) > 1:
            yield "\n".join(piece)
            piece, size = [sender], len(sender.encode())
        piece.append(topic)
        size += more
    if len(piece) > 1:
        yield "\n".join(piece)


class Listener:
    """A thread that hears what other servers announce, until it is closed."""

    def __init__(
        self, url: str, own: str, on_topics: Callable[[list[str]], object], on_gap: Callable[[], object]
    ) -> None:
        self._dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._own = own
        self._on_topics = on_topics
        self._on_gap = on_gap
        self._closed = threading.Event()
        self._wake_out, self._wake_in = os.pipe()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        """Begin to listen; it may take a moment, and whoever waits is woken when it does."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening and wait for the thread's end."""
        self._closed.set()
        os.write(self._wake_in, b"x")
        self._thread.join(CONNECT_SECONDS)
        if not self._thread.is_alive():  # else it waits for a database that hangs, and ends with the process
            os.close(self._wake_in)
            os.close(self._wake_out)

    def _run(self) -> None:
        import psycopg

        told = False
        while not self._closed.is_set():
            try:
                with psycopg.connect(
                    self._dsn, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="sftd"
                ) as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    self._on_gap()
                    told = False
                    self._listen(connection)
            except psycopg.Error as error:
                if not told and not self._closed.is_set():
                    log.warning("other servers are not heard until the database is back: %s", error)
                    told = True
                self._closed.wait(RETRY_SECONDS)
            except Exception:  # the thread must not end unnoticed: nobody would be woken any more
                log.exception("listening for other servers failed; trying again")
                self._closed.wait(RETRY_SECONDS)

    def _listen(self, connection: "psycopg.Connection") -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([connection.fileno(), self._wake_out], [], [], SILENT_SECONDS)
            if not ready:
                connection.execute("SELECT 1")  # also takes in what came with it
            for notice in connection.notifies(timeout=0):
                sender, *topics = notice.payload.split("\n")
                if sender != self._own:
                    self._on_topics(topics)
