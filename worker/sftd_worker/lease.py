"""The lease on a job: renewed by heartbeats for as long as the attempt lives, and given up the moment it is lost.

A lease is lost when the server itself says so, or when 0.8 of its length has passed since the last heartbeat that the
server acknowledged was *sent*: by then the server may soon hand the job on, and this worker must have let go. A thread of its
own sees to that, which touches no file and no connection, so that nothing that hangs keeps a trainer alive. A refused
connection counts like an acknowledgement where the server says so (there is only one): it shows that no server runs, and
a server that starts extends every lease.
"""

import logging
import threading
import time
from collections.abc import Callable

from sftd._transport import Transport, backoff_seconds
from sftd.errors import ApiError, Conflict, ConnectionFailed, NotFound, SftdError, UpgradeRequired
from sftd.protocol import TOKEN_HEADER, Directive, Heartbeat, Lease
from sftd.schemas import Want

log = logging.getLogger("sftd.worker")

HEARTBEAT_TIMEOUT_SECONDS = 5.0  # beyond the time that the server may hold the answer
FENCE_SHARE = 0.8


class Outdated(Exception):
    """The server does not serve this version of the worker any more."""


def is_lost(error: SftdError) -> bool:
    """Does the server itself say that the lease is over? A 404 or 409 of something before it, or of a server that does
    not know the call, says nothing."""
    return isinstance(error, Conflict | NotFound) and error.is_ours and error.code != "unknown_route"


def is_outdated(error: SftdError) -> bool:
    """Does the server itself say that it does not serve this version of the worker?"""
    return isinstance(error, UpgradeRequired) and error.is_ours


class LeaseKeeper:
    """Sends heartbeats from a thread of its own and keeps what they bring: what is wanted, and `lost` once it is."""

    def __init__(
        self,
        lease: Lease,
        transport: Transport,
        *,
        wait_seconds: float,
        on_news: Callable[[], None],
        refused_means_down: bool = True,
    ) -> None:
        self.lease = lease
        self.want = Want.RUN  # of the user
        self.make_room = False  # of the server: another job needs this one's place
        self.draining = False  # of the server: this worker shall have no jobs
        self.next_upload_seconds: float | None = None  # of the server: report no more often
        self.lost: str | None = None  # why
        self.outdated: str | None = None  # the server's word, where it does not serve this version any more
        self.heard = False  # the server has confirmed the lease
        self.base_sha256: str | None = None  # of the base model, for the server to keep
        self.step = 0  # the newest step, set by the shipper, told to the server
        # Where checkpoints are written, set by the attempt, told to the server.
        self.disk_free_bytes: int | None = None
        self._transport = transport
        self._refused_means_down = refused_means_down
        # Held answers must leave room for several tries before the fence.
        self._wait_seconds = min(wait_seconds, lease.lease_seconds / 8)
        self._on_news = on_news
        self._acknowledged_at = time.monotonic()
        self._end: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._fence = threading.Thread(target=self._await_fence, name="fence", daemon=True)

    def start(self) -> None:
        self._fence.start()
        self._thread.start()

    def ends(self, end: Callable[[], None]) -> None:
        """What must not outlive the lease: `end` is called when it is lost, at once where it is already, perhaps twice.
        It touches no files."""
        self._end = end
        if self.lost is not None:
            end()

    def close(self) -> None:
        """Stop sending heartbeats. One that is under way ends by itself and changes nothing any more."""
        self._closed.set()

    @property
    def fence_at(self) -> float:
        """When the lease must be given up if nothing is heard, on the monotonic clock."""
        return self._acknowledged_at + FENCE_SHARE * self.lease.lease_seconds

    def still_held(self) -> bool:
        """May this attempt go on?"""
        if self.lost is None and time.monotonic() >= self.fence_at:
            self.lose("the server was not heard in time")
        return self.lost is None

    def lose(self, why: str) -> None:
        """The lease is lost; every thread of the attempt sees it. Safe to call twice."""
        if self.lost is None:
            self.lost = why
            try:
                self._end()
            finally:
                self._closed.set()
                self._on_news()

    def _await_fence(self) -> None:
        """Each acknowledgement moves the fence."""
        while not self._closed.wait(max(0.0, self.fence_at - time.monotonic())):
            if not self.still_held():
                return

    def _run(self) -> None:
        try:
            self._beat_until_closed()
        except Exception as error:  # the edge of a thread: without heartbeats the attempt must end
            log.exception("heartbeats of %s ended by a mistake of ours", self.lease.job_id)
            self.lose(f"heartbeats ended: {error!r}")

    def _beat_until_closed(self) -> None:
        num_failures = 0
        while not self._closed.is_set():
            sent_at = time.monotonic()
            try:
                directive = self._beat()
            except SftdError as error:
                if is_outdated(error):
                    self.outdated = str(error)
                if is_lost(error) or self.outdated is not None:
                    self.lose(str(error))
                    return
                self._missed(error, sent_at, num_failures)
                num_failures += 1
                continue
            num_failures = 0
            self._acknowledged_at = sent_at
            if self._take(directive):
                self._on_news()
            elif time.monotonic() - sent_at < self._wait_seconds / 2:
                self._closed.wait(
                    self._wait_seconds / 2
                )  # a server that does not hold the answer is not flooded

    def _take(self, directive: Directive) -> bool:
        """Keep what an answer says. Is it news for the attempt?"""
        before = (self.want, self.make_room, self.draining, self.heard)
        self.want, self.make_room, self.draining = directive.want, directive.make_room, directive.draining
        self._refused_means_down = directive.refused_means_down
        self.next_upload_seconds = directive.next_upload_seconds
        self.heard = True
        return before != (self.want, self.make_room, self.draining, self.heard)

    def _missed(self, error: SftdError, sent_at: float, num_failures: int) -> None:
        """A heartbeat was not acknowledged: wait before the next, which must come well before the fence."""
        refused = isinstance(error, ConnectionFailed) and error.refused and self._refused_means_down
        if refused and self._transport.nothing_listens():
            self._acknowledged_at = sent_at
        if num_failures == 0:
            log.warning("heartbeat of %s failed, trying on: %s", self.lease.job_id, error)
        most = self.lease.lease_seconds / 8
        asked = (isinstance(error, ApiError) and error.retry_after_seconds) or 0.1
        self._closed.wait(min(most, max(asked, backoff_seconds(num_failures, first=0.2, most=most))))

    def _beat(self) -> Directive:
        beat = Heartbeat(
            attempt=self.lease.attempt,
            started=True,
            step=self.step,
            base_sha256=self.base_sha256,
            seen_want=self.want,
            seen_make_room=self.make_room,
            seen_draining=self.draining,
            disk_free_bytes=self.disk_free_bytes,
            # The first answer is wanted at once: the job may have been cancelled on its way here.
            wait_seconds=self._wait_seconds if self.heard else 0,
        )
        seconds = self._wait_seconds + min(HEARTBEAT_TIMEOUT_SECONDS, self.lease.lease_seconds / 4)
        return self._transport.request(
            "POST",
            f"/worker/jobs/{self.lease.job_id}/heartbeat",
            body=beat,
            headers={TOKEN_HEADER: self.lease.token},
            timeout_seconds=seconds,
            max_retries=0,
        ).parse(Directive)
