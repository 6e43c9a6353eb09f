"""The one error shape: on every route, for every kind of mistake."""

import json
import re
import socket
from pathlib import Path

import pytest

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SOURCE = Path(__file__).parents[2] / "server" / "sftd_server"
UNKNOWN = {
    "analysis_id": "count_nope",
    "job_id": "job_nope",
    "file_id": "file_nope",
    "upload_id": "upload_nope",
    "key_id": "key_nope",
    "step": "1",
    "name": "x",
    "sha256": "ab" * 32,
    "kind": "results",
    "path": "x",
}
UNKNOWN["worker_id"] = "worker_nope"
UNKNOWN["model"] = "ft:org/nope:admin::job_nope"
BODIES = {
    "/jobs/{job_id}/move": {"position": "first"},
    "/jobs/{job_id}/checkpoints/{step}/pin": {"name": "x"},
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_nope"]},
}
FORMS = ("/files", "/v1/files", "/v1/uploads/{upload_id}/parts")
WITHOUT_BODY = ("/cancel", "/pause", "/resume", "/unpin", "/drain", "/undrain", "/collect", "/renew")


def routes(app) -> list[tuple[str, str]]:
    """(method, path) of every route, from the app itself."""
    flat = [inner for route in app.routes for inner in getattr(route, "original_router", app).routes]
    return [
        (method, route.path)
        for route in flat
        if hasattr(route, "path")
        for method in sorted(route.methods - {"HEAD"})
    ]


def filled(path: str) -> str:
    return re.sub(r"{(\w+)(:path)?}", lambda found: UNKNOWN[found[1]], path)


def key_for(box, path: str):
    return box.worker if path.startswith("/worker/") else box.admin


def test_there_are_routes_and_all_are_documented(shared_box) -> None:
    found = routes(shared_box.app)
    documented = shared_box.app.openapi()["paths"]

    assert len(found) > 30
    for method, path in found:
        plain = path.replace(":path", "")
        if not plain.startswith(("/docs", "/openapi.json")):
            operation = documented[plain][method.lower()]
            assert operation["description"], path
            malformed = "400" if plain.startswith("/v1/") else "422"
            assert plain == "/healthz" or {"401", "403", malformed} <= operation["responses"].keys(), path
            name = "`POST /worker/…`" if plain.startswith("/worker/") else f"`{method} {plain}`"
            assert name in API, name


def test_every_route_without_a_key(shared_box, assert_error) -> None:
    stranger = shared_box.client(None)
    for method, path in routes(shared_box.app):
        answer = stranger.request(method, filled(path))
        if path == "/healthz":
            assert answer.json()["status"] == "ok"
        else:
            assert_error(answer, 401, "missing_key")
            assert "www-authenticate" in answer.headers


def test_every_route_with_a_wrong_key(shared_box, assert_error) -> None:
    stranger = shared_box.client("sftd-wrong")
    for method, path in routes(shared_box.app):
        if path != "/healthz":
            assert_error(stranger.request(method, filled(path)), 401, "invalid_key")


def test_every_path_with_a_method_it_does_not_have(shared_box, assert_error) -> None:
    for path in {path for _, path in routes(shared_box.app)}:
        answer = key_for(shared_box, path).request("TRACE", filled(path))

        assert_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"]


def test_every_route_of_something_unknown(shared_box, assert_error) -> None:
    for method, path in routes(shared_box.app):
        if "{" in path and not path.startswith("/worker/"):
            body = BODIES.get(path, {}) if method in ("POST", "PATCH") else None
            params = {"base_model": "org/m"} if path.endswith("/preview") else None
            answer = shared_box.admin.request(method, filled(path), json=body, params=params)
            assert answer.status_code == 404, path
            assert_error(answer, 404, answer.json()["error"]["code"])


