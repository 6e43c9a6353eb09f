"""A scripted HTTP server for the client's own behaviour, and the real server with a worker for the rest."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sftd import Client, cli
from sftd._transport import Transport

WORKER_TESTS = Path(__file__).parents[1] / "worker"
ROWS = '{"prompt": "a", "completion": "b"}\n'


@dataclass
class Answer:
    """What to answer to one request. `cut`: send only so many bytes of the body, then hang up; 0 hangs up at once."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedServer:
    """Answers requests with a list of answers, in order; the last one is given again and again."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[Answer] = []
        self.pauses: list[float] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                scripted.serve(self)

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def will_answer(self, *answers: Answer) -> None:
        self.answers = list(answers)

    def client(self, *, max_retries: int = 2) -> Client:
        """A client that notes how long it would pause, and does not."""
        transport = Transport(self.url, "key", max_retries=max_retries, pause=self.pauses.append)
        client = Client(transport=transport)
        client.jobs._pause = self.pauses.append
        return client

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"] or 0)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append(Request(handler.command, handler.path, headers, handler.rfile.read(length)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if answer.cut == 0:
            handler.close_connection = True
            return
        if "Date" in answer.headers:
            handler.send_response_only(answer.status)  # without the date of this machine
        else:
            handler.send_response(answer.status)
        for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content if answer.cut is None else content[: answer.cut])
        handler.close_connection = answer.cut is not None


def job_body(**fields: Any) -> dict[str, Any]:
    """A job as a server answers it."""
    spec = {"base_model": "org/model", "training_file": "file_1", "max_steps": 10, "warmup_steps": 0}
    none = (
        "name started_at finished_at queue_position estimated_finish_at worker_id total_steps loss eval_loss"
        " tokens_per_second failure"
    )
    body = dict.fromkeys(none.split())
    body |= {
        "id": "job_1",
        "object": "job",
        "state": "queued",
        "want": "run",
        "owner": "admin",
        "priority": 0,
    }
    body |= {
        "base_model": "org/model",
        "method": "lora",
        "spec": spec,
        "metadata": {},
        "attempt": 0,
        "step": 0,
    }
    body |= {
        "created_at": "2026-01-01T00:00:00Z",
        "progress": 0.0,
        "tokens_seen": 0,
        "folder": "/data/jobs/job_1",
    }
    return {**body, **fields}


def error_body(message: str = "no", code: str = "some_code", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": param, "code": code}}


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def answer() -> type[Answer]:
    return Answer


@pytest.fixture
def job_answer() -> Callable[..., Answer]:
    return lambda **fields: Answer(body=job_body(**fields))


@pytest.fixture
def error_answer() -> Callable[..., Answer]:
    def make(status: int, *, headers: dict[str, str] | None = None, **body: Any) -> Answer:
        return Answer(status, error_body(**body), headers or {})

    return make


class Outcome:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def sftd(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*argv: object) -> Outcome:
        try:
            cli.main([str(word) for word in argv])
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def at_scripted(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> ScriptedServer:
    """The scripted server, which commands call then; nobody waits between two tries."""
    monkeypatch.setenv("SFTD_URL", scripted.url)
    monkeypatch.setenv("SFTD_API_KEY", "key")
    monkeypatch.setattr("sftd._transport.backoff_seconds", lambda *_, **__: 0)
    return scripted


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("SFTD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


# ---------------------------------------------------------------- the real server


@dataclass
class Box:
    """A real server in a process, and a worker whose trainer is scripted."""

    url: str
    key: str
    data: Path
    script: Path

    def set_script(self, **script: Any) -> None:
        self.script.write_text(json.dumps(script))

    def client(self) -> Client:
        return Client(self.url, self.key)


@pytest.fixture(scope="session")
def _box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("box")
    data, script = folder / "data", folder / "script.json"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SFTD_")}
    environment = {**clean, "XDG_STATE_HOME": str(folder / "state"), "SFTD_DATA": str(data), "SFTD_PORT": "0"}
    server = subprocess.Popen(
        [sys.executable, "-m", "sftd_server.app"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    line = server.stdout.readline()
    url = line.split("listens on ")[1].split(";")[0]
    trainer = [sys.executable, "-S", str(WORKER_TESTS / "scripted_trainer.py"), str(script)]
    settings = {
        "server_url": url,
        "data": str(data),
        "device": "cpu",
        "trainer_argv": trainer,
        "warm": False,
        "cancel_grace_seconds": 1,
    }
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, str(WORKER_TESTS / "run_worker.py"), json.dumps(settings)], env=clean, stderr=log
        )
    yield Box(url, (data / "admin.key").read_text().strip(), data, script)
    for process in (worker, server):
        process.terminate()
        process.wait(20)


@pytest.fixture
def box(_box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setenv("SFTD_URL", _box.url)
    monkeypatch.setenv("SFTD_API_KEY", _box.key)
    _box.set_script(steps=5, checkpoint_every=2)
    return _box


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    return path
