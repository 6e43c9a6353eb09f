"""The worker process: register, then claim jobs while devices are free and run them side by side, until told to stop.

    sftd-worker --server http://127.0.0.1:8000 --data DIR

The first SIGTERM, SIGINT or SIGHUP means stop: no new job; running ones save a checkpoint and go back to the queue (at
once, or after SFTD_DRAIN_SECONDS). Another one hurries. What happens to one job is told in `attempt.py`, how several run
side by side in `crew.py`.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Sequence

from sftd._transport import Transport
from sftd.errors import SftdError
from sftd_worker.analyst import Analyst
from sftd_worker.claimer import Claimer
from sftd_worker.crew import Crew
from sftd_worker.family import adopt_orphans
from sftd_worker.gpus import Devices, NoDevice, find_devices, list_gpus, share_of_cores
from sftd_worker.process import trainer_environment
from sftd_worker.registration import CannotWork, NameLock, TooOld, refused, register, too_old
from sftd_worker.settings import SettingsError, WorkerSettings, read_settings
from sftd_worker.tidy import Tidier
from sftd_worker.warm import WarmParent
from sftd_worker.worker import Stops, Worker

log = logging.getLogger("sftd.worker")


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
    """Work until stopped. Call it from the main thread: what is forked is bound to its life, and signals arrive there."""
    devices = find_devices(device=settings.device, num_wanted=settings.gpus, environment=os.environ)
    transport = Transport(settings.server_url, settings.read_key())
    threads = _threads(devices)
    worker = Worker(
        settings,
        devices,
        transport,
        uuid.uuid4().hex,
        stops=Stops(settings.drain_seconds),
        warm=_warm_parent(settings, devices, threads),
        threads=threads,
    )
    adopt_orphans()
    _listen_for_stop(worker)
    if settings.own_data:
        settings.data.mkdir(parents=True, exist_ok=True)
    name = NameLock(settings.data, settings.worker_name, worker.boot_id)
    if settings.alive_file is not None:
        settings.alive_file.unlink(missing_ok=True)  # an earlier worker's says nothing about this one
    try:
        register(worker, name, pause=worker.bell.wait)
        worker.bell.alive_file = settings.alive_file
        _work(worker, name)
    finally:
        transport.close()
        if worker.warm is not None:
            worker.warm.end()
    log.info("stopped")
    return 0


def _threads(devices: Devices) -> int | None:
    """Of one trainer; None: as many as the environment says, or torch likes."""
    if devices.kind == "cuda" or "OMP_NUM_THREADS" in os.environ:
        return None
    return share_of_cores(devices.num_slots)


def _warm_parent(settings: WorkerSettings, devices: Devices, threads: int | None) -> WarmParent | None:
    """It may see every device that a trainer may, and no secret: each trainer is told what is its own."""
    if not settings.warm:
        return None
    every = devices.visible(devices.lock_names())
    environment = trainer_environment(
        os.environ, cuda_visible_devices=every, offline=settings.offline, threads=threads
    )
    return WarmParent(settings.warm_argv, environment=environment)


def _work(worker: Worker, name: NameLock) -> None:
    """Claim and run, until told to stop or the server's no; then wait for what runs. Raises CannotWork."""
    crew = Crew(worker)
    claimer: Claimer | None = None
    analyst = Analyst(worker)
    analyst.start()
    registering = _Errand(worker, "register", lambda pause: register(worker, name, pause=pause))
    looking = _Errand(worker, "look", lambda pause: _look_for_lost(worker, pause))
    tidier = Tidier(worker, name)
    tidying = _Errand(worker, "tidy", lambda pause: tidier.tidy())
    no: CannotWork | None = None
    while no is None and not worker.stops.asked:
        crew.look()
        if worker.warm is not None:
            worker.warm.keep()
        if worker.is_changed and worker.devices.num_slots:
            registering.run()
        if worker.lost_gpus:
            looking.run()
        if tidier.due:
            tidying.run()
        if claimer is None and crew.wanted_slots():
            claimer = Claimer(worker, name, crew.wanted_slots)
            claimer.start()
        if claimer is not None and claimer.done:
            done, claimer = claimer, None
            if done.lease is not None:
                crew.start(done.lease)
            no = _no_of(done.error)
        else:
            worker.bell.wait(1.0)
        no = no or _no_of(registering.error) or (too_old(crew.outdated) if crew.outdated else None)
    if no is not None:
        log.error("no more jobs are taken: %s", no)
    if isinstance(no, TooOld):  # what runs could not be reported either
        worker.stops.save_now()
        worker.ring_all()
    if worker.stops.asked:
        log.info("stopping: no new jobs; what runs %s", _what_becomes(worker))
    analyst.stop()
    if claimer is not None:
        claimer.give_back()
    for errand in (registering, looking):
        errand.stop()
    while crew.busy:
        worker.bell.wait(1.0)
        crew.look()
    if no is not None:
        raise no


def _what_becomes(worker: Worker) -> str:
    seconds = worker.settings.drain_seconds
    if seconds and not worker.stops.saves:
        return f"may go on for {seconds:g} s, then it is saved and given back"
    return "is saved and given back"


def _no_of(error: Exception | None) -> CannotWork | None:
    """What the error of a thread that speaks to the server means for this worker."""
    if error is None or isinstance(error, CannotWork):
        return error
    what = "The server does not give out jobs to this worker"
    no = refused(error, what) if isinstance(error, SftdError) else CannotWork(f"{what}: {error!r}")
    no.__cause__ = error
    return no


class _Errand:
    """Something that takes its time, done in a thread of its own whenever `run` is called and it is not under way."""

    def __init__(self, worker: Worker, name: str, work: Callable[[Callable[[float], object]], None]) -> None:
        self.error: Exception | None = None
        self._worker = worker
        self._name = name
        self._work = work
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Begin, unless it is under way or has failed."""
        if self.error is None and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """It ends at its next pause."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            self._work(self._stopped.wait)
        except Exception as error:  # the edge of a thread; the main thread looks at it
            if not isinstance(error, CannotWork | SftdError):
                log.exception("%s ended by a mistake of ours", self._name)
            self.error = error
        finally:
            self._worker.bell.ring()


def _look_for_lost(worker: Worker, pause: Callable[[float], object]) -> None:
    """One look for lost GPUs, after a while."""
    pause(worker.settings.gpu_look_seconds)
    listed = {gpu.uuid for gpu in list_gpus()}
    worker.regain([gpu for gpu in worker.lost_gpus if gpu.uuid in listed])


def _listen_for_stop(worker: Worker) -> None:
    def on_signal(number: int, frame: object) -> None:
        worker.stops.add()
        worker.ring_all()

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
    parser.add_argument(
        "--own-data",
        action=argparse.BooleanOptionalAction,
        help="the data folder is this worker's own: files go through the server [SFTD_OWN_DATA]",
    )
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
