"""Wrong keys: an address that sends too many of them in a minute is told to wait.

A good key works from such an address all the same: a whole team may sit behind it. So this bounds the noise and the work
that guessing makes; that no guess is ever right is up to the keys, of which those made here have 192 random bits.
"""

import ipaddress
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from sftd_server.clock import Clock
from sftd_server.errors import TooManyFailures

WINDOW_SECONDS = 60.0
MOST_ADDRESSES = 10_000  # remembered; then the one that failed longest ago is forgotten

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

log = logging.getLogger("sftd.server")


class Throttle:
    """Counts wrong keys by address. `limit` 0 counts nothing."""

    def __init__(self, clock: Clock, *, limit: int, trusted_proxies: Sequence[str]) -> None:
        self._clock = clock
        self._limit = limit
        self._trusted = networks(trusted_proxies)
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()  # address → when, on the steady clock

    def note(self, scope: Scope, headers: Headers) -> None:
        """A wrong key came. Raises TooManyFailures where that was one too many."""
        if not self._limit:
            return
        address, now = self.address(scope, headers), self._clock.monotonic()
        times = self._failures.setdefault(address, deque())
        self._failures.move_to_end(address)
        while times and times[0] <= now - WINDOW_SECONDS:
            times.popleft()
        if len(times) >= self._limit:
            raise TooManyFailures(times[0] + WINDOW_SECONDS - now)
        times.append(now)
        if len(times) == self._limit:
            log.warning("%s has sent %d wrong keys within a minute", address, self._limit)
        if len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)

    def address(self, scope: Scope, headers: Headers) -> str:
        """Who is counted for a request: where it comes from. One IPv6 network is one address."""
        address = _parsed(self.origin(scope, headers))
        if isinstance(address, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((address, 64), strict=False))
        return "unknown" if address is None else str(address)

    def origin(self, scope: Scope, headers: Headers) -> str:
        """Where a request comes from: its peer, or what a trusted proxy says of it."""
        client = scope.get("client")
        found = client[0] if client else ""
        if self._trusted:
            hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
            while hops and is_within(found, self._trusted):
                found = hops.pop()
        address = _parsed(found)
        return "unknown" if address is None else str(address)


def networks(texts: Sequence[str]) -> list[Network]:
    """Addresses and networks as written in a setting. Raises ValueError."""
    return [ipaddress.ip_network(text, strict=False) for text in texts]


def is_within(text: str, among: Sequence[Network]) -> bool:
    """Is this an address of one of these networks?"""
    if not among:
        return False
    address = _parsed(text)
    return address is not None and any(address in network for network in among)


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
