"""Copies all tables of an installation from one database to another: SQLite to PostgreSQL, or back.

Rows pass as SQLite stores them (times and JSON as text), so that nothing is read and made anew on the way, and a value
arrives as it was. Everything happens in one transaction of the target.
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Connection, DateTime, Engine, Table, text
from sqlmodel import SQLModel

from sftd_server import migrations, tables
from sftd_server.admin import AdminError
from sftd_server.engines import unhurried

BATCH = 2000  # rows
# Which servers run is no part of an installation.
TABLES: list[Table] = [
    table for table in SQLModel.metadata.sorted_tables if table.name != tables.ServerRow.__tablename__
]
Row = tuple[Any, ...]  # values of any column


def copy_all(source: Connection, target: Engine, *, say: Callable[[str], None]) -> int:
    """Fill an empty database with all that `source` holds; the number of rows. Raises AdminError if it is not empty.

    `source` sees one snapshot throughout.
    """
    unhurried(source)
    migrations.upgrade(target)
    total = 0
    with target.begin() as connection:
        unhurried(connection)
        _require_empty(connection)
        for table in TABLES:
            try:
                num_rows = _copy(source, connection, table)
            except connection.dialect.loaded_dbapi.Error as error:  # the drivers' own: rows bypass SQLAlchemy
                said = " ".join(str(error).split())
                raise AdminError(
                    f"{table.name}: {said}. Nothing was kept; `sftd admin check` says what is wrong with the source."
                ) from None
            found = _count(connection, table)
            if not num_rows == found == _count(source, table):
                raise AdminError(
                    f"{table.name}: {num_rows} rows were read, {found} are there; nothing was kept."
                )
            _set_sequence(source, connection, table)
            say(f"{table.name}: {num_rows:,} rows")
            total += num_rows
    return total


def _require_empty(target: Connection) -> None:
    for table in SQLModel.metadata.sorted_tables:
        if _count(target, table):
            raise AdminError(
                f"The target is not empty: its table {table.name} has rows. Give a database that nothing was written to."
            )


def _count(connection: Connection, table: Table) -> int:
    return int(connection.execute(text(f'SELECT count(*) FROM "{table.name}"')).scalar_one())


def _copy(source: Connection, target: Connection, table: Table) -> int:
    columns = list(table.columns)
    names = ", ".join(f'"{column.name}"' for column in columns)
    is_json = [isinstance(column.type, JSON) for column in columns]
    rows = (
        tuple(_clean(value, is_json=json) for value, json in zip(row, is_json, strict=True))
        for row in _read(source, table, columns)
    )
    raw: Any = target.connection.driver_connection  # of sqlite3 or psycopg
    num_rows = 0
    if target.dialect.name == "sqlite":
        marks = ", ".join("?" * len(columns))
        while batch := list(islice(rows, BATCH)):
            raw.executemany(f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})', batch)
            num_rows += len(batch)
        return num_rows
    with raw.cursor() as cursor, cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copying:
        for row in rows:
            copying.write_row(row)
            num_rows += 1
    return num_rows


def _read(source: Connection, table: Table, columns: list[Column[Any]]) -> Iterator[Row]:
    if source.dialect.name == "sqlite":
        raw: Any = source.connection.driver_connection  # sqlite3.Connection
        names = ", ".join(f'"{column.name}"' for column in columns)
        yield from raw.execute(f'SELECT {names} FROM "{table.name}"')
        return
    query = text(f'SELECT {", ".join(map(_as_stored, columns))} FROM "{table.name}"')
    streamed = source.execution_options(stream_results=True, yield_per=BATCH)
    for row in streamed.execute(query):
        yield tuple(row)


def _as_stored(column: Column[Any]) -> str:
    """An expression of PostgreSQL for what SQLite has in this column."""
    name = f'"{column.name}"'
    kind = getattr(column.type, "impl_instance", column.type)
    if isinstance(kind, DateTime):
        return f"to_char({name}, 'YYYY-MM-DD HH24:MI:SS.US')"
    if isinstance(kind, Boolean):
        return f"{name}::int"
    return f"{name}::text" if isinstance(kind, JSON) else name


def _clean(value: Any, *, is_json: bool) -> Any:  # a value of any column
    """What earlier versions stored in SQLite and PostgreSQL refuses: NUL in text, NaN and infinities in JSON."""
    if not isinstance(value, str):
        return value
    if is_json and ("NaN" in value or "Infinity" in value or "\\u0000" in value):
        return json.dumps(_plain(json.loads(value)))
    return value.replace("\x00", "\ufffd")


def _plain(value: Any) -> Any:  # any JSON
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.replace("\x00", "\ufffd") if isinstance(value, str) else value


# ---------------------------------------------------------------- numbers that count up


def _set_sequence(source: Connection, target: Connection, table: Table) -> None:
    """Numbers go on where they were: one that was given out is not given out again, though its row is gone."""
    column = table.autoincrement_column
    if column is None:
        return
    highest = source.execute(text(f'SELECT max("{column.name}") FROM "{table.name}"')).scalar() or 0
    highest = max(highest, _last_given(source, table, column))
    if not highest:
        return
    if target.dialect.name != "sqlite":
        sequence = text("SELECT setval(pg_get_serial_sequence(:table, :column), :highest)")
        target.execute(sequence, {"table": table.name, "column": column.name, "highest": highest})
    elif table.dialect_options["sqlite"]["autoincrement"]:
        bound = {"table": table.name, "highest": highest}
        target.execute(text("DELETE FROM sqlite_sequence WHERE name = :table"), bound)
        target.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :highest)"), bound)


def _last_given(source: Connection, table: Table, column: Column[Any]) -> int:
    if source.dialect.name == "sqlite":
        if not table.dialect_options["sqlite"]["autoincrement"]:
            return 0
        query = text("SELECT seq FROM sqlite_sequence WHERE name = :table")
        return int(source.execute(query, {"table": table.name}).scalar() or 0)
    query = text("SELECT pg_get_serial_sequence(:table, :column)")
    name = source.execute(query, {"table": table.name, "column": column.name}).scalar_one()
    last, given = source.execute(text(f"SELECT last_value, is_called FROM {name}")).one()
    return int(last) if given else 0
