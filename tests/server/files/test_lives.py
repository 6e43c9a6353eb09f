"""How long files live, and how lists go on over those that are gone; OpenAI's way to list and delete."""

import json

import pytest

DAY = 86400


def upload(box, number: int, **fields: str) -> str:
    content = json.dumps({"text": f"row {number}"}).encode()
    answer = box.admin.post(
        "/v1/files", files={"file": content}, data={"purpose": "fine-tune", **fields}
    ).json()
    return str(answer["id"])


def lives(seconds: int) -> dict[str, str]:
    return {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(seconds)}


def swept(box) -> list[str]:
    return [item.name for item in box.run(box.app.state.janitor.collect())]


def ids_of(answer) -> list[str]:
    return [file["id"] for file in answer.json()["data"]]


def test_a_file_goes_when_its_time_is_up(box) -> None:
    kept, short = upload(box, 1), upload(box, 2, **lives(3600))
    shown = box.admin.get(f"/v1/files/{short}").json()
    assert shown["expires_at"] == shown["created_at"] + 3600
    assert box.admin.get(f"/files/{short}").json()["expires_at"] == "2030-01-01T01:00:00Z"
    box.clock.advance(3599)
    assert swept(box) == []
    box.clock.advance(1)

    assert swept(box) == [short]

    assert ids_of(box.admin.get("/files")) == [kept]
    assert len([path for path in (box.server.folder.path / "blobs").rglob("*") if path.is_file()]) == 1


def test_a_file_that_an_unfinished_job_needs_outlives_its_time(box) -> None:
    short = upload(box, 1, **lives(3600))
    job_id = box.submit(training_file=short)
    box.clock.advance(DAY)
    assert swept(box) == []
    box.admin.post(f"/jobs/{job_id}/cancel")

    assert swept(box) == [short]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (lives(3599), "expires_after[seconds]"),
        (lives(31 * DAY), "expires_after[seconds]"),
        ({**lives(3600), "expires_after[seconds]": "1e9"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({**lives(3600), "expires_after[anchor]": "last_active_at"}, "expires_after[anchor]"),
    ],
)
@pytest.mark.parametrize("path", ["/files", "/v1/files"])
def test_a_lifetime_that_cannot_be_names_its_field(shared_box, path: str, fields: dict, field: str) -> None:
    answer = shared_box.admin.post(
        path, files={"file": b'{"text": "a"}'}, data={"purpose": "fine-tune", **fields}
    )

    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == field
    assert shared_box.nothing_left_of_uploads()


def test_openai_lists_go_either_way_by_purpose_and_over_what_was_deleted(box) -> None:
    ids = [upload(box, number) for number in range(4)]
    other = upload(box, 9, purpose="user_data")
    get = box.admin.get

    page = get("/v1/files", params={"limit": 2, "purpose": "fine-tune"}).json()
    assert [file["id"] for file in page["data"]] == [ids[3], ids[2]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
        "list",
        ids[3],
        ids[2],
        True,
    )
    deleted = box.admin.delete(f"/v1/files/{ids[2]}")
    assert deleted.json() == {"id": ids[2], "object": "file", "deleted": True}
    assert ids_of(get("/v1/files", params={"after": ids[2]})) == [ids[1], ids[0]]
    assert ids_of(get("/files", params={"after": ids[2]})) == [ids[1], ids[0]]
    assert ids_of(get("/v1/files", params={"after": ids[2], "order": "asc"})) == [ids[3], other]
    assert ids_of(get("/v1/files", params={"purpose": "user_data"})) == [other]
    assert get("/v1/files", params={"after": "file_nope"}).status_code == 404
    assert get("/v1/files", params={"limit": 1, "order": "asc"}).json()["data"][0]["id"] == ids[0]


def test_a_list_goes_on_after_what_was_deleted_for_a_week(box) -> None:
    old, gone = upload(box, 1), upload(box, 2)
    box.admin.delete(f"/files/{gone}")
    box.clock.advance(6 * DAY)
    swept(box)
    assert ids_of(box.admin.get("/files", params={"after": gone})) == [old]
    box.clock.advance(2 * DAY)

    swept(box)

    assert box.admin.get("/files", params={"after": gone}).status_code == 404


def test_a_file_in_use_is_not_deleted(box, assert_error) -> None:
    file_id = upload(box, 1)
    box.submit(training_file=file_id)

    assert_error(box.admin.delete(f"/v1/files/{file_id}"), 409, "file_in_use")


def test_a_purpose_is_needed(shared_box) -> None:
    answer = shared_box.admin.post("/v1/files", files={"file": b'{"text": "a"}'})

    assert answer.json()["error"]["param"] == "purpose"
