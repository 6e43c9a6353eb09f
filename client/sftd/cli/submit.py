"""Commands that post a job: `sftd submit`, `sftd retry`, `sftd clone`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sftd.cli.app import JOBS, AsJson, Assignments, Follow, JobId, app, watch_job
from sftd.cli.data import upload_file
from sftd.client import Client
from sftd.errors import ConfigurationError, JobFailed
from sftd.output import print_json, say
from sftd.schemas import Job
from sftd.specfile import Spec, read_spec, set_field, upload_files

SpecFile = Annotated[
    Path, typer.Argument(metavar="SPEC.yaml", help="The job spec; docs/job-spec.md lists the fields.")
]


@app.command(rich_help_panel=JOBS)
def submit(
    spec: SpecFile, assignments: Assignments = None, follow: Follow = False, as_json: AsJson = False
) -> None:
    """Post a job and print its id. Data files that lie here are uploaded first."""
    fields = spec_fields(spec, assignments)
    with Client() as client:
        upload_data(client, fields, folder=spec.parent)
        _posted(client, client.jobs.create(spec=fields), follow=follow, as_json=as_json)


@app.command(rich_help_panel=JOBS)
def retry(
    job_id: JobId,
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin anew, not from a checkpoint.")] = False,
    step: Annotated[int | None, typer.Option(min=0, help="Go on from the checkpoint of this step.")] = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Try a job that is over again, as a new job, and print its id."""
    if scratch and step is not None:
        raise ConfigurationError("--scratch stands beside --step; give one of the two.")
    with Client() as client:
        job = client.jobs.retry(job_id, start="scratch" if scratch else "checkpoint", step=step)
        _posted(client, job, follow=follow, as_json=as_json)


@app.command(rich_help_panel=JOBS)
def clone(
    job_id: JobId, assignments: Assignments = None, follow: Follow = False, as_json: AsJson = False
) -> None:
    """Post a job with the same spec but for what --set changes, and print its id."""
    with Client() as client:
        fields = assigned(client, job_id, assignments)
        _posted(client, client.jobs.clone(job_id, **fields), follow=follow, as_json=as_json)


def spec_fields(spec: Path, assignments: list[str] | None) -> Spec:
    """A spec file as `--set` changes it."""
    fields = read_spec(spec)
    for assignment in assignments or []:
        set_field(fields, assignment)
    return fields


def upload_data(client: Client, fields: Spec, *, folder: Path) -> None:
    """Upload the data files that lie here, and put their ids into the spec."""
    upload_files(fields, folder=folder, upload=lambda path: upload_file(client, path).id)


def assigned(client: Client, job_id: str, assignments: list[str] | None) -> dict[str, Any]:
    """The top-level fields that --set changes, whole: `lora.rank=8` changes the job's own lora."""
    spec = client.jobs.retrieve(job_id).spec.model_dump(mode="json", exclude_none=True)
    names: dict[str, None] = {}
    for assignment in assignments or []:
        set_field(spec, assignment)
        names[assignment.partition("=")[0].split(".")[0].strip()] = None
    return {name: spec.get(name) for name in names}


def _posted(client: Client, job: Job, *, follow: bool, as_json: bool) -> None:
    """A new job: its id, what stands in its way, and then its log where that is asked for."""
    if not as_json:
        print(job.id, flush=True)
    elif not follow:
        print_json(job)
    if job.why_waiting and "no registered worker" in job.why_waiting:
        say(f"{job.id}: {job.why_waiting}")
    if not follow:
        return
    try:
        done = watch_job(client, job.id, logs=True, as_json=as_json)
    except JobFailed as error:
        if as_json:
            print_json(error.job)
        raise
    if as_json:
        print_json(done)
