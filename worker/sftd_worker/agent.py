"""The worker process: register, then claim one job after another and run each, until it is told to stop.

    sftd-worker --server http://127.0.0.1:8000 --data DIR

The first SIGTERM, SIGINT or SIGHUP means stop: no new job; the running one saves a checkpoint and goes back to the
queue. The second one hurries. What happens to one job is told in `attempt.py`.
"""

import argparse
import logging
import os
import platform
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from sftd import __version__
from sftd._transport import Transport, backoff_seconds
from sftd.errors import ApiError, Conflict, ConnectionFailed, NotFound, ServerError, SftdError, Throttled
from sftd.protocol import TOKEN_HEADER, Claim, Hello, Lease, Release, Welcome
from sftd_worker.attempt import Worker, run_attempt
from sftd_worker.family import adopt_orphans
from sftd_worker.gpus import Devices, NoDevice, find_devices
from sftd_worker.process import trainer_environment
from sftd_worker.settings import SettingsError, WorkerSettings, read_settings
from sftd_worker.warm import WarmParent

log = logging.getLogger("sftd.worker")

CALL_SECONDS = 10.0  # deadline of a call, beyond the time that the server may hold its answer
MOST_BACKOFF_SECONDS = 15.0
TOLD_VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


class CannotWork(Exception):
    """This worker cannot work for that server; trying again would not help."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a worker until it is stopped. Exit codes: 0 stopped, 1 it cannot go on, 2 wrong settings."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = read_settings(os.environ, **vars(_parser().parse_args(argv)))
        code = run(settings)
    except (SettingsError, NoDevice) as error:
        print(f"sftd-worker: {error}", file=sys.stderr)
        code = 2
    except (CannotWork, SftdError) as error:
        print(f"sftd-worker: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


def run(settings: WorkerSettings) -> int:
    """Work until stopped. Call it from the main thread: trainers are bound to its life, and signals arrive there."""
    devices = find_devices(device=settings.device, num_wanted=settings.gpus, environment=os.environ)
    transport = Transport(settings.server_url, settings.read_key())
    worker = Worker(settings, devices, transport, warm=_warm_parent(settings, devices))
    adopt_orphans()
    _listen_for_stop(worker)
    boot_id = uuid.uuid4().hex
    if settings.alive_file is not None:
        settings.alive_file.unlink(missing_ok=True)  # an earlier worker's says nothing about this one
    try:
        _register(worker, boot_id, pause=worker.bell.wait)
        worker.bell.alive_file = settings.alive_file
        _work(worker, boot_id)
    finally:
        transport.close()
        if worker.warm is not None:
            worker.warm.end()
    log.info("stopped")
    return 0


def _warm_parent(settings: WorkerSettings, devices: Devices) -> WarmParent | None:
    """It may see every device that a trainer may; each trainer is told which are its own."""
    if not settings.warm:
        return None
    every = devices.visible(devices.lock_names())
    environment = trainer_environment(os.environ, cuda_visible_devices=every, offline=settings.offline)
    return WarmParent(settings.warm_argv, environment=environment)


def _work(worker: Worker, boot_id: str) -> None:
    """Claim → run, until told to stop."""
    while not worker.stops.count:
        claimer = Claimer(worker, boot_id)
        claimer.start()
        while not claimer.done and not worker.stops.count:
            if worker.warm is not None:
                worker.warm.keep()
            worker.bell.wait(1.0)
        if worker.stops.count:
            claimer.give_back()
            return
        if claimer.error is not None:
            raise CannotWork(
                f"The server does not give out jobs to this worker: {claimer.error}"
            ) from claimer.error
        if claimer.lease is not None:
            log.info("%s, attempt %d: claimed", claimer.lease.job_id, claimer.lease.attempt)
            run_attempt(worker, claimer.lease)


class Claimer:
    """Asks for the next job from a thread of its own, so that the main thread hears signals meanwhile."""

    def __init__(self, worker: Worker, boot_id: str) -> None:
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self._worker = worker
        self._boot_id = boot_id
        self._request_id = uuid.uuid4().hex
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def give_back(self) -> None:
        """Stop asking, and release a job that was handed over in this very moment. Safe to call twice."""
        self._stopped.set()
        try:
            # The same request brings the same lease, if the answer under way holds one.
            lease = self.lease or self._claim(wait_seconds=0)
            if lease is not None:
                body = Release(attempt=lease.attempt, message="The worker is being stopped.")
                headers = {TOKEN_HEADER: lease.token}
                path = f"/worker/jobs/{lease.job_id}/release"
                self._worker.transport.request(
                    "POST", path, body=body, headers=headers, timeout_seconds=CALL_SECONDS
                )
        except SftdError as error:
            log.warning("could not ask whether a job was handed over just now: %s", error)

    def _run(self) -> None:
        try:
            self._ask_until_answered()
        except Exception as error:  # the edge of a thread; the main thread raises it again
            self.error = error
        finally:
            self._worker.bell.ring()

    def _ask_until_answered(self) -> None:
        num_failures = 0
        while self.lease is None and not self._stopped.is_set():
            try:
                self.lease = self._claim(wait_seconds=self._worker.settings.claim_wait_seconds)
                self._request_id = uuid.uuid4().hex
                num_failures = 0
            except (NotFound, Conflict):  # the request is spent, or the server has new records: begin afresh
                self._request_id = uuid.uuid4().hex
                _register(self._worker, self._boot_id, pause=self._stopped.wait)
                self._stopped.wait(backoff_seconds(num_failures, first=1.0, most=MOST_BACKOFF_SECONDS))
                num_failures += 1
            except (ConnectionFailed, ServerError, Throttled) as error:
                num_failures = _note_failure("claim", error, num_failures)
                self._stopped.wait(_pause_seconds(error, num_failures))

    def _claim(self, *, wait_seconds: float) -> Lease | None:
        claim = Claim(
            worker_id=self._worker.settings.worker_name,
            boot_id=self._boot_id,
            request_id=self._request_id,
            gpus=self._worker.devices.num_slots,
            wait_seconds=wait_seconds,
        )
        reply = self._worker.transport.request(
            "POST", "/worker/claim", body=claim, timeout_seconds=wait_seconds + CALL_SECONDS, max_retries=0
        )
        return None if reply.status == 204 else reply.parse(Lease)


def _register(worker: Worker, boot_id: str, *, pause: Callable[[float], object]) -> None:
    """Say hello until the server answers, and make sure that both sides mean the same data folder."""
    num_failures = 0
    while not worker.stops.count:
        hello = _hello(worker, boot_id)
        try:
            reply = worker.transport.request(
                "POST", "/worker/register", body=hello, timeout_seconds=CALL_SECONDS, max_retries=0
            )
        except (ConnectionFailed, ServerError, Throttled) as error:
            num_failures = _note_failure("register", error, num_failures)
            pause(_pause_seconds(error, num_failures))
            continue
        except ApiError as error:
            raise CannotWork(f"The server does not accept this worker: {error}") from error
        _check_installation(worker.settings.data, hello.installation_id, reply.parse(Welcome).installation_id)
        slots = f"{worker.devices.num_slots} {worker.devices.kind} slot(s)"
        log.info("registered with %s as %s, %s", worker.transport.url, hello.worker_id, slots)
        return


def _check_installation(data: Path, ours: str | None, theirs: str) -> None:
    if ours is None:
        raise CannotWork(
            f"{data / 'installation.id'} is not there: this is not the server's data folder. Give --data that folder;"
            " worker and server must share it, on one machine or on one volume."
        )
    if ours != theirs:
        raise CannotWork(
            f"{data} belongs to another server (its installation is {ours}, the server's is {theirs}); check --data"
            " and --server."
        )


def _hello(worker: Worker, boot_id: str) -> Hello:
    return Hello(
        worker_id=worker.settings.worker_name,
        boot_id=boot_id,
        gpus=worker.devices.num_slots,
        device=worker.devices.kind,
        labels=worker.settings.labels,
        versions=_versions(),
        installation_id=_read_installation_id(worker.settings.data),
    )


def _read_installation_id(data: Path) -> str | None:
    try:
        return (data / "installation.id").read_text("utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {"sftd": __version__, "python": platform.python_version()}
    for name in TOLD_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _note_failure(call: str, error: SftdError, num_failures: int) -> int:
    if num_failures == 0:
        log.warning("%s failed, trying on: %s", call, error)
    return num_failures + 1


def _pause_seconds(error: SftdError, num_failures: int) -> float:
    asked = error.retry_after_seconds if isinstance(error, ApiError) else None
    return asked or backoff_seconds(num_failures, first=0.1, most=MOST_BACKOFF_SECONDS)


def _listen_for_stop(worker: Worker) -> None:
    def on_signal(number: int, frame: object) -> None:
        worker.stops.count += 1
        worker.bell.ring()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means: go on without the terminal
        signal.signal(signal.SIGHUP, on_signal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftd-worker",
        description="Takes jobs from an sftd server and trains them. All settings: docs/operations.md.",
    )
    parser.add_argument("--server", dest="server_url", help="address of the server [SFTD_SERVER_URL]")
    parser.add_argument("--data", help="the server's data folder [SFTD_DATA]")
    parser.add_argument("--name", dest="worker_name", help="name of this worker [SFTD_WORKER_NAME]")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], help="what to train on [SFTD_DEVICE]")
    parser.add_argument("--gpus", type=int, help="use so many GPUs or CPU processes [SFTD_GPUS]")
    parser.add_argument(
        "--warm",
        action=argparse.BooleanOptionalAction,
        help="keep a process that has imported torch, so that jobs start at once [SFTD_WARM]",
    )
    return parser


if __name__ == "__main__":
    main()
