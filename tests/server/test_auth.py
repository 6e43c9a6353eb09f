"""Keys: which role opens which route, expiry, and where secrets are not."""

import asyncio
import base64
import re

import pytest

EXPECTED = {
    # route → status by role; what is not here: users and admins pass the gate, workers get 403
    ("POST", "/keys"): {"admin": 422, "user": 403, "worker": 403},
    ("GET", "/keys"): {"admin": 200, "user": 403, "worker": 403},
    ("PATCH", "/keys/{key_id}"): {"admin": 422, "user": 403, "worker": 403},
    ("DELETE", "/keys/{key_id}"): {"admin": 404, "user": 403, "worker": 403},
    ("GET", "/audit"): {"admin": 200, "user": 403, "worker": 403},
    ("POST", "/workers/{worker_id}/drain"): {"admin": 404, "user": 403, "worker": 403},
    ("POST", "/workers/{worker_id}/undrain"): {"admin": 404, "user": 403, "worker": 403},
    ("POST", "/storage/collect"): {"admin": 200, "user": 403, "worker": 403},
    ("GET", "/healthz"): {"admin": 200, "user": 200, "worker": 200},
}


def operations(app) -> list[tuple[str, str]]:
    paths = app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods] + [
        ("GET", "/docs"),
        ("GET", "/docs/start.js"),
        ("GET", "/docs/static/swagger-ui-bundle.js"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing/here"),
    ]


def test_every_route_for_every_role(shared_box) -> None:
    clients = {"admin": shared_box.admin, "user": shared_box.key("u"), "worker": shared_box.worker}
    for method, path in operations(shared_box.app):
        for role, client in clients.items():
            answer = client.request(
                method, re.sub(r"{\w+}", "1", path), json={} if method == "POST" else None
            )
            for_workers = path.startswith("/worker/")
            expected = EXPECTED.get((method, path), {}).get(role)
            if expected is not None:
                assert answer.status_code == expected, (method, path, role)
            elif for_workers != (role == "worker"):
                assert answer.status_code == 403, (method, path, role)
            else:
                assert answer.status_code not in (401, 403), (method, path, role)


def test_an_admin_makes_lists_and_deletes_keys(box, assert_error) -> None:
    made = box.admin.post("/keys", json={"name": "ci"}).json()
    client = box.client(made["secret"])

    assert client.get("/jobs").status_code == 200
    listed = box.admin.get("/keys")
    assert {key["name"] for key in listed.json()["data"]} == {"admin", "worker", "ci"}
    assert made["secret"] not in listed.text
    assert_error(box.admin.post("/keys", json={"name": "ci"}), 409, "name_taken")
    assert box.admin.delete(f"/keys/{made['id']}").status_code == 204
    assert_error(client.get("/jobs"), 401, "invalid_key")
    assert_error(box.admin.delete(f"/keys/{made['id']}"), 404, "unknown_key")


@pytest.mark.parametrize(
    "body", [{}, {"name": ""}, {"name": "a\nb"}, {"name": "a", "role": "root"}, {"name": 3}]
)
def test_a_malformed_key_request_is_refused(shared_box, assert_error, body: dict) -> None:
    assert_error(shared_box.admin.post("/keys", json=body), 422, "invalid_request")


def test_an_unknown_field_names_its_neighbour(shared_box) -> None:
    answer = shared_box.admin.post("/keys", json={"name": "x", "rol": "user"})

    assert answer.json()["error"]["message"] == "rol: unknown field; did you mean role?"


def test_a_key_ends_when_it_said(box, assert_error) -> None:
    secret = box.admin.post("/keys", json={"name": "short", "expires_in_seconds": 60}).json()["secret"]
    client = box.client(secret)

    box.clock.advance(59)
    assert client.get("/jobs").status_code == 200
    box.clock.advance(2)
    assert_error(client.get("/jobs"), 401, "expired_key")


def test_the_built_in_keys_stay(box, assert_error) -> None:
    for key_id in ("key_admin", "key_worker"):
        assert_error(box.admin.delete(f"/keys/{key_id}"), 409, "built_in_key")


@pytest.mark.parametrize("given", ["", "Bearer", "Basic x", "Bearer \xe9", "sftd-admin-key-of-the-tests"])
def test_a_malformed_header_is_no_key(shared_box, given: str) -> None:
    answer = shared_box.client(None).get("/jobs", headers={"authorization": given.encode("latin-1")})

    assert answer.status_code == 401


def test_a_browser_opens_the_docs_with_the_key_as_password_and_nothing_else(shared_box) -> None:
    key = "sftd-admin-key-of-the-tests"
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}
    browser = shared_box.client(None)

    assert browser.get("/docs").headers["www-authenticate"].startswith("Basic ")
    page = browser.get("/docs", headers=basic)
    assert page.status_code == 200
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert not link.startswith("http")  # a GPU box is often offline
        assert browser.get(f"/{link}", headers=basic).status_code == 200, link
    schema = browser.get("/openapi.json", headers=basic).json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert browser.get("/jobs", headers=basic).status_code == 401
    wrong = {"authorization": "Basic " + base64.b64encode(b"me:wrong").decode()}
    assert browser.get("/docs", headers=wrong).status_code == 401
    assert browser.get("/docs", headers={"authorization": "Basic !!!"}).status_code == 401


