"""Keys with limits, and the audit log, of the Python client against a real server."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.server.conftest import ADMIN, Box, start_box

from sftd import Client, errors


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = start_box(tmp_path_factory.mktemp("people") / "data")
    yield box
    box.stop()


@pytest.fixture
def admin(server: Box) -> Iterator[Client]:
    with Client(server.url, ADMIN) as client:
        yield client


def test_a_key_is_limited_shown_to_its_holder_and_changed(server: Box, admin: Client) -> None:
    made = admin.keys.create(name="limited", max_running_jobs=2, max_gpu_hours_per_month=10)
    with Client(server.url, made.secret) as client:
        own = client.keys.me()
    changed = admin.keys.change(made.id, max_running_jobs=None, max_queued_jobs=5)

    assert (own.name, own.role, own.max_running_jobs, own.max_queued_jobs) == ("limited", "user", 2, None)
    assert (own.running_jobs, own.queued_jobs, own.gpu_hours_this_month) == (0, 0, 0)
    assert own.month_ends_at == datetime(2030, 2, 1, tzinfo=UTC)
    assert (changed.max_running_jobs, changed.max_queued_jobs, changed.max_gpu_hours_per_month) == (
        None,
        5,
        10,
    )


def test_a_reached_limit_is_raised_at_once(server: Box, admin: Client, tmp_path: Path) -> None:
    secret = admin.keys.create(name="full", max_queued_jobs=1).secret
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with Client(server.url, secret) as client:
        client.jobs._pause = client._transport._pause = lambda seconds: pytest.fail("it waited")
        file_id = client.files.upload(rows).id
        client.jobs.create(base_model="org/m", training_file=file_id)
        with pytest.raises(errors.Throttled) as raised:
            client.jobs.create(base_model="org/m", training_file=file_id)

    assert (raised.value.code, raised.value.param, raised.value.should_retry) == (
        "limit_reached",
        "max_queued_jobs",
        False,
    )


def test_the_audit_log_is_read_page_by_page_and_filtered(admin: Client) -> None:
    key_id = admin.keys.create(name="audited").id
    admin.keys.delete(key_id)

    assert [entry.action for entry in admin.audit.list(target=key_id)] == ["key.delete", "key.create"]
    assert [entry.action for entry in admin.audit.list(limit=1)] == ["key.delete"]
    assert list(admin.audit.list(action="key", until=datetime(2029, 1, 1, tzinfo=UTC))) == []
    assert {entry.key_name for entry in admin.audit.list(since=datetime(2029, 1, 1, tzinfo=UTC))} >= {"admin"}
