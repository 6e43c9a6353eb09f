"""`sftd admin`: what is moved, backed up and restored is what was there; what is wrong is found."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlmodel import update
from tests.postgres import Postgres

from sftd_server.admin.check import check
from sftd_server.artifacts.mirror import LEAVING, Mirror
from sftd_server.openai.results import ResultFiles
from sftd_server.settings import Settings
from sftd_server.tables import StoredRow

BOTH = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
Admin = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def admin() -> Admin:
    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sftd_server.admin", *map(str, arguments)]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def put_files(folder: Path, **contents: bytes) -> dict[str, dict[str, object]]:
    """Files as a trainer writes them, and their manifest."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def fill(box) -> list[str]:
    """Jobs in several states, with everything that a job can have. Returns their ids."""
    data = box.server.folder.path
    done = box.running(metadata={"team": "q"}, name="café")
    done.event(0, "run", start_step=-1, total_steps=20)
    done.metrics(0, *[(step, {"loss": 1 / step, "odd": "NaN", "big": "Infinity"}) for step in range(1, 21)])
    done.post("logs", seq=0, lines=[f"line {i} \u2028 \U0001f600" for i in range(50)])
    done.event(
        1, "evaluation", step=10, eval_loss="NaN", perplexity="Infinity", token_accuracy=0.5, num_tokens=7
    )
    for step in (10, 20):
        folder = data / "jobs" / done.job_id / "checkpoints" / f"checkpoint-{step}"
        done.checkpoint(step, files=put_files(folder, weights=b"w" * step), metrics={"eval_loss": 1.5})
    done.finish(files=put_files(data / "jobs" / done.job_id / "results", adapter=b"the result"))
    failed = box.running()
    failed.finish("failed", reason="bad_data", message="no", log_tail=["a", "b"])
    running = box.running()
    running.post("logs", seq=0, lines=["before"])
    waiting = box.submit(priority=3)
    box.admin.post(f"/jobs/{waiting}/pause")
    box.key("ci")
    box.run(ResultFiles(box.server).make_missing())  # it is made beside the requests
    return [done.job_id, failed.job_id, running.job_id, waiting]


def shown(box, job_ids: list[str]) -> dict[str, Any]:
    """All that the interface tells of these jobs, and of the rest."""
    found: dict[str, Any] = {}
    for job_id in job_ids:
        for part in ("", "/events", "/logs", "/metrics", "/checkpoints", "/evaluations"):
            answer = box.admin.get(f"/jobs/{job_id}{part}", params={"limit": 1000} if part else {})
            assert answer.status_code == 200
            found[job_id + part] = json.loads(answer.text)
        found[job_id].pop("folder")
        found[job_id].pop("why_waiting", None)
    for path in ("/files", "/keys"):
        found[path] = box.admin.get(path).json()
    archive = box.admin.get(f"/jobs/{job_ids[0]}/archive")
    assert archive.status_code == 200
    found["archive"] = archive.content
    file_id = found["/files"]["data"][-1]["id"]
    found["content"] = box.admin.get(f"/files/{file_id}/content").content
    return found


def settings_of(box) -> dict[str, str]:
    return {"SFTD_DATABASE_URL": box.server.settings.database_url}


@BOTH
def test_a_backup_of_a_running_server_restores_to_what_it_was(make_box, admin: Admin, tmp_path: Path) -> None:
    box = make_box()
    jobs = fill(box)
    before = shown(box, jobs)
    busy = box.running()
    stopped = threading.Event()

    def write_on() -> None:
        seq = 0
        while not stopped.is_set():
            seq = busy.post("logs", seq=seq, lines=["x"] * 50).json()["next_seq"]
            time.sleep(0.05)

    writing = threading.Thread(target=write_on)
    writing.start()
    saved = admin("backup", tmp_path / "saved", "--data", tmp_path / "data", **settings_of(box))
    stopped.set()
    writing.join()

    assert saved.returncode == 0, saved.stderr
    assert "hashes verified" in saved.stdout
    assert not list(tmp_path.glob(".*.part"))
    box.stop()
    restored = admin("restore", tmp_path / "saved", "--data", tmp_path / "again", SFTD_DATABASE_URL="")
    assert restored.returncode == 0, restored.stderr
    checked = admin("check", "--deep", "--data", tmp_path / "again", SFTD_DATABASE_URL="")
    assert (checked.returncode, checked.stdout) == (0, "nothing wrong was found\n")

    again = make_box("again", clock=box.clock, database_url="")
    assert shown(again, jobs) == before
    assert again.server.installation_id == box.server.installation_id
    assert again.server.secret == box.server.secret
    lines = again.admin.get(f"/jobs/{busy.job_id}/logs", params={"limit": 10_000}).json()["data"]
    busy.worker = again.worker
    assert busy.post("logs", seq=len(lines), lines=["y"]).json() == {"next_seq": len(lines) + 1}


