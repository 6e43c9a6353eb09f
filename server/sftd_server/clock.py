"""Time, as the server sees it. Passed down, so that a test can move it."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


@dataclass(frozen=True)
class Clock:
    """The machine's clock. Where one server owns the database, it is the only clock for leases."""

    def now(self) -> datetime:
        """Wall clock, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never jump; comparable within one process only."""
        return time.monotonic()


class DatabaseClock(Clock):
    """The database's clock, for servers that share one: this machine's own may be wrong, and never decides.

    Between two looks at it (`set`, at the start and at every tick of the reaper) it goes on by the monotonic clock.
    """

    def __init__(self) -> None:
        object.__setattr__(self, "_known", None)

    @property
    def is_set(self) -> bool:
        """Whether the database's clock has been read."""
        return self.__dict__["_known"] is not None

    def set(self, wall: datetime, monotonic: float) -> None:
        """The database's clock said `wall` when this process's said `monotonic`."""
        object.__setattr__(self, "_known", (wall, monotonic))

    def now(self) -> datetime:
        known: tuple[datetime, float] | None = self.__dict__["_known"]
        if known is None:
            raise RuntimeError("the database's clock has not been read yet")
        wall, monotonic = known
        return wall + timedelta(seconds=self.monotonic() - monotonic)
