"""What is PostgreSQL's alone: other servers in the way, a database that goes away, its clock, NOTIFY."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from tests.postgres import Postgres

from sftd_server.clock import Clock, DatabaseClock
from sftd_server.db import Database, touch
from sftd_server.files import checker
from sftd_server.notices import MAX_BYTES, payloads
from sftd_server.server import Server
from sftd_server.settings import Settings
from sftd_server.workers.reaper import Reaper


@pytest.fixture
def url(postgres: Postgres):
    made = postgres.create()
    yield made
    postgres.drop(made)


@pytest.fixture
def names(url: str) -> str:
    """A database with the metric names one, two and three."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("INSERT INTO metric_name (name) VALUES ('one'), ('two'), ('three')")
    return url


def rename(name: str, to: str):
    return lambda session: session.execute(
        text("UPDATE metric_name SET name = :to WHERE name = :name"), {"to": to, "name": name}
    )


def run(url: str, scenario) -> object:
    async def whole() -> object:
        db = Database(url)
        db.start()
        try:
            return await scenario(db)
        finally:
            await db.stop()

    return asyncio.run(whole())


def test_a_row_that_another_server_holds_delays_its_write_and_no_other(names: str) -> None:
    other = psycopg.connect(names)
    other.execute("UPDATE metric_name SET name = 'held' WHERE name = 'one'")

    async def scenario(db: Database) -> list[float]:
        began = time.monotonic()
        threading.Timer(1.5, other.rollback).start()
        waiting = asyncio.ensure_future(db.write(rename("one", "1")))
        free = asyncio.ensure_future(db.write(rename("two", "2")))
        await free
        done = [time.monotonic() - began]
        await waiting
        return [*done, time.monotonic() - began]

    free, waited = run(names, scenario)
    other.close()

    assert free < 1.3
    assert waited >= 1.4
    with psycopg.connect(names) as connection:
        found = {row[0] for row in connection.execute("SELECT name FROM metric_name")}
    assert found == {"1", "2", "three"}


def test_two_writers_that_deadlock_both_get_through(names: str) -> None:
    """Each renames the two rows in the other's order, in one piece of work."""

    def both(first: str, second: str, mark: str):
        def work(session) -> None:
            for name in (first, second):
                session.execute(
                    text("UPDATE metric_name SET name = name || :mark WHERE name LIKE :name || '%'"),
                    {"mark": mark, "name": name},
                )
                time.sleep(0.2)

        return work

    async def scenario(db: Database) -> None:
        another = Database(names)
        another.start()
        await asyncio.gather(
            db.write(both("one", "two", "+")), another.write(both("two", "one", "-")), return_exceptions=False
        )
        await another.stop()

    run(names, scenario)

    with psycopg.connect(names) as connection:
        found = sorted(row[0] for row in connection.execute("SELECT name FROM metric_name"))
    assert found in (["one+-", "three", "two+-"], ["one-+", "three", "two-+"])


def test_a_value_that_another_server_took_first_is_found_when_the_work_is_done_anew(names: str) -> None:
    other = psycopg.connect(names)
    other.execute("INSERT INTO metric_name (name) VALUES ('four')")
    calls = []

    def find_or_make(session) -> str:
        calls.append(1)
        if session.execute(text("SELECT 1 FROM metric_name WHERE name = 'four'")).first():
            return "found"
        session.execute(text("INSERT INTO metric_name (name) VALUES ('four')"))
        return "made"

    async def scenario(db: Database) -> str:
        threading.Timer(0.2, other.commit).start()
        return await db.write(find_or_make)

    assert run(names, scenario) == "found"
    assert len(calls) == 2
    other.close()


def test_a_reader_sees_one_snapshot_and_cannot_write(names: str) -> None:
    def twice(session) -> tuple[int, int]:
        count = text("SELECT count(*) FROM metric_name")
        before = session.execute(count).scalar()
        with psycopg.connect(names, autocommit=True) as other:
            other.execute("INSERT INTO metric_name (name) VALUES ('between')")
        return before, session.execute(count).scalar()

    async def scenario(db: Database) -> tuple[int, int]:
        with pytest.raises(Exception, match="read-only"):
            await db.read(rename("one", "x"))
        return await db.read(twice)

    assert run(names, scenario) == (3, 3)


