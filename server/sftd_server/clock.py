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


class ClockWatch:
    """Notices where the wall clock and the monotonic clock part: it was set, or the machine was suspended."""

    JUMP_SECONDS = 2.0  # less is drift

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: tuple[datetime, float] | None = None
        self.steady_since = 0.0  # by the monotonic clock: the start, or the last jump

    def begin(self) -> None:
        """The clock counts from now on."""
        self.settle()
        self.steady_since = self._clock.monotonic()

    def jump(self) -> float:
        """By how many seconds the clock has jumped since it was last settled; 0 where it did not."""
        if self._seen is None:
            return 0.0
        wall, monotonic = self._seen
        jump = (self._clock.now() - wall).total_seconds() - (self._clock.monotonic() - monotonic)
        return jump if abs(jump) > self.JUMP_SECONDS else 0.0

    def settle(self) -> None:
        """What the clock says now is what it is compared with from here on."""
        if self.jump():
            self.steady_since = self._clock.monotonic()
        self._seen = self._clock.now(), self._clock.monotonic()


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
