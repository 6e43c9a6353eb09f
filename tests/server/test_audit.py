"""The audit log: who did what to what, from where; in the transaction of the change; for as long as it is to be kept."""

import functools

import pytest

from sftd_server.audit.service import Recorder, action_of, describe
from sftd_server.auth import Caller
from sftd_server.db import witness
from sftd_server.janitor import Janitor
from sftd_server.tables import GoneRow

DAY = 86400


def entries(box, **params) -> list[dict]:
    answer = box.admin.get("/audit", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def newest(box) -> dict:
    return entries(box, limit=1)[0]


def test_a_change_leaves_who_what_when_and_from_where(box) -> None:
    ci = box.key("ci")
    answer = ci.post("/jobs", json=box.spec(name="tides", method="qlora"))

    entry = newest(box)

    key_id = next(key["id"] for key in box.admin.get("/keys").json()["data"] if key["name"] == "ci")
    assert entry == {
        "id": entry["id"],
        "created_at": "2030-01-01T00:00:00Z",
        "key_id": key_id,
        "key_name": "ci",
        "role": "user",
        "action": "job.create",
        "target": answer.json()["id"],
        "address": "127.0.0.1",
        "request_id": answer.headers["x-request-id"],
        "details": {"name": "tides", "base_model": "org/model", "method": "qlora"},
    }


def test_every_kind_of_change_is_told_with_what_matters_of_it(box) -> None:
    file_id, spare = box.upload(), box.upload(b'{"text": "a"}')
    lease = box.running(training_file=file_id)
    job_id = lease.job_id
    lease.checkpoint(5)
    box.admin.post(f"/jobs/{job_id}/checkpoints/5/pin", json={"name": "best"})
    box.admin.post(f"/jobs/{job_id}/checkpoints/5/unpin")
    box.admin.post(f"/jobs/{job_id}/pause")
    lease.finish("paused")
    box.admin.post(f"/jobs/{job_id}/resume")
    box.admin.patch(f"/jobs/{job_id}", json={"priority": 2, "name": "x"})
    box.admin.post(f"/jobs/{job_id}/move", json={"position": "last"})
    copy = box.admin.post(f"/jobs/{job_id}/clone", json={}).json()["id"]
    box.admin.post(f"/jobs/{job_id}/cancel")
    again = box.admin.post(f"/jobs/{job_id}/retry").json()["id"]
    box.admin.delete(f"/jobs/{copy}")
    box.admin.delete(f"/files/{spare}")
    key_id = box.admin.post("/keys", json={"name": "ci", "max_queued_jobs": 9}).json()["id"]
    box.admin.patch(f"/keys/{key_id}", json={"max_queued_jobs": None, "expires_in_seconds": 60})
    box.admin.delete(f"/keys/{key_id}")
    box.admin.post("/workers/w1/drain")
    box.admin.post("/workers/w1/undrain")
    box.admin.post("/storage/collect")

    found = entries(box)[::-1][2:]  # but for the built-in keys

    assert [(entry["action"], entry["target"]) for entry in found] == [
        ("file.create", file_id), ("file.create", spare), ("job.create", job_id), ("checkpoint.pin", job_id),
        ("checkpoint.unpin", job_id), ("job.pause", job_id), ("job.resume", job_id), ("job.change", job_id),
        ("job.move", job_id), ("job.clone", copy), ("job.cancel", job_id), ("job.retry", again), ("job.delete", copy),
        ("file.delete", spare), ("key.create", key_id), ("key.change", key_id), ("key.delete", key_id),
        ("worker.drain", "w1"), ("worker.undrain", "w1"), ("storage.collect", None),
    ]  # fmt: skip
    details = {entry["action"]: entry["details"] for entry in found}
    assert details["checkpoint.pin"] == {"step": "5", "name": "best"}
    assert details["job.change"] == {"fields": ["name", "priority"]}
    assert details["job.clone"]["job_id"] == details["job.retry"]["job_id"] == job_id
    assert details["job.delete"]["owner"] == "admin"
    assert details["file.create"]["filename"] == "rows.jsonl"
    assert details["key.create"] == {"name": "ci", "role": "user", "max_queued_jobs": 9}
    assert details["key.change"] == {
        "name": "ci", "changed": {"max_queued_jobs": None, "expires_at": "2030-01-01T00:01:00+00:00"}
    }  # fmt: skip


def test_what_changed_nothing_leaves_nothing(box, assert_error) -> None:
    ci = box.key("ci")
    spec, once = box.spec(), {"Idempotency-Key": "once"}
    job_id = box.admin.post("/jobs", json=spec, headers=once).json()["id"]
    box.admin.post(f"/jobs/{job_id}/cancel")
    before = entries(box)

    box.admin.post("/jobs", json=spec, headers=once)  # a repetition
    box.admin.post(f"/jobs/{job_id}/cancel")
    box.admin.patch(f"/jobs/{job_id}", json={})
    box.admin.post("/storage/collect", params={"dry_run": True})
    assert_error(ci.delete(f"/jobs/{job_id}"), 403, "not_owner")  # and refusals
    assert_error(box.admin.post("/jobs", json={}), 422, "invalid_spec")
    assert_error(box.admin.delete("/keys/key_nope"), 404, "unknown_key")
    assert_error(box.admin.post("/keys", json={"name": "ci"}), 409, "name_taken")
    lease = box.submit() and box.claim()
    lease.start()  # nor what workers say
    lease.finish()

    assert len(entries(box)) == len(before) + 1


def test_an_admin_who_changes_somebody_elses_job_is_told_with_its_owner(box) -> None:
    job_id = box.key("ci").post("/jobs", json=box.spec()).json()["id"]

    box.admin.post(f"/jobs/{job_id}/cancel")

    assert newest(box)["details"] == {"owner": "ci"}


def test_no_secret_is_in_the_log(box) -> None:
    made = box.admin.post("/keys", json={"name": "ci"}).json()

    assert made["secret"] not in box.admin.get("/audit").text


def test_a_change_that_is_taken_back_takes_its_entry_along(box) -> None:
    """Whatever fails in the transaction, and however often it is begun anew."""

    def change(session, target: str, *, fails: bool) -> None:
        session.add(GoneRow(id=target, number=1, deleted_at=box.clock.now()))
        describe(session, target=target)
        session.flush()
        if fails:
            raise ValueError("after the change")

    async def serve() -> None:
        scope = {"method": "POST", "path": "/things"}
        caller = Caller("key_1", "ci", "user")
        witness.set(Recorder(scope, caller, address="a", request_id="r", clock=box.clock))
        with pytest.raises(ValueError, match="after the change"):
            await box.server.db.write(functools.partial(change, target="thing_1", fails=True))
        await box.server.db.write(functools.partial(change, target="thing_2", fails=False))

    box.run(serve())

    assert [entry["target"] for entry in entries(box, action="thing.create")] == ["thing_2"]


def test_the_address_is_what_a_trusted_proxy_says_and_nobody_else(make_box) -> None:
    for proxies, told in (((), "127.0.0.1"), (("127.0.0.0/8",), "2001:db8::7")):
        box = make_box(f"data{len(proxies)}", trusted_proxies=proxies)
        job_id = box.submit()
        box.admin.post(f"/jobs/{job_id}/cancel", headers={"x-forwarded-for": "9.9.9.9, 2001:db8::7"})
        assert newest(box)["address"] == told


def test_entries_are_filtered_and_paged(box) -> None:
    ci = box.key("ci")
    mine = ci.post("/jobs", json=box.spec()).json()["id"]
    box.clock.advance(60)
    theirs = box.submit()
    ci.post(f"/jobs/{mine}/cancel")

    def told(**params) -> list[str]:
        return [entry["action"] for entry in entries(box, **params)]

    assert told(key_name="ci") == ["job.cancel", "job.create"]
    assert told(target=theirs) == ["job.create"]
    assert told(action="job") == ["job.cancel", "job.create", "job.create"]
    assert told(action="job.cancel", key_name="ci") == ["job.cancel"]
    assert told(action="jo") == told(action="job_") == told(action="%") == []
    assert (
        told(since="2030-01-01T00:01:00Z")
        == told(since="2030-01-01T00:01:00")
        == ["job.cancel", "job.create"]
    )
    assert told(until="2030-01-01T01:01:00+01:00", action="job") == ["job.create"]
    first = box.admin.get("/audit", params={"limit": 2}).json()
    assert first["has_more"] is True
    rest = entries(box, after=first["next_after"])
    assert [entry["id"] for entry in first["data"] + rest] == [entry["id"] for entry in entries(box)]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=yesterday", "since"),
        ("until=0001-01-01T00:00:00%2B10:00", "until"),
        ("limit=0", "limit"),
        ("after=x", "after"),
    ],
)
def test_a_bad_filter_is_named(shared_box, assert_error, query: str, param: str) -> None:
    assert assert_error(shared_box.admin.get(f"/audit?{query}"), 422, "invalid_request")["param"] == param


