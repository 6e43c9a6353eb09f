"""A5 and A6: guessing keys; what a browser can be made to send."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from tests.security.conftest import filled

from sftd_server.clock import Clock
from sftd_server.errors import Forbidden, TooManyFailures
from sftd_server.hosts import Hosts
from sftd_server.settings import SettingsError, read_settings
from sftd_server.throttle import MOST_ADDRESSES, Throttle


def guess(box, key: str = "sftd-wrong", **headers: str) -> httpx.Response:
    return box.client(None).get("/jobs", headers={"authorization": f"Bearer {key}", **headers})


# ---------------------------------------------------------------- A5


def test_a5_the_eleventh_wrong_key_within_a_minute_has_to_wait(make_box, assert_error) -> None:
    box = make_box(max_wrong_keys=10)
    for i in range(10):
        assert_error(guess(box, f"sftd-{i}"), 401, "invalid_key")
        box.clock.advance(1)

    refused = guess(box, "sftd-10")

    assert_error(refused, 429, "too_many_failures")
    assert refused.headers["retry-after"] == "50"
    box.clock.advance(51)
    assert guess(box).status_code == 401


def test_a5_a_good_key_works_from_an_address_that_has_to_wait(make_box) -> None:
    box = make_box(max_wrong_keys=3)
    assert [guess(box).status_code for _ in range(5)] == [401, 401, 401, 429, 429]

    assert box.admin.get("/jobs").status_code == 200  # a whole team may have this address
    assert box.worker.post("/worker/claim", json={}).status_code == 422
    assert guess(box).status_code == 429


def test_a5_asking_without_a_key_or_with_an_expired_one_is_no_guess(make_box) -> None:
    box = make_box(max_wrong_keys=2)
    secret = box.admin.post("/keys", json={"name": "old", "expires_in_seconds": 1}).json()["secret"]
    box.clock.advance(2)

    assert [box.client(None).get("/jobs").status_code for _ in range(4)] == [401] * 4
    assert [guess(box, secret).json()["error"]["code"] for _ in range(4)] == ["expired_key"] * 4


def test_a5_an_address_cannot_be_made_up(make_box) -> None:
    box = make_box(max_wrong_keys=3)
    forged = [
        guess(box, **{"x-forwarded-for": f"10.0.0.{i}", "forwarded": f"for=10.0.0.{i}"}) for i in range(5)
    ]

    assert [answer.status_code for answer in forged] == [401, 401, 401, 429, 429]


def test_a5_behind_a_trusted_proxy_the_address_is_the_one_it_saw(make_box) -> None:
    box = make_box(max_wrong_keys=3, trusted_proxies=("127.0.0.0/8", "10.1.0.0/16"))

    def statuses(forwarded: str, count: int = 5) -> list[int]:
        return [guess(box, **{"x-forwarded-for": forwarded}).status_code for _ in range(count)]

    assert statuses("203.0.113.7") == [401, 401, 401, 429, 429]
    assert statuses("203.0.113.8") == [401, 401, 401, 429, 429]
    # What stands left of the last proxy's word was written by the client.
    assert statuses("198.51.100.1, 203.0.113.8", 1) == [429]
    assert statuses("203.0.113.8, 10.1.2.3", 1) == [429]
    assert statuses("nonsense", 1) == [401]


def test_a5_a_process_does_not_believe_forwarded_addresses_of_its_own_machine(tmp_path: Path) -> None:
    """Uvicorn does unless it is told otherwise."""
    environment = {
        **os.environ,
        "SFTD_ADMIN_KEY": "sftd-admin-key-of-the-tests",
        "XDG_STATE_HOME": str(tmp_path),
    }
    environment["SFTD_MAX_WRONG_KEYS"] = "2"
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(tmp_path / "data"), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split("listens on ")[1].split(";")[0]
        statuses = [
            httpx.get(f"{url}/jobs", headers={"authorization": "Bearer x", "x-forwarded-for": f"10.0.0.{i}"}).status_code
            for i in range(3)
        ]  # fmt: skip
    finally:
        process.kill()
        process.wait()
    assert statuses == [401, 401, 429]


class Steady(Clock):
    def monotonic(self) -> float:
        return 1000.0


def test_a5_a_million_addresses_take_bounded_memory() -> None:
    throttle = Throttle(Steady(), limit=2, trusted_proxies=())
    addresses = itertools.product(range(10), range(200), range(50))
    for a, b, c in itertools.islice(addresses, 2 * MOST_ADDRESSES):
        throttle.note({"client": (f"10.{a}.{b}.{c}", 1)}, Headers())

    assert len(throttle._failures) == MOST_ADDRESSES


def test_a5_one_ipv6_network_is_one_address() -> None:
    throttle = Throttle(Steady(), limit=2, trusted_proxies=())
    throttle.note({"client": ("2001:db8::1", 1)}, Headers())
    throttle.note({"client": ("2001:db8::2", 1)}, Headers())
    throttle.note({"client": ("2001:db8:0:1::2", 1)}, Headers())

    with pytest.raises(TooManyFailures):
        throttle.note({"client": ("2001:db8::ffff", 1)}, Headers())


def test_a5_keys_are_compared_by_hash_in_constant_time(repository: Path) -> None:
    source = (repository / "server/sftd_server/auth.py").read_text()

    assert "compare_digest(row.secret_sha256, digest)" in source
    assert "sha256(secret" in source


# ---------------------------------------------------------------- A6


@pytest.mark.parametrize(
    "host",
    ["evil", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "xlocalhost",
     "evil.example@127.0.0.1", "127.0.0.1/", "127.0.0.1:8000:1", "gpubox.local", ""],
)  # fmt: skip
def test_a6_a_foreign_host_gets_nothing(shared_box, assert_error, host: str) -> None:
    for client in (shared_box.admin, shared_box.client(None)):
        for path in ("/jobs", "/healthz", "/docs"):
            assert_error(client.get(path, headers={"host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:1234", "LOCALHOST", "box.localhost", "[::1]:80", "10.0.0.5:8000"]
)
def test_a6_own_names_and_addresses_in_digits_pass(shared_box, host: str) -> None:
    assert shared_box.admin.get("/jobs", headers={"host": host}).status_code == 200


def test_a6_the_message_says_what_to_set(shared_box) -> None:
    error = shared_box.admin.get("/jobs", headers={"host": "sftd.team.example"}).json()["error"]

    assert "'sftd.team.example'" in error["message"]
    assert "SFTD_ALLOWED_HOSTS" in error["message"]


def allows(hosts: Hosts, host: str, method: str = "GET", **headers: str) -> bool:
    try:
        hosts.check(
            method, Headers({"host": host, **{name.replace("_", "-"): v for name, v in headers.items()}})
        )
    except Forbidden:
        return False
    return True


def test_a6_beyond_loopback_the_teams_names_work_and_public_ones_do_not() -> None:
    hosts = Hosts("0.0.0.0", ["sftd.team.example", "alt.example:8443"])

    for host in ("gpubox:8000", "server:8000", "gpubox.lan", "gpubox.local:8000", socket.gethostname(),
                 "sftd.team.example", "SFTD.team.example.:8000", "alt.example:8443", "192.168.1.9:8000"):  # fmt: skip
        assert allows(hosts, host), host
    for host in (
        "evil.example:8000",
        "gpubox.evil.example",
        "alt.example:9000",
        "sftd.team.example.evil.example",
    ):
        assert not allows(hosts, host), host
    assert allows(Hosts("0.0.0.0", ["*"]), "anything.example")
    assert allows(Hosts("box.team.example", []), "box.team.example:8000")


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FOREIGN = ("http://evil.example", "null", "file://", "http://127.0.0.1:1", "https://127.0.0.1.evil.example",
           "chrome-extension://abc", "", "http://", "http://evil.example@127.0.0.1")  # fmt: skip


def test_a6_a_page_of_another_origin_can_call_nothing_by_any_method(shared_box, every_route) -> None:
    for path in {path for _, path in every_route(shared_box)}:
        client = shared_box.worker if path.startswith("/worker/") else shared_box.admin
        for method in METHODS:
            answer = client.request(method, filled(path), headers={"origin": "http://evil.example"})
            assert answer.status_code == 403, (method, path)
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a6_odd_origins_are_foreign(shared_box, assert_error, origin: str) -> None:
    job_id = shared_box.submit()
    for method, path in (
        ("POST", f"/jobs/{job_id}/cancel"),
        ("DELETE", "/keys/key_worker"),
        ("GET", "/healthz"),
    ):
        answer = shared_box.admin.request(method, path, headers={"origin": origin})
        assert_error(answer, 403, "origin_not_allowed")
    assert shared_box.state(job_id) == "queued"


def test_a6_a_form_of_another_site_does_nothing(shared_box) -> None:
    """A simple request, which a browser sends without asking, with a key that it knows by Basic."""
    before = shared_box.admin.get("/jobs").json()["data"]
    headers = {"content-type": "text/plain", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    body = json.dumps(shared_box.spec())

    assert shared_box.admin.post("/jobs", content=body, headers=headers).status_code == 403
    assert shared_box.admin.get("/jobs", headers={**headers, "sec-fetch-dest": "image"}).status_code == 403
    assert shared_box.admin.get("/jobs").json()["data"] == before


def test_a6_the_own_page_and_links_to_it_work(shared_box) -> None:
    own = {"origin": shared_box.url, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}

    assert shared_box.admin.get("/jobs", headers=own).status_code == 200
    assert shared_box.admin.post("/jobs", json=shared_box.spec(), headers=own).status_code == 200
    assert shared_box.admin.get("/docs", headers=link).status_code == 200


def test_a6_behind_a_proxy_the_origin_may_be_a_named_one() -> None:
    hosts = Hosts("127.0.0.1", ["sftd.team.example"])

    assert allows(hosts, "sftd.team.example", "POST", origin="https://sftd.team.example")
    assert allows(
        hosts, "127.0.0.1:8000", "POST", origin="https://sftd.team.example"
    )  # Host rewritten on the way
    assert not allows(hosts, "127.0.0.1:8000", "POST", origin="https://sftd.team.example:3000")
    assert not allows(hosts, "127.0.0.1:8000", "POST", origin="https://other.team.example")


def test_a6_a_preflight_is_never_answered_with_leave(shared_box) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "DELETE"}
    answer = shared_box.client(None).options("/jobs", headers=headers)

    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def setting(name: str, text: str) -> tuple[str, ...]:
    return getattr(read_settings({f"SFTD_{name.upper()}": text}), name)


def test_a6_the_settings_are_lists_and_checked() -> None:
    assert setting("allowed_hosts", "a.example, b.example:8443,") == ("a.example", "b.example:8443")
    assert setting("trusted_proxies", "10.0.0.1,fd00::/8") == ("10.0.0.1", "fd00::/8")
    for name, text in (("allowed_hosts", "http://a"), ("allowed_hosts", "a b"), ("trusted_proxies", "proxy")):
        with pytest.raises(SettingsError, match=f"SFTD_{name.upper()}: '"):
            setting(name, text)
