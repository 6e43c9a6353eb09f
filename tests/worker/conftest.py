"""A scripted server that speaks the real worker protocol, the real server, and workers as processes beside them."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sftd import Client
from sftd.protocol import CheckpointRef, InputFile, Lease
from sftd.spec import JobSpec

HERE = Path(__file__).parent
KEY = "worker-key-of-the-tests"
INSTALLATION = "installation-of-the-tests"
JOB = "job_1"
NOT_SERVED = "/worker/analyses/"  # it plans nothing


@dataclass
class Fault:
    """What to do to the next calls whose path ends so, instead of (or after) serving them."""

    path_ends: str
    times: int = 1
    status: int | None = None  # answer with this
    headers: dict[str, str] = field(default_factory=dict)
    code: str = "scripted"
    page: bool = False  # with a body that is not ours, as of a proxy
    serve_first: bool = False  # serve the call, then lose the answer
    when: Callable[[dict[str, Any]], bool] = lambda body: True


class FakeServer:
    """One job, one lease at a time, everything that arrives kept in order."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.lock = threading.Condition()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.streams: dict[str, list[Any]] = {"metrics": [], "logs": [], "events": []}
        self.checkpoints: list[dict[str, Any]] = []
        self.last_calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: list[Fault] = []
        self.want = "run"
        self.directive: dict[str, Any] = {}  # what heartbeats are answered besides
        self.welcome: dict[str, Any] = {}
        self.lease: Lease | None = None
        self.claimed = False
        self.fenced = False
        self.attempts = 0
        self.num_starts = 0  # of workers: what an earlier one asked for is not answered any more
        self.lease_seconds = 30.0
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    # ---- steering

    def up(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # connections break off here on purpose

        self._http = Listener(("127.0.0.1", self.port), Handler)
        self._open: list[Any] = []
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Stop listening and break every connection, as a killed server does."""
        assert self._http
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self._open:
                try:
                    connection.shutdown(2)
                except OSError:
                    continue
            self._open.clear()
            self.lock.notify_all()

    def post_job(self, *, rows: bytes = b'{"prompt": "a", "completion": "b"}\n', **fields: Any) -> None:
        sha = hashlib.sha256(rows).hexdigest()
        (self.data / "blobs").mkdir(exist_ok=True)
        (self.data / "blobs" / sha).write_bytes(rows)
        file = InputFile(
            file_id="file_1", filename="rows.jsonl", sha256=sha, bytes=len(rows), path=f"blobs/{sha}"
        )
        extra = {name: fields.pop(name) for name in ("checkpoints", "base") if name in fields}
        spec = JobSpec.model_validate({"base_model": "org/model", "training_file": "file_1", **fields})
        with self.lock:
            self.attempts += 1
            self.lease = Lease(
                job_id=JOB,
                attempt=self.attempts,
                token=f"token-{self.attempts}",
                lease_seconds=self.lease_seconds,
                spec=spec,
                folder=f"jobs/{JOB}",
                training_file=file,
                validation_file=None,
                base=extra.get("base"),
                checkpoints=extra.get("checkpoints", []),
                next_seq={"metrics": 0, "logs": 0, "events": 0},
            )
            self.streams = {"metrics": [], "logs": [], "events": []}
            self.claimed, self.fenced, self.want = False, False, "run"
            self.lock.notify_all()

    def wish(self, want: str) -> None:
        with self.lock:
            self.want = want
            self.lock.notify_all()

    def direct(self, **directive: Any) -> None:
        """What the server asks of the worker from now on: `direct(make_room=True)`."""
        with self.lock:
            self.directive = directive
            self.lock.notify_all()

    def bodies(self, call: str) -> list[dict[str, Any]]:
        """What was sent with this call, in order."""
        with self.lock:
            return [body for path, body in self.calls if path.endswith(call)]

    def add_fault(self, path_ends: str, **how: Any) -> None:
        """A Fault from now on: `add_fault("metrics", status=503, times=2)`."""
        with self.lock:
            self.faults.append(Fault(path_ends, **how))

    def break_down(self) -> None:
        """Answer every call with 500 from now on."""
        self.add_fault("", times=10**9, status=500)

    def fence(self) -> None:
        with self.lock:
            self.fenced = True
            self.lock.notify_all()

    def until(self, ready: Callable[[], Any], seconds: float = 15.0) -> Any:
        """Wait until something holds; it is looked at again after every call that arrives."""
        deadline = time.monotonic() + seconds
        with self.lock:
            while not (found := ready()):
                left = deadline - time.monotonic()
                assert left > 0, (
                    f"waited {seconds} s in vain; calls: {[path for path, _ in self.calls][-20:]}"
                )
                self.lock.wait(min(left, 0.05))
        return found

    def steps(self) -> list[int]:
        return [point["step"] for point in self.streams["metrics"]]

    # ---- serving

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"] or 0)
        body = json.loads(handler.rfile.read(length) or b"{}")
        fault: Fault | None = None
        with self.lock:
            self._open.append(handler.connection)
            if not handler.path.startswith(NOT_SERVED):
                self.calls.append((handler.path, body))
                fault = self._fault(handler.path, body)
            if fault is None or fault.serve_first:
                status, headers, answer = self._answer(handler, body)
            if fault is not None and fault.status is not None:
                status, headers = fault.status, fault.headers
                answer = {"detail": "Not Found"} if fault.page else _error("scripted", fault.code)
            self.lock.notify_all()
        if fault is not None and fault.status is None:
            handler.close_connection = True  # the answer is lost
            return
        try:
            content = json.dumps(answer).encode() if answer is not None else b""
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            handler.close_connection = True

    def _fault(self, path: str, body: dict[str, Any]) -> Fault | None:
        for fault in self.faults:
            if path.endswith(fault.path_ends) and fault.times > 0 and fault.when(body):
                fault.times -= 1
                return fault
        return None

    def _answer(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any]
    ) -> tuple[int, dict[str, str], Any]:
        if handler.path.startswith(NOT_SERVED):
            return 404, {}, _error("no route", "unknown_route")
        call = handler.path.rsplit("/", 1)[1]
        if handler.headers["Authorization"] != f"Bearer {KEY}":
            return 401, {}, _error("no key")
        if call == "register":
            welcome = {"lease_seconds": self.lease_seconds, "installation_id": INSTALLATION}
            return 200, {}, {**welcome, **self.welcome}
        if call == "claim":
            start = self.num_starts
            is_gone = lambda: self.num_starts != start  # noqa: E731
            self.lock.wait_for(lambda: is_gone() or (self.lease and not self.claimed), body["wait_seconds"])
            if self.lease is None or self.claimed or is_gone():
                return 204, {}, None
            self.claimed = True
            return 200, {}, self.lease.model_dump(mode="json")
        lease = self.lease
        assert lease
        token = handler.headers["X-Lease-Token"]
        if self.fenced or body["attempt"] != lease.attempt or token != lease.token or self._over():
            return 409, {}, _error("the lease is lost")
        return self._fenced_answer(call, body)

    def _fenced_answer(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if call == "heartbeat":
            is_news = lambda: any(  # noqa: E731
                self.directive.get(name, False) != body[f"seen_{name}"] for name in ("make_room", "draining")
            )
            changed = lambda: (  # noqa: E731
                self.want != body["seen_want"] or is_news() or self.fenced or self._over()
            )
            self.lock.wait_for(changed, body["wait_seconds"])
            if self.fenced or self._over():
                return 409, {}, _error("the lease is lost")
            return 200, {}, {"want": self.want, "lease_seconds": self.lease_seconds, **self.directive}
        if call in self.streams:
            return self._append(call, body)
        if call == "restore":  # there is no store behind this server
            return 404, {}, {"error": {**_error("gone")["error"], "code": "file_gone"}}
        if call == "checkpoints":
            self.checkpoints.append({**body, "steps_before": self.steps()})
            return 200, {}, {"ok": True}
        self.last_calls.append((call, body))
        return 200, {}, {"ok": True}

    def _append(self, kind: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        items = body[{"metrics": "points", "logs": "lines", "events": "events"}[kind]]
        stream = self.streams[kind]
        if body["seq"] == len(stream):
            stream += items
        elif body["seq"] + len(items) > len(stream):
            return 416, {"X-Expected-Seq": str(len(stream))}, _error("gap")
        return 200, {}, {"next_seq": max(len(stream), body["seq"] + len(items))}

    def _over(self) -> bool:
        return any(body["attempt"] == self.attempts for _, body in self.last_calls)


def _error(message: str, code: str = "test") -> dict[str, Any]:
    return {"error": {"message": message, "type": "test", "param": None, "code": code}}


class WorkerProcess:
    """A worker with a scripted trainer, started the cold way unless `warm` is set."""

    def __init__(self, server: FakeServer, tmp_path: Path, name: str = "worker") -> None:
        self.server = server
        self.warm = False
        self.folder = server.data / "jobs" / JOB
        self._script = tmp_path / f"{name}.script.json"
        self._log = tmp_path / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, script: dict[str, Any], *, env: dict[str, str] | None = None, **settings: Any) -> None:
        with self.server.lock:
            self.server.num_starts += 1
            self.server.lock.notify_all()
        self._script.write_text(json.dumps(script))
        flags = {
            "server_url": f"http://127.0.0.1:{self.server.port}",
            "data": str(self.server.data),
            "key": KEY,
            "device": "cpu",
            "cancel_grace_seconds": 1,
            "checkpoint_grace_seconds": 5,
            "trainer_argv": [sys.executable, "-S", str(HERE / "scripted_trainer.py"), str(self._script)],
            "warm": self.warm,
            "warm_argv": [sys.executable, str(HERE / "scripted_warm.py"), str(self._script)],
            **settings,
        }
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "run_worker.py"), json.dumps(flags)],
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
            )

    def stop(self, seconds: float = 15.0) -> int:
        assert self.process
        self.process.terminate()
        return self.process.wait(seconds)

    def trainer_pids(self) -> list[int]:
        path = self.folder / "pids.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def trainer_gone(self) -> bool:
        return all(not _alive(pid) for pid in self.trainer_pids())

    def log(self) -> str:
        return self._log.read_text()


class Box:
    """The real server and workers as processes that a test kills and starts again."""

    def __init__(
        self, folder: Path, *, server_settings: dict[str, str] | None = None, lease_seconds: int = 2
    ) -> None:
        self.data = folder / "data"
        self.folder = folder
        self.lease_seconds = lease_seconds
        self.server_settings = server_settings or {}  # more of its environment
        self.script = folder / "script.json"
        self._scripts: dict[str, Any] = {}  # by the job's name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._clean = {name: value for name, value in os.environ.items() if not name.startswith("SFTD_")}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start_server()
        self.client = Client(f"http://127.0.0.1:{self.port}", (self.data / "admin.key").read_text().strip())

    def start_server(self) -> None:
        environment = {
            **self._clean,
            "SFTD_DATA": str(self.data),
            "SFTD_PORT": str(self.port),
            "SFTD_LEASE_SECONDS": str(self.lease_seconds),
            "SFTD_REAP_SECONDS": "0.2",
            "SFTD_BACKOFF_SECONDS": "0",
            "XDG_STATE_HOME": str(self.folder / "state"),
            **self.server_settings,
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "sftd_server.app"], env=environment, stdout=subprocess.PIPE
        )
        self.processes.append(self.server)
        assert self.server.stdout
        assert b"listens on" in self.server.stdout.readline()

    def restart_server(self, *, lease_seconds: int) -> None:
        self.server.kill()
        self.server.wait()
        self.lease_seconds = lease_seconds
        self.start_server()

    def start_worker(
        self, name: str, *, env: dict[str, str | None] | None = None, **more: Any
    ) -> subprocess.Popen[bytes]:
        """`env`: changes of its environment; None takes a variable away."""
        settings = {
            "server_url": f"http://127.0.0.1:{self.port}",
            "data": str(self.data),
            "worker_name": name,
            "device": "cpu",
            "warm": False,
            "trainer_argv": [sys.executable, "-S", str(HERE / "scripted_trainer.py"), str(self.script)],
            "warm_argv": [sys.executable, str(HERE / "scripted_warm.py"), str(self.script)],
            **more,
        }
        environment = {**self._clean, **(env or {})}
        with (self.folder / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, str(HERE / "run_worker.py"), json.dumps(settings)],
                env={variable: value for variable, value in environment.items() if value is not None},
                stderr=log,
            )
        self.processes.append(worker)
        return worker

    def start_own_worker(self, name: str, **more: Any) -> subprocess.Popen[bytes]:
        """A worker that sees nothing of the server's folder: its own is called like it."""
        key = (self.data / "worker.key").read_text().strip()
        return self.start_worker(
            name, **{"data": str(self.folder / name), "own_data": True, "key": key, **more}
        )

    def post(self, *, name: str | None = None, gpus: int = 1, **script: Any) -> str:
        """A job, and what its trainer does. Jobs that run side by side have names, and a script each."""
        if name is not None:
            self._scripts[name] = script
        self.script.write_text(json.dumps({**(script if name is None else {}), "by_name": self._scripts}))
        rows = self.folder / "rows.jsonl"
        rows.write_text('{"prompt": "a", "completion": "b"}\n')
        spec: dict[str, Any] = {"base_model": "org/model", "gpus": gpus}
        if name is not None:
            spec["name"] = name
        return self.client.jobs.create(training_file=self.client.files.upload(rows).id, **spec).id

    def until(self, ready: Callable[[], object], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.05)  # another process's state: there is nothing to wait on

    def steps(self, job_id: str) -> list[int]:
        return [point.step for point in self.client.jobs.metrics(job_id)]

    def state(self, job_id: str) -> str:
        return str(self.client.jobs.retrieve(job_id).state)

    def job_folder(self, job_id: str) -> Path:
        return self.data / "jobs" / job_id

    def trainer_pids(self, job_id: str) -> list[int]:
        path = self.job_folder(job_id) / "pids.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def server_settings() -> dict[str, str]:
    """Variables of the server's environment; a module may have others."""
    return {}


@pytest.fixture
def box(request: pytest.FixtureRequest, tmp_path: Path, server_settings: dict[str, str]) -> Iterator[Box]:
    seconds = getattr(request.module, "LEASE_SECONDS", 2)
    box = Box(tmp_path, server_settings=server_settings, lease_seconds=seconds)
    yield box
    for process in box.processes:
        process.kill()
        process.wait()


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Does a process run? A dead one that is not buried yet does not."""
    return _alive


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "installation.id").write_text(INSTALLATION)
    return data


@pytest.fixture
def server(data: Path) -> Iterator[FakeServer]:
    server = FakeServer(data)
    server.up()
    yield server
    server.down()


@pytest.fixture
def worker(server: FakeServer, tmp_path: Path) -> Iterator[WorkerProcess]:
    yield from _worker(server, tmp_path, "worker")


@pytest.fixture
def second_worker(server: FakeServer, tmp_path: Path) -> Iterator[WorkerProcess]:
    yield from _worker(server, tmp_path, "second")


def _worker(server: FakeServer, tmp_path: Path, name: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(server, tmp_path, name)
    yield worker
    if worker.process and worker.process.poll() is None:
        worker.process.kill()
        worker.process.wait()
    print(worker.log() if worker.process else "")  # shown where a test fails


@pytest.fixture
def checkpoint_on_disk(data: Path) -> Callable[[int], CheckpointRef]:
    """Lay down a checkpoint of a step, whole, as a trainer would."""

    def lay_down(step: int) -> CheckpointRef:
        folder = data / "jobs" / JOB / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        content = b"weights"
        (folder / "adapter.safetensors").write_bytes(content)
        files = {"adapter.safetensors": {"bytes": 7, "sha256": hashlib.sha256(content).hexdigest()}}
        manifest = json.dumps(
            {"step": step, "attempt": 1, "config_sha256": "", "world_size": 1, "files": files}
        )
        (folder / "manifest.json").write_text(manifest)
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        return CheckpointRef(step=step, name=folder.name, manifest_sha256=digest)

    return lay_down
