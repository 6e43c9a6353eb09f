"""The copy in S3: whole or not at all, resumable, and what downloads and resumed jobs fall back to."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlmodel import select

from sftd_server.artifacts.mirror import Mirror, is_safely_stored
from sftd_server.artifacts.store import PART_BYTES, StoreError, WrongContent, open_store
from sftd_server.disk import try_lock
from sftd_server.settings import Settings, SettingsError, read_settings
from sftd_server.tables import CheckpointRow, StoredRow

LARGE = bytes(range(256)) * 160_000  # 41 MB: three parts
CONTENT = {"model.safetensors": LARGE, "sub/config.json": b"{}", "empty.txt": b""}
SMALL = {"a.txt": b"12345", "b.txt": b"6789"}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def key(content: bytes) -> str:
    return f"blobs/sha256/{sha(content)[:2]}/{sha(content)}"


def lay_down(folder, content: dict[str, bytes], step: int | None = None) -> dict:
    files = {name: {"bytes": len(data), "sha256": sha(data)} for name, data in content.items()}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if step is not None:
        (folder / "manifest.json").write_bytes(manifest(step, files))
    return files


def manifest(step: int, files: dict) -> bytes:
    return json.dumps({"step": step, "attempt": 1, "files": files}).encode()


def checkpoint(box, lease, step: int, content: dict[str, bytes] = SMALL):
    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints" / f"checkpoint-{step}"
    files = lay_down(folder, content, step)
    answer = lease.checkpoint(step, files=files, manifest_sha256=sha(manifest(step, files)))
    assert answer.status_code == 200, answer.text
    return folder


def result(box, lease, content: dict[str, bytes] = SMALL):
    folder = box.server.folder.path / "jobs" / lease.job_id / "results"
    assert lease.finish(files=lay_down(folder, content)).status_code == 200
    return folder


def mirror(box, machine: Mirror | None = None) -> int:
    return box.run((machine or Mirror(box.server)).tick())


def stored(box) -> set[str]:
    return box.run(box.server.db.read(lambda session: set(session.exec(select(StoredRow.sha256)))))


def row(box, name: str) -> CheckpointRow:
    query = select(CheckpointRow).where(CheckpointRow.name == name)
    return box.run(box.server.db.read(lambda session: session.exec(query).one()))


def is_safe(box, name: str) -> bool:
    found = row(box, name)
    return box.run(box.server.db.read(lambda session: is_safely_stored(session, found)))


def restore(lease, kind: str, *, name: str, of: str | None = None):
    return lease.worker.post(
        f"/worker/jobs/{lease.job_id}/restore",
        json={"attempt": lease.attempt, "kind": kind, "name": name, "of": of},
        headers={"X-Lease-Token": lease.token},
    )


# ---------------------------------------------------------------- sending


def test_everything_on_record_goes_to_the_store(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    checkpoint(box, lease, 5, CONTENT)
    assert not is_safe(box, "checkpoint-5")
    result(box, lease, CONTENT)

    mirror(box)

    assert bucket.read(key(LARGE)) == LARGE
    head = bucket.s3.head_object(Bucket=bucket.name, Key=f"team/sftd/{key(LARGE)}")
    assert head["ETag"].strip('"').endswith("-3")  # it came in three parts
    assert bucket.read(key(b"")) == b""
    told = json.loads(bucket.read(f"manifests/{lease.job_id}/checkpoint-5.json"))
    assert bucket.read(f"blobs/sha256/{told['manifest_sha256'][:2]}/{told['manifest_sha256']}")
    assert told["files"]["model.safetensors"]["sha256"] == sha(LARGE)
    assert json.loads(bucket.read(f"manifests/{lease.job_id}/results.json"))["files"].keys() == CONTENT.keys()
    file = lease.answer["training_file"]
    assert sha(bucket.read(f"blobs/sha256/{file['sha256'][:2]}/{file['sha256']}")) == file["sha256"]
    assert is_safe(box, "checkpoint-5")
    assert bucket.uploads_under_way() == []
    assert mirror(box) == 0  # nothing is left to do


def test_a_file_that_is_not_what_is_on_record_is_not_stored(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    folder = checkpoint(box, lease, 5, CONTENT)
    checkpoint(box, lease, 10)
    (folder / "model.safetensors").write_bytes(LARGE[:-1] + b"!")  # as long as before

    mirror(box)

    assert key(LARGE) not in bucket.names()
    assert bucket.uploads_under_way() == []
    assert (row(box, "checkpoint-5").mirrored_at, is_safe(box, "checkpoint-5")) == (None, False)
    assert is_safe(box, "checkpoint-10")  # the others are not held up


class Cut:
    """A file whose reading ends in an error after some bytes, as when the process dies there."""

    def __init__(self, content: bytes, after: int) -> None:
        self._file = io.BytesIO(content)
        self._after = after

    def read(self, size: int, /) -> bytes:
        if self._file.tell() >= self._after:
            raise OSError("cut off")
        return self._file.read(size)


@pytest.mark.parametrize("after", [0, PART_BYTES + 1, 2 * PART_BYTES + 1])
def test_an_upload_that_breaks_off_leaves_nothing_that_can_be_seen(make_box, bucket, after: int) -> None:
    store = open_store(Settings(data="/nowhere", **bucket.settings))
    assert store is not None

    with pytest.raises(StoreError, match="cut off"):
        store.put_blob(Cut(LARGE, after), sha256=sha(LARGE), size=len(LARGE))

    assert bucket.names() == []
    assert bucket.uploads_under_way() == []
    assert store.size(sha(LARGE)) is None


def test_uploads_left_by_a_killed_server_are_given_up_by_age(bucket) -> None:
    store = open_store(Settings(data="/nowhere", **bucket.settings))
    assert store is not None
    for name in (f"team/sftd/{key(LARGE)}", "another/prefix"):
        bucket.s3.create_multipart_upload(Bucket=bucket.name, Key=name)

    # This S3 says of every upload that it was begun in November 2010.
    assert store.abort_old_uploads(older_than=timedelta(days=100 * 365)) == 0
    assert store.abort_old_uploads(older_than=timedelta(days=1)) == 1
    assert bucket.uploads_under_way() == ["another/prefix"]


def test_a_store_that_is_away_holds_nothing_up_and_is_tried_again(make_box, bucket) -> None:
    away = {
        "endpoint_url": "http://127.0.0.1:9",
        "key": "x",
        "secret": "x",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    box = make_box(**{**bucket.settings, "artifacts_options": json.dumps(away)})
    lease = box.running()
    checkpoint(box, lease, 5)
    with pytest.raises(StoreError):
        mirror(box)
    result(box, lease)
    assert box.state(lease.job_id) == "succeeded"
    box.stop()

    box = make_box(**bucket.settings)
    mirror(box)
    assert is_safe(box, "checkpoint-5")


def test_another_installation_does_not_use_the_prefix(make_box, bucket) -> None:
    bucket.write("installation.id", b"inst_of_somebody_else")
    box = make_box(**bucket.settings)
    checkpoint(box, box.running(), 5)

    assert mirror(box) == 0
    assert bucket.names() == ["installation.id"]


def test_one_server_at_a_time_mirrors(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    checkpoint(box, box.running(), 5)
    held = try_lock(box.server.folder.path / "locks" / "mirror.lock")
    assert held is not None

    assert mirror(box) == 0
    assert bucket.names() == []


# ---------------------------------------------------------------- reading


def test_downloads_are_served_from_the_store_when_the_local_copy_is_gone(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    folder = checkpoint(box, lease, 5, CONTENT)
    results = result(box, lease, CONTENT)
    mirror(box)
    shutil.rmtree(folder)
    shutil.rmtree(results)
    file = lease.answer["training_file"]
    content = box.admin.get(f"/files/{file['file_id']}/content").content
    (box.server.folder.path / file["path"]).unlink()

    for where in ("checkpoints/5/files", "result/files"):
        for name, data in CONTENT.items():
            assert box.admin.get(f"/jobs/{lease.job_id}/{where}/{name}").content == data
    answer = box.admin.get(f"/jobs/{lease.job_id}/archive")
    assert len(answer.content) == int(answer.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    assert found == {f"{lease.job_id}/{name}": data for name, data in CONTENT.items()}
    assert box.admin.get(f"/files/{file['file_id']}/content").content == content


def test_wrong_bytes_in_the_store_are_not_served_as_a_whole_file(make_box, bucket) -> None:
    import httpx

    box = make_box(**bucket.settings)
    lease = box.running()
    results = result(box, lease, CONTENT)
    mirror(box)
    shutil.rmtree(results)
    bucket.write(key(LARGE), LARGE[:-1] + b"!")

    with pytest.raises(httpx.RemoteProtocolError):  # it breaks off before its end
        box.admin.get(f"/jobs/{lease.job_id}/result/files/model.safetensors")


def test_a_resumed_jobs_checkpoint_is_brought_back_verified(make_box, bucket, assert_error) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    folder = checkpoint(box, lease, 5, CONTENT)
    mirror(box)
    box.expire()
    shutil.rmtree(folder)
    lease = box.claim()
    lease.start()

    answer = restore(lease, "checkpoints", name="checkpoint-5")
    assert answer.json() == {"ready": True}
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = {name: {"bytes": len(data), "sha256": sha(data)} for name, data in CONTENT.items()}
    assert found == {**CONTENT, "manifest.json": manifest(5, files)}

    # A file that is damaged on disk is replaced; one that is damaged in the store as well is told.
    (folder / "sub/config.json").write_bytes(b"[]")
    assert restore(lease, "checkpoints", name="checkpoint-5").json() == {"ready": True}
    assert (folder / "sub/config.json").read_bytes() == b"{}"
    (folder / "sub/config.json").write_bytes(b"[]")
    bucket.write(key(b"{}"), b"()")
    assert_error(restore(lease, "checkpoints", name="checkpoint-5"), 404, "file_gone")
    assert (folder / "model.safetensors").read_bytes() == LARGE  # what there is stays
    assert_error(restore(lease, "checkpoints", name="checkpoint-6"), 404, "unknown_checkpoint")


def test_what_a_server_killed_while_restoring_left_is_cleared_a_day_later(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    folder = checkpoint(box, lease, 5)
    mirror(box)
    old, new = (folder.with_name(f".restore-checkpoint-5-{mark}") for mark in ("old", "new"))
    for left in (old, new):
        left.mkdir()
        (left / "a.txt").write_bytes(b"half")
    before = time.time() - 25 * 3600
    os.utime(old, (before, before))
    shutil.rmtree(folder)

    assert restore(lease, "checkpoints", name="checkpoint-5").json() == {"ready": True}
    assert (old.exists(), new.exists()) == (False, True)
    assert (folder / "a.txt").read_bytes() == b"12345"


def test_a_lost_data_file_is_brought_back(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    mirror(box)
    file = lease.answer["training_file"]
    path = box.server.folder.path / file["path"]
    before = path.read_bytes()
    path.unlink()

    assert restore(lease, "inputs", name=file["sha256"]).json() == {"ready": True}
    assert path.read_bytes() == before


@pytest.mark.parametrize("at", ["", "@5"])
def test_a_job_may_build_on_what_lies_in_the_store_alone(make_box, bucket, assert_error, at: str) -> None:
    box = make_box(**bucket.settings)
    made = box.running(method="full")
    folders = checkpoint(box, made, 5), result(box, made)
    for folder in folders:
        shutil.rmtree(folder)
    body = box.spec(base_model=f"job:{made.job_id}{at}", method="full")
    error = assert_error(box.admin.post("/jobs", json=body), 422, "invalid_spec")
    assert "put back there from a backup" in error["message"]
    lay_down(folders[0], SMALL, 5)
    lay_down(folders[1], SMALL)
    mirror(box)
    for folder in folders:
        shutil.rmtree(folder)

    box.submit(base_model=f"job:{made.job_id}{at}", method="full")

    lease = box.claim()
    kind, name = ("checkpoints", "checkpoint-5") if at else ("results", "results")
    assert lease.answer["base"]["path"].endswith(name)
    assert restore(lease, kind, name=name, of=made.job_id).json() == {"ready": True}
    assert (folders[0 if at else 1] / "a.txt").read_bytes() == b"12345"

    shutil.rmtree(folders[0 if at else 1])
    box.server.store = None
    error = assert_error(box.admin.post("/jobs", json=body), 422, "invalid_spec")
    assert "SFTD_ARTIFACTS_URL" in error["message"]


def test_without_a_store_there_is_nothing_to_bring_back(box, assert_error) -> None:
    lease = box.running()
    folder = checkpoint(box, lease, 5)
    shutil.rmtree(folder)

    assert_error(restore(lease, "checkpoints", name="checkpoint-5"), 404, "file_gone")
    assert not folder.exists()


# ---------------------------------------------------------------- sweeping


def sweep(box, machine: Mirror) -> int:
    return box.run(machine.sweep(box.server.store))


def test_what_nothing_refers_to_goes_from_the_store_and_the_rest_stays(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    lease = box.running()
    checkpoint(box, lease, 5, {"only.txt": b"only here", "both.txt": b"shared"})
    checkpoint(box, lease, 10, {"both.txt": b"shared"})
    machine = Mirror(box.server)
    mirror(box, machine)
    before = bucket.names()
    assert sweep(box, machine) == 0
    assert bucket.names() == before

    def strike(session):
        found = session.exec(select(CheckpointRow).where(CheckpointRow.name == "checkpoint-5")).one()
        found.deleted_at = datetime.now(UTC)
        session.add(found)

    box.run(box.server.db.write(strike))
    assert sweep(box, machine) == 2  # the file and the manifest of its own
    assert key(b"only here") not in bucket.names()
    assert key(b"shared") in bucket.names()
    assert bucket.names("manifests") == [f"manifests/{lease.job_id}/checkpoint-10.json"]
    assert is_safe(box, "checkpoint-10")


def test_a_removal_that_was_killed_is_finished(make_box, bucket) -> None:
    box = make_box(**bucket.settings)
    machine = Mirror(box.server)
    mirror(box, machine)
    bucket.write(key(b"left"), b"left")
    left = StoredRow(sha256=sha(b"left"), bytes=-1, created_at=datetime.now(UTC))  # marked, then killed
    box.run(box.server.db.write(lambda session: session.add(left)))

    assert sweep(box, machine) == 1
    assert key(b"left") not in bucket.names()
    assert sha(b"left") not in stored(box)


def test_a_blob_that_is_wanted_again_while_it_leaves_is_sent_anew(make_box, bucket, monkeypatch) -> None:
    from sftd_server.artifacts import mirror as module

    box = make_box(**bucket.settings)
    lease = box.running()
    machine = Mirror(box.server)
    mirror(box, machine)
    bucket.write(key(b"12345"), b"12345")
    old = StoredRow(sha256=sha(b"12345"), bytes=5, created_at=datetime.now(UTC))  # of a job that is gone
    box.run(box.server.db.write(lambda session: session.add(old)))
    looked = []
    whole = module.references

    def references(session):
        looked.append(1)
        return whole(session) | (
            {sha(b"12345")} if len(looked) == 2 else set()
        )  # reported between the two looks

    monkeypatch.setattr(module, "references", references)
    assert sweep(box, machine) == 0
    assert key(b"12345") in bucket.names()  # never gone
    monkeypatch.undo()
    checkpoint(box, lease, 5)
    mirror(box, machine)
    assert is_safe(box, "checkpoint-5")


# ---------------------------------------------------------------- a folder as the store; settings


def test_a_folder_can_be_the_store(make_box, tmp_path) -> None:
    box = make_box(artifacts_url=f"file://{tmp_path}/store", mirror_seconds=3600)
    lease = box.running()
    results = result(box, lease, CONTENT)
    mirror(box)
    assert (tmp_path / "store" / key(LARGE)).read_bytes() == LARGE
    shutil.rmtree(results)

    assert box.admin.get(f"/jobs/{lease.job_id}/result/files/model.safetensors").content == LARGE
    store = box.server.store
    with pytest.raises(WrongContent):
        store.put_blob(io.BytesIO(b"x"), sha256=sha(b"y"), size=1)
    assert not any(path.name.startswith(".") for path in (tmp_path / "store").rglob("*"))


@pytest.mark.parametrize("url", ["bucket/prefix", "s3://", "gs://bucket", "file://", "http://bucket"])
def test_a_wrong_url_of_a_store_is_named_at_the_start(url: str) -> None:
    with pytest.raises(
        SettingsError, match=r"SFTD_ARTIFACTS_URL: must be s3://bucket/prefix or file:///folder"
    ):
        read_settings({"SFTD_ARTIFACTS_URL": url})


@pytest.mark.parametrize("options", ["{", "[]", "endpoint_url=x"])
def test_options_that_are_no_json_are_named_and_not_shown(options: str) -> None:
    with pytest.raises(SettingsError, match="SFTD_ARTIFACTS_OPTIONS: must be a JSON object"):
        read_settings({"SFTD_ARTIFACTS_OPTIONS": options})


def test_secrets_in_options_are_not_printed() -> None:
    assert "hunter2" not in repr(read_settings({"SFTD_ARTIFACTS_OPTIONS": '{"secret": "hunter2"}'}))
