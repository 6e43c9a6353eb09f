"""`sftd up` as a process, with the real server and a real, idle worker."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sftd.errors import ConfigurationError
from sftd.up import require_extras


class Up:
    """A running `sftd up`, and what it prints."""

    def __init__(self, tmp_path: Path, *options: str, stdout: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = tmp_path / "up.log"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sftd.cli",
                    "up",
                    "--data",
                    str(tmp_path / "data"),
                    "--port",
                    str(self.port),
                    *options,
                ],
                stdout=output if stdout is None else stdout,
                stderr=output,
                env={**os.environ, "SFTD_DEVICE": "cpu"},
            )

    def log(self) -> str:
        return self._log.read_text()

    def child(self, module: str) -> psutil.Process:
        """The child that runs a module."""
        for child in psutil.Process(self.process.pid).children():
            if module in child.cmdline():
                return child
        raise AssertionError(f"{module} does not run; {self.log()}")

    def until(self, ready: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)  # another process's state: there is nothing to wait on


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    up.until(lambda: "registered with" in up.log())
    yield up
    if up.process.poll() is None:
        up.process.kill()
    up.process.wait()


def test_a_stop_ends_worker_then_server_with_zero(up: Up) -> None:
    server, worker = up.child("sftd_server.app"), up.child("sftd_worker.agent")

    up.process.send_signal(signal.SIGINT)

    assert up.process.wait(20) == 0
    assert not server.is_running()
    assert not worker.is_running()
    assert "sftd is up at" in up.log()
    assert "INFO stopped" in up.log()


def test_a_closed_terminal_stops_it_like_ctrl_c(up: Up) -> None:
    up.process.send_signal(signal.SIGHUP)

    assert up.process.wait(20) == 0
    assert "INFO stopped" in up.log()


def test_a_broken_pipe_does_not_keep_it_from_stopping_in_order(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    up = Up(tmp_path, stdout=writing)
    os.close(writing)
    up.until(lambda: "registered with" in up.log())
    os.close(reading)

    up.process.send_signal(signal.SIGTERM)

    assert up.process.wait(20) == 0
    assert "INFO stopped" in up.log()


def test_nothing_is_left_when_it_is_killed(up: Up) -> None:
    children = [up.child("sftd_server.app"), up.child("sftd_worker.agent")]

    up.process.kill()
    up.process.wait()

    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_a_crashed_worker_is_started_again(up: Up) -> None:
    worker = up.child("sftd_worker.agent")

    worker.kill()
    up.until(lambda: up.log().count("registered with") == 2)

    assert up.child("sftd_worker.agent").pid != worker.pid
    assert "The worker ended (exit code -9); starting it again in 1 s." in up.log()


def test_a_killed_server_is_started_again_and_its_worker_goes_on(up: Up) -> None:
    server, worker = up.child("sftd_server.app"), up.child("sftd_worker.agent")

    server.kill()
    up.until(lambda: up.log().count("listens on") == 2)

    assert up.child("sftd_server.app").pid != server.pid
    assert up.child("sftd_worker.agent").pid == worker.pid
    assert "The server ended (exit code -9); starting it again in 1 s." in up.log()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(20) == 0


def test_a_server_that_does_not_come_up_ends_it_with_one(tmp_path: Path) -> None:
    up = Up(tmp_path, "--host", "203.0.113.7")  # not an address of this machine

    assert up.process.wait(30) == 1
    assert "The server did not start (exit code" in up.log()


def test_a_taken_port_is_said(tmp_path: Path, up: Up) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "sftd.cli", "up", "--data", str(tmp_path / "other"), "--port", str(up.port)],
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert again.returncode == 2
    assert "choose another --port" in again.stderr


def test_missing_packages_are_named_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("fastapi", "torch") else object()
    )

    with pytest.raises(ConfigurationError, match=r'fastapi, torch not installed: pip install "sftd\[all\]"'):
        require_extras(worker=True)
    with pytest.raises(ConfigurationError, match=r"^fastapi not"):
        require_extras(worker=False)