BAD_BODIES = {
    "not JSON": b"{",
    "empty": b"",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "not UTF-8": b'{"a": "\xff"}',
    "duplicate keys": b'{"a": 1, "a": 2}',
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a pair as a key": b'{"\\ud800": 1}',
    "beyond 64 bits": b'{"a": 9223372036854775808}',
    "10^300": b'{"a": 1' + b"0" * 300 + b"}",
    "10^5000": b'{"a": 1' + b"0" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep but for Python": b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a million keys": b"{" + b",".join(b'"%d": 1' % i for i in range(90_000)) + b"}",
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "unknown fields": b'{"nope": 1, "<script>": 2}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_every_json_route_with_a_bad_body(shared_box, assert_error, body: bytes) -> None:
    for method, path in routes(shared_box.app):
        if method in ("POST", "PATCH") and path not in FORMS and not path.endswith(WITHOUT_BODY):
            headers = {"content-type": "application/json", "x-lease-token": "t"}
            answer = key_for(shared_box, path).request(method, filled(path), content=body, headers=headers)
            good = {"/jobs/{job_id}/retry": (b"", b"null")}.get(path, ())  # its body may be left out
            fields = (
                path.endswith(("/clone", "/jobs/{job_id}")) and b"nope" in body
            )  # of what job, to begin with?
            if path == "/jobs/plan" and b"nope" in body:  # mistakes of a spec are what it answers
                assert (answer.status_code, answer.json()["ok"]) == (200, False)
                continue
            malformed = 400 if path.startswith("/v1/") else 422
            assert answer.status_code in ((404,) if fields or body in good else (413, malformed)), (
                path,
                answer.text,
            )
            assert_error(answer, answer.status_code, answer.json()["error"]["code"])


def test_nul_in_a_string_is_refused(shared_box, assert_error) -> None:
    body = json.dumps(shared_box.spec(metadata={"a": "x\x00y"}))

    assert_error(shared_box.admin.post("/jobs", content=body), 422, "invalid_json")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused(shared_box, assert_error, announced: bool) -> None:
    for client, path, limit in (
        (shared_box.admin, "/jobs", 1024**2),
        (shared_box.admin, "/keys", 1024**2),
        (shared_box.worker, "/worker/claim", 16 * 1024**2),
    ):
        body = b'{"a": "' + b"x" * limit + b'"}'
        content = body if announced else iter([body[i : i + 65536] for i in range(0, len(body), 65536)])
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        assert_error(answer, 413, "too_large")


def test_a_body_that_never_arrives_is_given_up(make_box) -> None:
    box = make_box(body_seconds=0.2)
    host, port = box.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        key = box.admin.headers["authorization"]
        raw.sendall(
            f"POST /jobs HTTP/1.1\r\nhost: {host}\r\nauthorization: {key}\r\ncontent-length: 9\r\n\r\n{{".encode()
        )
        raw.settimeout(10)
        assert raw.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=x",
        "limit=99999999999999999999999",
        "state=nope",
        "state=queued&state=x",
        "after=" + "x" * 99,
    ],
)
def test_bad_parameters_of_a_list(shared_box, assert_error, query: str) -> None:
    error = assert_error(shared_box.admin.get(f"/jobs?{query}"), 422, "invalid_request")

    assert error["param"].startswith(query.split("=")[0])


@pytest.mark.parametrize("query", ["after=-5", f"after={2**63}", "points=0", "limit=0", "limit=1e3"])
def test_bad_parameters_of_metrics(shared_box, assert_error, query: str) -> None:
    job_id = shared_box.submit()

    assert_error(shared_box.admin.get(f"/jobs/{job_id}/metrics?{query}"), 422, "invalid_request")


def test_strange_parameters_never_break_a_list(shared_box) -> None:
    for query in (
        "metadata[a]=b' OR 1=1 --",
        "metadata[%25_]=%25",
        "metadata[]=x",
        "metadata[a]=%00",
        "owner=%00",
        "owner=\ud83d\ude00".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
        "after=job_nope",
        "x=y",
    ):
        assert shared_box.admin.get(f"/jobs?{query}").status_code < 500


def test_strange_paths_never_break_the_server(shared_box) -> None:
    for path in ("/jobs/%00", "/jobs/%ff", "/jobs/" + "x" * 5000, "/jobs/..%2f..", "/jobs/a/checkpoints/1e9/files/x",
                 f"/jobs/a/checkpoints/{2**64}/files/x", "//", "/jobs/", "/%E2%80%AE", "/jobs/a/logs/b"):  # fmt: skip
        answer = shared_box.admin.get(path)
        assert answer.status_code in (404, 422), (path, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_fault_of_ours_keeps_the_shape_and_tells_nothing(make_box, assert_error, caplog) -> None:
    box = make_box()
    box.server.folder.tmp.rmdir()  # an upload has nowhere to go

    answer = box.admin.post("/files", files={"file": b"{}"})

    error = assert_error(answer, 500, "internal")
    assert answer.headers["x-request-id"] in error["message"]
    assert "Traceback" not in answer.text
    assert str(box.server.folder.path) not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    box.server.folder.tmp.mkdir()


def test_a_request_id_is_made_here_and_never_taken_from_outside(shared_box) -> None:
    given = {"x-request-id": "evil"}
    ids = {shared_box.admin.get("/jobs", headers=given).headers["x-request-id"] for _ in range(5)}

    assert len(ids) == 5
    assert "evil" not in ids


def test_every_code_is_documented_and_every_documented_code_is_used() -> None:
    source = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    used = set(re.findall(r'code="([a-z_]+)"', source)) | set(re.findall(r'_CODE = "([a-z_]+)"', source))
    used |= set(re.findall(r'code: str = "([a-z_]+)"', source)) | {"bad_request"}
    documented = set(re.findall(r"^\| \d{3} \| `([a-z_]+)` \|", API, re.MULTILINE))

    assert used == documented


def test_more_metadata_filters_than_a_job_has_pairs_are_refused(shared_box, assert_error) -> None:
    query = "&".join(f"metadata[{i}]=x" for i in range(1500))

    error = assert_error(shared_box.admin.get(f"/jobs?{query}"), 422, "invalid_request")

    assert error["param"] == "metadata"
