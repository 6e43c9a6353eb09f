"""Commands for what is on record of a job: `sftd logs`, `events`, `metrics`, `attempts`, `checkpoints`, `pin`, `unpin`, `get`."""

from pathlib import Path
from typing import Annotated

import typer

from sftd.cli.app import RECORDS, AsJson, Follow, JobId, app, leaving
from sftd.client import Client
from sftd.errors import ConfigurationError
from sftd.output import (
    duration,
    number,
    print_csv,
    print_json,
    print_json_line,
    print_table,
    printable,
    say,
    when,
)
from sftd.schemas import Checkpoint, Event, MetricPoint

METRIC_COLUMNS = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")
PLOTTED = ("loss", "eval_loss")
PLOT_POINTS = 1000  # more than a terminal has columns of dots

Step = Annotated[int, typer.Argument(min=0, help="Step of the checkpoint.")]


@app.command(rich_help_panel=RECORDS)
def attempts(job_id: JobId, as_json: AsJson = False) -> None:
    """List how often a worker has taken a job, and how each attempt ended."""
    with Client() as client:
        found = list(client.jobs.attempts(job_id))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            str(attempt.attempt),
            attempt.worker_id,
            when(attempt.claimed_at),
            when(attempt.ended_at) if attempt.ended_at else "",
            duration(attempt.gpu_seconds),
            " ".join(word for word in (attempt.outcome or "goes on", attempt.reason) if word),
            attempt.message or "",
        )
        for attempt in found
    ]
    print_table(("ATTEMPT", "WORKER", "CLAIMED", "ENDED", "GPU TIME", "OUTCOME", "MESSAGE"), rows)


@app.command(rich_help_panel=RECORDS)
def logs(
    job_id: JobId,
    follow: Follow = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only of this attempt.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's log; with --json one object a line."""
    if follow and attempt is not None:
        raise ConfigurationError("--follow stands beside --attempt; give one of the two.")
    with Client() as client, leaving(job_id):
        lines = client.jobs.follow(job_id) if follow else client.jobs.logs(job_id, attempt=attempt)
        for line in lines:
            if as_json:
                print_json_line(line, flush=follow)
            else:
                print(printable(line.text), flush=follow)


@app.command(rich_help_panel=RECORDS)
def events(job_id: JobId, follow: Follow = False, as_json: AsJson = False) -> None:
    """Print what happened to a job; with --json one object a line."""
    with Client() as client, leaving(job_id):
        for event in client.jobs.follow(job_id, stream="events") if follow else client.jobs.events(job_id):
            if as_json:
                print_json_line(event, flush=follow)
            else:
                print(_event_line(event), flush=follow)


@app.command(rich_help_panel=RECORDS)
def metrics(
    job_id: JobId,
    names: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Only these. Default of --plot: loss,eval_loss.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw them over the steps.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Every metric, as CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a job's metrics, step by step."""
    if plot + as_csv + as_json > 1:
        raise ConfigurationError("Give one of --plot, --csv and --json.")
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if plot:
        _plot(job_id, wanted or list(PLOTTED))
        return
    with Client() as client:
        points = list(client.jobs.metrics(job_id, names=wanted or None))
    if as_json:
        print_json(points)
    elif as_csv:
        print_csv(points)
    else:
        _print_points(points, wanted)


@app.command(rich_help_panel=RECORDS)
def get(
    job_id: JobId,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: the job's id.")
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Fetch the checkpoint of this step instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch what a job made."""
    folder = out or Path(job_id)
    with Client() as client:
        if checkpoint is None:
            files = client.jobs.download(job_id, folder)
        else:
            files = client.jobs.download_checkpoint(job_id, folder, step=checkpoint)
    if as_json:
        print_json({"folder": str(folder), "files": [str(file.relative_to(folder)) for file in files]})
        return
    say(f"{len(files)} files in {folder}")


@app.command(rich_help_panel=RECORDS)
def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List a job's checkpoints."""
    with Client() as client:
        found = list(client.jobs.checkpoints(job_id))
    if as_json:
        print_json(found)
        return
    rows = [(str(c.step), str(c.attempt), f"{c.bytes:,}", when(c.created_at), c.pinned or "") for c in found]
    print_table(("STEP", "ATTEMPT", "BYTES", "SAVED", "PINNED AS"), rows)


@app.command(rich_help_panel=RECORDS)
def pin(
    job_id: JobId,
    step: Step,
    name: Annotated[str, typer.Argument(help="The name to keep it under.")],
    as_json: AsJson = False,
) -> None:
    """Keep a checkpoint, whatever the server's rules for old ones."""
    with Client() as client:
        checkpoint = client.jobs.pin(job_id, step, name=name)
    _say_checkpoint(checkpoint, f"is kept as {name}", as_json=as_json)


@app.command(rich_help_panel=RECORDS)
def unpin(job_id: JobId, step: Step, as_json: AsJson = False) -> None:
    """Let a checkpoint be removed like any other again."""
    with Client() as client:
        checkpoint = client.jobs.unpin(job_id, step)
    _say_checkpoint(checkpoint, "is not pinned any more", as_json=as_json)


def _say_checkpoint(checkpoint: Checkpoint, words: str, *, as_json: bool) -> None:
    if as_json:
        print_json(checkpoint)
    else:
        say(f"the checkpoint of step {checkpoint.step} {words}")


def _event_line(event: Event) -> str:
    return printable(f"{when(event.created_at)}  {event.type:<18}  {event.message}")


def _print_points(points: list[MetricPoint], wanted: list[str]) -> None:
    values = [point.model_dump() for point in points]
    columns = ["step", *wanted] if wanted else METRIC_COLUMNS
    names = [name for name in columns if any(name in row for row in values)] or ["step"]
    print_table(
        [name.upper() for name in names], [[number(row.get(name)) for name in names] for row in values]
    )


def _plot(job_id: str, names: list[str]) -> None:
    from sftd.cli.plot import print_plot  # only where it is asked for

    with Client() as client:
        points = [
            point.model_dump() for point in client.jobs.metrics(job_id, names=names, points=PLOT_POINTS)
        ]
    print_plot({name: [(point["step"], point[name]) for point in points if name in point] for name in names})
