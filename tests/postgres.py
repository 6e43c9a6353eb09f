"""A private PostgreSQL for tests: started in a folder of its own, as an unprivileged user, gone when the tests are.

`Postgres.start()` raises NoPostgres where there is none. Its binaries are looked for in PATH and where Debian puts them.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sftd_server import migrations
from sftd_server.db import make_engine

USER = "sftd"
TEMPLATE = "sftd_template"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "300",
    "shared_buffers": "32MB",
    # Its data need not outlive the machine: the tests kill servers, never the machine.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "256MB",
    "autovacuum": "off",
    "logging_collector": "off",
}


class NoPostgres(Exception):
    """There is no PostgreSQL on this machine. The message says how to get it."""


class Postgres:
    """A running one. `create` makes databases with the newest schema; they are copied off a template."""

    def __init__(self, folder: Path, binaries: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self._binaries = binaries
        self._num_databases = 0
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls) -> "Postgres":
        binaries = find_binaries()
        folder = Path(tempfile.mkdtemp(prefix="sftd-postgres-"))
        if (user := _unprivileged()) is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        postgres = cls(folder, binaries, _free_port())
        try:
            command = [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", USER, "-E", "UTF8"]
            command += ["--locale=C", "--auth=trust", "--no-sync", "--no-instructions"]
            subprocess.run(_as_user(command), check=True, capture_output=True, cwd=folder)
            postgres.up()
            postgres.execute("postgres", f"CREATE DATABASE {TEMPLATE}")
            engine = make_engine(postgres.url(TEMPLATE))
            migrations.upgrade(engine)
            engine.dispose()
        except BaseException:
            postgres.stop()
            raise
        return postgres

    def up(self) -> None:
        """Start it, again after `down`, and wait until it answers."""
        command = [str(self._binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        for name, value in {**_SETTINGS, "unix_socket_directories": str(self.folder)}.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(_as_user(command), stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def down(self) -> None:
        """Stop it as a restart would: whoever is connected is thrown out."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)

    def stop(self) -> None:
        """Stop it and remove all of it."""
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, name: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def create(self, *, empty: bool = False) -> str:
        """The address of a new database, with the newest schema unless it shall be empty."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        self.execute("postgres", f"CREATE DATABASE {name}" + ("" if empty else f" TEMPLATE {TEMPLATE}"))
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute("postgres", f"DROP DATABASE IF EXISTS {url.rsplit('/', 1)[1]} WITH (FORCE)")

    def execute(self, name: str, statement: str) -> list[tuple[object, ...]]:
        """Run one statement, outside a transaction."""
        import psycopg

        with psycopg.connect(self.url(name), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]  # a test's own text
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        import psycopg

        try:
            self.execute("postgres", "SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


def find_binaries() -> Path:
    """The folder of initdb and postgres. Raises NoPostgres."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise NoPostgres('needs psycopg: pip install "sftd[postgres]"') from None
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name)[::-1]
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise NoPostgres("needs PostgreSQL's initdb and postgres: apt-get install postgresql")


def _unprivileged() -> pwd.struct_passwd | None:
    """Who runs it where we are root, which postgres refuses to be."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _as_user(command: Sequence[str]) -> list[str]:
    end = ["setpriv", "--pdeathsig", "INT"]  # it ends with us, however we end
    user = _unprivileged()
    if user is not None:
        end += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return [*end, "--", *command]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
