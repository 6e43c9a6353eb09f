"""The `sftd` command: a box on this machine, and jobs on any.

Exit codes: 0 done; 1 the job failed or was cancelled; 2 a mistake in the call or a refusal; 3 no answer.
Results go to stdout, everything else to stderr.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sftd import __version__, up
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
from sftd.output import (
    duration,
    facts,
    number,
    pairs,
    print_csv,
    print_json,
    print_table,
    printable,
    printable_lines,
    say,
    size,
    steps,
    when,
)
from sftd.rows import RowsInvalid, check_file
from sftd.schemas import Collected, Event, Job, Storage, Worker
from sftd.specfile import read_spec, set_field, upload_files
from sftd.watch import watch

app = typer.Typer(
    help="sftd: fine-tuning on your own GPU box.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="Access keys (administrators only).", no_args_is_help=True)
app.add_typer(keys, name="keys")

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
WorkerId = Annotated[str, typer.Argument(metavar="ID", help="Name of the worker.")]
Step = Annotated[int, typer.Argument(min=0, help="Step of the checkpoint.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")]

METRIC_COLUMNS = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a failure is one clear line and an exit code."""
    try:
        app(args=None if argv is None else list(argv))
    except SftdError as error:
        print(f"sftd: {printable_lines(str(error))}", file=sys.stderr)
        sys.exit(exit_code(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"sftd: {printable_lines(str(error))}", file=sys.stderr)
        sys.exit(2)


def exit_code(error: SftdError) -> int:
    """What a command ends with after an error."""
    if isinstance(error, JobFailed | WaitTimeout):
        return 1
    return 3 if isinstance(error, ConnectionFailed | ServerError | Throttled) else 2


# ---------------------------------------------------------------- the box


@app.command("up")
def start_box(
    data: Annotated[Path, typer.Option(help="Data folder: jobs, files, keys, database.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    models: Annotated[
        Path | None, typer.Option(help="Folder with base models. Default: DATA/models.")
    ] = None,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Also start a worker here.")] = True,
) -> None:
    """Start a server and a worker on this machine; Ctrl-C stops both, saving the running job."""
    box = up.Box(
        data=data.expanduser().absolute(),
        host=host,
        port=port,
        models=models.expanduser().absolute() if models else None,
        worker=worker,
    )
    raise typer.Exit(up.run(box, say=lambda text: print(text, flush=True)))


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def admin(context: typer.Context) -> None:
    """Move (migrate-db), backup, restore or check the installation on this machine; `sftd admin --help` tells more."""
    up.require_extras(worker=False)  # the commands are the server's own, in a process of theirs
    command = [sys.executable, "-m", "sftd_server.admin", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


# ---------------------------------------------------------------- data and jobs


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Data file, JSONL or a JSON array.")]) -> None:
    """Check a data file on this machine, as the server will at upload."""
    try:
        summary = check_file(file, name=file.name)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}.") from error
    except RowsInvalid as error:
        print(printable_lines(str(error)), file=sys.stderr)
        raise typer.Exit(2) from error
    print(f"{file}: {summary.num_rows:,} rows, format {summary.format}, no mistakes")


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="Data file, JSONL or a JSON array.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
) -> None:
    """Upload a data file and print its id."""
    with Client() as client:
        print(_upload(client, file, purpose=purpose))


@app.command()
def submit(
    spec: Annotated[
        Path, typer.Argument(metavar="SPEC.yaml", help="The job spec; docs/job-spec.md lists the fields.")
    ],
    assignments: Assignments = None,
    follow: Follow = False,
) -> None:
    """Post a job and print its id. Data files that lie here are uploaded first."""
    fields = read_spec(spec)
    for assignment in assignments or []:
        set_field(fields, assignment)
    with Client() as client:
        upload_files(fields, folder=spec.parent, upload=lambda path: _upload(client, path))
        _posted(client, client.jobs.create(spec=fields), follow=follow)


@app.command("ls")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        jobs = list(client.jobs.list(state=state, limit=limit))
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
            when(job.created_at),
        )
        for job in jobs
    ]
    print_table(("ID", "NAME", "STATE", "STEP", "LOSS", "BASE MODEL", "CREATED"), rows)


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with Client() as client:
        job = client.jobs.retrieve(job_id)
    if as_json:
        print_json(job)
        return
    lines = {
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
        "metadata": ", ".join(f"{name}={value}" for name, value in job.metadata.items()) or None,
        "failure": job.failure and f"{job.failure.reason}: {job.failure.message}",
        "remedy": job.failure and job.failure.remedy,
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name:<12}{printable_lines(str(value))}")
    if job.failure and job.failure.log_tail:
        print("last lines of the log:")
        for line in job.failure.log_tail:
            print(f"  {printable(line)}")


