"""Backup and restore of an installation.

A backup is a folder: the database as a SQLite file (also where the installation's is PostgreSQL), the files on record,
the keys. It is made beside a running server: the database in one snapshot, then the files that this names. They never
change, so on the same file system they are linked, not copied. It appears under its name when it is whole. Files that lie
in the artifact store alone are not in it: they are counted, and a restore looks whether they are still there.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlmodel import Session

import sftd
from sftd_server import migrations
from sftd_server.admin import AdminError
from sftd_server.admin.recorded import RecordedFile, StoreCheck, fault_of, only_stored, recorded_files
from sftd_server.admin.transfer import copy_all
from sftd_server.datafolder import DataFolder
from sftd_server.disk import fsync
from sftd_server.engines import is_shared, make_engine
from sftd_server.settings import Settings

FORMAT = 1
NOTE = "backup.json"
DATABASE = "sftd.db"
MAX_TRIES = 5  # of a snapshot whose files were deleted before they were linked
_SECRETS = ("admin.key", "worker.key", "server.secret", "installation.id")

Say = Callable[[str], None]


def backup(settings: Settings, destination: Path, *, quick: bool, say: Say) -> list[str]:
    """Back an installation up, while its server runs or not. Returns what is missing from it, a line each."""
    if destination.exists():
        raise AdminError(f"{destination} exists; give a name that is free.")
    require_database(settings.database_url)
    part = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a backup that was killed
    try:
        part.mkdir(mode=0o700, parents=True)
        for _ in range(MAX_TRIES):
            (part / DATABASE).unlink(missing_ok=True)
            _copy_database(settings.database_url, part / DATABASE)
            missing = _take_files(settings.data, part)
            if not missing:
                break
        for name in _SECRETS:
            if (settings.data / name).exists():
                _copy(settings.data / name, part / name)
        faults = [f"{file.path} ({file.belongs_to}) is not in the data folder" for file in missing]
        gone = {file.path for file in missing}
        verify(part, quick=quick, leave_out=gone)
        elsewhere = only_stored(_files_of(part), part)
        _write_note(part, faults, elsewhere)
        _sync_folders(part)
        os.rename(part, destination)
        fsync(destination.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    say(f"{destination}: {_num_files(destination):,} files, {'sizes' if quick else 'hashes'} verified")
    if elsewhere:
        say(
            f"NOT in this backup: {_counted(elsewhere)} that the artifact store alone has. Keep the store as long as the"
            " backup, or nothing brings them back."
        )
    return faults


def restore(settings: Settings, source: Path, *, quick: bool, say: Say) -> list[str]:
    """Lay a backup out as a data folder, and its database where the settings say. Returns what is not to be had of the
    files that the artifact store alone had, a line each."""
    folder = settings.data
    if folder.exists() and any(folder.iterdir()):
        raise AdminError(f"{folder} is not empty; give a folder that is, or that does not exist.")
    note = _read_note(source)
    verify(source, quick=quick, leave_out=set(note.get("missing", [])))
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(mode=0o700, parents=True)
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if path.is_dir():
                (part / name).mkdir(mode=0o700, exist_ok=True)
            elif str(name) not in (NOTE, DATABASE):
                _copy(path, part / name)
        DataFolder(part).prepare()
        inside = _restore_database(settings, source / DATABASE, part, say)
        _sync_folders(part)
        os.rename(part, folder)  # takes the place of an empty folder
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    say(f"{folder} is restored" + ("" if inside else "; its database is where SFTD_DATABASE_URL says"))
    missing = set(note.get("missing", []))
    elsewhere = [file for file in only_stored(_files_of(source), source) if file.path not in missing]
    if not elsewhere:
        return []
    say(f"{_counted(elsewhere)} were not in the backup: the artifact store alone had them.")
    looking = StoreCheck(settings, deep=False)
    found = [(file, looking.fault_of(file)) for file in elsewhere]
    return [f"{file.path} ({file.belongs_to}) {fault}" for file, fault in found if fault is not None]


def verify(folder: Path, *, quick: bool, leave_out: set[str]) -> None:
    """Raise AdminError unless the backup is whole: the database, and every file on record."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    if found != ["ok"]:
        raise AdminError(f"The backup's database is damaged: {found[0]}.")
    for file in _files_of(folder):
        fault = None if file.path in leave_out else fault_of(file, folder, deep=not quick)
        if fault is not None:
            raise AdminError(f"{folder / file.path} {fault}; it belongs to {file.belongs_to}.")


