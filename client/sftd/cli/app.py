"""What the commands share: the app that they belong to, their common options, and what an error ends with."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from rich.console import Console

from sftd import __version__
from sftd.client import Client
from sftd.errors import (
    ConfigurationError,
    ConnectionFailed,
    JobFailed,
    ServerError,
    SftdError,
    Throttled,
    WaitTimeout,
)
from sftd.output import print_json, say
from sftd.schemas import Job
from sftd.watch import watch

COMPLETION_SECONDS = 1.0
COMPLETED_JOBS = 50

app = typer.Typer(
    help="sftd: fine-tuning on your own GPU box.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
files = typer.Typer(help="Uploaded data files.", no_args_is_help=True)
keys = typer.Typer(help="Access keys (administrators only).", no_args_is_help=True)
app.add_typer(files, name="files", rich_help_panel="Data and jobs")
app.add_typer(keys, name="keys", rich_help_panel="Administration")

BOX, JOBS, RECORDS, ADMIN = "This machine", "Data and jobs", "What a job tells", "Administration"


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"sftd {__version__}")
        raise typer.Exit


def job_ids(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the newest jobs, for the shell's completion; none where the server does not answer at once."""
    found: list[tuple[str, str]] = []
    # In a thread, since looking up the server's name has no time-out of its own.
    asking = threading.Thread(target=_ask_for_job_ids, args=(incomplete, found), daemon=True)
    asking.start()
    asking.join(COMPLETION_SECONDS)
    return list(found)


def _ask_for_job_ids(incomplete: str, found: list[tuple[str, str]]) -> None:
    with (
        suppress(Exception),
        Client(timeout=COMPLETION_SECONDS, max_retries=0) as client,
    ):  # no place to say it
        for job in client.jobs.list(limit=COMPLETED_JOBS):
            if job.id.startswith(incomplete):
                found.append((job.id, f"{job.state} {job.name or ''}"))


JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.", autocompletion=job_ids)]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")]


def exit_code(error: SftdError) -> int:
    """What a command ends with after an error."""
    if isinstance(error, JobFailed | WaitTimeout):
        return 1
    return 3 if isinstance(error, ConnectionFailed | ServerError | Throttled) else 2


def reason(error: SftdError) -> str:
    """The error in words; of a fault of the server's with the id that its log knows it by."""
    if isinstance(error, ServerError) and error.request_id:
        return f"{error} (request {error.request_id})"
    return str(error)


def require_number(option: str, value: float | None) -> None:
    """Refuse `nan` and `inf`, which the command line takes for numbers."""
    if value is not None and not math.isfinite(value):
        raise ConfigurationError(f"{option} {value}: give a number.")


@contextmanager
def leaving(job_id: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{job_id} goes on; end it with: sftd cancel {job_id}")
        raise typer.Exit(130) from None


def watch_job(client: Client, job_id: str, *, logs: bool, as_json: bool = False) -> Job:
    """Show a job until it is over. With `as_json` stdout is left to the result."""
    with leaving(job_id):
        return watch(client, job_id, console=Console(stderr=as_json), logs=logs)


def say_state(job: Job, *, as_json: bool) -> None:
    """Where a job stands after a call that steers it."""
    if as_json:
        print_json(job)
        return
    asked = {"cancel": "to be cancelled", "pause": "to be paused"}.get(str(job.want))
    waiting = f", {asked}" if asked and job.state.leased else ""
    print(f"{job.id} is {job.state}{waiting}")


def say_deleted(thing_id: str, word: str, *, as_json: bool) -> None:
    """Something is gone."""
    if as_json:
        print_json({"id": thing_id, "deleted": True})
        return
    say(f"{thing_id} is {word}")
