"""Time, as the server sees it. Passed down, so that a test can move it."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """The machine's clock. The server is the only clock for leases."""

    def now(self) -> datetime:
        """Wall clock, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never jump; comparable within one process only."""
        return time.monotonic()
