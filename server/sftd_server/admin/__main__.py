"""`sftd admin migrate-db | backup | restore | check`, or `python -m sftd_server.admin …`."""

import argparse
import logging
import os
import sys
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from sftd_server import migrations
from sftd_server.admin import AdminError
from sftd_server.admin.backup import backup, require_database, restore
from sftd_server.admin.check import check
from sftd_server.admin.transfer import copy_all
from sftd_server.datafolder import DataFolder, StartRefused
from sftd_server.engines import is_shared, make_engine
from sftd_server.settings import Settings, SettingsError, read_settings


def main() -> None:
    """Run one command. Exit codes: 0 done; 1 something is wrong with the installation; 2 it cannot be done."""
    arguments = _parser().parse_args()
    os.umask(0o077)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        sys.exit(arguments.run(arguments))
    except (AdminError, SettingsError, StartRefused) as error:
        sys.exit(_refused(str(error)))
    except DBAPIError as error:
        sys.exit(_refused(f"The database does not answer as it should: {' '.join(str(error.orig).split())}"))
    except OSError as error:
        sys.exit(_refused(str(error)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftd admin", description="Move, back up, restore, check an installation."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    moving = commands.add_parser("migrate-db", help="copy the database into an empty one of the other kind")
    moving.add_argument("--from", dest="source", required=True, metavar="URL", help="sqlite:///<path>")
    moving.add_argument(
        "--to", dest="target", required=True, metavar="URL", help="postgresql://user@host/name"
    )
    moving.add_argument(
        "--data", type=Path, help="data folder (SFTD_DATA, default: where the SQLite file lies)"
    )
    moving.set_defaults(run=_migrate)

    saving = commands.add_parser("backup", help="back up, while the server runs or not")
    saving.add_argument("destination", type=Path, metavar="DEST", help="a folder that does not exist")
    saving.add_argument("--data", type=Path, help="data folder (SFTD_DATA)")
    saving.add_argument("--quick", action="store_true", help="verify the files' sizes, not their hashes")
    saving.set_defaults(run=_backup)

    laying = commands.add_parser("restore", help="lay a backup out as a data folder")
    laying.add_argument("source", type=Path, metavar="SRC", help="a backup")
    laying.add_argument("--data", type=Path, required=True, help="a folder that is empty or does not exist")
    laying.add_argument("--quick", action="store_true", help="verify the files' sizes, not their hashes")
    laying.set_defaults(run=_restore)

    looking = commands.add_parser("check", help="look for anything wrong; a line each, exit code 1 if any")
    looking.add_argument("--data", type=Path, help="data folder (SFTD_DATA)")
    looking.add_argument("--deep", action="store_true", help="hash every file on record")
    looking.set_defaults(run=_check)
    return parser


def _migrate(arguments: argparse.Namespace) -> int:
    for option, url in (("--from", arguments.source), ("--to", arguments.target)):
        try:
            is_shared(url)
        except ValueError as error:
            raise AdminError(f"{option} {error}") from None
    if is_shared(arguments.source) == is_shared(arguments.target):
        raise AdminError(
            "--from and --to must be of different kinds: one sqlite:///…, the other postgresql://…"
        )
    file = Path(
        make_url(arguments.target if is_shared(arguments.source) else arguments.source).database or ""
    )
    given = arguments.data or (os.environ.get("SFTD_DATA") and Path(os.environ["SFTD_DATA"]))
    locks = [
        DataFolder(folder.expanduser().absolute()) for folder in {file.absolute().parent, given} if folder
    ]
    # Whoever serves from the folder, on either database, would write what is not copied any more.
    held = [folder.lock() for folder in locks if (folder.path / "locks").is_dir()]
    require_file(arguments.source)
    source = make_engine(arguments.source)
    migrations.upgrade(source)
    source.dispose()
    reading, target = make_engine(arguments.source, query_only=True), make_engine(arguments.target)
    try:
        with reading.connect() as connection:
            total = copy_all(connection, target, say=print)
    finally:
        reading.dispose()
        target.dispose()
        for handle in held:
            os.close(handle)
    shown = make_url(arguments.target).render_as_string(hide_password=True)
    print(
        f"{total:,} rows are in {shown}; start the server with SFTD_DATABASE_URL set to it. The source is unchanged."
    )
    return 0


def require_file(url: str) -> None:
    """Raise AdminError where a SQLite file is not there: SQLite would make an empty one."""
    if not is_shared(url) and not Path(make_url(url).database or "").is_file():
        raise AdminError(f"There is no file {make_url(url).database}.")


def _backup(arguments: argparse.Namespace) -> int:
    destination = arguments.destination.expanduser().absolute()
    faults = backup(_settings(arguments), destination, quick=arguments.quick, say=print)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _restore(arguments: argparse.Namespace) -> int:
    source = arguments.source.expanduser().absolute()
    faults = restore(_settings(arguments), source, quick=arguments.quick, say=print)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _check(arguments: argparse.Namespace) -> int:
    num_findings = 0
    settings = _settings(arguments)
    require_database(settings.database_url)
    for finding in check(settings, deep=arguments.deep):
        num_findings += 1
        print(finding, flush=True)
    if not num_findings:
        print("nothing wrong was found")
    return 1 if num_findings else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    return read_settings(os.environ, data=arguments.data)


def _refused(message: str) -> int:
    print(f"sftd admin: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
