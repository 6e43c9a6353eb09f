"""Files that come in parts: put together in order, over restarts, within bounds, for their owner alone."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from sftd_server.files import parts

ROWS = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(30))
HOUR = 3601


def begin(client, size: int = len(ROWS), **more):
    body = {
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": size,
        "mime_type": "text/jsonl",
        **more,
    }
    return client.post("/v1/uploads", json=body)


def begun(client, size: int = len(ROWS), **more) -> str:
    answer = begin(client, size, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def send(client, upload_id: str, data: bytes):
    return client.post(f"/v1/uploads/{upload_id}/parts", files={"data": data})


def sent(client, upload_id: str, data: bytes) -> str:
    answer = send(client, upload_id, data)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def finish(client, upload_id: str, part_ids: list[str], **more):
    return client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def on_disk(box) -> list[str]:
    return [path.name for path in box.server.folder.uploads.rglob("*")]


def refused(answer, status: int, code: str) -> dict:
    assert answer.status_code in (status, 400 if status == 422 else status), answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    return error


def swept(box) -> list[str]:
    return [item.name for item in box.run(box.app.state.janitor.collect())]


def test_parts_make_a_file_in_the_order_that_is_given(box) -> None:
    upload_id = begun(box.admin, expires_after={"anchor": "created_at", "seconds": 3600})
    last, first = sent(box.admin, upload_id, ROWS[100:]), sent(box.admin, upload_id, ROWS[:100])
    sent(box.admin, upload_id, b"not used")

    done = finish(box.admin, upload_id, [first, last], md5=hashlib.md5(ROWS).hexdigest()).json()

    made = done["file"]
    assert (done["status"], done["parts"], made["bytes"]) == ("completed", [], len(ROWS))
    assert made["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert made["expires_at"] == made["created_at"] + 3600
    assert box.admin.get(f"/v1/files/{made['id']}/content").content == ROWS
    assert finish(box.admin, upload_id, [first, last]).json()["file"]["id"] == made["id"]
    assert list(box.server.folder.tmp.iterdir()) == []


def test_completed_twice_at_once_it_is_one_file(box) -> None:
    upload_id = begun(box.admin)
    part = sent(box.admin, upload_id, ROWS)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: finish(box.admin, upload_id, [part]), range(4)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["file"]["id"] for answer in answers}) == 1
    assert len(box.admin.get("/v1/files").json()["data"]) == 1


def test_what_does_not_fit_together_is_refused_and_can_be_mended(box) -> None:
    upload_id = begun(box.admin)
    first, last = sent(box.admin, upload_id, ROWS[:100]), sent(box.admin, upload_id, ROWS[100:])
    wrong = hashlib.md5(b"other").hexdigest()

    short = refused(finish(box.admin, upload_id, [first]), 422, "invalid_request")
    unknown = refused(finish(box.admin, upload_id, [first, "part_nope"]), 422, "invalid_request")
    twice = refused(finish(box.admin, upload_id, [first, first]), 422, "invalid_request")
    differs = refused(finish(box.admin, upload_id, [first, last], md5=wrong), 422, "invalid_request")

    assert f"{len(ROWS):,} were announced" in short["message"]
    assert "part_ids[1]" in unknown["message"]
    assert "twice" in twice["message"]
    assert differs["param"] == "md5"
    assert box.admin.get("/v1/files").json()["data"] == list(box.server.folder.tmp.iterdir()) == []
    assert finish(box.admin, upload_id, [first, last]).json()["status"] == "completed"


def test_sending_goes_on_after_a_restart(make_box) -> None:
    box = make_box()
    upload_id = begun(box.admin)
    sent(box.admin, upload_id, ROWS[:50])
    box.stop()
    again = make_box()

    there = again.admin.get(f"/v1/uploads/{upload_id}").json()["parts"]
    rest = sent(again.admin, upload_id, ROWS[sum(part["bytes"] for part in there) :])

    done = finish(again.admin, upload_id, [*(part["id"] for part in there), rest])
    assert done.json()["file"]["sha256"] == hashlib.sha256(ROWS).hexdigest()


def test_an_upload_expires_after_an_hour_and_is_swept(box) -> None:
    upload_id = begun(box.admin)
    part = sent(box.admin, upload_id, ROWS)
    box.clock.advance(HOUR - 60)
    assert swept(box) == []
    box.clock.advance(60)

    assert box.admin.get(f"/v1/uploads/{upload_id}").json()["status"] == "expired"
    refused(finish(box.admin, upload_id, [part]), 409, "upload_closed")
    refused(send(box.admin, upload_id, b"x"), 409, "upload_closed")
    assert swept(box) == [f"uploads/{upload_id}"]
    assert on_disk(box) == []
    assert box.admin.get(f"/v1/uploads/{upload_id}").json()["status"] == "expired"
    box.clock.advance(31 * 86400)
    swept(box)
    refused(box.admin.get(f"/v1/uploads/{upload_id}"), 404, "unknown_upload")


def test_an_upload_does_not_expire_while_it_is_put_together(box, monkeypatch) -> None:
    upload_id = begun(box.admin)
    part = sent(box.admin, upload_id, ROWS)
    box.clock.advance(HOUR - 60)
    really = parts._put_together

    def slowly(*arguments):
        box.clock.advance(60)
        assert swept(box) == []
        return really(*arguments)

    monkeypatch.setattr(parts, "_put_together", slowly)

    assert finish(box.admin, upload_id, [part]).json()["status"] == "completed"


def test_a_cancelled_upload_takes_nothing_any_more(box) -> None:
    upload_id = begun(box.admin)
    part = sent(box.admin, upload_id, ROWS)

    for _ in range(2):
        assert box.admin.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"

    refused(send(box.admin, upload_id, b"x"), 409, "upload_closed")
    refused(finish(box.admin, upload_id, [part]), 409, "upload_closed")
    swept(box)
    assert on_disk(box) == []


def test_a_completed_upload_cannot_be_cancelled(box) -> None:
    upload_id = begun(box.admin)
    finish(box.admin, upload_id, [sent(box.admin, upload_id, ROWS)])

    refused(box.admin.post(f"/v1/uploads/{upload_id}/cancel"), 409, "upload_closed")


def test_a_part_that_was_damaged_on_disk_is_noticed(box) -> None:
    upload_id = begun(box.admin)
    part = sent(box.admin, upload_id, ROWS)
    path = box.server.folder.uploads / upload_id / part
    path.write_bytes(b"x" * len(ROWS))
    refused(finish(box.admin, upload_id, [part]), 409, "file_changed")
    path.unlink()
    refused(finish(box.admin, upload_id, [part]), 404, "file_gone")

    assert finish(box.admin, upload_id, [sent(box.admin, upload_id, ROWS)]).status_code == 200


def test_an_upload_is_its_owners_alone(box) -> None:
    ann, ben = box.key("ann"), box.key("ben")
    upload_id = begun(ann)

    for answer in (
        ben.get(f"/v1/uploads/{upload_id}"),
        send(ben, upload_id, ROWS),
        finish(ben, upload_id, ["part_x"]),
        ben.post(f"/v1/uploads/{upload_id}/cancel"),
    ):
        refused(answer, 403, "not_owner")
    made = finish(ann, upload_id, [sent(ann, upload_id, ROWS)]).json()["file"]
    refused(ben.delete(f"/v1/files/{made['id']}"), 403, "not_owner")


def test_an_owner_has_few_uploads_open(box, monkeypatch) -> None:
    monkeypatch.setattr(parts, "MAX_OPEN", 2)
    ann, ids = box.key("ann"), []
    ids += [begun(ann), begun(ann)]

    error = refused(begin(ann), 409, "too_many_uploads")

    assert "Complete or cancel" in error["message"]
    assert begin(box.admin).status_code == 200
    ann.post(f"/v1/uploads/{ids[0]}/cancel")
    assert begin(ann).status_code == 200
    box.clock.advance(HOUR)
    assert begin(ann).status_code == 200


def test_few_closed_uploads_of_an_owner_are_remembered(box, monkeypatch) -> None:
    monkeypatch.setattr(parts, "MAX_CLOSED", 2)
    ann = box.key("ann")
    ids, still_open = [begun(client) for client in (ann, ann, ann, box.admin)], begun(ann)
    for upload_id in ids:
        box.clock.advance(1)
        box.admin.post(f"/v1/uploads/{upload_id}/cancel")

    swept(box)

    known = [box.admin.get(f"/v1/uploads/{upload_id}").status_code for upload_id in (*ids, still_open)]
    assert (sorted(known[:3]), known[3:]) == ([200, 200, 404], [200, 200])


def test_sizes_are_bounded(make_box, monkeypatch) -> None:
    box = make_box(max_upload_bytes=1000)
    monkeypatch.setattr(parts, "SPARE_BYTES", 1000)
    refused(begin(box.admin, 1001), 413, "too_large")
    uploads = [begun(box.admin, 1000) for _ in range(8)]
    refused(begin(box.admin, 1000), 409, "too_many_uploads")

    sent(box.admin, uploads[0], b"x" * 1500)
    refused(send(box.admin, uploads[0], b"x" * 501), 413, "too_large")
    refused(send(box.admin, uploads[0], b""), 422, "invalid_request")
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 400)
    refused(send(box.admin, uploads[1], b"x" * 401), 413, "too_large")

    assert len([name for name in on_disk(box) if name.startswith("part_")]) == 1
    assert list(box.server.folder.tmp.iterdir()) == []


def test_the_number_of_parts_is_bounded_by_what_was_announced(box, monkeypatch) -> None:
    monkeypatch.setattr(parts, "SPARE_PARTS", 2)
    monkeypatch.setattr(parts, "MIN_BYTES", 100)
    upload_id = begun(box.admin, 100)
    for _ in range(3):
        sent(box.admin, upload_id, b"x")

    error = refused(send(box.admin, upload_id, b"x"), 413, "too_large")

    assert "at most 3 parts" in error["message"]
    assert len(on_disk(box)) == 1 + 3


def test_a_part_is_taken_without_looking_at_all_that_came_before(box, monkeypatch) -> None:
    """The one writer would stand still for it."""
    upload_id = begun(box.admin)
    first = sent(box.admin, upload_id, ROWS[:100])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_look", None)
        last = sent(box.admin, upload_id, ROWS[100:])

    assert finish(box.admin, upload_id, [first, last]).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("purpose", "evil"),
        ("bytes", 0),
        ("bytes", "many"),
        ("filename", ""),
        ("filenam", "x"),
        ("expires_after", {"anchor": "created_at", "seconds": 1}),
        ("expires_after", {"anchor": "never", "seconds": 3600}),
    ],
)
def test_a_bad_announcement_names_the_field(shared_box, field: str, value) -> None:
    error = refused(begin(shared_box.admin, **{field: value}), 422, "invalid_request")

    assert field in error["message"]


def test_an_archive_in_parts_is_refused_when_it_is_whole(box) -> None:
    upload_id = begun(box.admin, 10)
    part = sent(box.admin, upload_id, b"PK\x03\x04zipped")

    refused(finish(box.admin, upload_id, [part]), 415, "archive_refused")
    assert list(box.server.folder.tmp.iterdir()) == []


def test_what_a_crash_left_of_a_closed_upload_is_swept_and_what_is_open_stays(box) -> None:
    upload_id = begun(box.admin)
    sent(box.admin, upload_id, ROWS)
    orphan = box.server.folder.uploads / "upload_000000000000"
    orphan.mkdir()
    (orphan / "part_x").write_bytes(b"x")
    os.utime(orphan, (0, 0))

    assert [item.name for item in box.run(box.app.state.janitor.collect(dry_run=True))] == [
        "uploads/upload_000000000000"
    ]
    assert swept(box) == ["uploads/upload_000000000000"]
    assert box.server.uploads.sweep(now=2e10) == 0  # which looks after what workers send
    assert len(on_disk(box)) == 2
