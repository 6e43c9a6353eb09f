"""Files whose rows are checked after they were taken in, and the jobs that wait for that."""

import asyncio
import hashlib
import http.client
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlmodel import Session, col, select, update
from tests.waiting import until

from sftd_server.disk import try_lock
from sftd_server.engines import make_engine
from sftd_server.files import checker, store
from sftd_server.files import checks as checks_module
from sftd_server.files.checks import CheckFailed, Checks
from sftd_server.files.rowcheck import Verdict, verdict_on
from sftd_server.tables import FileRow

GOOD = b'{"prompt": "2+2?", "completion": "4"}\n'
BAD = b'{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "a"}\n'


def post(box, content: bytes, name: str = "rows.jsonl", purpose: str = "fine-tune", **fields: str):
    answer = box.admin.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def checked(box, file_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = box.admin.get(f"/v1/files/{file_id}").json()
        return None if found["status"] == "uploaded" else found

    return until(look)


@pytest.fixture
def held(box):
    """A server that has a good file, and whose further checks wait until they are let go."""
    box.spec()
    return hold(box)


def hold(box):
    gate, verdict = asyncio.Event(), box.server.checks.verdict
    box.begun = []

    async def wait(path: Path, **of: Any):
        box.begun.append(of["sha256"])
        await gate.wait()
        return await verdict(path, **of)

    box.server.checks.verdict = wait
    box.let_go = lambda: box.loop.call_soon_threadsafe(gate.set)
    return box


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def status_of(session: Session, file_id: str) -> str:
    return session.exec(select(FileRow.status).where(FileRow.id == file_id)).one()


def test_a_file_is_answered_at_once_and_checked_after_that(held) -> None:
    made = post(held, GOOD)
    assert (made["status"], made["num_rows"], made["status_details"]) == ("uploaded", None, None)
    held.let_go()

    done = checked(held, made["id"])

    assert (done["status"], done["format"], done["num_rows"]) == ("processed", "prompt_completion", 1)
    assert held.admin.get(f"/files/{made['id']}").json()["status"] == "processed"


def test_an_invalid_file_says_what_is_wrong_line_by_line(box) -> None:
    done = checked(box, post(box, BAD)["id"])

    assert done["status"] == "error"
    lines = done["status_details"].split("\n")
    assert [line.split(",")[0] for line in lines] == ["line 2", "line 3"]


def test_what_is_wrong_is_told_in_bounds(box) -> None:
    bad = b'{"messages": [{"role": "' + b"x" * 10_000 + b'", "content": ""}]}\n'

    done = checked(box, post(box, bad * 24)["id"])

    assert len(done["status_details"]) < 15_000
    assert done["status_details"].endswith("and 4 more")


def test_a_row_with_nul_in_a_field_name_is_told_on_every_database(box) -> None:
    done = checked(box, post(box, b'{"a\\u0000\\n": 1}\n')["id"])

    assert (done["status"], done["status_details"].count("\n")) == ("error", 0)


def test_the_same_content_is_checked_once_and_stored_once(held) -> None:
    first, second = post(held, BAD, "one"), post(held, BAD, "two")
    held.let_go()
    wrong = checked(held, first["id"])["status_details"]

    assert checked(held, second["id"])["status_details"] == wrong
    assert post(held, BAD, "three")["status_details"] == wrong  # known at once
    refused = held.admin.post("/files", files={"file": ("four", BAD)})
    assert refused.json()["error"]["message"] == "\n".join(f"four: {line}" for line in wrong.split("\n"))
    assert len(held.begun) == 1
    blobs = [path.name for path in (held.server.folder.path / "blobs").rglob("*") if path.is_file()]
    assert blobs.count(sha(BAD)) == 1


def test_what_another_release_has_found_wrong_is_looked_at_anew(held) -> None:
    first = post(held, GOOD)["id"]
    old = Verdict(None, None, "line 1, row: is more than this release reads"), held.clock.now()
    held.run(held.server.db.write(lambda session: checker.settle(session, sha(GOOD), *old)))
    held.let_go()
    assert checked(held, first)["status"] == "error"

    assert checked(held, post(held, GOOD)["id"])["status"] == "processed"


def test_few_verdicts_are_remembered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checks_module, "MAX_KNOWN", 2)
    path, own = tmp_path / "rows", Checks(tmp_path)
    path.write_bytes(GOOD)

    for name in "abac":
        asyncio.run(own.verdict(path, num_bytes=1, sha256=name))

    assert [bool(own.known(name)) for name in "abc"] == [True, False, True]


