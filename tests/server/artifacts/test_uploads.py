"""Uploads of workers without the shared folder: in pieces, resumable, hashed; and what they become."""

import asyncio
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import CancelledError

import pytest

from sftd.protocol import CheckpointReport, Finish
from sftd.schemas import ManifestFile
from sftd_server.artifacts import placing
from sftd_server.artifacts.placing import checkpoint_to_place, result_to_place
from sftd_server.errors import Unavailable
from sftd_server.workers import endings, leases

SEVERAL_SERVERS = pytest.mark.parametrize("database", ["postgres"], indirect=True, scope="module")

WEIGHTS = bytes(range(256)) * 20_000  # 5 MB


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_of(content: dict[str, bytes]) -> dict:
    return {name: {"bytes": len(data), "sha256": sha(data)} for name, data in content.items()}


def manifest_of(step: int, content: dict[str, bytes]) -> bytes:
    return json.dumps({"step": step, "attempt": 1, "files": files_of(content)}).encode()


def put(lease, content: bytes, first: int, last: int, *, name: str | None = None, **more):
    """Bytes first..last (inclusive) of a blob."""
    piece = content[first : last + 1]
    return call(lease, name or sha(content), piece, f"bytes {first}-{last}/{len(content)}", **more)


def ask(lease, content: bytes):
    return call(lease, sha(content), b"", f"bytes */{len(content)}")


def call(lease, name: str, piece: bytes, content_range: str, **more):
    return lease.worker.put(
        f"/worker/blobs/{name}",
        params={"job_id": more.get("job_id", lease.job_id), "attempt": more.get("attempt", lease.attempt)},
        content=piece,
        headers={"X-Lease-Token": more.get("token", lease.token), "Content-Range": content_range},
    )


def send(lease, *contents: bytes) -> None:
    for content in contents:
        answer = put(lease, content, 0, len(content) - 1)
        assert answer.status_code == 201, answer.text


def report(lease, step: int, content: dict[str, bytes], **more):
    body = {"manifest_sha256": sha(manifest_of(step, content)), "files": files_of(content), "uploaded": True}
    return lease.checkpoint(step, **{**body, **more})


def uploads(box, lease) -> list[str]:
    folder = box.server.folder.uploads / lease.job_id
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# ---------------------------------------------------------------- pieces


def test_an_upload_goes_on_where_it_stands(box) -> None:
    lease = box.running()

    assert "range" not in ask(lease, WEIGHTS).headers
    first = put(lease, WEIGHTS, 0, 999_999)
    assert (first.status_code, first.headers["range"]) == (308, "bytes=0-999999")
    again = put(lease, WEIGHTS, 0, 999_999)  # its answer was lost
    assert (again.status_code, again.headers["range"]) == (308, "bytes=0-999999")
    gap = put(lease, WEIGHTS, 2_000_000, 2_999_999)
    assert (gap.status_code, gap.headers["range"]) == (308, "bytes=0-999999")
    assert ask(lease, WEIGHTS).headers["range"] == "bytes=0-999999"
    last = put(lease, WEIGHTS, 1_000_000, len(WEIGHTS) - 1)

    assert last.status_code == 201
    assert ask(lease, WEIGHTS).status_code == 201
    assert (box.server.folder.uploads / lease.job_id / sha(WEIGHTS)).read_bytes() == WEIGHTS


def test_a_server_started_again_goes_on_with_the_upload(make_box) -> None:
    box = make_box()
    lease = box.running()
    put(lease, WEIGHTS, 0, 999_999)
    box.stop()

    box = make_box()
    lease.worker = box.worker
    assert ask(lease, WEIGHTS).headers["range"] == "bytes=0-999999"
    assert put(lease, WEIGHTS, 1_000_000, len(WEIGHTS) - 1).status_code == 201


def test_a_part_whose_last_answer_was_lost_to_a_kill_is_finished_by_asking(box) -> None:
    lease = box.running()
    folder = box.server.folder.uploads / lease.job_id
    folder.mkdir()
    (folder / f"{sha(WEIGHTS)}.part").write_bytes(WEIGHTS)  # killed between the write and the rename

    assert ask(lease, WEIGHTS).status_code == 201
    assert uploads(box, lease) == [sha(WEIGHTS)]


def test_an_empty_file_is_whole_at_once(box) -> None:
    assert ask(box.running(), b"").status_code == 201


def test_wrong_bytes_are_dropped(box, assert_error) -> None:
    lease = box.running()
    wrong = b"x" + WEIGHTS[1:]

    assert_error(put(lease, wrong, 0, len(wrong) - 1, name=sha(WEIGHTS)), 422, "wrong_hash")
    assert uploads(box, lease) == []
    send(lease, WEIGHTS)