@app.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Give up after so many seconds.")] = None,
) -> None:
    """Wait until a job is over, showing how far it is."""
    with Client() as client:
        _watch(client, job_id, logs=False, timeout_seconds=timeout)


@app.command()
def cancel(job_id: JobId) -> None:
    """End a job for good."""
    with Client() as client:
        _say_state(client.jobs.cancel(job_id))


@app.command()
def pause(job_id: JobId) -> None:
    """Save a checkpoint, then stop and free the device."""
    with Client() as client:
        _say_state(client.jobs.pause(job_id))


@app.command()
def resume(job_id: JobId) -> None:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    with Client() as client:
        _say_state(client.jobs.resume(job_id))


@app.command()
def retry(
    job_id: JobId,
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin anew, not from a checkpoint.")] = False,
    step: Annotated[int | None, typer.Option(min=0, help="Go on from the checkpoint of this step.")] = None,
    follow: Follow = False,
) -> None:
    """Try a job that is over again, as a new job, and print its id."""
    if scratch and step is not None:
        raise ConfigurationError("--scratch stands beside --step; give one of the two.")
    with Client() as client:
        job = client.jobs.retry(job_id, start="scratch" if scratch else "checkpoint", step=step)
        _posted(client, job, follow=follow)


@app.command()
def clone(job_id: JobId, assignments: Assignments = None, follow: Follow = False) -> None:
    """Post a job with the same spec but for what --set changes, and print its id."""
    with Client() as client:
        fields = _assigned(client, job_id, assignments)
        _posted(client, client.jobs.clone(job_id, **fields), follow=follow)


@app.command()
def change(job_id: JobId, assignments: Assignments = None) -> None:
    """Change when and where a job runs, or what it is called: --set max_seconds=3600, --set name=try."""
    if not assignments:
        raise ConfigurationError("Nothing to change; give --set KEY=VALUE.")
    with Client() as client:
        client.jobs.update(job_id, **_assigned(client, job_id, assignments))
    say(f"{job_id} is changed")


@app.command()
def priority(
    job_id: JobId,
    value: Annotated[int, typer.Argument(metavar="PRIORITY", help="Higher runs first; the default is 0.")],
) -> None:
    """Change a job's priority."""
    with Client() as client:
        _say_state(client.jobs.update(job_id, priority=value))


@app.command()
def move(
    job_id: JobId,
    first: Annotated[bool, typer.Option("--first", help="Before all others of its priority.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Behind all others of its priority.")] = False,
    before: Annotated[str | None, typer.Option(metavar="ID", help="Before this job.")] = None,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Behind this job.")] = None,
) -> None:
    """Put a queued job elsewhere among those of its priority."""
    if sum((first, last, before is not None, after is not None)) != 1:
        raise ConfigurationError("Give one of --first, --last, --before ID and --after ID.")
    position: Literal["first", "last"] | None = "first" if first else "last" if last else None
    with Client() as client:
        _say_state(client.jobs.move(job_id, position=position, before=before, after=after))


