"""A1-A3: no route without a key, no port beyond loopback with a weak one, no role or lease beyond its own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.security.conftest import Things, filled

from sftd_server.datafolder import DataFolder
from sftd_server.exposure import check_exposure
from sftd_server.settings import Settings, SettingsError

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
OPEN = {"/healthz"}


# ---------------------------------------------------------------- A1


def test_a1_every_route_with_every_method_needs_a_key(shared_box, every_route) -> None:
    stranger = shared_box.client(None)
    paths = {path for _, path in every_route(shared_box)} - OPEN
    for path in sorted(paths):
        for method in METHODS:
            answer = stranger.request(method, filled(path))
            assert answer.status_code == 401, (method, path, answer.status_code)
            assert "www-authenticate" in answer.headers


@pytest.mark.parametrize(
    "path",
    ["/", "/nothing", "/docs", "/docs/", "/docs/static/x", "/openapi.json", "/redoc", "/static/x", "/metrics",
     "/healthz/", "/healthz/../jobs", "/%68ealthz", "//healthz", "/healthz;x", "/HEALTHZ", "/healthz%00", "/worker",
     "/v1/models", "/admin", "/jobs/%2e%2e/healthz"],
)  # fmt: skip
def test_a1_no_way_round_the_key_by_another_spelling(shared_box, path: str) -> None:
    host, port = shared_box.url.removeprefix("http://").split(":")
    with socket.create_connection(
        (host, int(port)), timeout=10
    ) as raw:  # as it stands: clients tidy paths up
        raw.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        head = b"".join(iter(lambda: raw.recv(65536), b""))

    is_healthz = path == "/%68ealthz"  # the same path, written otherwise
    assert head.startswith(b"HTTP/1.1 200" if is_healthz else b"HTTP/1.1 401"), head[:80]


def test_a1_every_route_with_a_wrong_key_and_an_expired_one(box, every_route) -> None:
    made = box.admin.post("/keys", json={"name": "short", "role": "admin", "expires_in_seconds": 1}).json()
    box.clock.advance(2)
    for client in (box.client("sftd-wrong"), box.client(made["secret"])):
        for method, path in every_route(box):
            if path not in OPEN:
                assert client.request(method, filled(path)).status_code == 401, (method, path)


def test_a1_streams_and_bodies_are_not_begun_without_a_key(shared_box) -> None:
    stranger = shared_box.client(None)
    job_id = shared_box.submit()

    stream = stranger.get(f"/jobs/{job_id}/events", headers={"accept": "text/event-stream"})
    upload = stranger.post("/files", files={"file": b"x" * 100_000})

    assert (stream.status_code, upload.status_code) == (401, 401)
    assert shared_box.nothing_left_of_uploads()


def test_a1_a_websocket_is_refused(shared_box) -> None:
    headers = {
        "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    for path in ("/jobs", "/worker/claim", "/ws"):
        assert shared_box.client(None).get(path, headers=headers).status_code == 401


def test_a1_healthz_tells_nothing_but_that_it_lives(shared_box) -> None:
    assert set(shared_box.client(None).get("/healthz").json()) == {"status", "version"}


# ---------------------------------------------------------------- A2


@pytest.mark.parametrize(
    "key", ["changeme", "short-key-123", "aaaaaaaaaaaaaaaaaaaaaaaa", "abababababababababab"]
)
def test_a2_a_key_that_can_be_guessed_is_not_enough_beyond_loopback(tmp_path: Path, key: str) -> None:
    environment = {**os.environ, "SFTD_ADMIN_KEY": key, "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / "data"), "--port", "0"]

    run = subprocess.run(
        [*command, "--host", "0.0.0.0"], env=environment, capture_output=True, text=True, check=False
    )

    assert run.returncode == 1
    assert "SFTD_ADMIN_KEY can be guessed" in run.stderr
    assert "0.0.0.0" in run.stderr
    assert key not in run.stderr + run.stdout
    assert "Traceback" not in run.stderr


def test_a2_what_may_listen_where(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.prepare()

    def check(host: str, key: str | None = None) -> None:
        check_exposure(Settings(data=tmp_path, host=host, admin_key=key), folder)

    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check(host, "weak-key")
    for host in ("0.0.0.0", "::", "10.0.0.5", "gpubox"):
        check(host)  # a key is made at the first start, before anything listens: it has 192 random bits
        check(host, "long-and-mixed-0123456789")
        with pytest.raises(SettingsError, match="can be guessed"):
            check(host, "weak-key")
    folder.secret("admin.key", prefix="sftd-", bits=192)
    check("0.0.0.0")
    folder.admin_key.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        check("0.0.0.0")
    folder.write_secret("admin.key", "hand-made")
    with pytest.raises(SettingsError, match="can be guessed"):
        check("0.0.0.0")


def test_a2_beyond_loopback_the_key_that_was_made_opens_the_door(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    environment.pop("SFTD_ADMIN_KEY", None)
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / "data"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--host", "0.0.0.0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split("listens on ")[1].split(";")[0]
        key = (tmp_path / "data" / "admin.key").read_text().strip()
        with httpx.Client(base_url=url, timeout=10) as client:
            assert client.get("/jobs").status_code == 401
            assert client.get("/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 200
    finally:
        process.terminate()
        _, log = process.communicate(timeout=15)
    assert "plain HTTP" in log  # and it says what is missing


# ---------------------------------------------------------------- A3


def is_for_admins(path: str) -> bool:
    return path.startswith(("/keys", "/audit")) and path != "/keys/me"


def test_a3_every_route_for_every_role(shared_box, every_route) -> None:
    clients = {"admin": shared_box.admin, "user": shared_box.key("a3"), "worker": shared_box.worker}
    for method, path in every_route(shared_box):
        for role, client in clients.items():
            body = {} if method in ("POST", "PUT", "PATCH") else None
            status = client.request(method, filled(path), json=body).status_code
            for_workers = path.startswith("/worker/")
            if path in OPEN:
                assert status == 200, (method, path, role)
            elif for_workers != (role == "worker") or (role != "admin" and is_for_admins(path)):
                assert status == 403, (method, path, role, status)
            else:
                assert status not in (401, 500), (method, path, role, status)
                assert status != 403 or role == "user", (method, path, role)  # an admin may do everything


def test_a3_a_refused_role_does_not_learn_what_exists(shared_box, every_route) -> None:
    job_id = shared_box.submit()
    for method, path in every_route(shared_box):
        if "{job_id}" in path and not path.startswith("/worker/"):
            there = shared_box.worker.request(method, filled(path, {"job_id": job_id}))
            nowhere = shared_box.worker.request(method, filled(path))
            assert there.status_code == nowhere.status_code == 403
            assert there.content == nowhere.content


BODIES: tuple[Any, ...] = (
    None,
    {},
    {"priority": 5},
    {"name": "stolen"},
    {"position": "first"},
    {"before": "job_nope"},
    {"from_checkpoint": False},
    {"set": {"priority": 1}},
    {"max_queued_jobs": 9},
    {"pinned": "x"},
    {"pin": "x"},
    {"part_ids": []},
)
COPIES = ("/clone", "/retry", "/plan")  # make something of the caller's own, and leave the job as it is


def test_a3_what_belongs_to_another_is_read_but_never_changed(shared_box, changing_routes) -> None:
    """Every route that names something and changes it: jobs, files, keys, workers, and what is added later."""
    owner, other = shared_box.key("a3-owner"), shared_box.key("a3-other")
    things = Things(shared_box)
    num_refused = 0
    for method, path in changing_routes(shared_box):
        if "{" not in path or path.endswith(COPIES):
            continue
        for body in BODIES:
            there = things.fill(path, owner, verb=path.rsplit("/", 1)[1])
            job = re.search(r"/jobs/[^/]+", there)
            shown = there if job is None else job[0]
            before = owner.get(shown)

            theirs = other.request(method, there, json=body)

            after = owner.get(shown)
            assert not theirs.is_success, (method, path, body, theirs.text)
            assert after.status_code == before.status_code, (method, path, body)
            if job is not None:
                assert {**after.json(), "queue_position": 0} == {**before.json(), "queue_position": 0}, path
            own = owner.request(method, there, json=body)
            if own.is_success:
                assert theirs.status_code == 403, (method, path, body, theirs.text)
                num_refused += 1
                break
    assert num_refused >= 9


def test_a3_the_token_of_one_job_opens_no_other(box, every_route, assert_error) -> None:
    mine, theirs = box.running(), box.running()
    bodies = {
        "heartbeat": {"started": True},
        "metrics": {"seq": 0, "points": [{"step": 1, "values": {"loss": 1}}]},
        "logs": {"seq": 0, "lines": ["x"]},
        "events": {"seq": 0, "events": [{"type": "notice", "message": "x"}]},
        "checkpoints": {"step": 1, "name": "checkpoint-1", "manifest_sha256": "ab" * 32, "files": {}},
        "finish": {"state": "succeeded"},
        "release": {"message": "x"},
    }
    kinds = {
        path.rsplit("/", 1)[1] for _, path in every_route(box) if path.startswith("/worker/jobs/{job_id}/")
    }
    assert kinds >= set(bodies)
    for kind in sorted(kinds):
        for token, attempt in ((mine.token, 1), ("", 1), (theirs.token, 2), (theirs.token.upper(), 1)):
            answer = box.worker.post(
                f"/worker/jobs/{theirs.job_id}/{kind}",
                json={"attempt": attempt, **bodies.get(kind, {})},
                headers={"X-Lease-Token": token},
            )
            if kind in bodies:
                assert_error(answer, 409, "stale_lease")
            assert not answer.is_success, (kind, answer.text)
        unknown = box.worker.post(
            f"/worker/jobs/job_nope/{kind}",
            json={"attempt": 1, **bodies.get(kind, {})},
            headers={"X-Lease-Token": mine.token},
        )
        assert unknown.status_code == answer.status_code  # a stranger does not learn which jobs there are

    assert theirs.metrics(0, (1, {"loss": 1.0})).json() == {"next_seq": 1}  # nothing of the above came in