def test_a_backup_is_restored_into_postgres(
    make_box, admin: Admin, tmp_path: Path, postgres: Postgres
) -> None:
    box = make_box()
    jobs = fill(box)
    before = shown(box, jobs)
    assert admin("backup", tmp_path / "saved", "--data", tmp_path / "data").returncode == 0
    url = postgres.create(empty=True)

    restored = admin(
        "restore", tmp_path / "saved", "--data", tmp_path / "again", "--quick", SFTD_DATABASE_URL=url
    )

    assert restored.returncode == 0, restored.stderr
    assert not (tmp_path / "again" / "sftd.db").exists()
    again = make_box("again", clock=box.clock, database_url=url)
    assert shown(again, jobs) == before
    again.stop()
    refused = admin("restore", tmp_path / "saved", "--data", tmp_path / "third", SFTD_DATABASE_URL=url)
    assert refused.returncode == 2
    assert "not empty" in refused.stderr
    assert not (tmp_path / "third").exists()
    postgres.drop(url)


def test_a_database_moves_to_postgres_with_every_row(
    make_box, admin: Admin, tmp_path: Path, postgres: Postgres
) -> None:
    box = make_box()
    jobs = fill(box)
    gone = box.submit()
    before = shown(box, jobs)
    url = postgres.create(empty=True)
    source = f"sqlite:///{tmp_path}/data/sftd.db"

    held = admin("migrate-db", "--from", source, "--to", url)
    assert held.returncode == 2
    assert "Another sftd-server runs on" in held.stderr
    box.stop()
    with closing(
        sqlite3.connect(tmp_path / "data" / "sftd.db")
    ) as file:  # as versions before this one may have stored
        file.execute("PRAGMA foreign_keys = ON")
        file.execute("UPDATE log_line SET text = 'a' || char(0) || 'b' WHERE text = 'before'")
        file.execute("""UPDATE checkpoint SET metrics = '{"eval_loss": NaN}' WHERE step = 10""")
        file.execute("DELETE FROM job WHERE id = ?", (gone,))
        file.commit()
    moved = admin("migrate-db", "--from", source, "--to", url)
    assert moved.returncode == 0, moved.stderr
    again = make_box(clock=box.clock, database_url=url)

    after = shown(again, jobs)
    assert after[f"{jobs[2]}/logs"]["data"][0]["text"] == "a\ufffdb"
    assert after[f"{jobs[0]}/checkpoints"]["data"][0]["metrics"] == {"eval_loss": "NaN"}
    for found in (before, after):
        del found[f"{jobs[2]}/logs"], found[f"{jobs[0]}/checkpoints"]
    assert after == before
    newer = again.submit()  # numbers go on where they were, also past a job that was deleted
    number = "SELECT number FROM job WHERE id = %s"
    with psycopg.connect(url) as connection:
        row = connection.execute(number, (newer,)).fetchone()
    assert row == (6,)
    again.stop()

    twice = admin("migrate-db", "--from", source, "--to", url)
    assert twice.returncode == 2
    assert "not empty" in twice.stderr
    back = admin(
        "migrate-db", "--from", url, "--to", f"sqlite:///{tmp_path}/back.db", "--data", tmp_path / "data"
    )
    assert back.returncode == 0, back.stderr
    last = make_box(clock=box.clock, database_url=f"sqlite:///{tmp_path}/back.db")
    found = shown(last, jobs)
    for name in after:
        if name not in ("/files",):
            assert found[name] == after[name], name
    postgres.drop(url)