@pytest.mark.parametrize(
    "header",
    ["bytes 0-9/5", "bytes 5-2/9", "0-9/10", "bytes */x", "bytes 0-9/*", "bytes  0-9/10", "ｂytes */1"],
)
def test_a_malformed_range_is_told(shared_box, assert_error, header: str) -> None:
    lease = shared_box.running()
    answer = shared_box.worker.put(
        f"/worker/blobs/{sha(b'x')}",
        params={"job_id": lease.job_id, "attempt": 1},
        content=b"",
        headers={"X-Lease-Token": lease.token, "Content-Range": header.encode()},
    )

    assert_error(answer, 422, "invalid_request")
    lease.finish("cancelled")


def test_a_body_of_another_length_than_its_range_changes_nothing(box, assert_error) -> None:
    lease = box.running()

    assert_error(call(lease, sha(WEIGHTS), b"abc", f"bytes 0-9/{len(WEIGHTS)}"), 422, "invalid_request")
    assert not (box.server.folder.uploads / lease.job_id).exists()


def test_limits_on_one_blob_and_on_a_job(make_box, assert_error) -> None:
    box = make_box(max_blob_bytes=1000, max_uploads_bytes=1500)
    lease = box.running()

    assert_error(put(lease, b"x" * 1001, 0, 9), 413, "too_large")
    send(lease, b"x" * 900)
    assert_error(put(lease, b"y" * 900, 0, 9), 413, "uploads_too_large")
    send(lease, b"z" * 600)


def test_a_disk_without_room_answers_507_and_the_part_stays(box, assert_error, monkeypatch) -> None:
    lease = box.running()
    put(lease, WEIGHTS, 0, 999_999)
    monkeypatch.setattr("sftd_server.artifacts.uploads.RESERVE_BYTES", 2**60)

    assert_error(put(lease, WEIGHTS, 1_000_000, 1_999_999), 507, "disk_full")
    assert ask(lease, WEIGHTS).headers["range"] == "bytes=0-999999"


def test_only_the_holder_of_a_lease_uploads(box, assert_error) -> None:
    lease = box.running()

    assert_error(put(lease, b"abc", 0, 2, token="stolen"), 409, "stale_lease")
    assert_error(put(lease, b"abc", 0, 2, attempt=2), 409, "stale_lease")
    assert_error(put(lease, b"abc", 0, 2, job_id="../../etc"), 409, "stale_lease")
    box.expire()
    assert_error(put(lease, b"abc", 0, 2), 409, "stale_lease")
    assert list(box.server.folder.uploads.iterdir()) == []


def test_the_next_attempt_goes_on_with_an_upload(box) -> None:
    lease = box.running()
    put(lease, WEIGHTS, 0, 999_999)
    box.expire()

    lease = box.claim()
    lease.start()
    assert ask(lease, WEIGHTS).headers["range"] == "bytes=0-999999"


def test_unused_uploads_are_swept_after_a_day(box) -> None:
    lease = box.running()
    send(lease, b"old", b"new")
    folder = box.server.folder.uploads / lease.job_id
    before = time.time() - 25 * 3600
    os.utime(folder / sha(b"old"), (before, before))

    assert box.server.uploads.sweep() == 1
    assert uploads(box, lease) == [sha(b"new")]
    os.utime(folder / sha(b"new"), (before, before))
    box.server.uploads.sweep()
    assert not folder.exists()


# ---------------------------------------------------------------- checkpoints and results


CONTENT = {"model.safetensors": WEIGHTS, "sub/config.json": b"{}", "copy.json": b"{}", "empty.txt": b""}


def sent_checkpoint(lease, step: int, content: dict[str, bytes] = CONTENT) -> None:
    for data in content.values():
        assert ask(lease, data).status_code == 201 or put(lease, data, 0, len(data) - 1).status_code == 201
    send(lease, manifest_of(step, content))


