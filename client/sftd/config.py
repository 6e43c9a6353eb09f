"""The address and key that `sftd login` keeps: `$XDG_CONFIG_HOME/sftd/config.toml`, or under ~/.config.

    url = "https://box.example"
    key = "sftd-…"

A key that others on the machine can read is refused, not used.
"""

import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sftd.errors import ConfigurationError

MAX_CONFIG_BYTES = 64 * 1024
NAMES = ("url", "key")


@dataclass(frozen=True)
class Config:
    """What the file says."""

    url: str | None = None
    key: str | None = None


def read_config() -> Config:
    """The file's address and key; nothing where there is no file. Raises ConfigurationError for one that is wrong."""
    path = config_path()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return Config()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    found = _parse(path, content)
    if found.key and mode & 0o077 and os.name == "posix":
        raise ConfigurationError(f"{path} holds a key, and others may read it: chmod 600 {path}")
    return found


def write_config(config: Config) -> Path:
    """Keep address and key for this user alone (0600); returns the file."""
    path = config_path()
    values = {"url": config.url, "key": config.key}
    # JSON's form of text is TOML's too, but for DEL, which neither an address nor a key holds.
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in values.items()
        if value is not None
    ]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".config-")  # 0600 from the start
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("".join(lines))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def forget_config() -> bool:
    """Delete the file; tells whether there was one."""
    try:
        config_path().unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def config_path() -> Path:
    """Where the file lies, or would."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        # By its specification a relative path there is none.
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    except RuntimeError as error:
        raise ConfigurationError("No home folder is known: set HOME or XDG_CONFIG_HOME.") from error
    return folder / "sftd" / "config.toml"


def _parse(path: Path, content: bytes) -> Config:
    import tomllib  # only where there is a file

    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes; it holds url and key.")
    try:
        values = tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not TOML ({error}); `sftd login` writes it anew.") from error
    for name, value in values.items():
        if name not in NAMES or not isinstance(value, str):
            raise ConfigurationError(f"{path}: {name!r} is wrong; it holds url and key, both text.")
    if values.get("key") and not values.get("url"):
        raise ConfigurationError(f"{path}: a key without the url that it is for; add url, or `sftd login`.")
    return Config(url=values.get("url") or None, key=(values.get("key") or "").strip() or None)
