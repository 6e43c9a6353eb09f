"""A whole installation for one line of the harness: real server, real workers, a network that can fail, users, a history.

Everything a process of the service acknowledges passes the network's recorder, so that it can be asked for afterwards.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.faults import audit
from tests.faults.network import Call, Link, Network
from tests.faults.nursery import Nursery, Process

HERE = Path(__file__).parent
ADMIN_KEY = "sftd-admin-key-of-the-faults"
ROWS = b'{"prompt": "2+2?", "completion": "4"}\n'
NO_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SFTD_")}


@dataclass
class Plan:
    """A job that was posted: what it must come to."""

    key: str
    seed: int
    steps: int
    spec: dict[str, Any]
    lawful: bool = True  # its trainer computes by law.py
    one_point_a_step: bool = True
    job_id: str | None = None  # once the server has acknowledged it
    cancel_asked_at: float | None = None  # monotonic: when the wish was sent; acknowledged later
    cancel_heard_at: float | None = None


@dataclass
class WorkerBox:
    """A worker's name, its way to the server, and its present process."""

    name: str
    link: Link
    flags: dict[str, Any]
    process: Process | None = None
    stopped_until: float | None = None  # monotonic, while it is a zombie


@dataclass
class Lifespan:
    """A server process, by the monotonic clock."""

    started_at: float  # it answered