@BOTH
def test_a_sound_installation_has_no_findings(make_box, admin: Admin, tmp_path: Path) -> None:
    box = make_box()
    fill(box)
    lost = box.running()
    lost.event(0, "run", start_step=-1)
    box.expire()
    second = box.claim("w2")
    second.start()
    second.event(0, "run", start_step=-1)
    box.admin.post(f"/jobs/{lost.job_id}/cancel")
    second.finish("cancelled")

    found = admin("check", "--deep", "--data", tmp_path / "data", **settings_of(box))

    assert (found.returncode, found.stdout) == (0, "nothing wrong was found\n"), found.stderr


DAMAGE = [
    (
        "UPDATE attempt SET outcome = NULL WHERE job = 1",
        "I1 {0} is succeeded, but its attempt 1 has not ended",
    ),
    ("UPDATE attempt SET token_sha256 = 'x' WHERE job = 3", "I1 {2} is running, but its attempt 1 is not"),
    (
        "UPDATE attempt SET attempt = 2 WHERE job = 2",
        "I2 {1} counts 1 attempts, 1 are on record, up to number 2",
    ),
    ("UPDATE event SET attempt = 7 WHERE job = 1 AND type = 'claimed'", "I3 {0} has an event of attempt 1"),
    (
        "UPDATE log_line SET attempt = 2 WHERE text LIKE 'line 1 %'",
        "I3 {0} has a log line of attempt 1 after",
    ),
    ("DELETE FROM log_line WHERE text LIKE 'line 7 %'", "I5 {0} has 49 log lines of attempt 1, 50 were"),
    ("DELETE FROM event WHERE type = 'evaluation'", "I5 {0} has 1 events of attempt 1, 2 were"),
    ("UPDATE stream SET next_seq = 3 WHERE job = 1 AND kind = 'metrics'", "I5 {0} has metrics of 20 steps"),
    ("DELETE FROM stream WHERE job = 3 AND kind = 'events'", "I5 {2} has 2 streams of attempt 1, not 3"),
    ("DELETE FROM event WHERE job = 2 AND type = 'failed'", "I6 {1} is failed and has 0 events of its end"),
    (
        "UPDATE event SET type = 'cancelled' WHERE type = 'failed'",
        "I6 {1} is failed, its last event says cancelled",
    ),
    (
        "INSERT INTO event (job, attempt, type, message, data, created_at)"
        " VALUES (2, 1, 'claimed', '', '{}', '2031-01-01 00:00:00.000000')",
        "I7 {1} has the event claimed after its end",
    ),
    (
        "UPDATE checkpoint SET created_at = '2031-01-01 00:00:00.000000' WHERE step = 10",
        "I8 {0} has a checkpoint of step 10 of attempt 1 after one of step 20",
    ),
]


@BOTH
def test_every_invariant_that_is_broken_is_found(make_box, tmp_path: Path, request) -> None:
    box = make_box()
    jobs = fill(box)
    box.stop()
    data, url = box.server.folder.path, box.server.settings.database_url
    for number, (statement, finding) in enumerate(DAMAGE):
        if url.startswith("sqlite"):
            copy = f"sqlite:///{tmp_path}/copy{number}.db"
            shutil.copyfile(data / "sftd.db", tmp_path / f"copy{number}.db")
            with closing(sqlite3.connect(tmp_path / f"copy{number}.db")) as file:
                file.execute(statement)
                file.commit()
        else:
            postgres, name = request.getfixturevalue("postgres"), f"damaged_{number}"
            postgres.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {url.rsplit('/', 1)[1]}")
            postgres.execute(name, statement)
            copy = postgres.url(name)

        found = list(check(Settings(data=data, database_url=copy), deep=False))

        assert any(line.startswith(finding.format(*jobs)) for line in found), (statement, found)
        if not url.startswith("sqlite"):
            postgres.drop(copy)