def require_database(url: str) -> None:
    """Raise AdminError unless there is a database of this version of sftd."""
    parsed = make_url(url)
    if not is_shared(url) and not Path(parsed.database or "").is_file():
        raise AdminError(f"There is no database at {parsed.database}; give the data folder with --data.")
    engine = make_engine(url, query_only=True)
    try:
        with engine.connect() as connection:
            found, head = migrations.revision(connection), migrations.head()
    finally:
        engine.dispose()
    if found != head:
        raise AdminError(
            f"The database has the schema {found or 'of nothing'}, this version of sftd needs {head}: start its server once."
        )


# ---------------------------------------------------------------- the database


def _copy_database(url: str, to: Path) -> None:
    """A consistent copy, as one SQLite file."""
    if is_shared(url):
        source, target = make_engine(url, query_only=True), make_engine(f"sqlite:///{to}")
        try:
            with source.connect() as connection:
                copy_all(connection, target, say=lambda line: None)
        finally:
            source.dispose()
            target.dispose()
    else:
        file = make_url(url).database or ""
        with closing(sqlite3.connect(file, timeout=30)) as original, closing(sqlite3.connect(to)) as copy:
            original.backup(copy)
    with closing(sqlite3.connect(to)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    fsync(to)


def _restore_database(settings: Settings, file: Path, part: Path, say: Say) -> bool:
    """Put the database where it belongs; whether that is within the data folder."""
    url = settings.database_url
    if is_shared(url):
        source, target = make_engine(f"sqlite:///{file}", query_only=True), make_engine(url)
        try:
            with source.connect() as connection:
                copy_all(connection, target, say=say)
        finally:
            source.dispose()
            target.dispose()
        return False
    place = Path(make_url(url).database or "")
    if place.is_relative_to(settings.data):
        _copy(file, part / place.relative_to(settings.data))
        return True
    if place.exists():
        raise AdminError(f"SFTD_DATABASE_URL names {place}, which exists; remove it, or unset the variable.")
    _copy(file, place)
    return False


# ---------------------------------------------------------------- files


def _files_of(folder: Path) -> Iterator[RecordedFile]:
    """What the database of a backup has on record."""
    with _reading(folder / DATABASE) as session:
        yield from recorded_files(session, DataFolder(folder))


@contextmanager
def _reading(file: Path) -> Iterator[Session]:
    engine = make_engine(f"sqlite:///{file}", query_only=True)
    try:
        with Session(engine) as session:
            yield session
    finally:
        engine.dispose()


def _take_files(data: Path, part: Path) -> list[RecordedFile]:
    """Link or copy what is on record; what is not there any more is returned."""
    missing = []
    for file in _files_of(part):
        target = part / file.path
        if target.exists():
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            _link_or_copy(data / file.path, target)
        except FileNotFoundError:
            if not file.in_store:
                missing.append(file)
    return missing


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        _copy(path, to)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(path, to, follow_symlinks=False)
    os.chmod(to, 0o600)
    fsync(to)


def _counted(files: Sequence[RecordedFile]) -> str:
    num_bytes = sum(file.bytes for file in files)
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'} ({num_bytes:,} bytes)"


def _num_files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


def _sync_folders(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync(path)


# ---------------------------------------------------------------- what it says of itself


def _write_note(folder: Path, faults: list[str], elsewhere: Sequence[RecordedFile]) -> None:
    note = {
        "format": FORMAT,
        "version": sftd.__version__,
        "schema": migrations.head(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "missing": [fault.split(" ", 1)[0] for fault in faults],
        "num_only_in_store": len(elsewhere),
    }
    path = folder / NOTE
    path.write_text(json.dumps(note, indent=2) + "\n")
    fsync(path)


def _read_note(folder: Path) -> dict[str, list[str]]:
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        raise AdminError(f"{folder} is no backup: it has no {NOTE}.") from None
    if note.get("format") != FORMAT:
        raise AdminError(f"{folder} was made by sftd {note.get('version')}; restore it with that version.")
    return dict(note)
