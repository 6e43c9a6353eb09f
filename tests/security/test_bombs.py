"""A9, A10, A14, A15, A16, A20: content that is meant to swell, break or run: bodies, uploads, connections, rows."""

import gzip
import io
import json
import os
import pickle
import resource
import select
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sftd.rows import MAX_ROW_VALUES, RowsInvalid, check_file

KEY = "sftd-admin-key-of-the-tests"


@dataclass
class Process:
    """A server as a process of its own, whose memory can be looked at."""

    pid: int
    port: int
    user: httpx.Client
    worker: httpx.Client

    def reset_peak(self) -> float:
        """Begin to watch its memory; what it has now, in MB."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> float:
        return self._status("VmHWM")

    def _status(self, name: str) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def raw(self, head: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1"))
        return connection


@pytest.fixture(scope="module")
def start_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def start(**environment: str) -> Process:
            folder = tmp_path_factory.mktemp("process")
            variables = {**os.environ, "SFTD_ADMIN_KEY": KEY, "XDG_STATE_HOME": str(folder), **environment}
            command = [sys.executable, "-m", "sftd_server.app", "--data", str(folder / "data"), "--port", "0"]
            process = subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            url = process.stdout.readline().split("listens on ")[1].split(";")[0]

            def client(key: str) -> httpx.Client:
                headers = {"authorization": f"Bearer {key}"}
                return stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))

            worker_key = (folder / "data" / "worker.key").read_text().strip()
            made = Process(process.pid, int(url.rsplit(":", 1)[1]), client(KEY), client(worker_key))
            made.user.get("/openapi.json")  # what is made once and kept is made now
            return made

        yield start


@pytest.fixture(scope="module")
def process(start_process: Callable[..., Process]) -> Process:
    return start_process()


# ---------------------------------------------------------------- A14


def many(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item]) * 0 + b",".join([item] * count) + b"]"


BOMBS: dict[str, bytes] = {
    "a million keys": b"{" + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}",
    "two million lists": many(b"[]", 2_000_000),
    "objects": many(b'{"a":{"b":1}}', 500_000),
    "just under the limit": many(b'{"a":1}', 24_000),
    "depth 1e5": b"[" * 100_000,
    "depth 1e5, closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "duplicate keys": b'{"a":1,"a":2}',
    "10^300": b'{"a":1' + b"0" * 300 + b"}",
    "a million digits": b'{"a":1' + b"0" * 1_000_000 + b"}",
    "an exponent": b'{"gpus":1e999999999}',
    "half a pair": b'{"a":"\\ud800"}',
    "many escapes": b'{"a":"' + b"\\u0041" * 150_000 + b'"}',
    "NUL": b'{"worker_id":"a\\u0000b"}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"gpus":-Infinity}',
    "minus zero": b'{"gpus":-0.0}',
    "2^63": b'{"gpus":9223372036854775808}',
    "not UTF-8": b'{"a":"\xff\xfe"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "an open string": b'{"a":"' + b",[{\\" * 200_000,
    "a long key": b'{"' + b"k" * 900_000 + b'":1}',
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS.keys())
def test_a14_json_bombs_are_refused_at_once_and_cost_nothing(process: Process, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    before = process.reset_peak()
    for client, path in ((process.user, "/jobs"), (process.user, "/keys"), (process.worker, "/worker/claim")):
        took = []
        for _ in range(3):  # the best of them, by the server's own clock: this machine has other things to do
            began = process.cpu_seconds()
            answer = client.post(path, content=body, headers=headers)
            took.append(process.cpu_seconds() - began)
            assert answer.status_code in (413, 422), answer.text[:200]
            assert len(answer.content) < 20_000
        # What is refused is read all the same, so that the client sees the refusal.
        assert min(took) <= 0.1 + len(body) / 50e6, (path, took)
    assert process.peak() - before < 50


def test_a14_a_gigabyte_is_refused_by_its_announcement(process: Process) -> None:
    before = process.reset_peak()
    began = time.monotonic()
    head = f"POST /jobs HTTP/1.1\nhost: localhost\nauthorization: Bearer {KEY}\ncontent-length: 1073741824\nexpect: 100-continue\n\n"
    with process.raw(head) as raw:
        answer = raw.recv(4096)

    assert answer.startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 0.5
    assert process.peak() - before < 50


@pytest.mark.parametrize("chunked", [False, True])
def test_a14_a_gigabyte_that_is_sent_all_the_same_takes_no_memory(process: Process, chunked: bool) -> None:
    before = process.reset_peak()
    length = "transfer-encoding: chunked" if chunked else f"content-length: {2**30}"
    piece = b"x" * 65536
    sent = (b"10000\r\n" + piece + b"\r\n") if chunked else piece
    with process.raw(
        f"POST /jobs HTTP/1.1\nhost: localhost\nauthorization: Bearer {KEY}\n{length}\n\n"
    ) as raw:
        answer, num_sent = b"", 0
        while not answer and num_sent < 2**30:
            try:
                raw.sendall(sent)
            except OSError:  # it has hung up
                break
            num_sent += len(piece)
            if has_answered(raw, 0):
                answer = raw.recv(4096)

    assert answer.startswith(b"HTTP/1.1 413")
    assert num_sent < 200e6
    assert process.peak() - before < 50


def test_a14_nan_and_infinities_as_metrics_come_back_exactly(shared_box) -> None:
    lease = shared_box.running()
    values = {"nan": "NaN", "inf": "Infinity", "minus_inf": "-Infinity", "minus_zero": -0.0, "tiny": 5e-324, "big": 1.7976931348623157e308}  # fmt: skip

    assert lease.metrics(0, (1, values)).status_code == 200

    point = shared_box.admin.get(f"/jobs/{lease.job_id}/metrics").json()["data"][0]
    assert {name: point[name] for name in values} == values
    assert lease.metrics(1, (2**53, {"loss": 1.0})).status_code == 422
    assert lease.finish("failed").status_code == 200


# ---------------------------------------------------------------- A15


@pytest.mark.parametrize(
    "coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-gzip", "IDENTITY, gzip"]
)
def test_a15_a_body_that_would_swell_is_not_taken(shared_box, every_route, assert_error, coding: str) -> None:
    bomb = gzip.compress(b"0" * 10_000_000)
    for method, path in every_route(shared_box):
        if method in ("POST", "PUT", "PATCH"):
            client = shared_box.worker if path.startswith("/worker/") else shared_box.admin
            answer = client.request(method, path, content=bomb, headers={"content-encoding": coding})
            assert_error(answer, 415, "unsupported_encoding")
    assert shared_box.admin.get("/jobs", headers={"content-encoding": "identity"}).status_code == 200


def test_a15_a_chunked_body_without_end_is_given_up(start_process: Callable[..., Process]) -> None:
    process = start_process(SFTD_BODY_SECONDS="1")
    head = (
        f"POST /jobs HTTP/1.1\nhost: localhost\nauthorization: Bearer {KEY}\ntransfer-encoding: chunked\n\n"
    )
    with process.raw(head) as raw:
        began = time.monotonic()
        answer = b""
        while (
            not answer and time.monotonic() - began < 10
        ):  # a drop every 0.2 s: it never stalls, and never ends
            raw.sendall(b"1\r\nx\r\n")
            if has_answered(raw, 0.2):
                answer = raw.recv(4096)

    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 8


def test_a15_idle_connections_leave_heartbeats_alone(start_process: Callable[..., Process]) -> None:
    process = start_process(
        SFTD_MAX_CONNECTIONS="300", SFTD_MAX_CONNECTIONS_PER_ADDRESS="100", SFTD_HEAD_SECONDS="60"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    worker = process.worker
    file_id = process.user.post("/files", files={"file": b'{"text": "a"}'}).json()["id"]
    process.user.post("/jobs", json={"base_model": "o/m", "training_file": file_id})
    claim = {"worker_id": "w", "boot_id": "b", "request_id": "r", "gpus": 1, "wait_seconds": 0}
    worker.post("/worker/register", json={"worker_id": "w", "boot_id": "b", "gpus": 1, "device": "cpu"})
    lease = worker.post("/worker/claim", json=claim).json()
    took: list[float] = []
    held: list[int] = []
    over = threading.Event()

    def beat() -> None:
        while not over.is_set() or len(took) < 20:
            began = time.monotonic()
            body = {"attempt": 1, "started": True, "seen_want": "run", "wait_seconds": 0.2}
            answer = worker.post(
                f"/worker/jobs/{lease['job_id']}/heartbeat",
                json=body,
                headers={"x-lease-token": lease["token"]},
            )
            held.append(answer.status_code)
            took.append(time.monotonic() - began)

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    with ExitStack() as stack:
        try:
            for i in range(1000):  # from four addresses of this machine, the heartbeats' own among them
                connection = socket.socket()
                stack.enter_context(connection)
                connection.bind((f"127.0.0.{1 + i % 4}", 0))
                connection.settimeout(10)
                connection.connect(("127.0.0.1", process.port))
                connection.sendall(b"GET /jobs HTTP/1.1\r\n"[: i % 20])  # at most a part of a head
            while process.num_files() > 350 and time.monotonic() < began + 60:
                time.sleep(0.1)
            left = process.num_files()
            new = [
                httpx.get(f"http://127.0.0.1:{process.port}/healthz", timeout=10).status_code
                for _ in range(5)
            ]
        finally:
            over.set()
            thread.join(60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert set(held) == {200}
    assert max(took) < 5, max(took)  # the limit of a worker's call
    assert new == [200] * 5
    assert left <= 350


def test_a15_one_address_cannot_take_the_room_of_the_others(start_process: Callable[..., Process]) -> None:
    process = start_process(SFTD_MAX_CONNECTIONS_PER_ADDRESS="20", SFTD_HEAD_SECONDS="60")
    with ExitStack() as stack:
        mine = stack.enter_context(process.raw(""))
        assert asked(mine)
        greedy = []
        for _ in range(100):
            connection = stack.enter_context(socket.socket())
            connection.bind(("127.0.0.9", 0))
            connection.connect(("127.0.0.1", process.port))
            greedy.append(connection)
        assert asked(greedy[-1])  # the newest is let in, the one that was idle longest makes room
        is_open = [not has_answered(connection, 0) for connection in greedy]

        assert sum(is_open) == 20
        assert all(is_open[-20:])
        assert asked(mine)


def test_a15_a_connection_that_says_nothing_is_closed(start_process: Callable[..., Process]) -> None:
    process = start_process(SFTD_HEAD_SECONDS="1")
    with ExitStack() as stack:
        silent = stack.enter_context(process.raw(""))
        slow = stack.enter_context(process.raw("GET /healthz HTTP/1.1\n"))
        kept = stack.enter_context(process.raw(""))
        assert asked(kept)
        began = time.monotonic()
        while time.monotonic() - began < 5 and not has_answered(silent, 0.1):
            slow.sendall(b"x")  # a loris
        assert closed(silent)
        assert closed(slow)
        assert asked(kept)  # one that has asked before may rest


def has_answered(connection: socket.socket, seconds: float) -> bool:
    """Whether something can be read, or the other side has hung up, within so many seconds."""
    poll = select.poll()  # unlike select() it takes any number of open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def asked(connection: socket.socket) -> bool:
    connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        piece = connection.recv(4096)
        if not piece:
            return False
        answer += piece
    return answer.startswith(b"HTTP/1.1 200")


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(4096) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "flood",
    ["".join(f"x-{i}: y\n" for i in range(20_000)), "x: " + "y" * 1_000_000 + "\n", "cookie: a=b\n" * 50_000],
    ids=["many", "long", "same"],
)
def test_a15_a_flood_of_headers_is_cut_off(process: Process, flood: str) -> None:
    before = process.reset_peak()
    with process.raw("GET /healthz HTTP/1.1\nhost: localhost\n") as raw:
        try:
            raw.sendall(flood.replace("\n", "\r\n").encode())
            answer = raw.recv(4096)
        except ConnectionError:
            answer = b""

    assert answer in (b"",) or answer.startswith(b"HTTP/1.1 4")
    assert process.peak() - before < 50
    assert process.user.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "head",
    ["GET / HTTP/9.9\n\n", "\n\n\n", "GET\n\n", "\x16\x03\x01\x02\x00\x01", "GET /jobs HTTP/1.1\n\n",
     "GET /jobs HTTP/1.1\nhost: a\nhost: b\n\n", "GET /jobs HTTP/1.1\nhost: localhost\ncontent-length: -1\n\n",
     "POST /jobs HTTP/1.1\nhost: localhost\ncontent-length: 5\ntransfer-encoding: chunked\n\n0\n\n",
     "POST /jobs HTTP/1.1\nhost: localhost\ntransfer-encoding: gzip, chunked\n\n0\n\n",
     "POST /jobs HTTP/1.1\nhost: localhost\ncontent-length: 5\ncontent-length: 6\n\n", "PRI * HTTP/2.0\n\nSM\n\n"],
    ids=ascii,
)  # fmt: skip
def test_a15_no_broken_head_gets_in_or_breaks_anything(process: Process, head: str) -> None:
    with process.raw(head) as raw:
        raw.shutdown(socket.SHUT_WR)
        answer = raw.recv(4096)

    assert answer == b"" or answer.split(b" ")[1][:1] in b"45", answer[:60]
    assert not answer.startswith(b"HTTP/1.1 500")
    assert process.user.get("/healthz").status_code == 200


# ---------------------------------------------------------------- A16


def test_a16_a_job_has_at_most_a_thousand_metric_names(shared_box, assert_error) -> None:
    lease = shared_box.running()
    names = [f"m/{i}" for i in range(1001)]

    assert lease.metrics(0, (1, dict.fromkeys(names[:1000], 1.0))).status_code == 200
    assert_error(lease.metrics(1, (2, {names[1000]: 1.0})), 422, "too_many_metric_names")
    assert_error(lease.metrics(1, (2, {f"n{i}": 1.0 for i in range(9000)})), 422, "too_many_metric_names")
    assert lease.metrics(1, (2, {names[0]: 1.0})).status_code == 200
    for name in ("x" * 129, "x" * 1_000_000, "", "a b", "<script>", "a\n", "ü", "a\x00"):
        assert lease.metrics(2, (3, {name: 1.0})).status_code == 422, name[:20]
    assert lease.finish("failed").status_code == 200


def test_a16_a_million_names_at_once_are_refused_at_once(process: Process) -> None:
    body = b'{"attempt":1,"seq":0,"points":[{"step":1,"values":{' + b",".join(b'"m%d":1' % i for i in range(1_000_000)) + b"}}]}"  # fmt: skip
    before = process.reset_peak()

    answer = process.worker.post("/worker/jobs/job_x/metrics", content=body, headers={"x-lease-token": "t", "content-type": "application/json"})  # fmt: skip

    assert answer.status_code == 422
    assert process.peak() - before < 50


# ---------------------------------------------------------------- A9, A10


def zipped(name: str, content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("../../evil")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return made.getvalue()


ARCHIVES = {
    "zip-slip": zipped("../../evil.jsonl", b"{}"),
    "zip bomb": zipped("bomb", b"0" * 50_000_000),
    "tar with links": tarred(),
    "tar.gz": gzip.compress(tarred()),
    "gzip": gzip.compress(b'{"text": "a"}'),
    "empty zip": b"PK\x05\x06" + b"\0" * 18,
    "bzip2": b"BZh91AY&SY",
    "xz": b"\xfd7zXZ\x00\x00\x04",
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "torch .pt": zipped("archive/data.pkl", pickle.dumps(1)),
}


@pytest.mark.parametrize("content", ARCHIVES.values(), ids=ARCHIVES.keys())
@pytest.mark.parametrize("name", ["rows.jsonl", "x.zip"])
def test_a9_an_archive_is_not_taken_and_not_opened(
    shared_box, assert_error, content: bytes, name: str
) -> None:
    error = assert_error(
        shared_box.admin.post("/files", files={"file": (name, content)}), 415, "archive_refused"
    )

    assert "not unpacked here" in error["message"]
    assert shared_box.nothing_left_of_uploads()


def test_a9_no_code_of_the_server_or_the_worker_unpacks_anything(repository: Path) -> None:
    for folder in ("server", "worker"):
        for path in (repository / folder).rglob("*.py"):
            text = path.read_text()
            for word in (
                "tarfile.open",
                "extractall",
                ".extract(",
                "zipfile",
                "shutil.unpack_archive",
                "gzip.",
            ):
                assert word not in text, (path, word)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/sftd-pwned-by-pickle",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["model.bin", "adapter.pt", "x.ckpt", "rows.joblib", "rows.jsonl"])
def test_a10_a_pickle_is_refused_and_not_read(shared_box, assert_error, protocol: int, name: str) -> None:
    content = pickle.dumps(Evil(), protocol=protocol)

    error = assert_error(
        shared_box.admin.post("/files", files={"file": (name, content)}), 422, "invalid_file"
    )

    assert protocol < 2 or "pickle" in error["message"]
    assert not Path("/tmp/sftd-pwned-by-pickle").exists()


@pytest.mark.parametrize(
    "weights", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors.index.json"]
)
def test_a10_a_base_model_without_safetensors_is_refused_when_it_is_posted(
    shared_box, assert_error, weights: str
) -> None:
    folder = shared_box.server.folder.path / "models" / f"pickled-{weights}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(pickle.dumps(Evil()))

    for name in (str(folder), folder.name):
        error = assert_error(
            shared_box.admin.post("/jobs", json=shared_box.spec(base_model=name)), 422, "invalid_spec"
        )
        assert error["param"] == "base_model"
        assert ".safetensors" in error["message"]


# ---------------------------------------------------------------- A20


def problems(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(RowsInvalid) as caught:
        check_file(path, name="rows.jsonl")
    return str(caught.value)


GOOD = b'{"text": "a"}\n'


def test_a20_a_line_of_100_mb_is_named_and_the_rest_is_read(process: Process) -> None:
    long = b'{"text": "' + b"a" * 100_000_000 + b'"}\n'
    before = process.reset_peak()

    answer = process.user.post("/files", files={"file": ("rows.jsonl", GOOD + long + GOOD + b"oops\n")})

    message = answer.json()["error"]["message"]
    assert answer.status_code == 422
    assert "line 2, row: is longer than 33,554,432 bytes; split it" in message
    assert "line 4, row: is not JSON" in message
    assert process.peak() - before < 150


@pytest.mark.parametrize(
    ("content", "said"),
    [(GOOD + b'{"text": "\xff"}\n', "line 2, row: is not UTF-8"), (GOOD + b'{"text": "\\ud800"}\n', "line 2, row: holds half"),
     (GOOD + b"[" * 100_000, "line 2, row: is nested too deeply"), (GOOD + b'{"text": NaN}', "line 2, row: is not JSON"),
     (GOOD + b'{"text": 1' + b"0" * 5000 + b"}", "line 2, row: is not JSON"), (GOOD + b'{"text": null}', "line 2, text: "),
     (b"\x00" * 1000, "line 1, row: is not JSON"), (b"[" + GOOD + b',{"text": "\xff"}]', "is not UTF-8"),
     (GOOD + b'{"text": "' + b"a" * 600_000 + b'", "x": ' + many(b"[]", 600_000) + b"}", "line 2, row: holds more than")],
    ids=range(9),
)  # fmt: skip
def test_a20_a_bad_row_is_named_by_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in problems(tmp_path, content)


@pytest.mark.parametrize("array", [False, True])
def test_a20_a_row_of_many_small_things_takes_no_memory(process: Process, array: bool) -> None:
    row = b'{"text": "a", "x": ' + many(b"[]", 8_000_000) + b"}"
    before = process.reset_peak()

    answer = process.user.post("/files", files={"file": ("rows.json", b"[" + row + b"]" if array else row)})

    assert answer.status_code == 422
    assert f"holds more than {MAX_ROW_VALUES:,} values" in answer.json()["error"]["message"]
    assert process.peak() - before < 150


@pytest.mark.parametrize("array", [False, True])
def test_a20_long_code_in_a_string_is_no_bomb(tmp_path: Path, array: bool) -> None:
    row = json.dumps({"text": 'a[i],{"b"},\\n' * 500_000})
    path = tmp_path / "rows"
    path.write_text(f"[{row},{row}]" if array else f"{row}\n{row}\n")

    assert check_file(path, name="rows").num_rows == 2
