"""Commands that list, show and steer jobs: `sftd ls`, `show`, `cancel`, `pause`, `resume`, `change`, `priority`, `move`,
`delete`."""

from typing import Annotated, Literal

import typer

from sftd.cli.app import JOBS, AsJson, Assignments, JobId, app, say_deleted, say_state
from sftd.cli.submit import assigned
from sftd.client import Client
from sftd.errors import ConfigurationError
from sftd.output import (
    duration,
    facts,
    number,
    pairs,
    print_facts,
    print_json,
    print_table,
    printable,
    say,
    steps,
    when,
)


@app.command("ls", rich_help_panel=JOBS)
def list_jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only this owner's (a key's name).")] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only those of this key.")] = False,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only jobs with this metadata; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    if mine and owner is not None:
        raise ConfigurationError("--mine stands beside --owner; give one of the two.")
    wanted = _metadata(metadata or [])
    with Client() as client:
        whose = client.keys.me().name if mine else owner
        jobs = list(client.jobs.list(state=state, owner=whose, metadata=wanted, limit=limit))
    if as_json:
        print_json(jobs)
        return
    rows = [
        (
            job.id,
            job.name or "",
            str(job.state),
            steps(job),
            number(job.loss),
            job.base_model,
            job.owner,
            when(job.created_at),
        )
        for job in jobs
    ]
    print_table(("ID", "NAME", "STATE", "STEP", "LOSS", "BASE MODEL", "OWNER", "CREATED"), rows)


@app.command(rich_help_panel=JOBS)
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with Client() as client:
        job = client.jobs.retrieve(job_id)
    if as_json:
        print_json(job)
        return
    print_facts(
        {
            "id": job.id,
            "name": job.name,
            "state": f"{job.state}" + (f", {job.queue_position} in line" if job.queue_position else ""),
            "waits": job.why_waiting,
            "paused by": job.pause_reason,
            "after": ", ".join(job.after) or None,
            "retry of": job.retry_of,
            "clone of": job.clone_of,
            "base model": f"{job.base_model} ({job.method})",
            "progress": f"{job.progress:.0%}  {facts(job)}" if job.attempt else None,
            "owner": job.owner,
            "created": when(job.created_at),
            "started": job.started_at and when(job.started_at),
            "finished": job.finished_at and when(job.finished_at),
            "attempt": job.attempt or None,
            "worker": job.worker_id,
            "GPU time": duration(job.gpu_seconds) if job.attempt else None,
            "folder": job.folder,
            "metadata": pairs(job.metadata) or None,
            "failure": job.failure and f"{job.failure.reason}: {job.failure.message}",
            "remedy": job.failure and job.failure.remedy,
        }
    )
    if job.failure and job.failure.log_tail:
        print("last lines of the log:")
        for line in job.failure.log_tail:
            print(f"  {printable(line)}")


@app.command(rich_help_panel=JOBS)
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """End a job for good."""
    with Client() as client:
        say_state(client.jobs.cancel(job_id), as_json=as_json)


@app.command(rich_help_panel=JOBS)
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Save a checkpoint, then stop and free the device."""
    with Client() as client:
        say_state(client.jobs.pause(job_id), as_json=as_json)


@app.command(rich_help_panel=JOBS)
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    with Client() as client:
        say_state(client.jobs.resume(job_id), as_json=as_json)


@app.command(rich_help_panel=JOBS)
def change(job_id: JobId, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Change when and where a job runs, or what it is called: --set max_seconds=3600, --set name=try."""
    if not assignments:
        raise ConfigurationError("Nothing to change; give --set KEY=VALUE.")
    with Client() as client:
        job = client.jobs.update(job_id, **assigned(client, job_id, assignments))
    if as_json:
        print_json(job)
    else:
        say(f"{job_id} is changed")


@app.command(rich_help_panel=JOBS)
def priority(
    job_id: JobId,
    value: Annotated[int, typer.Argument(metavar="PRIORITY", help="Higher runs first; the default is 0.")],
    as_json: AsJson = False,
) -> None:
    """Change a job's priority."""
    with Client() as client:
        say_state(client.jobs.update(job_id, priority=value), as_json=as_json)


@app.command(rich_help_panel=JOBS)
def move(
    job_id: JobId,
    first: Annotated[bool, typer.Option("--first", help="Before all others of its priority.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Behind all others of its priority.")] = False,
    before: Annotated[str | None, typer.Option(metavar="ID", help="Before this job.")] = None,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Behind this job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put a queued job elsewhere among those of its priority."""
    if sum((first, last, before is not None, after is not None)) != 1:
        raise ConfigurationError("Give one of --first, --last, --before ID and --after ID.")
    position: Literal["first", "last"] | None = "first" if first else "last" if last else None
    with Client() as client:
        say_state(client.jobs.move(job_id, position=position, before=before, after=after), as_json=as_json)


@app.command(rich_help_panel=JOBS)
def delete(
    job_id: JobId,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Leave its folder where it is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a job that is over, paused or queued, with all it made."""
    with Client() as client:
        client.jobs.delete(job_id, keep_files=keep_files)
    say_deleted(job_id, "deleted", as_json=as_json)


def _metadata(assignments: list[str]) -> dict[str, str]:
    """The pairs of `--metadata`."""
    wanted = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--metadata {assignment!r} is not name=value, such as team=q.")
        wanted[name] = value
    return wanted