def test_files_for_other_purposes_are_kept_as_they_are_and_train_nothing(box, assert_error) -> None:
    made = post(box, b"PK\x03\x04 no rows", purpose="assistants")
    assert (made["status"], made["purpose"], made["num_rows"]) == ("processed", "assistants", None)

    answer = box.admin.post("/jobs", json=box.spec(training_file=made["id"]))

    assert "purpose fine-tune" in assert_error(answer, 422, "invalid_spec")["message"]


@pytest.mark.parametrize("purpose", ["evil", "fine-tune-results"])
def test_a_purpose_that_nobody_may_upload_for_is_refused(shared_box, purpose: str) -> None:
    answer = shared_box.admin.post("/v1/files", files={"file": b"{}"}, data={"purpose": purpose})

    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == "purpose"


def test_archives_are_refused_at_once(shared_box, assert_error) -> None:
    answer = shared_box.admin.post(
        "/v1/files", files={"file": b"PK\x03\x04zip"}, data={"purpose": "fine-tune"}
    )

    assert_error(answer, 415, "archive_refused")


def test_a_job_waits_until_its_file_has_been_checked(held) -> None:
    file_id = post(held, GOOD)["id"]

    job_id = held.submit(training_file=file_id, num_epochs=1)

    assert "its training file is still being checked" in held.job(job_id)["why_waiting"]
    assert held.try_claim().status_code == 204
    held.let_go()
    checked(held, file_id)
    assert "checked" not in held.job(job_id)["why_waiting"]
    assert held.claim().job_id == job_id


def test_a_job_whose_file_comes_while_a_check_is_written_down_waits_no_longer(held) -> None:
    """Its file is committed after the look at what is to be written, and before that is written."""
    if not held.server.db.shared:
        pytest.skip("only where several servers write at once")
    post(held, GOOD)
    jobs: list[str] = []

    class Overtaken(Session):
        def exec(self, statement: Any, **more: Any) -> Any:
            found = super().exec(statement, **more)
            if not jobs:
                jobs.append(held.submit(training_file=post(held, GOOD)["id"]))
            return found

    with Overtaken(make_engine(held.server.settings.database_url)) as session:  # as of another server
        checker.settle(session, sha(GOOD), Verdict("prompt_completion", 1, None), held.clock.now())
        session.commit()

    assert held.claim().job_id == jobs[0]


@pytest.mark.parametrize(("content", "state"), [(GOOD, "queued"), (BAD, "failed")])
def test_a_job_that_waits_for_a_check_that_is_over_goes_on_by_itself(
    box, monkeypatch, content: bytes, state: str
) -> None:
    monkeypatch.setattr(checker, "LOOK_SECONDS", 0.02)
    box.spec()
    file_id = post(hold(box), content)["id"]
    job_id = box.submit(training_file=file_id)
    forgotten = update(FileRow).where(col(FileRow.id) == file_id)
    forgotten = forgotten.values(**store.columns_of(Verdict(None, 1, None if content == GOOD else "line 2")))

    box.run(box.server.db.write(lambda session: session.exec(forgotten).rowcount))

    until(lambda: "checked" not in (box.job(job_id)["why_waiting"] or ""))
    assert box.state(job_id) == state


def test_a_worker_that_waits_for_work_is_woken_by_the_end_of_a_check(held) -> None:
    file_id = post(held, GOOD)["id"]
    job_id = held.submit(training_file=file_id)
    held.register()
    held.loop.call_soon_threadsafe(held.loop.call_later, 0.05, held.let_go)

    assert held.claim(wait_seconds=10).job_id == job_id


def test_a_job_whose_file_turns_out_wrong_fails_and_takes_along_what_waits_for_it(held) -> None:
    bad = post(held, BAD)["id"]
    job_id = held.submit(validation_file=bad)
    behind = held.submit(after=[job_id])
    assert "its validation file is still being checked" in held.job(job_id)["why_waiting"]
    held.let_go()
    checked(held, bad)

    failure = held.job(job_id)["failure"]

    assert failure["reason"] == "bad_data"
    assert "line 2" in failure["message"]
    assert bad in failure["message"]
    assert held.job(behind)["failure"]["reason"] == "dependency_failed"
    assert held.events(job_id) == ["queued", "failed"]


