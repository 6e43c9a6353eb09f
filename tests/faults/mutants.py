"""Bugs that the fault harness must catch, planted into a real server from outside: no switch of them is in the product.

    python -m tests.faults.mutants fence --data DIR --port 8000     # a server that fences nobody

Each is the smallest change that breaks one promise. A name that is not there any more is an error, so that no mutant
quietly becomes a healthy server.
"""

import argparse
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sqlmodel import Session, col, select, update

from sftd.protocol import EventBatch, LogBatch, MetricsBatch
from sftd_server import app
from sftd_server.jobs.service import Note
from sftd_server.jobs.states import Trigger
from sftd_server.tables import JobRow, StreamRow
from sftd_server.workers import endings, leases, reports


def plant(name: str) -> None:
    """Break this process's server. Call it before the server starts."""
    SERVER_MUTANTS[name]()


def fence() -> None:
    """`fenced` accepts any token, any attempt, any state."""

    def anybody(session: Session, holder: leases.Holder) -> JobRow:
        row = session.exec(select(JobRow).where(JobRow.id == holder.job_id)).first()
        if row is None:
            raise leases.StaleLease
        return row

    _replace_everywhere("fenced", leases.fenced, anybody)


def sequence() -> None:
    """A stream takes a batch wherever it begins: what is sent twice lands twice."""

    def append(
        session: Session,
        holder: leases.Holder,
        kind: str,
        batch: MetricsBatch | LogBatch | EventBatch,
        num_items: int,
        store: Callable[[JobRow], None],
    ) -> int:
        row = leases.fenced(session, holder)
        after = batch.seq + num_items
        session.exec(
            update(StreamRow)
            .where(col(StreamRow.job) == row.number, col(StreamRow.attempt) == holder.attempt)
            .where(col(StreamRow.kind) == kind)
            .values(next_seq=after)
        )
        if num_items:
            store(row)
        return after

    _replace_everywhere("_append", reports._append, append)


def reaper_event() -> None:
    """The reaper takes jobs back without a word in the history."""
    real = endings.move

    def silently(
        session: Session, row: JobRow, trigger: Trigger, *, notes: list[Note], **more: Any
    ) -> object:  # as `move` takes it
        return real(session, row, trigger, notes=[] if trigger is Trigger.LEASE_EXPIRED else notes, **more)

    endings.move = silently  # type: ignore[assignment]


SERVER_MUTANTS: dict[str, Callable[[], None]] = {
    "fence": fence,
    "sequence": sequence,
    "reaper_event": reaper_event,
}


def _replace_everywhere(name: str, real: object, other: object) -> None:
    """Put `other` wherever a module of the server has `real` under this name."""
    places: list[ModuleType] = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("sftd_server") and getattr(module, name, None) is real
    ]
    assert places, f"nothing named {name} to replace"
    for module in places:
        setattr(module, name, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mutant", choices=list(SERVER_MUTANTS))
    flags, rest = parser.parse_known_args()
    plant(flags.mutant)
    sys.argv = ["sftd-server", *rest]
    app.main()


if __name__ == "__main__":
    main()
