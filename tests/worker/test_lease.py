"""Keeping a lease where connections are refused: by nobody, or by something that stands before a server that lives."""

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
