"""Starts real servers and workers as forks of one process that has imported them: a start then costs milliseconds.

`python -m tests.faults.nursery` reads commands, one JSON object a line, and answers each with one line. Whatever it has
started dies with it, and it dies with the harness. `Nursery` is the harness's end.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class Process:
    """A server, worker or trainer's parent, wherever it came from: can be signalled and waited for."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self.code: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is not buried yet."""
        if self.poll() is None:
            self._nursery.ask({"do": "signal", "pid": self.pid, "number": int(number)})

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.code is None:
            self.code = self._nursery.ask({"do": "poll", "pid": self.pid})
        return self.code

    def wait(self, seconds: float = 30) -> int:
        """Wait for its end. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} did not end within {seconds:g} s")
            time.sleep(0.01)
        return code


class Nursery:
    """The harness's end of the process that forks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        what: str,
        *,
        log: Path,
        env: dict[str, str],
        flags: dict[str, Any] | None = None,
        mutant: str | None = None,
        argv: Sequence[str] = (),
    ) -> Process:
        """Fork a `server` or a `worker`, or `exec` a program. Its output goes to the end of `log`."""
        command = {
            "do": "start", "what": what, "log": str(log), "env": env, "flags": flags or {}, "mutant": mutant,
            "argv": list(argv),
        }  # fmt: skip
        return Process(self, self.ask(command))

    def ask(self, command: dict[str, Any]) -> Any:  # a number, or None
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and with it all that it has started."""
        self._process.kill()
        self._process.wait()


# ---------------------------------------------------------------- the other end


def main() -> None:
    _die_with_parent()
    from tests.faults import mutants  # noqa: F401  # imports the server

    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        command = json.loads(line)
        answer: int | None = None
        if command["do"] == "start":
            answer = _start(command)
            codes[answer] = None
        elif command["do"] == "signal" and _poll(codes, command["pid"]) is None:
            os.kill(command["pid"], command["number"])
        elif command["do"] == "poll":
            answer = _poll(codes, command["pid"])
        print(json.dumps(answer), flush=True)


def _poll(codes: dict[int, int | None], pid: int) -> int | None:
    """Only asked for are the dead buried: a number is nobody else's before that."""
    if codes[pid] is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def _start(command: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _become(command)
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else (1 if end.code else 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid


def _become(command: dict[str, Any]) -> None:
    _die_with_parent()
    os.setsid()
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(command["env"])
    if command["what"] == "exec":
        os.execv(command["argv"][0], command["argv"])
    if command["what"] == "worker":
        import logging

        from sftd_worker.agent import run
        from sftd_worker.settings import read_settings

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        sys.exit(run(read_settings(os.environ, **command["flags"])))
    from tests.faults import mutants

    if command["mutant"]:
        mutants.plant(command["mutant"])
    sys.argv = ["sftd-server"]
    mutants.app.main()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