def test_a_paused_job_fails_for_its_file_when_it_is_resumed(held) -> None:
    bad = post(held, BAD)["id"]
    job_id = held.submit(training_file=bad)
    held.admin.post(f"/jobs/{job_id}/pause")
    held.let_go()
    checked(held, bad)
    assert held.state(job_id) == "paused"

    assert held.admin.post(f"/jobs/{job_id}/resume").json()["state"] == "failed"


def test_a_job_with_a_file_that_is_known_to_be_wrong_is_refused_with_the_lines(box, assert_error) -> None:
    bad = post(box, BAD)["id"]
    checked(box, bad)

    answer = box.admin.post("/jobs", json=box.spec(training_file=bad))

    error = assert_error(answer, 422, "invalid_spec")
    assert error["param"] == "training_file"
    assert "line 2, row: is not JSON" in error["message"]


def test_a_file_that_turns_out_wrong_while_its_job_is_posted_is_seen_by_one_of_the_two(held) -> None:
    """The post has looked the file up, and is written only after the check's end."""
    bad = post(held, BAD)["id"]
    spec = held.spec(training_file=bad)
    read = held.server.db.read
    looked = []

    async def slow(work):
        found = await read(work)
        if not looked and isinstance(found, tuple) and len(found) == 3:  # the spec, its inputs, no origin
            looked.append(held.let_go())
            while (await read(lambda session: status_of(session, bad))) == "uploaded":
                pass
        return found

    held.server.db.read = slow
    answer = held.admin.post("/jobs", json=spec)
    assert answer.status_code == 422
    assert "line 2" in answer.json()["error"]["message"]


def test_a_client_that_leaves_while_it_waits_for_the_check_leaves_nothing_half_done(held) -> None:
    good, bad = b'{"text": "left behind"}', b"not json"
    for content in (good, bad):
        request = held.admin.build_request("POST", "/files", files={"file": content})
        connection = http.client.HTTPConnection(request.url.netloc.decode())
        connection.request("POST", "/files", request.read(), dict(request.headers))
        until(lambda: held.begun)
        held.begun.clear()
        connection.close()
    before = len(held.admin.get("/files").json()["data"])
    held.let_go()

    def files() -> list[dict[str, Any]]:
        return held.admin.get("/files").json()["data"]

    until(lambda: len(files()) > before)
    until(lambda: not list(held.server.folder.tmp.iterdir()))
    assert len(files()) == before + 1
    assert (files()[0]["sha256"], files()[0]["status"]) == (sha(good), "processed")


def test_a_check_goes_on_after_a_restart(make_box) -> None:
    box = hold(make_box())
    file_id = post(box, GOOD)["id"]
    job_id = box.submit(training_file=file_id)
    until(lambda: box.begun)
    box.stop()

    again = make_box()

    assert checked(again, file_id)["status"] == "processed"
    assert again.claim().job_id == job_id


def test_a_content_that_another_server_checks_is_left_to_it_until_it_dies(box, monkeypatch) -> None:
    monkeypatch.setattr(checker, "LOOK_SECONDS", 0.02)
    took = []
    really_publish = store.publish

    def publish_and_hold(temporary: Path, blob: Path) -> None:
        really_publish(temporary, blob)
        took.append(try_lock(blob))  # as the other server, which was quicker

    monkeypatch.setattr(store, "publish", publish_and_hold)
    file_id = post(box, GOOD)["id"]
    for _ in range(10):
        assert box.admin.get(f"/files/{file_id}").json()["status"] == "uploaded"

    os.close(took[0])

    assert checked(box, file_id)["status"] == "processed"


def test_what_a_check_found_is_written_once(box) -> None:
    file_id = box.upload(GOOD)
    late = Verdict(None, None, "line 1, row: of a server that was slow")
    now = box.clock.now()

    box.run(box.server.db.write(lambda session: checker.settle(session, sha(GOOD), late, now)))

    assert box.admin.get(f"/files/{file_id}").json()["status"] == "processed"