def test_a_touch_wakes_those_who_wait_at_another_server(url: str) -> None:
    async def scenario(db: Database) -> list[bool]:
        another = Database(url)
        another.start()
        await asyncio.sleep(0.5)  # until it listens: that wakes everybody, too
        kept, other = another.signal("job:1"), another.signal("job:2")
        await db.write(lambda session: touch(session, "job:1", *(f"queue-{i:0100}" for i in range(500))))
        await asyncio.wait_for(kept.wait(), 5)
        await another.stop()
        return [kept.is_set(), other.is_set()]

    assert run(url, scenario) == [True, False]


def test_topics_are_announced_in_pieces_that_postgres_takes() -> None:
    topics = [f"job:{i:0200}" for i in range(200)]

    pieces = list(payloads("sender", topics))

    assert [topic for piece in pieces for topic in piece.split("\n")[1:]] == sorted(topics)
    assert max(len(piece.encode()) for piece in pieces) <= MAX_BYTES
    assert list(payloads("sender", [])) == []


def test_the_clock_is_the_databases(url: str, tmp_path: Path) -> None:
    server = Server(Settings(data=tmp_path, database_url=url))
    assert isinstance(server.clock, DatabaseClock)

    asyncio.run(server.set_clock())

    off = server.clock.now() - datetime.now(UTC)
    assert abs(off) < timedelta(seconds=1)  # it runs on this machine

    server.clock.set(datetime(2001, 1, 1, tzinfo=UTC), server.clock.monotonic())
    assert server.clock.now().year == 2001  # and not this machine's
    asyncio.run(server.set_clock())
    assert abs(server.clock.now() - Clock().now()) < timedelta(seconds=1)