def test_damaged_and_missing_files_are_found(make_box, admin: Admin, tmp_path: Path) -> None:
    box = make_box()
    done, *_ = fill(box)
    data = tmp_path / "data"
    (data / "jobs" / done / "checkpoints" / "checkpoint-10" / "weights").write_bytes(b"x" * 10)
    (data / "jobs" / done / "results" / "adapter").unlink()

    shallow = admin("check", "--data", data)
    deep = admin("check", "--deep", "--data", data)
    saved = admin("backup", tmp_path / "saved", "--data", data)
    quick = admin("backup", tmp_path / "saved", "--data", data, "--quick")

    assert (shallow.returncode, deep.returncode) == (1, 1)
    assert "adapter is not there" in shallow.stdout
    assert "weights differs from what is on record" in deep.stdout
    assert len(deep.stdout.splitlines()) == len(shallow.stdout.splitlines()) + 1 == 2
    assert saved.returncode == 2
    assert "weights differs" in saved.stderr
    assert quick.returncode == 1  # what there is, is saved; what is missing is said
    assert "results/adapter" in quick.stderr
    assert (tmp_path / "saved" / "sftd.db").exists()
    restored = admin("restore", tmp_path / "saved", "--data", tmp_path / "again")
    assert restored.returncode == 2  # a hash is wrong
    assert not (tmp_path / "again").exists()
    assert admin("restore", tmp_path / "saved", "--data", tmp_path / "again", "--quick").returncode == 0


def test_what_the_store_alone_has_is_counted_and_looked_for(make_box, admin: Admin, tmp_path: Path) -> None:
    store = tmp_path / "store"
    url = {"SFTD_ARTIFACTS_URL": f"file://{store}"}
    box = make_box(artifacts_url=url["SFTD_ARTIFACTS_URL"], mirror_seconds=3600)
    done, *_ = fill(box)
    result = tmp_path / "data" / "jobs" / done / "results" / "adapter"
    # The folders of checkpoints have no manifest here, and are not mirrored.
    box.run(Mirror(box.server).tick())
    result.unlink()
    data = ("--data", tmp_path / "data")

    assert admin("check", "--deep", *data, **url).returncode == 0
    saved = admin("backup", tmp_path / "saved", *data, **url)
    restored = admin("restore", tmp_path / "saved", "--data", tmp_path / "again", **url)
    not_told_where = admin("restore", tmp_path / "saved", "--data", tmp_path / "third")
    assert (saved.returncode, restored.returncode, not_told_where.returncode) == (0, 0, 1)
    assert "NOT in this backup: 1 file (10 bytes)" in saved.stdout
    assert json.loads((tmp_path / "saved" / "backup.json").read_text())["num_only_in_store"] == 1
    assert "1 file (10 bytes) were not in the backup" in restored.stdout
    assert "SFTD_ARTIFACTS_URL" in not_told_where.stderr
    assert (tmp_path / "third" / "sftd.db").exists()  # what there is, is there
    assert "SFTD_ARTIFACTS_URL" in admin("check", *data).stdout

    (blob,) = (store / "blobs").rglob(hashlib.sha256(b"the result").hexdigest())
    blob.write_bytes(b"the re5ult")
    assert admin("check", *data, **url).returncode == 0
    assert "has another hash there" in admin("check", "--deep", *data, **url).stdout
    blob.write_bytes(b"the")
    assert "has 3 bytes there" in admin("check", *data, **url).stdout
    blob.unlink()
    gone = "results/adapter is neither there nor in the artifact store"
    assert gone in admin("check", *data, **url).stdout
    lost = admin("restore", tmp_path / "saved", "--data", tmp_path / "fourth", **url)
    assert lost.returncode == 1
    assert f"jobs/{done}/results/adapter (job {done}, result) is neither" in lost.stderr


