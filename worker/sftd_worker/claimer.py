"""Asks the server for the next job, from a thread of its own, so that the main thread hears signals meanwhile."""

import logging
import threading
import uuid
from collections.abc import Callable

from sftd._transport import backoff_seconds
from sftd.errors import Conflict, NotFound, SftdError
from sftd.protocol import PROTOCOL, TOKEN_HEADER, Claim, Finish, Lease, Ok, Release
from sftd_worker.disk import free_bytes
from sftd_worker.registration import (
    CALL_SECONDS,
    MOST_BACKOFF_SECONDS,
    NameLock,
    may_pass,
    note_failure,
    pause_seconds,
    register,
)
from sftd_worker.worker import Worker

log = logging.getLogger("sftd.worker")

PARTLY_BUSY_WAIT_SECONDS = 5.0  # a claim asks for what was free when it began; meanwhile more may be


class Claimer:
    """Asks until there is a job, or nothing to ask for: `wanted_slots` says how many devices wait for one at present.
    `lease` is what came of it."""

    def __init__(self, worker: Worker, name: NameLock, wanted_slots: Callable[[], int]) -> None:
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self._worker = worker
        self._name = name
        self._wanted_slots = wanted_slots
        self._request_id = uuid.uuid4().hex
        self._asked_slots = 1
        self._stopped = threading.Event()
        self._handover = threading.Lock()  # of a lease: taken before the stop, or given back after it
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def give_back(self) -> None:
        """Stop asking, and release a job that was handed over in this very moment. Safe to call twice.

        The server may hold the last call for a while yet: what that brings is released too, as long as this process lives.
        """
        with self._handover:
            self._stopped.set()
        try:
            # The same request brings the same lease, if the answer under way holds one.
            lease = self.lease or (None if self.done else self._claim(wait_seconds=0))
            if lease is not None:
                self._release(lease)
        except SftdError as error:
            log.warning("could not ask whether a job was handed over just now: %s", error)

    def _release(self, lease: Lease) -> None:
        word = Release(attempt=lease.attempt, message="The worker is being stopped.")
        say_without_attempt(self._worker, lease, word)

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
            if not (slots := self._wanted_slots()):
                return  # a GPU was lost, or the server drains this worker: the main thread begins again
            self._asked_slots = slots
            try:
                self._take(self._claim(wait_seconds=self._wait_seconds()))
                self._request_id = uuid.uuid4().hex
                num_failures = 0
            except SftdError as error:
                if may_pass(error):
                    num_failures = note_failure("claim", error, num_failures)
                    self._stopped.wait(pause_seconds(error, num_failures))
                    continue
                if not isinstance(error, NotFound | Conflict):
                    raise
                # The request is spent, or the server has new records: begin afresh.
                self._request_id = uuid.uuid4().hex
                register(self._worker, self._name, pause=self._stopped.wait)
                self._stopped.wait(backoff_seconds(num_failures, first=1.0, most=MOST_BACKOFF_SECONDS))
                num_failures += 1

    def _take(self, lease: Lease | None) -> None:
        with self._handover:
            if not self._stopped.is_set():
                self.lease = lease
                return
        if lease is not None:
            self._release(lease)

    def _wait_seconds(self) -> float:
        wanted = self._worker.settings.claim_wait_seconds
        is_idle = self._asked_slots == self._worker.devices.num_slots
        return wanted if is_idle else min(wanted, PARTLY_BUSY_WAIT_SECONDS)

    def _claim(self, *, wait_seconds: float) -> Lease | None:
        claim = Claim(
            worker_id=self._worker.settings.worker_name,
            boot_id=self._worker.boot_id,
            request_id=self._request_id,
            gpus=self._asked_slots,
            wait_seconds=wait_seconds,
            protocol=PROTOCOL,
            disk_free_bytes=free_bytes(self._worker.settings.data / "jobs"),
        )
        reply = self._worker.transport.request(
            "POST", "/worker/claim", body=claim, timeout_seconds=wait_seconds + CALL_SECONDS, max_retries=0
        )
        return None if reply.status == 204 else reply.parse(Lease)


def say_without_attempt(worker: Worker, lease: Lease, word: Release | Finish) -> None:
    """The last call for a job that no attempt runs (any more). Raises SftdError."""
    call = "release" if isinstance(word, Release) else "finish"
    worker.transport.request(
        "POST",
        f"/worker/jobs/{lease.job_id}/{call}",
        body=word,
        headers={TOKEN_HEADER: lease.token},
        timeout_seconds=CALL_SECONDS,
    ).parse(Ok)
