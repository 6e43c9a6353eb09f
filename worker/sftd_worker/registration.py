"""How a worker makes itself known to its server, and how it shows that an earlier process of it is dead.

A worker holds `<data>/locks/worker-<name>.lock` for its life, and `worker-<name>.json` beside it says which process that
is. The process that gets the lock next, on the same run of the same kernel, knows that the other one is dead and all its
trainers with it: it tells the server, which gives that one's jobs out again at once.
"""

import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sftd import __version__
from sftd._transport import backoff_seconds
from sftd.errors import ApiError, ConnectionFailed, ServerError, SftdError, Throttled
from sftd.protocol import PROTOCOL, Hello, Welcome
from sftd_worker.gpus import Locks
from sftd_worker.lease import is_outdated
from sftd_worker.settings import WorkerSettings
from sftd_worker.worker import Worker

log = logging.getLogger("sftd.worker")

CALL_SECONDS = 10.0  # deadline of a call, beyond the time that the server may hold its answer
MOST_BACKOFF_SECONDS = 15.0
TOLD_VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CannotWork(Exception):
    """This worker cannot work for that server; trying again would not help."""


class TooOld(CannotWork):
    """The server does not serve this version any more."""


class _Boot(BaseModel):
    """`worker-<name>.json`: the process that holds the lock, or held it last."""

    model_config = ConfigDict(extra="ignore")

    boot_id: str
    kernel_boot_id: str


class NameLock:
    """A worker's name on this machine. `replaces`: an earlier process of that name that is known to be dead.

    Where the lock is held by a process that lives, or cannot be had at all, the worker works without it.
    """

    def __init__(self, data: Path, worker_name: str, boot_id: str) -> None:
        self.replaces: str | None = None
        self._boot = _Boot(boot_id=boot_id, kernel_boot_id=_kernel_boot_id())
        self._file = data / "locks" / f"worker-{worker_name}.json"
        self._locks = Locks()
        try:
            held = data.is_dir() and self._locks.take(self._file.parent, [f"worker-{worker_name}.lock"], 1)
        except OSError as error:
            log.warning("the worker's name could not be locked (%s)", error)
            return
        if held:
            self.replaces = self._find_dead()
        elif data.is_dir():
            log.warning(
                "another worker called %s runs on this data folder; give each a name (SFTD_WORKER_NAME)",
                worker_name,
            )

    @property
    def held(self) -> bool:
        """Has this process the lock?"""
        return bool(self._locks.fds)

    def note(self) -> None:
        """The server knows this process: from now on the next one must give it as the one it replaces."""
        self.replaces = None
        if not self.held:
            return
        try:
            handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".worker-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._boot.model_dump_json())
            os.replace(temporary, self._file)
        except OSError as error:
            log.warning(
                "%s could not be written (%s): after a crash jobs wait for their lease", self._file, error
            )

    def _find_dead(self) -> str | None:
        try:
            earlier = _Boot.model_validate(json.loads(self._file.read_bytes()))
        except (OSError, ValueError, ValidationError):
            return None
        # Of another kernel, or of the same machine before it restarted: who knows which.
        same_kernel = self._boot.kernel_boot_id and earlier.kernel_boot_id == self._boot.kernel_boot_id
        return earlier.boot_id if same_kernel and earlier.boot_id != self._boot.boot_id else None


def register(worker: Worker, name: NameLock, *, pause: Callable[[float], object]) -> None:
    """Say hello until the server answers or the worker is to stop. Raises CannotWork."""
    num_failures = 0
    while worker.devices.num_slots and not worker.stops.asked:
        worker.is_changed = False  # before the devices are looked at: what changes from here on is told again
        hello = _hello(worker, name)
        try:
            reply = worker.transport.request(
                "POST", "/worker/register", body=hello, timeout_seconds=CALL_SECONDS, max_retries=0
            )
            welcome = reply.parse(Welcome)
        except SftdError as error:
            if not may_pass(error):
                raise refused(error, "The server does not accept this worker") from error
            num_failures = note_failure("register", error, num_failures)
            pause(pause_seconds(error, num_failures))
            continue
        check_data_folder(worker.settings, welcome.installation_id)
        worker.refused_means_down = welcome.refused_means_down
        name.note()
        slots = f"{hello.gpus} {hello.device} slot(s)"
        log.info("registered with %s as %s, %s", worker.transport.url, hello.worker_id, slots)
        return


def check_data_folder(settings: WorkerSettings, theirs: str) -> None:
    """Both sides must mean the same data folder, unless the worker has one of its own: the one place that decides it."""
    data, ours = settings.data, _read_installation_id(settings.data)
    if settings.own_data:
        if ours is not None:
            raise CannotWork(
                f"{data} is a server's data folder; a worker with --own-data needs an empty one. Give --data another"
                " folder, or leave --own-data away."
            )
        return
    if ours is None:
        raise CannotWork(
            f"{data / 'installation.id'} is not there: this is not the server's data folder. Give --data that folder;"
            " worker and server must share it, on one machine or on one volume. A worker without it fetches and sends"
            " everything through the server: --own-data, with an empty folder."
        )
    if ours != theirs:
        raise CannotWork(
            f"{data} belongs to another server (its installation is {ours}, the server's is {theirs}); check --data"
            " and --server."
        )


def may_pass(error: SftdError) -> bool:
    """May the same call succeed later? Not after a no of the server itself."""
    if isinstance(error, ConnectionFailed | ServerError | Throttled):
        return True
    return isinstance(error, ApiError) and not error.is_ours


def refused(error: SftdError, what: str) -> CannotWork:
    """The server's no, as what ends this worker."""
    if is_outdated(error):
        return too_old(str(error))
    return CannotWork(f"{what}: {error}")


def too_old(said: str) -> TooOld:
    """What a worker says that is told to upgrade."""
    return TooOld(
        f"The server does not serve this worker any more: it speaks protocol {PROTOCOL} (sftd {__version__})."
        f" Upgrade it to the server's version and start it again. The server said: {said}"
    )


def note_failure(call: str, error: SftdError, num_failures: int) -> int:
    """Log the first failure of a row. Returns how many there were."""
    if num_failures == 0:
        log.warning("%s failed, trying on: %s", call, error)
    return num_failures + 1


def pause_seconds(error: SftdError, num_failures: int) -> float:
    """How long to wait before the call is tried again."""
    asked = error.retry_after_seconds if isinstance(error, ApiError) else None
    return asked or backoff_seconds(num_failures, first=0.1, most=MOST_BACKOFF_SECONDS)


def _hello(worker: Worker, name: NameLock) -> Hello:
    devices, own_data = worker.devices, worker.settings.own_data
    return Hello(
        worker_id=worker.settings.worker_name,
        boot_id=worker.boot_id,
        gpus=devices.num_slots,
        device=devices.kind,
        labels=worker.settings.labels,
        versions=_versions(),
        installation_id=None if own_data else _read_installation_id(worker.settings.data),
        protocol=PROTOCOL,
        replaces_boot_id=name.replaces,
        gpu_memory_gb=devices.gpu_memory_gb,
        gpu_names=[gpu.name for gpu in devices.gpus],
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


def _kernel_boot_id() -> str:
    try:
        return KERNEL_BOOT_ID.read_text().strip()
    except OSError:
        return ""