@app.command()
def delete(
    job_id: JobId,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Leave its folder where it is.")] = False,
) -> None:
    """Delete a job that is over, paused or queued, with all it made."""
    with Client() as client:
        client.jobs.delete(job_id, keep_files=keep_files)
    say(f"{job_id} is deleted")


# ---------------------------------------------------------------- what a job tells


@app.command()
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


@app.command()
def logs(
    job_id: JobId,
    follow: Follow = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only of this attempt.")] = None,
) -> None:
    """Print a job's log."""
    if follow and attempt is not None:
        raise ConfigurationError("--follow stands beside --attempt; give one of the two.")
    with Client() as client, _leaving(job_id):
        lines = client.jobs.follow(job_id) if follow else client.jobs.logs(job_id, attempt=attempt)
        for line in lines:
            print(printable(line.text), flush=follow)


@app.command()
def events(job_id: JobId, follow: Follow = False) -> None:
    """Print what happened to a job."""
    with Client() as client, _leaving(job_id):
        for event in client.jobs.follow(job_id, stream="events") if follow else client.jobs.events(job_id):
            print(_event_line(event), flush=follow)


@app.command()
def metrics(
    job_id: JobId, as_csv: Annotated[bool, typer.Option("--csv", help="Every metric, as CSV.")] = False
) -> None:
    """Print a job's metrics, step by step."""
    with Client() as client:
        points = list(client.jobs.metrics(job_id))
    if as_csv:
        print_csv(points)
        return
    values = [point.model_dump() for point in points]
    names = [name for name in METRIC_COLUMNS if any(name in row for row in values)] or ["step"]
    print_table(
        [name.upper() for name in names], [[number(row.get(name)) for name in names] for row in values]
    )


@app.command()
def get(
    job_id: JobId,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: the job's id.")
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Fetch the checkpoint of this step instead.")] = None,
) -> None:
    """Fetch what a job made."""
    folder = out or Path(job_id)
    with Client() as client:
        if checkpoint is None:
            files = client.jobs.download(job_id, folder)
        else:
            files = client.jobs.download_checkpoint(job_id, folder, step=checkpoint)
    say(f"{len(files)} files in {folder}")


@app.command()
def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List a job's checkpoints."""
    with Client() as client:
        found = list(client.jobs.checkpoints(job_id))
    if as_json:
        print_json(found)
        return
    rows = [(str(c.step), str(c.attempt), f"{c.bytes:,}", when(c.created_at), c.pinned or "") for c in found]
    print_table(("STEP", "ATTEMPT", "BYTES", "SAVED", "PINNED AS"), rows)


@app.command()
def pin(
    job_id: JobId,
    step: Step,
    name: Annotated[str, typer.Argument(help="The name to keep it under.")],
) -> None:
    """Keep a checkpoint, whatever the server's rules for old ones."""
    with Client() as client:
        client.jobs.pin(job_id, step, name=name)
    say(f"the checkpoint of step {step} is kept as {name}")


@app.command()
def unpin(job_id: JobId, step: Step) -> None:
    """Let a checkpoint be removed like any other again."""
    with Client() as client:
        client.jobs.unpin(job_id, step)
    say(f"the checkpoint of step {step} is not pinned any more")


# ---------------------------------------------------------------- administration


@app.command()
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
            _worker_state(w),
            when(w.seen_at),
            ", ".join(w.job_ids),
            pairs(w.labels),
        )
        for w in found
    ]
    print_table(("ID", "DEVICE", "SLOTS", "STATE", "SEEN", "JOBS", "LABELS"), rows)


@app.command()
def drain(worker_id: WorkerId) -> None:
    """Let a worker take no new jobs and give back those it runs (administrators only)."""
    with Client() as client:
        held = [job_id for worker in client.workers.drain(worker_id) for job_id in worker.job_ids]
    say(f"{worker_id} drains" + (f"; it still holds {', '.join(held)}" if held else ""))


