"""What this client raises. Catch `SftdError` for all of it.

SftdError
├── ConnectionFailed        no answer, none in time, or one that is not ours
├── ConfigurationError      no key, no address, an unreadable spec file
├── JobFailed               a job that was waited for failed or was cancelled; .job
├── FileFailed              the rows of a file that was waited for are wrong; .file
├── WaitTimeout             what was waited for is still going on; .job
└── ApiError                the server answered with an error; .status .code .param .request_id .retry_after_seconds .should_retry
    ├── AuthenticationError 401
    ├── PermissionDenied    403
    ├── NotFound            404
    ├── Conflict            409
    ├── TooLarge            413
    ├── SequenceGap         416   a stream went on past what the server holds
    ├── Invalid             400, 422
    ├── UpgradeRequired     426   a worker of another version than the server serves
    ├── Throttled           429
    └── ServerError         5xx
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftd.schemas import File, Job


class SftdError(Exception):
    """Base of everything raised here."""


class ConnectionFailed(SftdError):
    """The server could not be reached, did not answer in time, or something else answered in its place."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused  # nothing listens at the address: no server is running there


class ConfigurationError(SftdError):
    """Something is missing or unreadable on this side: the key, the address, the spec file."""


class JobFailed(SftdError):
    """A job that was waited for ended otherwise than in `succeeded`."""

    def __init__(self, message: str, *, job: "Job") -> None:
        super().__init__(message)
        self.job = job


class FileFailed(SftdError):
    """A file that was waited for cannot be trained on; the message names its lines."""

    def __init__(self, message: str, *, file: "File") -> None:
        super().__init__(message)
        self.file = file


class WaitTimeout(SftdError, TimeoutError):
    """The time given to wait is over; the job (or the check of a file) goes on. `job` is as it was seen last."""

    def __init__(self, message: str, *, job: "Job | None" = None) -> None:
        super().__init__(message)
        self.job = job


NOT_OURS = "unknown"  # the code of an error whose answer has none: not an sftd server's


class ApiError(SftdError):
    """The server answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        self.should_retry = should_retry  # the server's own word on it, where it gives one

    @property
    def is_ours(self) -> bool:
        """Whether an sftd server says so; else it comes from something before it, such as a proxy."""
        return self.code != NOT_OURS


class AuthenticationError(ApiError):
    """401: no key, a wrong key or an expired one."""


class PermissionDenied(ApiError):
    """403: the key's role does not allow this."""


class NotFound(ApiError):
    """404: no such thing."""


class Conflict(ApiError):
    """409: the thing is in the wrong state for this."""


class TooLarge(ApiError):
    """413: larger than the server's limit."""


class SequenceGap(ApiError):
    """416: the batch begins after what the server holds. `expected` is where to go on."""

    expected: int = 0


class Invalid(ApiError):
    """400 or 422: the request itself is wrong. The message lists every mistake."""


class UpgradeRequired(ApiError):
    """426: this worker's protocol is too old or too new for the server."""


class Throttled(ApiError):
    """429: too many requests, or a limit of the key is reached (code `limit_reached`); then waiting a moment is no use."""


class ServerError(ApiError):
    """5xx: the server's fault; worth another try."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    416: SequenceGap,
    422: Invalid,
    426: UpgradeRequired,
    429: Throttled,
}


def error_class(status: int) -> type[ApiError]:
    """The class that stands for an HTTP status."""
    if status >= 500:
        return ServerError
    return _BY_STATUS.get(status, ApiError)


def may_pass(error: SftdError) -> bool:
    """Whether the same call may succeed later: by the server's word, else no answer, too many calls, a fault of its own."""
    if isinstance(error, ApiError) and error.should_retry is not None:
        return error.should_retry
    return isinstance(error, ConnectionFailed | Throttled | ServerError)