def test_a_start_extends_all_leases_unless_another_server_was_there(url: str, tmp_path: Path) -> None:
    def lease_of(name: str) -> datetime:
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT lease_until FROM job WHERE id = %s", (name,)).fetchone()
        assert row is not None
        return row[0]

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO job (id, owner, body_sha256, priority, gpus, base_model, method, spec, labels, inputs,"
            " created_at, state, want, queued_at, not_before, queue_rank, attempt, failures, lost_count, lost_step,"
            " token_sha256, lease_until, step, tokens_seen, log_tail) VALUES ('job_x', 'o', '', 0, 1, 'm', 'lora', '',"
            " '{}', '{}', now(), 'running', 'run', now(), now(), 0, 1, 0, 0, 0, 'x', '2001-01-01', 0, 0, '[]')"
        )

    async def start() -> tuple[Server, Reaper]:
        server = Server(Settings(data=tmp_path, database_url=url))
        await server.set_clock()
        server.db.start()
        reaper = Reaper(server)
        await reaper.begin()
        return server, reaper

    async def scenario() -> None:
        first, first_reaper = await start()
        assert lease_of("job_x").year > 2001
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("UPDATE job SET lease_until = '2001-01-01'")
        second, second_reaper = await start()
        assert lease_of("job_x").year == 2001  # the first was there
        assert (
            len(await first.db.read(lambda session: session.execute(text("SELECT id FROM server")).all()))
            == 2
        )
        for server, reaper in ((first, first_reaper), (second, second_reaper)):
            await reaper.end()
            await server.db.stop()
        third, third_reaper = await start()
        assert lease_of("job_x").year > 2001  # nobody was
        await third_reaper.end()
        await third.db.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_database_that_goes_away_is_a_503_until_it_is_back(
    make_box, postgres: Postgres, assert_error
) -> None:
    box = make_box()
    lease = box.running()

    postgres.down()
    try:
        refused = [lease.post("logs", seq=0, lines=["x"]), box.admin.get("/jobs"), box.try_claim()]
    finally:
        postgres.up()

    for answer in refused:
        assert_error(answer, 503, "database_away")
        assert answer.headers["retry-after"]
    assert lease.post("logs", seq=0, lines=["x"]).json() == {"next_seq": 1}
    assert box.admin.get("/jobs").status_code == 200
    waiting = threading.Thread(target=lambda: box.try_claim("w2", wait_seconds=10))
    waiting.start()
    box.submit()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_streams_work_again_after_the_database_was_away(make_box, postgres: Postgres) -> None:
    box = make_box()
    lease = box.running()
    another = make_box()
    postgres.down()
    postgres.up()
    seen: list[str] = []

    def follow() -> None:
        client = another.client("sftd-admin-key-of-the-tests")
        with client.stream(
            "GET", f"/jobs/{lease.job_id}/logs", headers={"accept": "text/event-stream"}
        ) as answer:
            seen.extend(line for line in answer.iter_lines() if line.startswith("data:"))

    deadline = time.monotonic() + 20
    while another.admin.get("/jobs").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    following = threading.Thread(target=follow)
    following.start()
    lease.post("logs", seq=0, lines=["hello"])
    lease.finish()
    following.join(20)

    assert "hello" in seen[0]


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
def test_nul_is_kept_out_of_the_database(make_box, assert_error) -> None:
    box = make_box()
    lease = box.running()

    lease.post("logs", seq=0, lines=["a\x00b"])
    lease.post(
        "events", seq=0, events=[{"type": "notice", "message": "m\x00", "data": {"k\x00": ["v\x00", 1]}}]
    )
    lease.checkpoint(1, metrics={"eval_loss": "NaN", "x": "Infinity"})
    lease.finish("failed", reason="trainer_error", message="z\x00", log_tail=["t\x00"])

    assert box.admin.get(f"/jobs/{lease.job_id}/logs").json()["data"][0]["text"] == "a\ufffdb"
    noticed = next(
        e for e in box.admin.get(f"/jobs/{lease.job_id}/events").json()["data"] if e["type"] == "notice"
    )
    assert (noticed["message"], noticed["data"]) == ("m\ufffd", {"k\ufffd": ["v\ufffd", 1]})
    failure = box.job(lease.job_id)["failure"]
    assert (failure["message"], failure["log_tail"]) == ("z\ufffd", ["t\ufffd"])
    listed = box.admin.get(f"/jobs/{lease.job_id}/checkpoints").json()["data"]
    assert listed[0]["metrics"] == {"eval_loss": "NaN", "x": "Infinity"}
    assert_error(box.admin.get("/jobs/a%00b"), 404, "unknown_route")
    assert_error(box.admin.get("/jobs?owner=a%00b"), 422, "invalid_request")
    assert_error(box.admin.get("/jobs?metadata%5Ba%5D=%00"), 422, "invalid_request")


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_check_of_a_server_that_dies_is_taken_over_by_another(make_box, monkeypatch) -> None:
    monkeypatch.setattr(checker, "LOOK_SECONDS", 0.05)
    deadline = time.monotonic() + 20
    boxes, at_it = [make_box(), make_box()], []

    def hang(box) -> None:
        async def never(path: Path, **of: object) -> None:
            at_it.append(box)
            await asyncio.Event().wait()

        box.server.checks.verdict = never

    for box in boxes:
        hang(box)
    form = {"files": {"file": b'{"text": "a"}'}, "data": {"purpose": "fine-tune"}}
    file_id = boxes[0].admin.post("/v1/files", **form).json()["id"]
    job_id = boxes[1].submit(training_file=file_id)
    while not at_it:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # for what another thread does
    (other,) = (box for box in boxes if box is not at_it[0])
    for box in boxes:
        del box.server.checks.verdict
    assert other.admin.get(f"/v1/files/{file_id}").json()["status"] == "uploaded"

    at_it[0].stop()

    while other.admin.get(f"/v1/files/{file_id}").json()["status"] == "uploaded":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(at_it) == 1
    assert other.claim().job_id == job_id
