"""Calls of one attempt to the server: what to do about one that fails is decided in one place, `decide`."""

import enum
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from sftd._transport import Transport, backoff_seconds
from sftd.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    Invalid,
    NotFound,
    SequenceGap,
    ServerError,
    SftdError,
    Throttled,
    TooLarge,
)
from sftd.protocol import TOKEN_HEADER, NextSeq, Ok, Reply, Restored
from sftd_worker.lease import LeaseKeeper, is_lost

log = logging.getLogger("sftd.worker")

T = TypeVar("T")
CALL_TIMEOUT_SECONDS = 20.0
_ANSWERS: dict[str, type[Reply]] = {
    "metrics": NextSeq,
    "logs": NextSeq,
    "events": NextSeq,
    "restore": Restored,
}


class Verdict(enum.Enum):
    """What to do about a call that failed."""

    FENCED = "the lease is lost: send nothing any more"
    REWIND = "the stream stands elsewhere: go on where the server says"
    DROP = "it will never be taken: record it and go on"
    RETRY = "send it again"


def decide(error: SftdError) -> Verdict:
    """The worker's one rule for failed calls (worker protocol, section 4)."""
    match error:
        case Conflict(code="checkpoint_backwards" | "batch_differs" | "wrong_state" | "file_changed"):
            return Verdict.DROP
        case NotFound(code="file_gone" | "unknown_file" | "unknown_checkpoint" | "unknown_route"):
            return Verdict.DROP
        case Conflict() | NotFound() if is_lost(error):
            return Verdict.FENCED
        case SequenceGap():
            return Verdict.REWIND
        case TooLarge():  # a proxy's word too: what it does not let through is sent in smaller batches
            return Verdict.DROP
        case Invalid() if error.is_ours:
            return Verdict.DROP
        case Throttled() | ServerError() | ConnectionFailed():
            return Verdict.RETRY
        case _:  # 401, 403: a key may be put right while the lease lives; or it is not the server that speaks
            return Verdict.RETRY


class Fenced(Exception):
    """The lease is lost; nothing more may be sent."""


class Refused(Exception):
    """The server will never take this."""


class Outbox:
    """Calls of one attempt: sent until they are answered, or the lease is lost, or they are called off."""

    def __init__(self, transport: Transport, keeper: LeaseKeeper) -> None:
        self._transport = transport
        self._keeper = keeper
        self._called_off = threading.Event()

    def call_off(self) -> None:
        """Stop trying: the worker has to go."""
        self._called_off.set()

    def send(
        self,
        call: str,
        body: BaseModel,
        *,
        pause: Callable[[float], object] | None = None,
        given_up: Callable[[], bool] | None = None,
    ) -> bytes:
        """Send one call. Raises SequenceGap, Refused, or Fenced. The main thread brings its own way to wait."""
        return self.keep_trying(call, lambda: self._once(call, body), pause=pause, given_up=given_up)

    def keep_trying(
        self,
        call: str,
        once: Callable[[], T],
        *,
        pause: Callable[[float], object] | None = None,
        given_up: Callable[[], bool] | None = None,
    ) -> T:
        """Make a call of this attempt until it is answered; as `send`."""
        pause = pause or self._called_off.wait
        given_up = given_up or self._called_off.is_set
        num_failures = 0
        while self._keeper.still_held() and not given_up():
            try:
                return once()
            except SftdError as error:
                verdict = decide(error)
                if verdict is Verdict.REWIND:
                    raise
                if verdict is Verdict.DROP:
                    raise Refused(str(error)) from error
                if verdict is Verdict.FENCED:
                    self._keeper.lose(str(error))
                    break
                if num_failures == 0:
                    log.warning("%s of %s failed, trying on: %s", call, self._keeper.lease.job_id, error)
                asked = isinstance(error, ApiError) and error.retry_after_seconds
            pause(asked or backoff_seconds(num_failures, first=0.1, most=15.0))
            num_failures += 1
        raise Fenced(self._keeper.lost or "given up, the worker is being stopped")

    def _once(self, call: str, body: BaseModel) -> bytes:
        reply = self._transport.request(
            "POST",
            f"/worker/jobs/{self._keeper.lease.job_id}/{call}",
            body=body,
            headers={TOKEN_HEADER: self._keeper.lease.token},
            timeout_seconds=CALL_TIMEOUT_SECONDS,
            max_retries=0,
        )
        reply.parse(_ANSWERS.get(call, Ok))  # a page of something before the server is no answer of it
        return reply.content
