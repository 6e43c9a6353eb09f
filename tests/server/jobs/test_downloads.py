"""Downloads: found by manifest, never by path; the archive is a whole tar."""

import hashlib
import io
import os
import socket
import tarfile

import psutil
import pytest

CONTENT = {"model.safetensors": b"w" * 2_500_000, "sub/config.json": b"{}", "empty.txt": b""}
ATTACKS = [
    "../../../admin.key",
    "..%2f..%2f..%2fadmin.key",
    "%2e%2e/%2e%2e/admin.key",
    "..%252f..%252fadmin.key",
    "..;/admin.key",
    "..\\admin.key",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "config.json%00",
    "sub",
    "sub/",
    "sub//config.json",
    "%2e/sub/config.json",
    "file:///etc/passwd",
    "x" * 300,
    "．．/admin.key",
    "CON",
]


def manifest(content: dict[str, bytes]) -> dict:
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }


def write(folder, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def done(shared_box):
    """A job that has succeeded, with a checkpoint and a result."""
    lease = shared_box.running()
    folder = shared_box.server.folder.path / "jobs" / lease.job_id
    write(folder / "checkpoints" / "checkpoint-5", CONTENT)
    write(folder / "results", {**CONTENT, "not-in-the-manifest.txt": b"secret"})
    lease.checkpoint(5, files=manifest(CONTENT))
    lease.finish(files=manifest(CONTENT))
    return lease.job_id


def test_the_archive_is_a_tar_of_the_results_manifest(shared_box, done) -> None:
    answer = shared_box.admin.get(f"/jobs/{done}/archive")

    assert len(answer.content) == int(answer.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    assert found == {f"{done}/{name}": data for name, data in CONTENT.items()}


@pytest.mark.parametrize("where", ["checkpoints/5/files", "result/files"])
def test_each_file_of_a_manifest_can_be_fetched(shared_box, done, where: str) -> None:
    for name, data in CONTENT.items():
        answer = shared_box.admin.get(f"/jobs/{done}/{where}/{name}")

        assert answer.content == data
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("where", ["checkpoints/5/files", "result/files"])
@pytest.mark.parametrize("name", [*ATTACKS, "not-in-the-manifest.txt"])
def test_nothing_but_the_manifest_is_served(shared_box, done, where: str, name: str) -> None:
    answer = shared_box.admin.get(f"{shared_box.url}/jobs/{done}/{where}/{name}")

    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_raw_path_with_dots_is_not_found(shared_box, done) -> None:
    import socket

    host, port = shared_box.url.removeprefix("http://").split(":")
    key = shared_box.admin.headers["authorization"]
    for path in ("/../../admin.key", "/../../../../../../etc/passwd"):
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            target = f"/jobs/{done}/result/files{path}"
            raw.sendall(
                f"GET {target} HTTP/1.1\r\nhost: localhost\r\nauthorization: {key}\r\nconnection: close\r\n\r\n".encode()
            )
            assert raw.recv(64).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("swap", ["file", "folder", "results"])
def test_links_are_not_followed(box, assert_error, tmp_path, swap: str) -> None:
    lease = box.running()
    results = box.server.folder.path / "jobs" / lease.job_id / "results"
    write(results, {"sub/a.txt": b"good!"})
    lease.finish(files=manifest({"sub/a.txt": b"good!"}))
    evil = tmp_path / "evil"
    write(evil, {"a.txt": b"evil!", "sub/a.txt": b"evil!"})
    link = {"file": results / "sub" / "a.txt", "folder": results / "sub", "results": results}[swap]
    target = {"file": evil / "a.txt", "folder": evil, "results": evil}[swap]
    os.rename(link, f"{link}.old")
    link.symlink_to(target)

    assert_error(box.admin.get(f"/jobs/{lease.job_id}/result/files/sub/a.txt"), 404, "file_gone")
    assert_error(box.admin.get(f"/jobs/{lease.job_id}/archive"), 404, "file_gone")


def test_a_file_that_is_gone_or_has_changed_is_told(box, assert_error) -> None:
    lease = box.running()
    results = box.server.folder.path / "jobs" / lease.job_id / "results"
    assert_error(box.admin.get(f"/jobs/{lease.job_id}/archive"), 409, "no_result")
    lease.finish(files=manifest({"a.txt": b"12345"}))

    assert_error(box.admin.get(f"/jobs/{lease.job_id}/archive"), 404, "file_gone")
    write(results, {"a.txt": b"1234567"})
    assert_error(box.admin.get(f"/jobs/{lease.job_id}/archive"), 409, "file_changed")
    assert_error(box.admin.get(f"/jobs/{lease.job_id}/result/files/a.txt"), 409, "file_changed")
    assert_error(box.admin.get(f"/jobs/{lease.job_id}/checkpoints/9/files/a"), 404, "unknown_checkpoint")


def test_clients_that_hang_up_at_once_leave_no_file_open(box) -> None:
    host, port = box.url.removeprefix("http://").split(":")
    file_id = box.upload()
    request = f"GET /files/{file_id}/content HTTP/1.1\r\nhost: localhost\r\n"
    request += f"authorization: {box.admin.headers['authorization']}\r\n\r\n"
    blobs = str(box.server.folder.path / "blobs")

    for _ in range(50):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
    for _ in range(100):  # these come after all of those, and give the server time to notice
        box.admin.get(f"/files/{file_id}")

    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(blobs)] == []