@app.command()
def undrain(worker_id: WorkerId) -> None:
    """Let a worker take jobs again (administrators only)."""
    with Client() as client:
        client.workers.undrain(worker_id)
    say(f"{worker_id} takes jobs again")


@app.command()
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


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    role: Annotated[str, typer.Option(help="user, admin or worker.")] = "user",
    expires_in_days: Annotated[float | None, typer.Option(min=0.01, help="How long it is good for.")] = None,
) -> None:
    """Make a key and print its secret, which is shown this once."""
    if role not in ("user", "admin", "worker"):
        raise ConfigurationError(f"--role {role}: it is user, admin or worker.")
    seconds = None if expires_in_days is None else round(expires_in_days * 86400)
    with Client() as client:
        key = client.keys.create(name=name, role=role, expires_in_seconds=seconds)  # type: ignore[arg-type]  # checked above
    print(key.secret)
    say(f"{key.id} for {key.name}, role {key.role}; keep the secret, it is not shown again.")


@keys.command("ls")
def list_keys() -> None:
    """List the keys, without their secrets."""
    with Client() as client:
        rows = [
            (
                key.id,
                key.name,
                key.role,
                when(key.created_at),
                when(key.expires_at) if key.expires_at else "never",
            )
            for key in client.keys.list()
        ]
    print_table(("ID", "NAME", "ROLE", "CREATED", "EXPIRES"), rows)


@keys.command("rm")
def remove_key(key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]) -> None:
    """Withdraw a key."""
    with Client() as client:
        client.keys.delete(key_id)
    say(f"{key_id} is withdrawn")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"sftd {__version__}")
        raise typer.Exit


# ---------------------------------------------------------------- between commands


@contextmanager
def _leaving(job_id: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{job_id} goes on; end it with: sftd cancel {job_id}")
        raise typer.Exit(130) from None


def _watch(client: Client, job_id: str, *, logs: bool, timeout_seconds: float | None = None) -> None:
    with _leaving(job_id):
        watch(client, job_id, console=Console(), logs=logs, timeout_seconds=timeout_seconds)


def _low(storage: Storage) -> str:
    kept = f"; {size(storage.reserve_bytes)} are kept in reserve"
    return kept + (": reports, uploads and new runs wait until there is space" if storage.low else "")


def _upload(client: Client, path: Path, *, purpose: str = "fine-tune") -> str:
    file = client.files.upload(path, purpose=purpose)
    rows = f", {file.num_rows:,} rows" if file.num_rows is not None else ""
    say(f"{path} uploaded as {file.id}{rows}")
    return file.id


def _assigned(client: Client, job_id: str, assignments: list[str] | None) -> dict[str, Any]:
    """The top-level fields that --set changes, whole: `lora.rank=8` changes the job's own lora."""
    spec = client.jobs.retrieve(job_id).spec.model_dump(mode="json", exclude_none=True)
    names: dict[str, None] = {}
    for assignment in assignments or []:
        set_field(spec, assignment)
        names[assignment.partition("=")[0].split(".")[0].strip()] = None
    return {name: spec.get(name) for name in names}


def _posted(client: Client, job: Job, *, follow: bool) -> None:
    """A new job: its id, what stands in its way, and then its log where that is asked for."""
    print(job.id, flush=True)
    if job.why_waiting and "no registered worker" in job.why_waiting:
        say(f"{job.id}: {job.why_waiting}")
    if follow:
        _watch(client, job.id, logs=True)


def _worker_state(worker: Worker) -> str:
    if not worker.alive:
        return "silent"
    return "draining" if worker.draining else "there"


def _say_state(job: Job) -> None:
    asked = {"cancel": "to be cancelled", "pause": "to be paused"}.get(str(job.want))
    waiting = f", {asked}" if asked and job.state.leased else ""
    print(f"{job.id} is {job.state}{waiting}")


def _event_line(event: Event) -> str:
    return printable(f"{when(event.created_at)}  {event.type:<18}  {event.message}")


if __name__ == "__main__":
    main()
