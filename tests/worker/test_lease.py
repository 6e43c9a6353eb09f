"""Keeping a lease where connections are refused: by nobody, or by something that stands before a server that lives.
And letting go of it where nothing else can.
"""

import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from sftd._transport import Transport
from sftd_worker.lease import LeaseKeeper

if TYPE_CHECKING:
    from conftest import FakeServer


@pytest.fixture
def keeper(server: "FakeServer") -> Iterator[LeaseKeeper]:
    """Keeps a lease of one second on a server that has gone down."""
    server.post_job()
    assert server.lease
    lease = server.lease.model_copy(update={"lease_seconds": 1.0})
    server.down()
    transport = Transport(f"http://127.0.0.1:{server.port}", "key-of-the-tests")
    keeper = LeaseKeeper(lease, transport, wait_seconds=0, on_news=lambda: None)
    yield keeper
    keeper.close()
    transport.close()


def test_a_refusal_by_a_server_that_is_down_keeps_the_lease(keeper: LeaseKeeper) -> None:
    begun = time.monotonic()

    keeper.start()

    while time.monotonic() < begun + 1.5:
        assert keeper.still_held()
        time.sleep(0.05)  # the heartbeat thread's time passes


def test_a_refusal_by_a_proxy_of_a_server_that_lives_does_not_keep_the_lease(
    keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transport, "nothing_listens", lambda self: False)
    begun = time.monotonic()

    keeper.start()
    while keeper.still_held() and time.monotonic() < begun + 5:
        time.sleep(0.02)  # the heartbeat thread's time passes

    assert keeper.lost
    assert time.monotonic() - begun < 2


def test_a_heartbeat_that_hangs_does_not_hold_up_the_fence(keeper: LeaseKeeper, server: "FakeServer") -> None:
    """An answer that comes byte by byte is never late by a timeout that counts from the last one."""
    ended = threading.Event()
    keeper.ends(ended.set)

    def drip() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not ended.is_set():
                connection.sendall(b".")
                time.sleep(0.05)  # what makes it slow

    with socket.create_server(("127.0.0.1", server.port)) as listener:
        threading.Thread(target=drip, daemon=True).start()
        begun = time.monotonic()
        keeper.start()
        assert ended.wait(5)

    assert 0.7 < time.monotonic() - begun < 1.0
    assert keeper.lost


def test_what_comes_to_a_lease_that_is_lost_already_is_ended_at_once(keeper: LeaseKeeper) -> None:
    keeper.lose("said the test")
    ended = threading.Event()

    keeper.ends(ended.set)

    assert ended.is_set()
