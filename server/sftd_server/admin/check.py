"""Is an installation sound? The database itself, the invariants of the worker protocol, the files on record.

The invariants (I1-I9) are those of the worker protocol; those that only a whole history shows (I4, I10-I12) cannot be told
from tables. Reads one snapshot, beside a running server or without one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import text
from sqlmodel import Session

from sftd_server.admin.backup import require_database
from sftd_server.admin.recorded import RecordedFile, StoreCheck, fault_of, only_stored, recorded_files
from sftd_server.datafolder import DataFolder
from sftd_server.engines import make_engine
from sftd_server.settings import Settings

_LEASED = "('claimed','running','stopping')"
_TERMINAL = "('succeeded','failed','cancelled')"


@dataclass(frozen=True)
class Rule:
    """A query that finds what must not be: the job's id, then what `message` tells of it."""

    name: str
    message: str
    query: str


RULES = (
    Rule(
        "I1",
        "has {} attempts that have not ended",
        "SELECT job.id, count(*) FROM attempt JOIN job ON job.number = attempt.job WHERE attempt.outcome IS NULL"
        " GROUP BY job.id HAVING count(*) > 1",
    ),
    Rule(
        "I1",
        "is {}, but its attempt {} is not the one that holds the lease",
        f"SELECT id, state, attempt FROM job WHERE state IN {_LEASED} AND NOT EXISTS (SELECT 1 FROM attempt"
        " WHERE attempt.job = job.number AND attempt.attempt = job.attempt AND attempt.outcome IS NULL"
        " AND attempt.token_sha256 = job.token_sha256)",
    ),
    Rule(
        "I1",
        "is {}, but its attempt {} has not ended",
        "SELECT job.id, job.state, attempt.attempt FROM attempt JOIN job ON job.number = attempt.job"
        f" WHERE attempt.outcome IS NULL AND job.state NOT IN {_LEASED}",
    ),
    Rule(
        "I2",
        "counts {} attempts, {} are on record, up to number {}",
        "SELECT job.id, job.attempt, count(attempt.attempt), coalesce(max(attempt.attempt), 0) FROM job"
        " LEFT JOIN attempt ON attempt.job = job.number GROUP BY job.number, job.id, job.attempt"
        " HAVING count(attempt.attempt) <> job.attempt OR coalesce(max(attempt.attempt), 0) <> job.attempt"
        " OR coalesce(min(attempt.attempt), 1) <> 1",
    ),
    *(
        Rule(
            "I3",
            f"has {what} of attempt {{}} after one of attempt {{}}",
            f"SELECT job.id, found.attempt, found.earlier FROM (SELECT job, attempt, lag(attempt) OVER"
            f" (PARTITION BY job ORDER BY id) AS earlier FROM {table}) AS found JOIN job ON job.number = found.job"
            " WHERE found.attempt < found.earlier",
        )
        for table, what in (("event", "an event"), ("log_line", "a log line"))
    ),
    Rule(
        "I5",
        "has {} log lines of attempt {}, {} were acknowledged",
        "SELECT job.id, coalesce(found.num, 0), stream.attempt, stream.next_seq FROM stream"
        " JOIN job ON job.number = stream.job LEFT JOIN (SELECT job, attempt, count(*) AS num FROM log_line"
        " GROUP BY job, attempt) AS found ON found.job = stream.job AND found.attempt = stream.attempt"
        " WHERE stream.kind = 'logs' AND coalesce(found.num, 0) <> stream.next_seq",
    ),
    Rule(
        "I5",
        "has {} events of attempt {}, {} were acknowledged",
        "SELECT job.id, coalesce(found.num, 0), stream.attempt, stream.next_seq FROM stream"
        " JOIN job ON job.number = stream.job LEFT JOIN (SELECT job, attempt, count(*) AS num FROM event"
        " WHERE type IN ('run','evaluation','notice') GROUP BY job, attempt) AS found"
        " ON found.job = stream.job AND found.attempt = stream.attempt"
        " WHERE stream.kind = 'events' AND coalesce(found.num, 0) < stream.next_seq",
    ),
    Rule(
        "I5",
        "has metrics of {} steps of attempt {}, {} points were acknowledged",
        "SELECT job.id, found.num, found.attempt, coalesce(stream.next_seq, 0) FROM (SELECT job, attempt,"
        " count(DISTINCT step) AS num FROM metric GROUP BY job, attempt) AS found JOIN job ON job.number = found.job"
        " LEFT JOIN stream ON stream.job = found.job AND stream.attempt = found.attempt AND stream.kind = 'metrics'"
        " WHERE found.num > coalesce(stream.next_seq, 0)",
    ),
    Rule(
        "I5",
        "has {} streams of attempt {}, not 3",
        "SELECT job.id, count(stream.kind), attempt.attempt FROM attempt JOIN job ON job.number = attempt.job"
        " LEFT JOIN stream ON stream.job = attempt.job AND stream.attempt = attempt.attempt"
        " GROUP BY job.id, attempt.job, attempt.attempt HAVING count(stream.kind) <> 3",
    ),
    Rule(
        "I6",
        "is {} and has {} events of its end",
        f"SELECT job.id, job.state, count(event.id) FROM job LEFT JOIN event ON event.job = job.number"
        f" AND event.type IN {_TERMINAL} GROUP BY job.number, job.id, job.state"
        f" HAVING count(event.id) <> CASE WHEN job.state IN {_TERMINAL} THEN 1 ELSE 0 END",
    ),
    Rule(
        "I6",
        "is {}, its last event says {}",
        "SELECT job.id, job.state, event.type FROM job JOIN event ON event.job = job.number"
        f" WHERE event.type IN {_TERMINAL} AND event.type <> job.state",
    ),
    Rule(
        "I7",
        "has the event {} after its end",
        "SELECT job.id, later.type FROM event AS ended JOIN job ON job.number = ended.job"
        " JOIN event AS later ON later.job = ended.job AND later.id > ended.id"
        f" WHERE ended.type IN {_TERMINAL}"
        " AND later.type IN ('queued','claimed','running','stopping','paused','checkpoint','run','evaluation')",
    ),
    Rule(
        "I8",
        "has a checkpoint of step {} of attempt {} after one of step {}",
        "SELECT job.id, found.step, found.attempt, found.earlier FROM (SELECT job, attempt, step, lag(step) OVER"
        " (PARTITION BY job, attempt ORDER BY created_at, step) AS earlier FROM checkpoint) AS found"
        " JOIN job ON job.number = found.job WHERE found.step < found.earlier",
    ),
    Rule(
        "I9",
        "is one of {} jobs of one Idempotency-Key",
        "SELECT min(id), count(*) FROM job WHERE idempotency_key IS NOT NULL GROUP BY owner, idempotency_key"
        " HAVING count(*) > 1",
    ),
    Rule(
        "files",
        "is queued and waits for the check of its files, which is over",
        "SELECT id FROM job WHERE checking_files = true AND state = 'queued' AND NOT EXISTS (SELECT 1 FROM file"
        " WHERE file.status = 'uploaded' AND CAST(job.inputs AS TEXT) LIKE '%' || file.id || '%')",
    ),
)