def test_a_large_file_is_checked_in_a_process_of_its_own_which_dies_with_its_asker(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(GOOD * 400_000)  # a few hundred milliseconds
    own = Checks(tmp_path)

    async def ask_and_leave() -> psutil.Process:
        asking = asyncio.create_task(own.verdict(path, num_bytes=path.stat().st_size, sha256="ab"))
        before = {child.pid for child in psutil.Process().children()}
        while not (new := [c for c in psutil.Process().children() if c.pid not in before]):
            await asyncio.sleep(0.002)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return new[0]

    child = asyncio.run(ask_and_leave())

    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_both_ways_of_checking_say_the_same(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rows"
    path.write_bytes(GOOD + BAD)
    monkeypatch.setattr(checks_module, "SMALL_BYTES", 10)

    found = asyncio.run(Checks(tmp_path).verdict(path, num_bytes=100, sha256="ab"))

    assert found == verdict_on(path)
    assert (tmp_path / "rows-ab").stat().st_size == 16


def test_a_check_that_dies_is_tried_again_and_at_last_said(box, monkeypatch) -> None:
    monkeypatch.setattr(checker, "LOOK_SECONDS", 0.01)
    tries = []

    async def die(path: Path, **of: Any):
        tries.append(path)
        raise CheckFailed("its process ended with -9")

    verdict = box.server.checks.verdict
    box.server.checks.verdict = die
    file_id = post(box, GOOD)["id"]

    done = checked(box, file_id)
    assert (done["status"], len(tries)) == ("error", 3)
    assert "could not be checked" in done["status_details"]
    unavailable = box.admin.post("/files", files={"file": GOOD})
    assert (unavailable.status_code, unavailable.json()["error"]["code"]) == (503, "check_failed")
    box.server.checks.verdict = verdict
    assert checked(box, post(box, GOOD)["id"])["status"] == "processed"  # not the file's fault


def test_a_file_that_is_deleted_when_its_check_begins_leaves_no_empty_content(box, monkeypatch) -> None:
    seen, deleted, done = threading.Event(), threading.Event(), threading.Event()

    def late(path: Path, **how: Any) -> int | None:
        seen.set()
        assert deleted.wait(10)
        try:
            return try_lock(path, **how)
        finally:
            done.set()

    monkeypatch.setattr(checker, "try_lock", late)
    file_id = post(box, GOOD)["id"]
    assert seen.wait(10)
    assert box.admin.delete(f"/files/{file_id}").status_code == 204
    deleted.set()
    assert done.wait(10)

    assert [path for path in (box.server.folder.path / "blobs").rglob("*") if path.is_file()] == []
    assert checked(box, post(box, GOOD)["id"])["status"] == "processed"


def test_a_check_of_a_file_that_is_deleted_meanwhile_says_nothing_of_one_that_comes_later(held) -> None:
    """And leaves no marks behind."""
    marks = held.server.checks.marks(sha(GOOD))
    first = post(held, GOOD)["id"]
    until(lambda: held.begun)
    held.admin.delete(f"/files/{first}")
    marks.write_bytes(b"x" * 16)  # as the check's process does
    held.let_go()
    until(lambda: not marks.exists())

    for _ in range(2):
        assert checked(held, post(held, GOOD)["id"])["status"] == "processed"


def test_checks_that_wait_for_their_turn_hold_no_file_open(held, monkeypatch) -> None:
    opened: list[Path] = []

    def noted(path: Path, **how: Any) -> int | None:
        opened.append(path)
        return try_lock(path, **how)

    monkeypatch.setattr(checker, "try_lock", noted)
    ids = [post(held, b'{"text": "%d"}' % number)["id"] for number in range(6)]
    until(lambda: len(held.begun) == 4)
    assert len(opened) == 4
    held.let_go()

    assert {checked(held, file_id)["status"] for file_id in ids} == {"processed"}


def test_a_file_whose_content_is_gone_is_not_waited_for(held) -> None:
    held.server.checks.verdict = None  # never asked
    content = b'{"text": "gone"}'
    blob = held.server.folder.path / held.server.folder.blob_name(sha(content))

    def vanish(temporary: Path, blob: Path) -> None:
        temporary.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "publish", vanish)
        file_id = post(held, content)["id"]

    assert not blob.exists()
    assert "no longer on disk" in checked(held, file_id)["status_details"]