class World:
    """One installation. `close` ends all of it."""

    def __init__(
        self,
        folder: Path,
        nursery: Nursery,
        *,
        seed: int,
        lease_seconds: float = 2.0,
        mutant: str | None = None,
        server_settings: dict[str, str] | None = None,
        trainer_options: dict[str, Any] | None = None,
        data: Path | None = None,
        audited: bool = True,
        database_url: str | None = None,
        num_servers: int = 1,
    ) -> None:
        self.folder = folder
        self.data = data or folder / "data"
        self.nursery = nursery
        self.seed = seed
        self.random = random.Random(f"world {seed}")
        self.lease_seconds = lease_seconds
        self.mutant = mutant
        self.audited = audited
        self.settings = {
            "SFTD_DATA": str(self.data),
            "SFTD_ADMIN_KEY": ADMIN_KEY,
            "SFTD_LEASE_SECONDS": f"{lease_seconds:g}",
            "SFTD_START_SECONDS": f"{max(3.0, lease_seconds):g}",
            "SFTD_REAP_SECONDS": "0.2",
            "SFTD_BACKOFF_SECONDS": "0.1",
            "SFTD_MAX_BACKOFF_SECONDS": "0.3",
            "SFTD_MAX_LOST": "1000000",  # the harness loses far more workers than a real box
            "SFTD_MAX_FAILURES": "1000000",
            **({"SFTD_DATABASE_URL": database_url} if database_url else {}),
            **(server_settings or {}),
        }
        self.tables: audit.Tables = (
            audit.PostgresTables(database_url) if database_url else audit.SqliteTables(self.data / "sftd.db")
        )
        self.kills: Counter[str] = Counter()
        self.num_zombies = 0
        self.calls: list[Call] = []
        self.plans: dict[str, Plan] = {}
        self.damaged: set[tuple[str, str]] = set()  # (job id, checkpoint name) that the harness spoiled
        self.violations: list[str] = []
        self.lives: list[Lifespan] = []
        self.workers: dict[str, WorkerBox] = {}
        self.servers: dict[int, Process] = {}  # by port
        self._lock = threading.Lock()
        self.watch = folder / "watch"
        self.watch.mkdir(parents=True, exist_ok=True)
        self._options = folder / "trainer.json"
        self._options.write_text(json.dumps({"watch": str(self.watch), **(trainer_options or {})}))
        self.ports = [free_port() for _ in range(num_servers)]
        self.port = self.ports[0]  # what goes past the network goes to this one
        self.network = Network(self.ports, self._record, seed=seed)
        self._history = (folder / "history.jsonl").open("a")
        self.users = self.network.link("users")
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=self.headers, timeout=30, trust_env=False
        )
        self._file_id: str | None = None

    # ------------------------------------------------------------ the server

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {ADMIN_KEY}"}

    @property
    def server(self) -> Process:
        """The first server's process."""
        return self.servers[self.port]

    def start_server(
        self, *, port: int | None = None, cold: bool = False, env: dict[str, str] | None = None
    ) -> float:
        """Start the server and wait until it answers. Returns the seconds that took."""
        port = port or self.port
        begun = time.monotonic()
        whole = {**NO_ENVIRONMENT, **self.settings, "SFTD_PORT": str(port), **(env or {})}
        whole["XDG_STATE_HOME"] = str(self.folder / "state")
        log = self.folder / "server.log"
        if cold:
            argv = [sys.executable, "-m", "sftd_server.app"]
            self.servers[port] = self.nursery.start("exec", log=log, env=whole, argv=argv)
        else:
            self.servers[port] = self.nursery.start("server", log=log, env=whole, mutant=self.mutant)
        self.wait(lambda: self.answers(port), "the server to answer", seconds=60, pause=0.01)
        took = time.monotonic() - begun
        self.lives.append(Lifespan(time.monotonic()))
        self.network.listen()
        if len(self.lives) == 1:
            if self.audited:
                self.tables.install()
            self._file_id = self.upload()
        return took

    def start_servers(self) -> None:
        """Start those that do not run."""
        for port in self.ports:
            if port not in self.servers or self.servers[port].poll() is not None:
                self.start_server(port=port)

    def answers(self, port: int) -> bool:
        """Does the server on that port answer?"""
        if self.servers[port].poll() is not None:
            raise RuntimeError(f"the server ended by itself: {self.log('server.log')}")
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def kill_server(self, *, port: int | None = None, refused: bool = True) -> None:
        """SIGKILL. `refused`: its machine refuses connections then; else something before it takes them still."""
        if refused and len(self.ports) == 1:
            self.network.refuse()
        process = self.servers[port or self.port]
        process.signal(signal.SIGKILL)
        process.wait()
        self.kills["server"] += 1

    def stop_server(self) -> None:
        """SIGTERM: what is queued is written, and the log folded into the database."""
        self.server.signal(signal.SIGTERM)
        self.server.wait()

    def kill_servers(self) -> None:
        """SIGKILL to all of them."""
        for port in self.servers:
            self.kill_server(port=port)

    # ------------------------------------------------------------ workers

    def add_worker(self, name: str, *, slots: int = 1, start: bool = True, **flags: Any) -> WorkerBox:
        """A worker with a way of its own to the server."""
        link = self.network.link(name)
        whole = {
            "server_url": link.url,
            "data": str(self.data),
            "worker_name": name,
            "device": "cpu",
            "gpus": slots,
            "warm": False,
            "disk_reserve_bytes": 4 * 2**20,
            "lock_wait_seconds": 2,
            "checkpoint_grace_seconds": 10,
            "cancel_grace_seconds": 1,
            "claim_wait_seconds": 5,
            "heartbeat_wait_seconds": 1,
            "trainer_argv": [sys.executable, "-S", str(HERE / "trainer.py"), str(self._options)],
            **flags,
        }
        box = self.workers[name] = WorkerBox(name, link, whole)
        if start:
            self.start_worker(name)
        return box

    def start_worker(self, name: str, **env: str) -> Process:
        box = self.workers[name]
        box.process = self.nursery.start(
            "worker", log=self.folder / f"{name}.log", env={**NO_ENVIRONMENT, **env}, flags=box.flags
        )
        return box.process

    def kill_worker(self, name: str) -> None:
        """SIGKILL; its trainers die with it."""
        process = self.workers[name].process
        assert process is not None
        process.signal(signal.SIGKILL)
        process.wait()
        self.workers[name].stopped_until = None
        self.kills["worker"] += 1

    def freeze_worker(self, name: str, seconds: float, dice: random.Random) -> None:
        """SIGSTOP: for so long it can not even fence itself. Its trainers run on; what it has just sent is under way."""
        box = self.workers[name]
        assert box.process is not None
        box.stopped_until = time.monotonic() + seconds
        faults, box.link.faults.hold = box.link.faults, 1.0
        time.sleep(dice.uniform(0.05, 0.4))
        box.process.signal(signal.SIGSTOP)
        faults.hold = 0.0
        self.num_zombies += 1

    def wake_worker(self, name: str) -> None:
        process = self.workers[name].process
        assert process is not None
        process.signal(signal.SIGCONT)
        self.workers[name].stopped_until = None

    def stop_workers(self) -> None:
        """SIGTERM to all that live, and wait."""
        alive = [box.process for box in self.workers.values() if box.process and box.process.poll() is None]
        for process in alive:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM)
        for process in alive:
            with contextlib.suppress(TimeoutError):
                process.wait(30)
                continue
            self.violations.append(f"worker process {process.pid} did not stop within 30 s of SIGTERM")
            process.signal(signal.SIGKILL)

    def trainers(self) -> list[int]:
        """Trainer processes that live now."""
        found = set()
        for path in self.watch.glob("*.lock"):
            with contextlib.suppress(OSError, ValueError):
                pid, _, born = path.read_text().partition(" ")
                if _born(int(pid)) == born:
                    found.add(int(pid))
        return sorted(found)

    def kill_trainer(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills["trainer"] += 1

    # ------------------------------------------------------------ users

    def upload(self, content: bytes = ROWS) -> str:
        answer = self.client.post("/files", files={"file": ("rows.jsonl", content)})
        answer.raise_for_status()
        return str(answer.json()["id"])

    def plan(self, *, steps: int, save_steps: int = 10, pace: float = 0.01, **more: Any) -> Plan:
        """A job to post: its seed and key are made from the world's."""
        with self._lock:
            number = len(self.plans) + 1
            key = f"key-{self.seed}-{number}"
            seed = self.random.randrange(2**32)
            metadata = {"key": key, "step_seconds": str(pace), **more.pop("metadata", {})}
            spec = {
                "base_model": "org/model", "training_file": self._file_id, "max_steps": steps, "seed": seed,
                "save_steps": save_steps, "metadata": metadata, **more,
            }  # fmt: skip
            plan = self.plans[key] = Plan(key, seed, steps, spec)
            return plan

    def submit(self, plan: Plan, *, seconds: float = 60, via: str | None = None) -> str:
        """Post a job until the answer arrives, with its idempotency key. Returns its id."""
        answer = self.call("POST", "/jobs", seconds=seconds, json=plan.spec, key=plan.key, via=via)
        job_id = str(answer["id"])
        if plan.job_id not in (None, job_id):
            self.violations.append(f"I9: {plan.key} was answered with {plan.job_id} and with {job_id}")
        plan.job_id = job_id
        return job_id

    def post(self, **fields: Any) -> Plan:
        """Plan and submit."""
        plan = self.plan(**fields)
        self.submit(plan)
        return plan

    def call(
        self,
        method: str,
        path: str,
        *,
        seconds: float = 60,
        json: object = None,
        key: str | None = None,
        via: str | None = None,
        accept: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """A user's call through the network, sent again until it is answered. `accept`: errors that are an answer."""
        headers = {**self.headers, **({"Idempotency-Key": key} if key else {})}
        deadline = time.monotonic() + seconds
        url = via or self.users.url
        with httpx.Client(base_url=url, headers=headers, timeout=5, trust_env=False) as client:
            while True:
                try:
                    answer = client.request(method, path, json=json)
                    if answer.status_code < 500 and answer.status_code != 429:
                        if answer.is_success or answer.status_code in accept:
                            return {"status": answer.status_code, **answer.json()}
                        raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{method} {path} was not answered within {seconds:g} s")
                time.sleep(0.05)

    def cancel(self, plan: Plan) -> bool:
        """Ask to cancel, until that is answered. False: it was over already."""
        plan.cancel_asked_at = plan.cancel_asked_at or time.monotonic()
        answer = self.call("POST", f"/jobs/{plan.job_id}/cancel", accept=(409,))
        if answer["status"] == 200:
            plan.cancel_heard_at = plan.cancel_heard_at or time.monotonic()
        return answer["status"] == 200

    def job(self, plan: Plan) -> dict[str, Any]:
        answer = self.client.get(f"/jobs/{plan.job_id}")
        answer.raise_for_status()
        return dict(answer.json())

    def state(self, plan: Plan) -> str:
        return str(self.job(plan)["state"])

    def states(self) -> Counter[str]:
        """How many jobs are in each state."""
        return Counter({row["state"]: row["n"] for row in self.tables.rows(
            "SELECT state, count(*) AS n FROM job GROUP BY state"
        )})  # fmt: skip

    def all_over(self) -> bool:
        return not set(self.states()) - {"succeeded", "failed", "cancelled"}

    # ------------------------------------------------------------ history and end

    def _record(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            line = {name: getattr(call, name) for name in call.__dataclass_fields__}
            if not self._history.closed:
                self._history.write(json.dumps(line) + "\n")

    @property
    def num_acknowledged(self) -> int:
        """Writes that the server has answered with success."""
        return sum(
            call.method != "GET" and 200 <= call.status < 300 and call.status != 204 for call in self.calls
        )

    @property
    def num_fenced(self) -> int:
        """Calls of attempts that were taken away, which the server answered with 409 stale_lease.

        A heartbeat that crosses its own attempt's last word is answered so too, and proves nothing: it does not count.
        """
        ended = {
            (call.leased_job, call.body["attempt"])
            for call in self.calls
            if call.status == 200 and call.kind in ("finish", "release")
        }
        return sum(
            call.status == 409
            and call.code == "stale_lease"
            and (call.leased_job, call.body["attempt"]) not in ended
            for call in self.calls
        )

    def wait(self, ready: Any, what: str, *, seconds: float = 60, pause: float = 0.05) -> None:
        """Wait until something in another process holds. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {what}")
            time.sleep(pause)

    def log(self, name: str, num_chars: int = 3000) -> str:
        path = self.folder / name
        return path.read_text(errors="replace")[-num_chars:] if path.exists() else ""

    def close(self) -> None:
        """End everything. Safe to call twice."""
        if self._history.closed:
            return
        self._history.close()
        self.client.close()
        for box in self.workers.values():
            if box.process is not None and box.process.poll() is None:
                box.process.signal(signal.SIGKILL)
                box.process.wait()
        for process in self.servers.values():
            if process.poll() is None:
                process.signal(signal.SIGKILL)
                process.wait()
        self.network.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _born(pid: int) -> str:
    """When a process began, in ticks; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