def test_secret_files_are_for_their_owner_only(box) -> None:
    folder = box.server.folder.path

    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("worker.key", "installation.id"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert not (folder / "admin.key").exists()  # SFTD_ADMIN_KEY was given


def test_a_key_is_made_at_the_first_start_and_kept(make_box) -> None:
    box = make_box(admin_key=None)
    secret = (box.server.folder.path / "admin.key").read_text().strip()
    assert (box.server.folder.path / "admin.key").stat().st_mode & 0o777 == 0o600
    assert box.client(secret).get("/keys").status_code == 200
    box.stop()

    again = make_box(admin_key=None)
    assert again.client(secret).get("/keys").status_code == 200


@pytest.mark.sqlite
def test_secrets_are_in_no_log_and_no_table(box, caplog) -> None:
    made = box.admin.post("/keys", json={"name": "ci"}).json()["secret"]
    box.client(made).get("/jobs/nope")
    box.client(made[:-1]).get("/jobs")

    stored = b"".join(path.read_bytes() for path in box.server.folder.path.glob("sftd.db*"))
    for secret in (made, "sftd-admin-key-of-the-tests"):
        assert secret.encode() not in stored
        assert secret not in caplog.text
    assert box.server.secret not in caplog.text  # servers share it, so that it stands in the table `fact`


def test_a_slow_reading_of_the_keys_does_not_bring_back_a_deleted_one(box, assert_error) -> None:
    keyring, read = box.server.keyring, box.server.db.read
    found = box.admin.post("/keys", json={"name": "gone", "role": "user"}).json()
    calls: list[int] = []

    async def slow_first(work):
        calls.append(1)
        rows = await read(work)
        if len(calls) == 1:
            await asyncio.sleep(0.3)  # the answer is late; meanwhile the key is deleted
        return rows

    async def scenario() -> None:
        box.server.db.read = slow_first
        loading = asyncio.create_task(keyring.load())
        await asyncio.sleep(0.1)
        await keyring.delete(found["id"])
        await loading
        del box.server.db.read

    box.run(scenario())

    assert_error(box.client(found["secret"]).get("/jobs"), 401, "invalid_key")


LIMITS = {"max_running_jobs": 1, "max_queued_jobs": 2, "max_gpu_hours_per_month": 0.5}


def test_limits_and_the_end_of_a_key_are_set_changed_and_taken_away(box) -> None:
    made = box.admin.post("/keys", json={"name": "ci", "expires_in_seconds": 60, **LIMITS}).json()
    path = f"/keys/{made['id']}"
    assert {name: made[name] for name in LIMITS} == LIMITS

    changed = box.admin.patch(path, json={"max_running_jobs": 7, "expires_in_seconds": None}).json()

    assert {name: changed[name] for name in LIMITS} == {**LIMITS, "max_running_jobs": 7}
    assert (changed["expires_at"], "secret" in changed) == (None, False)
    box.clock.advance(61)
    client = box.client(made["secret"])
    assert client.get("/keys/me").json()["max_running_jobs"] == 7  # it did not expire
    none = box.admin.patch(path, json=dict.fromkeys(LIMITS)).json()
    assert {name: none[name] for name in LIMITS} == dict.fromkeys(LIMITS)
    assert (
        box.admin.patch(path, json={"expires_in_seconds": 1}).json()["expires_at"] == "2030-01-01T00:01:02Z"
    )
    assert box.admin.patch(path, json={}).json()["name"] == "ci"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_running_jobs": 0}, "max_running_jobs"),
        ({"max_queued_jobs": 1.5}, "max_queued_jobs"),
        ({"max_gpu_hours_per_month": -1}, "max_gpu_hours_per_month"),
        ({"max_gpu_hours_per_month": "many"}, "max_gpu_hours_per_month"),
        ({"expires_in_seconds": 0}, "expires_in_seconds"),
        ({"role": "admin"}, "role"),
        ({"name": "other"}, "name"),
    ],
)
def test_a_bad_limit_is_named_and_nothing_else_of_a_key_can_change(
    shared_box, assert_error, body: dict, param: str
) -> None:
    key_id = next(key["id"] for key in shared_box.admin.get("/keys").json()["data"] if key["role"] == "admin")

    assert (
        assert_error(shared_box.admin.patch(f"/keys/{key_id}", json=body), 422, "invalid_request")["param"]
        == param
    )


def test_workers_and_built_in_keys_take_no_limits(box, assert_error) -> None:
    for name in LIMITS:
        body = {"name": "gpu", "role": "worker", name: 3}
        error = assert_error(box.admin.post("/keys", json=body), 422, "invalid_request")
        assert (error["param"], "leave it out" in error["message"]) == (name, True)
    made = box.admin.post("/keys", json={"name": "gpu", "role": "worker"}).json()
    assert_error(box.admin.patch(f"/keys/{made['id']}", json={"max_queued_jobs": 1}), 422, "invalid_request")
    assert box.admin.patch(f"/keys/{made['id']}", json={"expires_in_seconds": 60}).status_code == 200
    for key_id in ("key_admin", "key_worker"):
        for change in ({"max_queued_jobs": 1}, {"expires_in_seconds": 60}):
            assert_error(box.admin.patch(f"/keys/{key_id}", json=change), 409, "built_in_key")


def test_everybody_but_workers_sees_the_key_that_they_use(box, assert_error) -> None:
    mine = box.key("ci").get("/keys/me").json()

    assert (mine["name"], mine["role"], mine["queued_jobs"]) == ("ci", "user", 0)
    assert "secret" not in str(mine)
    assert box.admin.get("/keys/me").json()["id"] == "key_admin"
    assert_error(box.worker.get("/keys/me"), 403, "not_for_workers")
