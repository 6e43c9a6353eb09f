"""May the server be reached from other machines? Only with keys that nobody guesses or reads over a shoulder.

On loopback any key will do. Beyond it the admin's key must be long: the one that is made at the first start is, one
from SFTD_ADMIN_KEY may not be; and the files that hold keys must be closed to other users of this machine.
"""

import logging
import stat

from sftd_server.datafolder import DataFolder
from sftd_server.hosts import is_loopback
from sftd_server.settings import Settings, SettingsError

MIN_KEY_CHARS = 16
MIN_DIFFERENT_CHARS = 8

log = logging.getLogger("sftd.server")


def check_exposure(settings: Settings, folder: DataFolder) -> None:
    """Raises SettingsError where the server would be open to others, saying what to do."""
    if is_loopback(settings.host):
        return
    mistakes = [] if settings.admin_key is None else _weaknesses(settings.admin_key.get_secret_value())
    mistakes = [f"SFTD_ADMIN_KEY {weakness}" for weakness in mistakes]
    for path in (folder.admin_key, folder.worker_key):
        if path.exists():
            mistakes += [f"{path} {weakness}" for weakness in _weaknesses(path.read_text().strip())]
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                mistakes.append(f"{path} can be read by other users of this machine: chmod 600 it")
    if mistakes:
        raise SettingsError(
            f"SFTD_HOST: will not listen on {settings.host}, where other machines reach it: {'; '.join(mistakes)}. "
            "Or listen on 127.0.0.1."
        )
    log.warning(
        "other machines reach %s by plain HTTP: put TLS before it, or trust the network", settings.host
    )


def _weaknesses(key: str) -> list[str]:
    if len(key) >= MIN_KEY_CHARS and len(set(key)) >= MIN_DIFFERENT_CHARS:
        return []
    if not key:
        return []  # an empty file: the server makes a key
    return [
        f"can be guessed: make it at least {MIN_KEY_CHARS} characters, {MIN_DIFFERENT_CHARS} of them different, or "
        "leave it out and the server makes one"
    ]
