"""`python -m sftd_server.migrations upgrade|check|downgrade|revision --database-url URL`."""

import argparse

from sftd_server import migrations
from sftd_server.db import make_engine


def main() -> None:
    """Run one migration command."""
    parser = argparse.ArgumentParser(prog="python -m sftd_server.migrations", description=__doc__)
    parser.add_argument("command", choices=["upgrade", "check", "downgrade", "revision"])
    parser.add_argument(
        "--database-url", required=True, help="sqlite:///<path> or postgresql://user@host/name"
    )
    parser.add_argument("--message", default="", help="what a new revision does")
    arguments = parser.parse_args()
    try:
        engine = make_engine(arguments.database_url)
    except ValueError as error:
        parser.error(f"--database-url {error}")
    if arguments.command == "revision":
        migrations.make_revision(engine, arguments.message)
    else:
        {"upgrade": migrations.upgrade, "check": migrations.check, "downgrade": migrations.downgrade}[
            arguments.command
        ](engine)
    engine.dispose()


if __name__ == "__main__":
    main()
