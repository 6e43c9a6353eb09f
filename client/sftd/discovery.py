"""Where is the server, and with which key? Arguments, then the environment, then what `sftd login` kept
(`sftd.config`), then the last server started here. A kept key goes to its own server only.

The note of the last server lies in `$XDG_STATE_HOME/sftd/server.json` (or under ~/.local/state). It names the key's
file, never the key itself.
"""

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sftd.config import Config, config_path, read_config
from sftd.errors import ConfigurationError

log = logging.getLogger("sftd.discovery")


@dataclass(frozen=True)
class ServerNote:
    """A server that was started on this machine."""

    url: str
    key_file: Path


@dataclass(frozen=True)
class Address:
    """Where to call, and with which key."""

    url: str
    key: str


def find_address(url: str | None = None, key: str | None = None) -> Address:
    """Settle address and key from what was given, the environment, `sftd login`, and the last server started here."""
    url = url or os.environ.get("SFTD_URL")
    key = key or os.environ.get("SFTD_API_KEY") or os.environ.get("SFTD_ADMIN_KEY")
    if url and key:
        return Address(url, key.strip())
    kept = _kept()
    note = find_server()
    url = url or kept.url or (note.url if note else None)
    if not url:
        raise ConfigurationError(
            "No server is known: `sftd login`, set SFTD_URL, or start one here with `sftd up`."
        )
    # The key of one server goes to that server only, never to another address.
    if not key and kept.url and _same(kept.url, url):
        key = kept.key
    if not key and note and _same(note.url, url):
        key = _read_key(note.key_file)
    if not key:
        raise ConfigurationError(
            f"No key for {url}: `sftd login`, or set SFTD_API_KEY (an administrator makes one: `sftd keys add`)."
        )
    return Address(url, key.strip())


def find_server() -> ServerNote | None:
    """The last server started on this machine, if a readable note of it is left."""
    try:
        note = json.loads(_note_path().read_text("utf-8"))
        return ServerNote(str(note["url"]), Path(note["key_file"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def remember_server(*, url: str, key_file: Path) -> None:
    """Leave a note of a server that has just started. A server runs without it: failing to write only warns."""
    try:
        path = _note_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"url": url, "key_file": str(key_file.resolve())})
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # 0600 from the start
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        log.warning("could not note this server for clients on this machine: %s", error)


def _kept() -> Config:
    """What `sftd login` kept; a machine without a home folder has kept nothing."""
    try:
        config_path()
    except ConfigurationError:
        return Config()
    return read_config()


def _note_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "sftd" / "server.json"


def _same(url: str, other: str) -> bool:
    first, second = (each.rstrip("/").replace("//localhost:", "//127.0.0.1:") for each in (url, other))
    return first == second


def _read_key(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
