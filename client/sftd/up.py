"""`sftd up`: a server and a worker on this machine, as child processes that end with this one, however it ends.

Either is started again when it dies; a server that does not come up at first ends everything. SIGTERM, Ctrl-C or a terminal that closes
stops the worker first (it saves a checkpoint and gives its job back), then the server; a second one hurries; a third
kills.
"""

import contextlib
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sftd._transport import Transport
from sftd.errors import ConfigurationError, ConnectionFailed, SftdError
from sftd.tether import tethered

START_SECONDS = 60.0
SERVER_STOP_SECONDS = 15.0
ORPHAN_STOP_SECONDS = 10.0  # for a worker whose server is gone
FIRST_RESTART_SECONDS, MOST_RESTART_SECONDS = 1.0, 60.0
STEADY_SECONDS = 60.0  # what ran so long starts again at once when it dies
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Box:
    """What to start."""

    data: Path
    host: str
    port: int
    models: Path | None
    worker: bool

    @property
    def url(self) -> str:
        """The address to call from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def run(box: Box, *, say: Callable[[str], None]) -> int:
    """Start everything, keep it going, stop it when told. Returns the exit code. Call it from the main thread."""
    require_extras(worker=box.worker)
    _require_free_port(box)
    return _Supervisor(box, say).run()


def require_extras(*, worker: bool) -> None:
    """Raise ConfigurationError, with the command that helps, where the box's packages are not installed."""
    needed = ["fastapi", "uvicorn", "sqlmodel"] + (["torch", "transformers"] if worker else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f'{", ".join(missing)} not installed: pip install "sftd[all]".')


class _Child:
    """A child process, watched by a thread that reports its end."""

    def __init__(self, module: str, environment: Mapping[str, str], on_exit: Callable[[], None]) -> None:
        self.started_at = time.monotonic()
        self.returncode: int | None = None
        # A session of its own: Ctrl-C at the terminal reaches only this process, which stops the others in order.
        self._process = subprocess.Popen(
            tethered([sys.executable, "-m", module]),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=self._watch, args=(on_exit,), name=module, daemon=True).start()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)  # does nothing once it has been waited for

    def _watch(self, on_exit: Callable[[], None]) -> None:
        self.returncode = self._process.wait()
        on_exit()


class _Kept:
    """A child that is started again when it ends, sooner or later: the later, the oftener it happens."""

    def __init__(self, name: str, start: Callable[[], _Child], say: Callable[[str], None]) -> None:
        self.child: _Child | None = None
        self._name = name
        self._start = start
        self._say = say
        self._pause_seconds = FIRST_RESTART_SECONDS
        self._start_at = time.monotonic()

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.running

    def signal(self, number: signal.Signals) -> None:
        if self.child is not None:
            self.child.signal(number)

    def keep(self) -> float:
        """See whether it runs, and start it when it is time. Returns in how many seconds to look again."""
        if self.child is not None and not self.child.running:
            if time.monotonic() - self.child.started_at > STEADY_SECONDS:
                self._pause_seconds = FIRST_RESTART_SECONDS
            pause = self._pause_seconds
            self._pause_seconds = min(MOST_RESTART_SECONDS, 2 * pause)
            self._say(
                f"The {self._name} ended (exit code {self.child.returncode}); starting it again in {pause:g} s."
            )
            self._start_at = time.monotonic() + pause
            self.child = None
        if self.child is None and time.monotonic() >= self._start_at:
            self.child = self._start()
        return LOOK_SECONDS if self.child is not None else max(0.05, self._start_at - time.monotonic())


class _Supervisor:
    def __init__(self, box: Box, say: Callable[[str], None]) -> None:
        self._box = box
        self._tell = say
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()  # safe to put to from a signal handler
        self._num_stops = 0
        self._server = _Kept("server", self._start_server, self._say)
        self._worker = _Kept("worker", self._start_worker, self._say)

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means: go on without the terminal
            signal.signal(signal.SIGHUP, self._on_stop)
        self._server.keep()
        if self._await_health():
            self._greet()
            self._keep_going()
        elif not self._num_stops:
            child = self._server.child
            self._say(
                f"The server did not start (exit code {child.returncode if child else None}); stopping."
            )
        self._stop_worker()
        self._stop_server()
        return 0 if self._num_stops else 1

    def _start_server(self) -> _Child:
        return self._start("sftd_server.app", SFTD_HOST=self._box.host, SFTD_PORT=str(self._box.port))

    def _start_worker(self) -> _Child:
        return self._start("sftd_worker.agent", SFTD_SERVER_URL=self._box.url)

    def _start(self, module: str, **environment: str) -> _Child:
        environment["SFTD_DATA"] = str(self._box.data)
        if self._box.models is not None:
            environment["SFTD_MODEL_ROOTS"] = str(self._box.models)
        return _Child(module, environment, lambda: self._rings.put(None))

    def _await_health(self) -> bool:
        """Wait until the server answers. False: it ended, or this process was told to stop."""
        transport = Transport(self._box.url, None)
        deadline = time.monotonic() + START_SECONDS
        try:
            while self._server.running and not self._num_stops and time.monotonic() < deadline:
                try:
                    transport.request("GET", "/healthz", timeout_seconds=2, max_retries=0)
                except SftdError:
                    self._wait(0.1)
                else:
                    return self._server.running
        finally:
            transport.close()
        return False

    def _greet(self) -> None:
        self._say(f"sftd is up at {self._box.url}; API documentation at {self._box.url}/docs")
        self._say(
            f"Admin key: {self._box.data / 'admin.key'}; commands on this machine find it by themselves."
        )
        self._say("Try: sftd submit lora.yaml --follow")

    def _keep_going(self) -> None:
        while not self._num_stops:
            next_look = self._server.keep()
            if self._box.worker:
                next_look = min(next_look, self._worker.keep())
            self._wait(next_look)

    def _stop_worker(self) -> None:
        if not self._worker.running:
            return
        self._say("Stopping the worker: a running job saves a checkpoint and goes back to the queue.")
        num_told = 0
        orphan_since: float | None = None
        while self._worker.running:
            if not self._server.running:
                orphan_since = orphan_since or time.monotonic()
            late = orphan_since is not None and time.monotonic() - orphan_since > ORPHAN_STOP_SECONDS
            wanted = 3 if late or self._num_stops > 2 else max(1, self._num_stops)
            if num_told < wanted:
                self._worker.signal(signal.SIGKILL if wanted == 3 else signal.SIGTERM)
                num_told = wanted
            self._wait(0.5)

    def _stop_server(self) -> None:
        self._server.signal(signal.SIGTERM)
        deadline = time.monotonic() + SERVER_STOP_SECONDS
        while self._server.running:
            if time.monotonic() > deadline or self._num_stops > 2:
                self._server.signal(signal.SIGKILL)
            self._wait(0.5)

    def _on_stop(self, number: int, frame: object) -> None:
        self._num_stops += 1
        self._rings.put(None)

    def _say(self, text: str) -> None:
        """Tell whoever started this. That the terminal or the pipe is gone must not end the box."""
        with contextlib.suppress(OSError):
            self._tell(text)

    def _wait(self, seconds: float) -> None:
        try:
            self._rings.get(timeout=seconds)
        except queue.Empty:
            return


def _require_free_port(box: Box) -> None:
    transport = Transport(box.url, None)
    try:
        transport.request("GET", "/healthz", timeout_seconds=2, max_retries=0)
    except ConnectionFailed as error:
        if error.refused:
            return
    except SftdError:
        pass
    finally:
        transport.close()
    raise ConfigurationError(f"Something listens at {box.url} already; stop it, or choose another --port.")