def check(settings: Settings, *, deep: bool) -> Iterator[str]:
    """What is wrong, a line each. `deep`: every recorded file is hashed."""
    require_database(settings.database_url)
    engine = make_engine(settings.database_url, query_only=True)
    try:
        with Session(engine) as session:
            yield from _of_sqlite(session)
            for rule in RULES:
                for job_id, *facts in session.connection().execute(text(rule.query)):
                    yield f"{rule.name} {job_id} {rule.message.format(*facts)}"
            files = list(recorded_files(session, DataFolder(settings.data)))
        elsewhere = StoreCheck(settings, deep=deep)

        def look(file: RecordedFile) -> str | None:
            if only_stored([file], settings.data):
                return elsewhere.fault_of(file)
            return fault_of(file, settings.data, deep=deep)

        suspects = [file for file in files if look(file)]
        if suspects:  # perhaps deleted since the snapshot, which is no fault
            with Session(engine) as session:
                still = set(recorded_files(session, DataFolder(settings.data)))
            for file in suspects:
                fault = look(file) if file in still else None
                if fault is not None:
                    yield f"file {settings.data / file.path} {fault}; it belongs to {file.belongs_to}"
    finally:
        engine.dispose()


def _of_sqlite(session: Session) -> Iterator[str]:
    """PostgreSQL checks its pages and keys by itself."""
    connection = session.connection()
    if connection.dialect.name != "sqlite":
        return
    for (said,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if said != "ok":
            yield f"database {said}"
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"database {table}: row {row} refers to a row of {parent} that is not there"
