"""How a run fails: every expected end has a FailureReason and a message for the person who posted the job."""

from sftd.schemas import FailureReason


class RunFailed(Exception):
    """The run cannot go on. `reason` names who can mend it, the message says what happened and what to do."""

    def __init__(self, reason: FailureReason, message: str, *, full_path: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.full_path = full_path  # with DISK_FULL: where there was no room
