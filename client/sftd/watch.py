"""`sftd wait` and `--follow`: a job's log as it comes, and how far it is, on a terminal or as plain lines."""

import threading
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from sftd.client import Client
from sftd.errors import JobFailed, SftdError
from sftd.output import facts, printable
from sftd.schemas import Job

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
LOG_END_SECONDS = 5.0  # how long the rest of the log may take after the job is over


class Display(Protocol):
    """Where a watched job is shown."""

    def show_line(self, text: str) -> None: ...
    def show_job(self, job: Job) -> None: ...


def watch(
    client: Client, job_id: str, *, console: Console, logs: bool, timeout_seconds: float | None = None
) -> Job:
    """Show a job until it is over; return it, or raise JobFailed."""
    if not console.is_terminal:
        return _watch(client, job_id, PlainLines(console), logs=logs, timeout_seconds=timeout_seconds)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        return _watch(client, job_id, Bar(progress), logs=logs, timeout_seconds=timeout_seconds)


class Bar:
    """A progress bar; log lines go above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("", total=None, facts="")

    def show_line(self, text: str) -> None:
        self._progress.console.print(Text(printable(text)))

    def show_job(self, job: Job) -> None:
        where = f" ({job.queue_position} in line)" if job.queue_position else ""
        known = job.total_steps or None
        self._progress.update(
            self._task,
            description=printable(f"{job.id} {job.state}{where}"),
            total=known,
            completed=job.step,
            facts=facts(job) if job.attempt else "",
        )


class PlainLines:
    """One line for each change of state, and one now and then for progress."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state: str | None = None
        self._step = -1
        self._shown_at = 0.0

    def show_line(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def show_job(self, job: Job) -> None:
        if job.state != self._state:
            self.show_line(f"{job.id} is {job.state}")
        elif job.step == self._step or time.monotonic() - self._shown_at < PLAIN_SECONDS:
            return
        else:
            self.show_line(f"{job.id} {facts(job)}")
        self._state, self._step, self._shown_at = job.state, job.step, time.monotonic()


def _watch(
    client: Client, job_id: str, display: Display, *, logs: bool, timeout_seconds: float | None
) -> Job:
    log = _LogThread(client, job_id, display) if logs else None
    if log is not None:
        log.start()
    away = _Away(display)
    try:
        job = client.jobs.wait(
            job_id, on_progress=away.show_job, on_trouble=away.show_trouble, timeout_seconds=timeout_seconds
        )
    except JobFailed:
        if log is not None:
            log.finish()
        raise
    if log is not None:
        log.finish()
    return job


class _Away:
    """Shows the job, and that the server is away: once, not at each try."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._is_away = False

    def show_job(self, job: Job) -> None:
        if self._is_away:
            self._display.show_line("(the server is there again)")
        self._is_away = False
        self._display.show_job(job)

    def show_trouble(self, error: SftdError) -> None:
        if not self._is_away:
            self._display.show_line(f"({error} Waiting for it.)")
        self._is_away = True


class _LogThread(threading.Thread):
    """Shows the log while the main thread watches the state. It ends with the job, or with the process."""

    def __init__(self, client: Client, job_id: str, display: Display) -> None:
        super().__init__(name="log", daemon=True)
        self._client, self._job_id, self._display = client, job_id, display

    def run(self) -> None:
        try:
            for line in self._client.jobs.follow(self._job_id):
                self._display.show_line(line.text)
        except SftdError as error:
            self._display.show_line(f"(the log cannot be followed any more: {error})")

    def finish(self) -> None:
        """The job is over: its last lines may still be on their way."""
        self.join(LOG_END_SECONDS)
