"""Uploads: checked row by row, limited in size, named by nobody but the server."""

import errno
import hashlib
import json

import pytest

BAD = b'{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "a"}\n{"prompt": "a", "completion": 3}\n'


def blobs(box) -> list[str]:
    return [path.name for path in (box.server.folder.path / "blobs").rglob("*") if path.is_file()]


def leftovers(box) -> list:
    return list(box.server.folder.tmp.iterdir())


def test_a_valid_file_is_kept_under_its_hash(box) -> None:
    content = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'

    answer = box.admin.post("/files", files={"file": ("rows.jsonl", content)}).json()

    sha = hashlib.sha256(content).hexdigest()
    assert (answer["sha256"], answer["bytes"], answer["format"], answer["num_rows"]) == (
        sha,
        len(content),
        "messages",
        1,
    )
    assert box.admin.get(f"/files/{answer['id']}").json() == answer
    assert box.admin.get("/files").json()["data"] == [answer]
    got = box.admin.get(f"/files/{answer['id']}/content")
    assert got.content == content
    assert got.headers["content-disposition"].startswith("attachment")
    assert blobs(box) == [sha]
    assert leftovers(box) == []


def test_every_bad_row_is_named_and_nothing_is_kept(box, assert_error) -> None:
    answer = box.admin.post("/files", files={"file": ("rows.jsonl", BAD)})

    lines = assert_error(answer, 422, "invalid_file")["message"].split("\n")
    assert [line.split(":")[1].split(",")[0] for line in lines] == [" line 2", " line 3", " line 4"]
    assert blobs(box) == leftovers(box) == box.admin.get("/files").json()["data"] == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"\xff\xfe", b"[" * 100_000, b'{"text": NaN}', b"\x80\x04pickle"],
)
def test_what_is_no_data_is_refused(shared_box, assert_error, content: bytes) -> None:
    answer = shared_box.admin.post("/files", files={"file": ("x.jsonl", content)})

    assert_error(answer, 422, "invalid_file")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\dir\\rows.jsonl", "rows.jsonl"),
        ("..", "upload"),
        ("", "upload"),
        ("a\u202eb\x1b[31m.jsonl", "ab[31m.jsonl"),
        ("x" * 999, "x" * 255),
    ],
)
def test_a_file_name_is_a_label_only(shared_box, given: str, shown: str) -> None:
    head = 'Content-Disposition: form-data; name="file"; filename="' + given.replace("\\", "\\\\") + '"'
    body = f"--b\r\n{head}\r\n\r\n".encode() + b'{"text": "a"}\r\n--b--\r\n'

    answer = shared_box.admin.post(
        "/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"}
    )

    assert answer.json()["filename"] == shown
    assert {len(name) for name in blobs(shared_box)} == {64}


def test_a_form_that_is_none_is_refused(shared_box, assert_error) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    cut = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{"text": "a"}'
    post = shared_box.admin.post

    assert_error(post("/files", json={}), 422, "invalid_request")
    assert_error(post("/files", data={"purpose": "fine-tune"}), 422, "invalid_request")
    assert_error(post("/files", files={"file": b"{}", "fil": b"x"}), 422, "invalid_request")
    assert_error(post("/files", files=[("file", b"{}"), ("file", b"{}")]), 422, "invalid_request")
    assert_error(post("/files", files={"file": b"{}"}, data={"purpose": "x" * 5000}), 422, "invalid_request")
    wrong = post("/files", files={"file": b"{}"}, data={"purpose": "evil"})
    assert assert_error(wrong, 422, "invalid_request")["param"] == "purpose"
    for body in (b"", b"--b", b"garbage", cut):
        assert_error(post("/files", content=body, headers=form), 422, "invalid_multipart")
    assert shared_box.nothing_left_of_uploads()


def test_too_large_a_file_is_refused_announced_or_not(make_box, assert_error) -> None:
    box = make_box(max_upload_bytes=1000)
    fits = b'{"text": "' + b"a" * 985 + b'"}\n'
    assert len(fits) <= 1000
    large = fits + b'{"text": "a"}\n'

    assert box.admin.post("/files", files={"file": fits}).status_code == 200
    assert_error(box.admin.post("/files", files={"file": large}), 413, "too_large")
    assert_error(box.admin.post("/files", files={"file": b"x" * 5_000_000}), 413, "too_large")
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    pieces = iter([head, *[b"x" * 100_000] * 20])  # chunked: no length is announced
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert_error(box.admin.post("/files", content=pieces, headers=headers), 413, "too_large")
    assert leftovers(box) == []


def test_a_file_goes_when_no_job_needs_it_and_its_content_when_no_file_does(box, assert_error) -> None:
    first, second = box.upload(), box.upload()
    job_id = box.submit(training_file=first)

    assert job_id in assert_error(box.admin.delete(f"/files/{first}"), 409, "file_in_use")["message"]
    box.admin.post(f"/jobs/{job_id}/cancel")
    assert box.admin.delete(f"/files/{first}").status_code == 204
    assert len(blobs(box)) == 1
    assert box.admin.delete(f"/files/{second}").status_code == 204
    assert blobs(box) == []
    assert_error(box.admin.get(f"/files/{first}"), 404, "unknown_file")
    assert_error(box.admin.delete(f"/files/{first}"), 404, "unknown_file")


def test_only_its_owner_or_an_admin_deletes_a_file(box, assert_error) -> None:
    file_id = box.upload()
    ann = box.key("ann")

    assert_error(ann.delete(f"/files/{file_id}"), 403, "not_owner")
    assert ann.get(f"/files/{file_id}/content").status_code == 200


def test_files_are_listed_by_cursor(box) -> None:
    ids = [box.upload(json.dumps({"text": str(i)}).encode()) for i in range(3)]

    page = box.admin.get("/files", params={"limit": 2}).json()

    assert [file["id"] for file in page["data"]] == ids[:0:-1]
    rest = box.admin.get("/files", params={"after": page["next_after"]}).json()
    assert [file["id"] for file in rest["data"]] == ids[:1]


def test_an_upload_that_can_not_be_recorded_leaves_nothing_on_disk(box, assert_error) -> None:
    kept = box.upload(b'{"text": "kept"}')
    before = sorted(blobs(box))
    write = box.server.db.write

    async def no_room(work):
        raise OSError(errno.ENOSPC, "no space left")

    box.server.db.write = no_room
    for content in (b'{"text": "new"}', b'{"text": "kept"}'):
        assert_error(box.admin.post("/files", files={"file": ("f", content)}), 507, "disk_full")
    box.server.db.write = write

    assert sorted(blobs(box)) == before
    assert box.admin.get(f"/files/{kept}/content").content == b'{"text": "kept"}'
