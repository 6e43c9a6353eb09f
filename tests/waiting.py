"""Waiting for what another thread, task or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(ready: Callable[[], T], seconds: float = 15.0) -> T:
    """Wait until something holds; the first answer of `ready` that counts as true.

    Raises:
        AssertionError: It did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)
    return found
