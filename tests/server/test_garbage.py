"""Spools, uploads, blobs and the cache: what goes, what stays, and the routes about the disk."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import Session, select

from sftd_server.files import store
from sftd_server.garbage import is_all_held
from sftd_server.jobs import service, submission
from sftd_server.tables import FileRow

OLD = "2020-01-01"


@pytest.fixture
def make_box(make_box):
    """Servers whose janitor has made its first round, so that it does not meet what a test lays down."""

    def make(**settings):
        box = make_box(**settings)
        collect(box)
        return box

    return make


def collect(box, **how) -> list:
    return box.run(box.app.state.janitor.collect(**how))


def lines(*told: tuple[str, int]) -> str:
    return "".join(json.dumps({"type": kind, "attempt": attempt, "at": 0}) + "\n" for kind, attempt in told)


def compact(*told: tuple[str, int]) -> str:
    return lines(*told).replace(" ", "")


def age(path: Path, moment: float) -> None:
    os.utime(path, (moment, moment))


# ---------------------------------------------------------------- spools


@pytest.mark.parametrize("write", [lines, compact])
def test_a_spool_is_held_when_every_line_was_acknowledged_or_refused(tmp_path: Path, write) -> None:
    spool, rejected = tmp_path / "events.jsonl", tmp_path / "rejected.jsonl"
    spool.write_text(
        write(
            ("step", 1), ("log", 1), ("run", 1), ("evaluation", 1), ("checkpoint", 1), ("step", 2), ("end", 2)
        )
        + '{"type":"step","attempt":2,"at":0'  # torn by a kill
    )
    held = {(1, "metrics"): 1, (1, "logs"): 1, (1, "events"): 2, (2, "metrics"): 1}

    assert is_all_held(spool, rejected, held)
    for key in held:
        assert not is_all_held(spool, rejected, {**held, key: held[key] - 1}), key
    rejected.write_text(json.dumps({"kind": "events", "why": "", "item": {}}) + "\n")
    assert is_all_held(spool, rejected, {**held, (1, "events"): 1})
    assert not is_all_held(spool, rejected, {**held, (1, "events"): 0})
    assert not is_all_held(spool, rejected, {**held, (1, "logs"): 0})


def test_an_old_spool_goes_if_the_server_holds_all_of_it_and_stays_if_not(make_box) -> None:
    box = make_box(finished_spool_days=30)
    spools = []
    for told in (2, 3):
        lease = box.running()
        lease.metrics(0, (1, {"loss": 1}), (2, {"loss": 1}))
        logs = box.server.folder.path / "jobs" / lease.job_id / "logs"
        logs.mkdir(parents=True)
        (logs / "events.jsonl").write_text(compact(*[("step", 1)] * told))
        (logs / "rejected.jsonl").write_text("")
        (logs / "training_log.txt").write_text("for a person")
        spools.append(logs / "events.jsonl")
        lease.finish("failed")
    running = box.running()
    logs = box.server.folder.path / "jobs" / running.job_id / "logs"
    logs.mkdir(parents=True)
    (logs / "events.jsonl").write_text("")

    assert collect(box) == []
    box.clock.advance(31 * 86400)
    removed = collect(box)

    assert [(item.kind, item.name.rsplit("/", 1)[1]) for item in removed] == [
        ("spool", "events.jsonl"),
        ("spool", "rejected.jsonl"),
    ]
    assert [spool.exists() for spool in spools] == [False, True]
    assert (spools[0].parent / "training_log.txt").exists()
    assert (logs / "events.jsonl").exists()
    assert collect(box) == []


# ---------------------------------------------------------------- uploads and blobs


def test_old_uploads_that_no_job_has_named_go_with_their_content(make_box) -> None:
    box = make_box(unused_file_days=10)
    used, unused = box.upload(b'{"prompt": "a", "completion": "used"}\n'), box.upload()
    lease = box.running(training_file=used)
    lease.finish("failed")
    assert collect(box) == []
    box.clock.advance(11 * 86400)
    young = box.upload(b'{"prompt": "a", "completion": "young"}\n')

    removed = collect(box)

    assert [(item.kind, item.name) for item in removed] == [("file", unused)]
    assert {file["id"] for file in box.admin.get("/files").json()["data"]} == {used, young}
    assert box.admin.get(f"/files/{used}/content").status_code == 200
    blobs = list((box.server.folder.path / "blobs").glob("sha256/*/*"))
    assert len(blobs) == 2


def test_uploads_stay_for_ever_unless_a_limit_is_set(box) -> None:
    file_id = box.upload()
    box.clock.advance(1000 * 86400)

    assert collect(box) == []
    assert box.admin.get(f"/files/{file_id}/content").status_code == 200


def test_a_job_posted_since_the_look_keeps_its_upload(box) -> None:
    used, validating, unused = (box.upload(b'{"text": "%d"}' % i) for i in range(3))
    box.submit(training_file=used, validation_file=validating)

    assert [box.run(store.remove_unused(box.server, name)) for name in (used, validating, unused)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("database", ["postgres"], indirect=True, scope="module")
def test_a_job_whose_number_is_not_the_newest_keeps_its_upload_at_whatever_moment_it_is_posted(
    make_box,
) -> None:
    here, there = make_box(unused_file_days=1), make_box()
    file_id, other = here.upload(), here.upload(b'{"text": "another"}')
    inputs = here.spec(training_file=file_id)
    spec, found = here.run(
        here.server.db.read(
            lambda session: submission.check(session, inputs, submission.Sources(here.server.folder, ()))
        )
    )
    submitted = service.Submission(spec, found, "admin", None, "")
    here.clock.advance(2 * 86400)

    with ThreadPoolExecutor(1) as pool:
        with there.in_open_write(lambda s: service.submit(s, submitted, there.clock.now())):
            here.submit(training_file=other)  # committed first, with the higher number
            collecting = pool.submit(collect, here)
            with pytest.raises(TimeoutError):
                collecting.result(0.3)
        assert [item for item in collecting.result(20) if item.kind == "file"] == []

    assert here.admin.get(f"/files/{file_id}/content").status_code == 200


def test_blobs_without_a_record_go_after_a_day_and_those_of_checkpoints_stay(box) -> None:
    data = box.server.folder.path
    now = box.clock.now().timestamp()

    def blob(digit: str, days: float) -> Path:
        path = data / "blobs" / "sha256" / (digit * 2) / (digit * 64)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        age(path, now - days * 86400)
        return path

    old, young, of_checkpoint, of_result = blob("1", 2), blob("2", 0.5), blob("3", 9), blob("4", 9)
    upload = box.upload()
    lease = box.running(training_file=upload)
    lease.checkpoint(1, files={"w": {"bytes": 1, "sha256": "3" * 64}})
    lease.finish(files={"w": {"bytes": 1, "sha256": "4" * 64}})
    with Session(box.server.db.engine.execution_options()) as session:
        sha = session.exec(select(FileRow.sha256)).one()
    age(data / box.server.folder.blob_name(sha), 0)

    removed = collect(box)

    assert [(item.kind, Path(item.name).name) for item in removed] == [("blob", "1" * 64)]
    assert [path.exists() for path in (old, young, of_checkpoint, of_result)] == [False, True, True, True]
    assert box.admin.get(f"/files/{upload}/content").status_code == 200


# ---------------------------------------------------------------- the cache


def test_the_cache_loses_what_was_used_longest_ago_but_nothing_in_use(make_box) -> None:
    box = make_box(cache_max_bytes=250)
    now, cache = box.clock.now(), box.server.folder.path / "cache"

    def entry(name: str, used: timedelta) -> Path:
        path = cache / name
        path.write_bytes(b"x" * 100)
        age(path, (now - used).timestamp())
        return path

    entries = [entry(f"rows-{days}.arrow", timedelta(days=days)) for days in (9, 5, 3)]
    folder = cache / "folder"
    folder.mkdir()
    (folder / "x").write_bytes(b"x" * 100)
    age(folder / "x", (now - timedelta(days=8)).timestamp())
    age(folder, (now - timedelta(days=99)).timestamp())

    removed = collect(box)

    assert [(item.kind, item.name) for item in removed] == [
        ("cache", "cache/rows-9.arrow"),
        ("cache", "cache/folder"),
    ]
    assert [path.exists() for path in entries] == [False, True, True]

    box.running()  # claimed now
    entry("rows-new.arrow", timedelta(hours=1))
    entry("rows-used.arrow", timedelta(hours=20))
    assert [item.name for item in collect(box)] == ["cache/rows-5.arrow", "cache/rows-3.arrow"]
    box.server.settings = box.server.settings.model_copy(update={"cache_max_bytes": 1})
    assert collect(box) == []  # the rest may be what the running job reads


def test_where_no_reads_are_noted_what_a_trainer_touched_since_its_claim_stays(make_box) -> None:
    box = make_box(cache_max_bytes=1)
    box.running()
    entry = box.server.folder.path / "cache" / "rows-used.arrow"
    entry.write_bytes(b"x" * 100)
    now = box.clock.now().timestamp()
    os.utime(entry, (now - 90 * 86400, now + 60))

    box.clock.advance(60 * 86400)  # it trains for long, and nothing else tells that the entry is in use
    assert collect(box) == []


# ---------------------------------------------------------------- the routes


@pytest.mark.sqlite
def test_the_disk_is_shown_by_kind_with_what_would_go_next(make_box, assert_error) -> None:
    box = make_box(keep_checkpoints=10)
    lease = box.running()
    job = box.server.folder.path / "jobs" / lease.job_id
    for step in (10, 20, 30):
        folder = job / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(b"x" * 100)
        files = {"manifest.json": {"bytes": 100, "sha256": "ab" * 32}}
        lease.checkpoint(step, files=files, manifest_sha256=hashlib.sha256(b"x" * 100).hexdigest())
    lease.finish("failed")  # else the janitor may hear of the last one only when less is kept
    (job / "results").mkdir()
    (job / "results" / "model").write_bytes(b"x" * 50)
    (job / "checkpoints" / ".stage-1").mkdir()
    (job / "checkpoints" / ".stage-1" / "w").write_bytes(b"x" * 7)
    box.server.settings = box.server.settings.model_copy(update={"keep_checkpoints": 2})

    shown = box.key("u").get("/storage").json()

    assert shown["bytes"]["checkpoints"] == 300
    assert shown["bytes"]["results"] == 50
    assert shown["bytes"]["leftovers"] == 7
    assert shown["bytes"]["database"] > 0
    assert shown["bytes"]["ballast"] == 16 * 1024**2
    assert 0 < shown["free_bytes"] < shown["total_bytes"]
    assert shown["low"] is False
    assert [(item["kind"], item["job_id"], item["step"]) for item in shown["next"]] == [
        ("checkpoint", lease.job_id, 10),
        ("leftover", lease.job_id, None),
    ]
    assert shown["next_bytes"] == 107

    assert_error(box.key("v").post("/storage/collect"), 403, "admin_only")
    assert_error(box.admin.post("/storage/collect?dry_run=perhaps"), 422, "invalid_request")
    dry = box.admin.post("/storage/collect?dry_run=true").json()
    assert (dry["dry_run"], dry["freed_bytes"], (job / "checkpoints/checkpoint-10").exists()) == (
        True,
        107,
        True,
    )
    done = box.admin.post("/storage/collect").json()
    assert (done["dry_run"], done["freed_bytes"], [item["step"] for item in done["removed"]]) == (
        False,
        107,
        [10, None],
    )
    again = box.admin.post("/storage/collect").json()
    assert (again["freed_bytes"], again["removed"]) == (0, [])