def test_only_admins_read_it(shared_box, assert_error) -> None:
    assert_error(shared_box.key("reader").get("/audit"), 403, "admin_only")


@pytest.mark.parametrize(
    ("days", "left"), [(400, ["job.cancel"]), (0, ["job.cancel", "job.create", "file.create"])]
)
def test_old_entries_are_deleted_unless_they_shall_stay(make_box, days: float, left: list[str]) -> None:
    box = make_box(audit_days=days)
    job_id = box.submit()
    box.clock.advance(401 * DAY)
    box.admin.post(f"/jobs/{job_id}/cancel")

    box.run(Janitor(box.server).collect())

    assert [entry["action"] for entry in entries(box) if entry["role"]] == left


def test_what_the_server_does_by_itself_has_no_key(make_box) -> None:
    box = make_box(unused_file_days=1)
    file_id = box.upload()
    box.clock.advance(2 * DAY)

    box.run(Janitor(box.server).collect())

    entry = newest(box)
    assert (entry["action"], entry["target"], entry["key_id"], entry["address"]) == (
        "file.delete",
        file_id,
        None,
        None,
    )
    assert entry["details"]["why"] == "no job has named it for 1 days"


@pytest.mark.parametrize(
    ("route", "action"),
    [
        ("POST /jobs", "job.create"),
        ("POST /jobs/{job_id}/cancel", "job.cancel"),
        ("PATCH /jobs/{job_id}", "job.change"),
        ("DELETE /jobs/{job_id}", "job.delete"),
        ("POST /jobs/{job_id}/checkpoints/{step}/pin", "checkpoint.pin"),
        ("POST /v1/fine_tuning/jobs", "job.create"),
        ("POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", "job.cancel"),
        ("DELETE /v1/models/{model:path}", "model.delete"),
        ("POST /v1/uploads", "upload.create"),
        ("POST /v1/uploads/{upload_id}/parts", "upload.add_part"),
        ("POST /v1/uploads/{upload_id}/complete", "upload.complete"),
        ("PUT /uploads/{upload_id}/parts/{n}", "part.change"),
        ("POST /storage/collect", "storage.collect"),
        ("DELETE /session", "session.delete"),
    ],
)  # fmt: skip
def test_what_a_route_does_is_read_off_it(route: str, action: str) -> None:
    assert action_of(*route.split(" ")) == action
