"""Commands of administration: `sftd workers`, `drain`, `undrain`, `storage`, `audit`."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from sftd.cli.app import ADMIN, AsJson, app
from sftd.client import Client
from sftd.errors import ConfigurationError
from sftd.output import pairs, print_json, print_table, say, size, when
from sftd.schemas import Collected, Storage, Worker

WorkerId = Annotated[str, typer.Argument(metavar="ID", help="Name of the worker.")]


@app.command(rich_help_panel=ADMIN)
def workers(as_json: AsJson = False) -> None:
    """List the workers."""
    with Client() as client:
        found = list(client.workers.list())
    if as_json:
        print_json(found)
        return
    rows = [
        (
            w.id,
            w.device,
            str(w.gpus),
            _standing(w),
            when(w.seen_at),
            ", ".join(w.job_ids),
            pairs(w.labels),
        )
        for w in found
    ]
    print_table(("ID", "DEVICE", "SLOTS", "STATE", "SEEN", "JOBS", "LABELS"), rows)


@app.command(rich_help_panel=ADMIN)
def drain(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Let a worker take no new jobs and give back those it runs (administrators only)."""
    with Client() as client:
        found = client.workers.drain(worker_id)
    if as_json:
        print_json(found)
        return
    held = [job_id for worker in found for job_id in worker.job_ids]
    say(f"{worker_id} drains" + (f"; it still holds {', '.join(held)}" if held else ""))


@app.command(rich_help_panel=ADMIN)
def undrain(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Let a worker take jobs again (administrators only)."""
    with Client() as client:
        found = client.workers.undrain(worker_id)
    if as_json:
        print_json(found)
        return
    say(f"{worker_id} takes jobs again")


@app.command(rich_help_panel=ADMIN)
def storage(
    collect: Annotated[bool, typer.Option("--collect", help="Delete now what is not kept (admins).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --collect: say only what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how full the server's disk is, and what would be deleted next."""
    if dry_run and not collect:
        raise ConfigurationError("--dry-run goes with --collect; without it nothing is deleted anyway.")
    with Client() as client:
        found = client.storage.collect(dry_run=dry_run) if collect else client.storage.show()
    if as_json:
        print_json(found)
        return
    items = found.removed if isinstance(found, Collected) else found.next
    if isinstance(found, Storage):
        print_table(("KIND", "SIZE"), [(kind, size(num)) for kind, num in found.bytes.items()])
        print(f"{size(found.free_bytes)} of {size(found.total_bytes)} are free" + _low(found))
        print(f"{size(found.next_bytes)} would be deleted now" + (":" if items else "."))
    else:
        print(
            f"{size(found.freed_bytes)} {'would be' if found.dry_run else 'were'} deleted"
            + (":" if items else ".")
        )
    rows = [(i.kind, i.job_id or "", i.name, size(i.bytes), i.why) for i in items]
    if rows:
        print_table(("KIND", "JOB", "NAME", "SIZE", "WHY"), rows)


@app.command(rich_help_panel=ADMIN)
def audit(
    action: Annotated[str | None, typer.Option(help="Only this kind of change, such as job.cancel.")] = None,
    key: Annotated[str | None, typer.Option(help="Only by the key of this name.")] = None,
    target: Annotated[str | None, typer.Option(metavar="ID", help="Only of this thing.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on: 2030-01-31, 2030-01-31T12:00.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Up to then.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show who changed what, the newest first (administrators only)."""
    with Client() as client:
        entries = list(
            client.audit.list(
                action=action,
                key_name=key,
                target=target,
                since=_time(since, "--since"),
                until=_time(until, "--until"),
                limit=limit,
            )
        )
    if as_json:
        print_json(entries)
        return
    rows = [
        (
            when(entry.created_at),
            entry.key_name or "the server",
            entry.action,
            entry.target or "",
            entry.address or "",
            pairs({name: str(value) for name, value in entry.details.items()}),
        )
        for entry in entries
    ]
    print_table(("AT", "BY", "ACTION", "TARGET", "FROM", "DETAILS"), rows)


def _standing(worker: Worker) -> str:
    if not worker.alive:
        return "silent"
    return "draining" if worker.draining else "there"


def _low(storage: Storage) -> str:
    kept = f"; {size(storage.reserve_bytes)} are kept in reserve"
    return kept + (": reports, uploads and new runs wait until there is space" if storage.low else "")


def _time(text: str | None, option: str) -> datetime | None:
    """A time as it is written on this machine's clock, unless it names a zone."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"{option} {text!r} is no time; write it as 2030-01-31 or 2030-01-31T12:00."
        ) from error