def test_a_blob_that_leaves_the_store_does_not_count_as_stored(
    make_box, admin: Admin, tmp_path: Path
) -> None:
    box = make_box(artifacts_url=f"file://{tmp_path}/store", mirror_seconds=3600)
    done, *_ = fill(box)
    box.run(Mirror(box.server).tick())
    (tmp_path / "data" / "jobs" / done / "results" / "adapter").unlink()
    leaving = update(StoredRow).values(bytes=LEAVING)
    box.run(box.server.db.write(lambda session: session.exec(leaving).rowcount))

    found = admin("check", "--data", tmp_path / "data", SFTD_ARTIFACTS_URL=f"file://{tmp_path}/store")
    saved = admin("backup", tmp_path / "saved", "--data", tmp_path / "data")

    assert "results/adapter is not there" in found.stdout
    assert (found.returncode, saved.returncode) == (1, 1)
    assert "results/adapter" in saved.stderr


def test_nothing_is_written_over(make_box, admin: Admin, tmp_path: Path) -> None:
    box = make_box()
    box.submit()
    assert admin("backup", tmp_path / "saved", "--data", tmp_path / "data").returncode == 0

    again = admin("backup", tmp_path / "saved", "--data", tmp_path / "data")
    onto = admin("restore", tmp_path / "saved", "--data", tmp_path / "data")
    no_backup = admin("restore", tmp_path / "data", "--data", tmp_path / "new")
    nothing = admin("check", "--data", tmp_path / "new")

    assert [run.returncode for run in (again, onto, no_backup, nothing)] == [2, 2, 2, 2]
    assert "exists" in again.stderr
    assert "is not empty" in onto.stderr
    assert "is no backup" in no_backup.stderr
    assert "There is no database" in nothing.stderr
    assert not (tmp_path / "new").exists()


def test_files_are_linked_on_the_same_file_system(make_box, admin: Admin, tmp_path: Path) -> None:
    done, *_ = fill(make_box())

    assert admin("backup", tmp_path / "saved", "--data", tmp_path / "data").returncode == 0

    weights = f"jobs/{done}/checkpoints/checkpoint-20/weights"
    assert os.path.samefile(tmp_path / "saved" / weights, tmp_path / "data" / weights)
    assert not os.path.samefile(tmp_path / "saved" / "sftd.db", tmp_path / "data" / "sftd.db")
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o700


def test_a_damaged_source_is_not_moved(make_box, admin: Admin, tmp_path: Path, postgres: Postgres) -> None:
    box = make_box()
    box.running().post("logs", seq=0, lines=["x"])
    box.stop()
    with closing(sqlite3.connect(tmp_path / "data" / "sftd.db")) as file:
        file.execute("DELETE FROM job")  # without what refers to it
        file.commit()
    url = postgres.create(empty=True)

    moved = admin("migrate-db", "--from", f"sqlite:///{tmp_path}/data/sftd.db", "--to", url)

    assert moved.returncode == 2
    assert "Nothing was kept" in moved.stderr
    assert postgres.execute(url.rsplit("/", 1)[1], "SELECT count(*) FROM key") == [(0,)]
    checked = admin("check", "--data", tmp_path / "data")
    assert "refers to a row of job that is not there" in checked.stdout
    postgres.drop(url)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["migrate-db", "--from", "mysql://x", "--to", "postgresql://h/d"],
            "--from only SQLite and PostgreSQL",
        ),
        (["migrate-db", "--from", "sqlite:///x.db", "--to", "sqlite:///y.db"], "of different kinds"),
        (["migrate-db", "--from", "sqlite:////nowhere/x.db", "--to", "postgresql://h/d"], "There is no file"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_wrong_call_is_told_in_a_sentence(admin: Admin, arguments: list[str], says: str) -> None:
    run = admin(*arguments)

    assert run.returncode == 2
    assert says in run.stderr


def test_the_command_line_hands_over(make_box, tmp_path: Path) -> None:
    make_box().submit()
    command = [sys.executable, "-m", "sftd.cli", "admin"]

    checked = subprocess.run(
        [*command, "check", "--data", str(tmp_path / "data")], capture_output=True, text=True
    )
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    wrong = subprocess.run([*command, "check", "--nonsense"], capture_output=True, text=True)

    assert (checked.returncode, checked.stdout) == (0, "nothing wrong was found\n")
    assert "migrate-db" in helped.stdout
    assert wrong.returncode == 2