def test_a_reported_checkpoint_lies_where_a_shared_folder_has_it(box) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)

    assert report(lease, 5, CONTENT).status_code == 200
    assert report(lease, 5, CONTENT).status_code == 200  # the answer was lost

    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-5"]
    found = {
        str(p.relative_to(folder / "checkpoint-5")): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    assert found == {**CONTENT, "manifest.json": manifest_of(5, CONTENT)}
    assert uploads(box, lease) == []
    for name, data in CONTENT.items():
        assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints/5/files/{name}").content == data


def test_a_report_may_count_the_manifest_among_its_files(box) -> None:
    """As the trainer does; the manifest itself does not."""
    lease = box.running()
    sent_checkpoint(lease, 5)
    manifest = manifest_of(5, CONTENT)

    answer = report(lease, 5, CONTENT, files=files_of({**CONTENT, "manifest.json": manifest}))
    assert answer.status_code == 200, answer.text
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints/5/files/manifest.json").content == manifest
    assert fetch(lease, "files/checkpoints/checkpoint-5/manifest.json").content == manifest


def test_a_missing_blob_is_named_and_can_be_sent_again(box, assert_error) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    (box.server.folder.uploads / lease.job_id / sha(WEIGHTS)).unlink()  # swept, say

    error = assert_error(report(lease, 5, CONTENT), 422, "blob_missing")
    assert error["param"] == "model.safetensors"
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints").json()["data"] == []
    send(lease, WEIGHTS)
    assert report(lease, 5, CONTENT).status_code == 200


def test_what_is_on_record_is_not_sent_again(box) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    report(lease, 5, CONTENT)

    assert ask(lease, WEIGHTS).status_code == 201
    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints" / "checkpoint-5"
    (folder / "sub/config.json").write_bytes(b"[]")  # damaged: it must come from the worker
    (folder / "copy.json").write_bytes(b"[]")
    assert ask(lease, b"{}").status_code == 308


@pytest.mark.parametrize(
    "manifest",
    [
        b"no json",
        b"[]",
        manifest_of(6, CONTENT),
        manifest_of(5, {**CONTENT, "more.txt": b""}),
        manifest_of(5, {**CONTENT, "empty.txt": b"not empty"}),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(box, assert_error, manifest: bytes) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    send(lease, manifest)

    assert_error(report(lease, 5, CONTENT, manifest_sha256=sha(manifest)), 422, "wrong_manifest")
    assert not (box.server.folder.path / "jobs" / lease.job_id / "checkpoints").exists()


def test_a_stale_worker_does_not_touch_what_the_next_attempt_laid_down(box, assert_error) -> None:
    stale = box.running()
    sent_checkpoint(stale, 5, {"a.txt": b"of the first"})
    box.expire()
    lease = box.claim()
    lease.start()
    sent_checkpoint(lease, 5, {"a.txt": b"of the second"})
    report(lease, 5, {"a.txt": b"of the second"})

    assert_error(report(stale, 5, {"a.txt": b"of the first"}), 409, "stale_lease")
    path = box.server.folder.path / "jobs" / lease.job_id / "checkpoints/checkpoint-5/a.txt"
    assert path.read_bytes() == b"of the second"


def report_of(lease, step: int, content: dict[str, bytes]) -> CheckpointReport:
    """What a worker says of a checkpoint that it has sent."""
    return CheckpointReport(
        attempt=lease.attempt,
        step=step,
        name=f"checkpoint-{step}",
        manifest_sha256=sha(manifest_of(step, content)),
        files=files_of(content),
        uploaded=True,
    )


def test_a_lease_that_ends_while_its_checkpoint_is_staged_leaves_the_recorded_one_alone(box) -> None:
    first = box.running()
    sent_checkpoint(first, 5, {"a.txt": b"on record"})
    report(first, 5, {"a.txt": b"on record"})
    box.expire()
    stale = box.claim()
    stale.start()
    content = {"a.txt": b"of a stale attempt"}
    sent_checkpoint(stale, 5, content)
    holder = leases.holder(stale.job_id, stale.attempt, stale.token)
    message = report_of(stale, 5, content)

    async def late() -> None:
        async with checkpoint_to_place(box.server, holder, message) as put:
            await asyncio.to_thread(box.expire)
            await asyncio.to_thread(box.claim)
            await box.server.db.write(put)

    box.run(late())

    folder = box.server.folder.path / "jobs" / stale.job_id / "checkpoints"
    assert (folder / "checkpoint-5/a.txt").read_bytes() == b"on record"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-5"]


def test_a_lease_that_ends_while_its_result_is_staged_leaves_none(box) -> None:
    stale = box.running()
    send(stale, b"result")
    holder = leases.holder(stale.job_id, stale.attempt, stale.token)
    files = files_of({"a.txt": b"result"})
    word = Finish(attempt=stale.attempt, state="succeeded", files=files, uploaded=True)

    async def late() -> None:
        async with result_to_place(box.server, holder, word) as put:
            await asyncio.to_thread(box.expire)
            await box.server.db.write(put)

    box.run(late())

    assert not list((box.server.folder.path / "jobs" / stale.job_id).glob("*result*"))
    assert box.state(stale.job_id) == "queued"


def test_a_write_that_fails_behind_the_rename_is_made_good_by_the_next_report(box) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    holder = leases.holder(lease.job_id, lease.attempt, lease.token)
    message = report_of(lease, 5, CONTENT)

    async def crash() -> None:
        async with checkpoint_to_place(box.server, holder, message) as put:

            def write(session) -> None:
                put(session)
                put(session)  # as where another server came between, and the write is done anew
                raise ConnectionError

            await box.server.db.write(write)

    with pytest.raises(ConnectionError):
        box.run(crash())
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints").json()["data"] == []

    assert report(lease, 5, CONTENT).status_code == 200
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints/5/files/copy.json").content == b"{}"
    assert uploads(box, lease) == []


def test_nothing_is_recorded_where_the_stage_is_gone(box) -> None:
    lease = box.running()
    send(lease, b"result")
    holder = leases.holder(lease.job_id, lease.attempt, lease.token)
    files = files_of({"a.txt": b"result"})
    word = Finish(attempt=lease.attempt, state="succeeded", files=files, uploaded=True)

    async def finish(*, cancelled: bool) -> None:
        async with result_to_place(box.server, holder, word) as put:
            stage = next((box.server.folder.path / "jobs" / lease.job_id).glob(".stage-*"))
            if cancelled:
                raise asyncio.CancelledError  # of a server that stops
            shutil.rmtree(stage)

            def write(session) -> None:
                put(session)
                endings.finish(session, holder, word, settings=box.server.settings, now=box.clock.now())

            await box.server.db.write(write)

    with pytest.raises(Unavailable):
        box.run(finish(cancelled=False))
    assert box.state(lease.job_id) == "running"
    with pytest.raises(CancelledError):
        box.run(finish(cancelled=True))
    assert len(list((box.server.folder.path / "jobs" / lease.job_id).glob(".stage-*"))) == 1

    assert lease.finish(files=files, uploaded=True).status_code == 200
    assert box.admin.get(f"/jobs/{lease.job_id}/result/files/a.txt").content == b"result"


@SEVERAL_SERVERS
def test_the_job_is_not_handed_on_between_the_rename_and_the_row(make_box) -> None:
    here, there = make_box(), make_box()
    lease = here.running()
    sent_checkpoint(lease, 5)
    holder = leases.holder(lease.job_id, lease.attempt, lease.token)
    hashes = {name: sha(data) for name, data in CONTENT.items()}
    staged = placing.Staged(
        holder, here.server.folder.path / "jobs" / lease.job_id / "checkpoints/checkpoint-5"
    )
    files = {name: ManifestFile(**file) for name, file in files_of(CONTENT).items()}
    placing._stage(here.server.uploads, holder, files, hashes, staged)

    with here.in_open_write(staged.put):
        there.expire()
        assert there.state(lease.job_id) == "running"

    there.reap()
    assert there.state(lease.job_id) == "queued"
    assert (staged.target / "copy.json").read_bytes() == b"{}"


def test_a_report_that_goes_backwards_leaves_the_files_alone(box, assert_error) -> None:
    lease = box.running()
    for step in (5, 10):
        sent_checkpoint(lease, step, {"a.txt": b"right"})
        report(lease, step, {"a.txt": b"right"})
    sent_checkpoint(lease, 5, {"a.txt": b"other"})

    assert_error(report(lease, 5, {"a.txt": b"other"}), 409, "checkpoint_backwards")
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints/5/files/a.txt").content == b"right"


def test_a_server_killed_while_it_staged_begins_the_stage_anew(box) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    stage = box.server.folder.path / "jobs" / lease.job_id / "checkpoints/.stage-checkpoint-5-1"
    stage.mkdir(parents=True)
    (stage / "empty.txt").write_bytes(b"half")

    assert report(lease, 5, CONTENT).status_code == 200
    assert box.admin.get(f"/jobs/{lease.job_id}/checkpoints/5/files/empty.txt").content == b""


def test_an_uploaded_result_is_downloaded_like_any_other(box, assert_error) -> None:
    lease = box.running()
    files = files_of(CONTENT)
    assert_error(lease.finish(files=files, uploaded=True), 422, "blob_missing")
    assert box.state(lease.job_id) == "running"
    for data in CONTENT.values():
        assert ask(lease, data).status_code == 201 or put(lease, data, 0, len(data) - 1).status_code == 201

    assert lease.finish(files=files, uploaded=True).status_code == 200
    assert lease.finish(files=files, uploaded=True).status_code == 200  # the answer was lost
    assert box.state(lease.job_id) == "succeeded"
    for name, data in CONTENT.items():
        assert box.admin.get(f"/jobs/{lease.job_id}/result/files/{name}").content == data


# ---------------------------------------------------------------- fetching


def fetch(lease, path: str, *, headers: dict[str, str] | None = None, **params):
    return lease.worker.get(
        f"/worker/jobs/{lease.job_id}/{path}",
        params={"attempt": lease.attempt, **params},
        headers={"X-Lease-Token": lease.token, **(headers or {})},
    )


def test_a_worker_fetches_the_data_file_of_its_job_from_any_byte_on(box, assert_error) -> None:
    lease = box.running()
    file = lease.answer["training_file"]
    whole = fetch(lease, f"inputs/{file['sha256']}")

    assert (whole.status_code, sha(whole.content)) == (200, file["sha256"])
    rest = fetch(lease, f"inputs/{file['sha256']}", headers={"Range": "bytes=10-"})
    assert (rest.status_code, rest.content) == (206, whole.content[10:])
    assert rest.headers["content-range"] == f"bytes 10-{file['bytes'] - 1}/{file['bytes']}"
    behind = {"Range": f"bytes={file['bytes']}-"}
    assert_error(fetch(lease, f"inputs/{file['sha256']}", headers=behind), 416, "out_of_range")
    for wrong in ("bytes=-5", "bytes=0-5", "lines=1-", "bytes=0-,5-"):
        answer = fetch(lease, f"inputs/{file['sha256']}", headers={"Range": wrong})
        assert_error(answer, 422, "invalid_request")


def test_a_worker_fetches_only_what_its_job_reads(box, assert_error) -> None:
    other = box.upload(b'{"prompt": "secret", "completion": "of another"}\n')
    other_sha = box.admin.get(f"/files/{other}").json()["sha256"]
    first = box.running()
    sent_checkpoint(first, 5)
    report(first, 5, CONTENT)
    first.finish(files={})
    lease = box.running()

    assert_error(fetch(lease, f"inputs/{other_sha}"), 404, "unknown_file")
    assert_error(fetch(lease, "files/checkpoints/checkpoint-5", of=first.job_id), 404, "unknown_checkpoint")
    assert_error(fetch(lease, "files/results/results", of=first.job_id), 404, "unknown_checkpoint")
    assert_error(fetch(lease, "files/checkpoints/checkpoint-5"), 404, "unknown_checkpoint")
    stolen = lease.worker.get(
        f"/worker/jobs/{lease.job_id}/inputs/{lease.answer['training_file']['sha256']}",
        params={"attempt": lease.attempt},
        headers={"X-Lease-Token": first.token},
    )
    assert_error(stolen, 409, "stale_lease")


def test_checkpoints_are_fetched_by_manifest_alone(box, assert_error) -> None:
    lease = box.running()
    sent_checkpoint(lease, 5)
    report(lease, 5, CONTENT)
    (box.server.folder.path / "jobs" / lease.job_id / "checkpoints/checkpoint-5/extra.txt").write_text("no")

    listed = fetch(lease, "files/checkpoints/checkpoint-5").json()
    assert listed == {"files": files_of(CONTENT), "manifest_sha256": sha(manifest_of(5, CONTENT))}
    for name, data in {**CONTENT, "manifest.json": manifest_of(5, CONTENT)}.items():
        assert fetch(lease, f"files/checkpoints/checkpoint-5/{name}").content == data
    for name in ("extra.txt", "..%2f..%2f..%2f..%2fadmin.key", "sub", "%2fetc%2fpasswd"):
        assert_error(fetch(lease, f"files/checkpoints/checkpoint-5/{name}"), 404, "unknown_file")
    for name in ("..", "%2e%2e", ".stage-1", "checkpoint-6"):
        answer = fetch(lease, f"files/checkpoints/{name}/adapter.safetensors")
        assert answer.status_code == 404, name


def test_the_base_and_the_seed_of_a_job_may_be_fetched(box) -> None:
    first = box.running(method="full")
    sent_checkpoint(first, 5)
    report(first, 5, CONTENT)
    for data in CONTENT.values():
        assert ask(first, data).status_code == 201
    first.finish(files=files_of(CONTENT), uploaded=True)
    on_result = box.running(base_model=f"job:{first.job_id}", method="full")
    on_checkpoint = box.running(base_model=f"job:{first.job_id}@5", method="full")

    answer = fetch(on_result, "files/results/results/model.safetensors", of=first.job_id)
    assert answer.content == WEIGHTS
    answer = fetch(on_checkpoint, "files/checkpoints/checkpoint-5/manifest.json", of=first.job_id)
    assert answer.content == manifest_of(5, CONTENT)
    assert fetch(on_checkpoint, "files/results/results", of=first.job_id).status_code == 404
