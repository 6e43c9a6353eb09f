"""A real server for the tests: SQLite file or PostgreSQL database, uvicorn on loopback, a clock that tests move.

What goes through `box`, `make_box` or `shared_box` in the modules of ON_BOTH runs on SQLite and on PostgreSQL.
`@pytest.mark.sqlite` leaves PostgreSQL out, where a test looks into the file.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from sqlmodel import Session
from tests.postgres import NoPostgres, Postgres
from tests.waiting import until

from sftd_server.app import create_app
from sftd_server.clock import Clock
from sftd_server.server import Server
from sftd_server.settings import Settings
from sftd_server.workers.reaper import Reaper

ON_BOTH = (
    "artifacts",
    "jobs",
    "workers",
    "files",
    "test_audit.py",
    "openai",
    "plans",
    "test_auth.py",
    "test_migrations.py",
    "test_db.py",
    "test_retention.py",
    "test_garbage.py",
)
T = TypeVar("T")
ADMIN = "sftd-admin-key-of-the-tests"
SHA = "ab" * 32
ROWS = b'{"prompt": "2+2?", "completion": "4"}\n{"prompt": "3+3?", "completion": "6"}\n'


class ManualClock(Clock):
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        object.__setattr__(self, "wall", datetime(2030, 1, 1, tzinfo=UTC))
        object.__setattr__(self, "steady", 1000.0)

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def advance(self, seconds: float) -> None:
        object.__setattr__(self, "steady", self.steady + seconds)
        self.jump(seconds)

    def jump(self, seconds: float) -> None:
        """The wall clock alone is set."""
        object.__setattr__(self, "wall", self.wall + timedelta(seconds=seconds))


@dataclass
class Lease:
    """A claimed job, and what its worker sends."""

    worker: httpx.Client
    job_id: str
    attempt: int
    token: str
    answer: dict[str, Any]

    def post(self, kind: str, **body: Any) -> httpx.Response:
        return self.worker.post(
            f"/worker/jobs/{self.job_id}/{kind}",
            json={"attempt": self.attempt, **body},
            headers={"X-Lease-Token": self.token},
        )

    def start(self) -> None:
        assert self.post("heartbeat", started=True).status_code == 200

    def metrics(self, seq: int, *points: tuple[int, dict[str, Any]]) -> httpx.Response:
        return self.post("metrics", seq=seq, points=[{"step": s, "values": v} for s, v in points])

    def event(self, seq: int, type: str, **data: Any) -> httpx.Response:
        return self.post("events", seq=seq, events=[{"type": type, "message": type, "data": data}])

    def checkpoint(self, step: int, **more: Any) -> httpx.Response:
        body = {"step": step, "name": f"checkpoint-{step}", "manifest_sha256": SHA, "files": {}, **more}
        return self.post("checkpoints", **body)

    def finish(self, state: str = "succeeded", **more: Any) -> httpx.Response:
        return self.post("finish", state=state, **more)


@dataclass
class Box:
    """A running server, and what users and workers do with it."""

    app: Any
    server: Server
    clock: ManualClock
    loop: asyncio.AbstractEventLoop
    url: str
    reaper: Reaper
    uvicorn_server: uvicorn.Server
    thread: threading.Thread
    clients: list[httpx.Client] = field(default_factory=list)
    num_claims: int = 0
    registered: set[tuple[str, str]] = field(default_factory=set)

    def client(self, key: str | None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(
            base_url=self.url, headers=headers, timeout=20, verify=False
        )  # no TLS to set up
        self.clients.append(client)
        return client

    @property
    def admin(self) -> httpx.Client:
        return self._named("_admin", ADMIN)

    @property
    def worker(self) -> httpx.Client:
        return self._named("_worker", self.server.folder.worker_key.read_text().strip())

    def _named(self, name: str, key: str) -> httpx.Client:
        if name not in self.__dict__:
            self.__dict__[name] = self.client(key)
        return self.__dict__[name]

    def key(self, name: str, role: str = "user") -> httpx.Client:
        answer = self.admin.post("/keys", json={"name": name, "role": role})
        return self.client(answer.json()["secret"])

    def run(self, awaitable: Awaitable[T]) -> T:
        """Run something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(awaitable, self.loop).result(20)  # type: ignore[arg-type]

    @contextmanager
    def in_open_write(self, work: Callable[[Session], object]) -> Iterator[None]:
        """What `work` writes is done, and not committed before this is left: as at a server that is slow just then."""
        done, may_commit = threading.Event(), threading.Event()

        def write(session: Session) -> None:
            work(session)
            session.flush()
            done.set()
            assert may_commit.wait(20)

        writing = asyncio.run_coroutine_threadsafe(self.server.db.write(write), self.loop)
        assert done.wait(10)
        try:
            yield
        finally:
            may_commit.set()
            writing.result(20)

    def nothing_left_of_uploads(self) -> bool:
        """Whether the folder of uploads on their way comes to be empty, on a server that tests share.

        The result file of a job that another test ended is written there too, after that job's end.
        """
        return until(lambda: not list(self.server.folder.tmp.iterdir()))

    def upload(self, content: bytes = ROWS, name: str = "rows.jsonl") -> str:
        answer = self.admin.post("/files", files={"file": (name, content)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def spec(self, **fields: Any) -> dict[str, Any]:
        if "training_file" not in fields:
            fields["training_file"] = self.__dict__.get("_file") or self.upload()
            self.__dict__["_file"] = fields["training_file"]
        return {"base_model": "org/model", **fields}

    def submit(self, **fields: Any) -> str:
        answer = self.admin.post("/jobs", json=self.spec(**fields))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def register(self, worker_id: str = "w1", **more: Any) -> httpx.Response:
        """Make a worker known, which then claims under the boot id `b1`."""
        self.registered.add((worker_id, more.get("boot_id", "b1")))
        hello = {"worker_id": worker_id, "boot_id": "b1", "gpus": 1, "device": "cuda", "protocol": 2, **more}
        return self.worker.post("/worker/register", json=hello)

    def try_claim(self, worker_id: str = "w1", request_id: str | None = None, **more: Any) -> httpx.Response:
        self.num_claims += 1
        if (worker_id, more.get("boot_id", "b1")) not in self.registered:
            given = {name: more[name] for name in ("boot_id", "gpus") if name in more}
            self.register(worker_id, installation_id=self.server.installation_id, **given)
        body = {"worker_id": worker_id, "boot_id": "b1", "gpus": 1, "wait_seconds": 0, "protocol": 2}
        body |= more
        return self.worker.post(
            "/worker/claim", json={"request_id": request_id or f"r{self.num_claims}", **body}
        )

    def claim(self, worker_id: str = "w1", **more: Any) -> Lease:
        answer = self.try_claim(worker_id, **more)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return Lease(self.worker, found["job_id"], found["attempt"], found["token"], found)

    def running(self, **fields: Any) -> Lease:
        self.submit(**fields)
        lease = self.claim()
        lease.start()
        return lease

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.admin.get(f"/jobs/{job_id}").json())

    def state(self, job_id: str) -> str:
        return str(self.job(job_id)["state"])

    def events(self, job_id: str) -> list[str]:
        return [event["type"] for event in self.admin.get(f"/jobs/{job_id}/events").json()["data"]]

    def reap(self) -> int:
        return self.run(self.reaper.tick())

    def begin_stop(self) -> None:
        for client in self.clients:
            client.close()
        if self.thread.is_alive() and not self.uvicorn_server.should_exit:
            self.loop.call_soon_threadsafe(self.server.begin_stop)
            self.uvicorn_server.should_exit = True

    def stop(self) -> None:
        self.begin_stop()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def expire(self) -> int:
        """Let the lease time pass and look."""
        self.clock.advance(31)
        return self.reap()


def start_box(data: Path, clock: ManualClock | None = None, **settings: Any) -> Box:
    """A server in a thread of its own, once it listens."""
    whole = {
        "admin_key": ADMIN,
        "reap_seconds": 3600,
        "backoff_seconds": 0,
        "max_wrong_keys": 0,  # tests try many; those of the limit set it
        **settings,
    }
    clock = clock or ManualClock()
    app = create_app(Settings(data=data, **whole), clock)
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, ws="none", proxy_headers=False)
    )
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> None:
        serving = asyncio.create_task(uvicorn_server.serve())
        while not uvicorn_server.started and not serving.done():
            await asyncio.sleep(0.005)
        ready.set()
        await serving

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()  # its files: a session has hundreds of servers

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    assert uvicorn_server.started, "the server did not start"
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    server, url = app.state.server, f"http://127.0.0.1:{port}"
    return Box(app, server, clock, loop, url, Reaper(server), uvicorn_server, thread)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sqlite: looks into the SQLite file; not run on PostgreSQL")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    here = metafunc.definition.path.relative_to(Path(__file__).parent).parts[0]
    marked = any("database" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if {"box", "make_box", "shared_box"} & set(metafunc.fixturenames) and not marked:
        both = here in ON_BOTH and not metafunc.definition.get_closest_marker("sqlite")
        kinds = ["sqlite", "postgres"] if both else ["sqlite"]
        metafunc.parametrize("database", kinds, indirect=True, scope="module")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private PostgreSQL, one a session; skips, saying why, where there is none."""
    try:
        running = Postgres.start()
    except NoPostgres as error:
        pytest.skip(f"PostgreSQL: {error}")
    yield running
    running.stop()


@dataclass
class Databases:
    """Makes a database for each test of a kind, and removes those of servers that are gone."""

    postgres: Postgres | None
    used: list[tuple[str, list[Box]]] = field(default_factory=list)

    def make(self) -> dict[str, str]:
        """Settings of a server with a database of its own."""
        if self.postgres is None:
            return {}
        self.sweep()
        return {"database_url": self.postgres.create()}

    def retire(self, settings: dict[str, str], boxes: list[Box]) -> None:
        """These servers have been told to stop."""
        if settings:
            self.used.append((settings["database_url"], boxes))

    def sweep(self, *, wait: bool = False) -> None:
        assert self.postgres is not None
        for url, boxes in list(self.used):
            for box in boxes if wait else ():
                box.thread.join(10)
            if not any(box.thread.is_alive() for box in boxes):
                self.postgres.drop(url)
                self.used.remove((url, boxes))


@pytest.fixture(scope="module")
def database(request: pytest.FixtureRequest) -> Iterator[Databases]:
    kind = getattr(request, "param", "sqlite")
    databases = Databases(request.getfixturevalue("postgres") if kind == "postgres" else None)
    yield databases
    if databases.postgres is not None:
        databases.sweep(wait=True)


@pytest.fixture(scope="session")
def stopping() -> Iterator[list[Box]]:
    """Servers that have been told to stop: uvicorn takes its time, and the next test need not wait for it."""
    boxes: list[Box] = []
    yield boxes
    for box in boxes:
        box.stop()


@pytest.fixture
def make_box(tmp_path: Path, stopping: list[Box], database: Databases) -> Iterator[Callable[..., Box]]:
    boxes: list[Box] = []
    own = database.make()

    def make(folder: str = "data", **settings: Any) -> Box:
        boxes.append(start_box(tmp_path / folder, **{**own, **settings}))
        return boxes[-1]

    yield make
    for box in boxes:
        box.begin_stop()
    stopping += boxes
    database.retire(own, boxes)


@pytest.fixture
def box(make_box: Callable[..., Box]) -> Box:
    return make_box()


@pytest.fixture(scope="module")
def shared_box(tmp_path_factory: pytest.TempPathFactory, database: Databases) -> Iterator[Box]:
    """One server for a whole module: for tests that each bring their own job and mind no others."""
    own = database.make()
    box = start_box(tmp_path_factory.mktemp("shared") / "data", **own)
    yield box
    box.stop()
    database.retire(own, [box])


@pytest.fixture
def read_events() -> Callable[[str], list[dict[str, str]]]:
    """Server-sent events of a whole stream, as dictionaries of their fields; comments are left out."""

    def read(text: str) -> list[dict[str, str]]:
        frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
        return [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in frames]

    return read


@pytest.fixture
def assert_error() -> Callable[[httpx.Response, int, str], dict[str, Any]]:
    """The one error shape, with this status and code."""

    def check(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
        assert answer.status_code == status, answer.text
        body = json.loads(answer.text)
        assert list(body) == ["error"]
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == code, body
        assert answer.headers["x-request-id"].startswith("req_")
        return dict(body["error"])

    return check
