"""The names this server is called by, and the pages that may call it: what a browser sends is checked here.

A page somewhere else can point a name of its own at this machine (DNS rebinding) or send a form here (CSRF). Neither
gets past: the Host must be a name of this server, and an Origin must be the very address that was called. Addresses in
digits always pass, because no name server stands behind them.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers

from sftd_server.errors import Forbidden

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,253}))(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
# Nobody can register these in the public name service, so no page out there has such a name.
_PRIVATE_ENDINGS = (".local", ".lan", ".internal", ".home.arpa", ".localdomain")
_READING = ("GET", "HEAD")
_MOST_KNOWN = 256


class Hosts:
    """Decides by the headers Host, Origin and Sec-Fetch-Site."""

    def __init__(self, listens_on: str, allowed: Iterable[str]) -> None:
        self._allowed = {name.lower().rstrip(".") for name in allowed}
        self._names = self._allowed | {listens_on.lower()} | _names_of_this_machine()
        self._only_here = is_loopback(listens_on)
        self._known: dict[str, bool] = {}  # Host headers and what came of them: they are always the same few

    def check(self, method: str, headers: Headers) -> None:
        """Raises Forbidden. A request without Host is HTTP/1.0, which no browser speaks."""
        host = headers.get("host")
        if host is not None and not self._admits(host):
            raise Forbidden(
                f"{host[:100]!r} is not a name of this server; call it by its address, or have its owner add the name "
                "to SFTD_ALLOWED_HOSTS.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host or ""):
            raise _foreign(f"the origin {origin[:100]!r}")
        is_link = method in _READING and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_link:
            raise _foreign("another site")

    def _admits(self, host: str) -> bool:
        known = self._known.get(host)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[host] = self._decide(host)
        return known

    def _decide(self, host: str) -> bool:
        if "*" in self._allowed:
            return True
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True
        if name in self._names or f"{name}:{match[2]}" in self._names:
            return True
        # Beyond loopback the team calls it by what its own network calls it: `gpubox`, a container's name, `gpubox.lan`.
        return not self._only_here and ("." not in name or name.endswith(_PRIVATE_ENDINGS))

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, mark, authority = origin.lower().partition("://")
        port = _DEFAULT_PORTS.get(scheme)
        if not mark or port is None or _HOST.fullmatch(authority) is None:  # `null`, file:, an extension
            return False
        short = authority.removesuffix(f":{port}")
        return short == host.lower().removesuffix(f":{port}") or short in self._allowed


def is_loopback(host: str) -> bool:
    """Is this an address that only this machine reaches? Names other than localhost count as reached from outside."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _foreign(who: str) -> Forbidden:
    return Forbidden(
        f"The request was sent by {who}; pages of other sites cannot call this server.",
        code="origin_not_allowed",
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _names_of_this_machine() -> set[str]:
    """Its name as it is set, and under the domains in which it looks others up. Asks no name server."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    try:
        text = Path("/etc/resolv.conf").read_text(errors="replace")
    except OSError:
        text = ""
    lines = (line.split() for line in text.lower().splitlines())
    domains = [domain for line in lines if line[:1] in (["search"], ["domain"]) for domain in line[1:]]
    return {name, short, *(f"{short}.{domain.strip('.')}" for domain in domains if domain.strip("."))} - {""}
