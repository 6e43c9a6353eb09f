"""`sftd up` as a person starts it: real server, worker and trainer over a fresh data folder, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from examples import tiny_model

from sftd import Client

ROOT = Path(__file__).resolve().parents[2]
Q_BASICS = ROOT / "examples" / "q_basics.jsonl"
ADMIN_KEY = "e2e-admin-key-0123456789"


@dataclass
class Service:
    """A running `sftd up`, and how to talk to it."""

    data: Path
    port: int
    env: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> str:
        return str(self.data / "models" / "tiny")

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "SFTD_ADMIN_KEY": ADMIN_KEY,
            "SFTD_URL": self.url,
            "SFTD_API_KEY": ADMIN_KEY,
            "XDG_STATE_HOME": str(self.data / "state"),
            **self.env,
        }

    @property
    def client(self) -> Client:
        return Client(self.url, ADMIN_KEY)

    def start(self, *more: str) -> None:
        command = [
            sys.executable,
            "-m",
            "sftd.cli",
            "up",
            "--data",
            str(self.data),
            "--port",
            str(self.port),
            *more,
        ]
        log = (self.data / "up.log").open("a")
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.wait(self.answers, "the service to answer")

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(90)

    def log(self) -> str:
        return (self.data / "up.log").read_text()

    def wait(self, ready: Callable[[], Any], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.log()}"
            time.sleep(0.05)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **options)

    def spec(self, **fields: Any) -> dict[str, Any]:
        """A job that takes some seconds, over the example data."""
        file = self.client.files.upload(Q_BASICS)
        return {
            "base_model": self.model, "training_file": file.id, "max_steps": 6, "warmup_steps": 1,
            "learning_rate": 3e-3, "batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 3,
            "eval_steps": 3, "validation_split": 0.1, "max_seq_length": 512, "gradient_checkpointing": False,
            **fields,
        }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def new_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Make services; all are stopped at the end."""
    made: list[Service] = []

    def make(*, start: bool = True, **env: str) -> Service:
        data = tmp_path_factory.mktemp("data")
        tiny_model.build(data / "models" / "tiny", Q_BASICS, hidden_size=64, vocab_size=1024)
        service = Service(data, free_port(), env)
        made.append(service)
        if start:
            service.start()
        return service

    yield make
    for service in made:
        if service.process is not None and service.process.poll() is None:
            service.stop()


@pytest.fixture(scope="session")
def service(new_service: Callable[..., Service]) -> Service:
    return new_service()
