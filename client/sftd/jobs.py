"""`client.jobs`: post a job, watch it, steer it, fetch what it made."""

import builtins
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.parse import quote

from sftd._transport import Param, Transport, backoff_seconds
from sftd.errors import JobFailed, NotFound, SftdError, WaitTimeout, may_pass
from sftd.files import unpack, write_file
from sftd.paging import pages
from sftd.schemas import (
    Attempt,
    Checkpoint,
    Evaluation,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    MoveRequest,
    PinRequest,
    RetryRequest,
)
from sftd.spec import JobSpec
from sftd.streams import follow

if TYPE_CHECKING:
    from sftd.plan import Plan

POLL_SECONDS = 1.0
PLAN_SECONDS = 60.0  # a plan may read a model's files; beside the time that is asked for


class Jobs:
    """Fine-tuning jobs."""

    def __init__(self, transport: Transport, *, pause: Callable[[float], object] = time.sleep) -> None:
        self._transport = transport
        self._pause = pause

    def create(self, *, spec: JobSpec | Mapping[str, Any] | None = None, **fields: Any) -> Job:
        """Post a job: `client.jobs.create(base_model="Qwen/Qwen2.5-7B-Instruct", training_file="file_…")`.

        Give the fields of a JobSpec, or a whole `spec`; fields then replace those of the spec. The server checks
        all of it and names every mistake at once.
        """
        return self._post("/jobs", _whole(spec, fields))

    def plan(
        self,
        *,
        spec: JobSpec | Mapping[str, Any] | None = None,
        wait_seconds: float | None = None,
        **fields: Any,
    ) -> "Plan":
        """What a job would come to, before it is posted: `client.jobs.plan(spec=fields).ok`.

        Give what `create` takes. Problems, rows, steps, memory, disk and time; nothing is queued. The rows of new data
        are counted by a worker: the server waits for that `wait_seconds` at most, then the plan is not `complete`.
        """
        from sftd.plan import Plan  # rarely needed, and its classes take a while to build

        return self._transport.request(
            "POST",
            "/jobs/plan",
            params={"wait": wait_seconds},
            body=_whole(spec, fields),
            timeout_seconds=PLAN_SECONDS + (wait_seconds or 0),
        ).parse(Plan)

    def retry(
        self,
        job_id: str,
        *,
        start: Literal["checkpoint", "scratch"] = "checkpoint",
        step: int | None = None,
    ) -> Job:
        """Try a job that is over again, as a new job: `client.jobs.retry("job_…").id`.

        It goes on from the newest checkpoint, or from that of `step`; `start="scratch"` begins anew.
        """
        body = RetryRequest(start=start, step=step).model_dump(by_alias=True)
        return self._post(f"{_path(job_id)}/retry", body)

    def clone(self, job_id: str, **fields: Any) -> Job:
        """Post a job with the same spec but for these fields: `client.jobs.clone("job_…", learning_rate=1e-4)`."""
        return self._post(f"{_path(job_id)}/clone", fields)

    def update(self, job_id: str, **fields: Any) -> Job:
        """Change when and where a job runs, or what it is called: `client.jobs.update("job_…", priority=5)`.

        `name`, `metadata`, `keep_checkpoints` at any time; `priority`, `requires` and the budgets until it is over;
        `after` while it is queued. None stands for a field's default.
        """
        return self._transport.request("PATCH", _path(job_id), body=fields).parse(Job)

    def move(
        self,
        job_id: str,
        *,
        position: Literal["first", "last"] | None = None,
        before: str | None = None,
        after: str | None = None,
    ) -> Job:
        """Put a queued job elsewhere among those of its priority: `client.jobs.move("job_…", position="first")`."""
        body = MoveRequest(position=position, before=before, after=after)
        return self._transport.request("POST", f"{_path(job_id)}/move", body=body).parse(Job)

    def delete(self, job_id: str, *, keep_files: bool = False) -> None:
        """Delete a job that is over, paused or queued, with its folder: `client.jobs.delete("job_…")`."""
        params = {"keep_files": "true"} if keep_files else None
        self._transport.request("DELETE", _path(job_id), params=params)

    def retrieve(self, job_id: str) -> Job:
        """One job as it stands: `client.jobs.retrieve("job_…").state`."""
        return self._transport.request("GET", _path(job_id)).parse(Job)

    def list(
        self,
        *,
        state: JobState | str | Sequence[JobState | str] | None = None,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Jobs, newest first; further pages are fetched as they are needed. `state` may be several."""
        states = [state] if isinstance(state, str) else state or []
        params: dict[str, Param] = {"state": [str(each) for each in states] or None, "owner": owner}
        params |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return pages(self._transport, "/jobs", Job, params=params, limit=limit, page_size=100)

    def cancel(self, job_id: str) -> Job:
        """End a job for good. Ends within seconds; what it has saved is kept."""
        return self._transport.request("POST", f"{_path(job_id)}/cancel").parse(Job)

    def pause(self, job_id: str) -> Job:
        """Save a checkpoint, then stop and free the device."""
        return self._transport.request("POST", f"{_path(job_id)}/pause").parse(Job)

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again; it goes on from its newest checkpoint."""
        return self._transport.request("POST", f"{_path(job_id)}/resume").parse(Job)

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], object] | None = None,
        on_trouble: Callable[[SftdError], object] | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Wait until a job has succeeded and return it; raise JobFailed if it failed or was cancelled.

        A server that goes away in between is waited for; with `timeout_seconds` also one that is away at first.
        `on_progress` is called with the job about once a second, `on_trouble` with what went wrong.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        seen: Job | None = None
        num_failures = 0
        while True:
            try:
                seen, num_failures = self.retrieve(job_id), 0
            except SftdError as error:
                # Without a limit a wrong address must show at once.
                if not may_pass(error) or (seen is None and deadline is None):
                    raise
                num_failures += 1
                if on_trouble:
                    on_trouble(error)
            else:
                if on_progress:
                    on_progress(seen)
                if seen.state.terminal:
                    return _succeeded(seen)
            wait = POLL_SECONDS + (backoff_seconds(num_failures, first=0.5, most=10.0) if num_failures else 0)
            left = wait if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise _still_going(job_id, seen, num_failures, timeout_seconds or 0)
            self._pause(min(wait, left))

    def metrics(
        self,
        job_id: str,
        *,
        names: builtins.list[str] | None = None,
        after: int | None = None,
        limit: int | None = None,
        points: int | None = None,
    ) -> Iterator[MetricPoint]:
        """Metrics in step order, one point a step: `[point.loss for point in client.jobs.metrics("job_…")]`.

        `points` thins them to about so many steps, evenly spaced; rare ones, such as evaluations, all stay.
        """
        params: dict[str, Param] = {"names": ",".join(names) if names else None, "points": points}
        return pages(
            self._transport, f"{_path(job_id)}/metrics", MetricPoint, params=params, after=after, limit=limit
        )

    def attempts(self, job_id: str) -> Iterator[Attempt]:
        """How often a worker has taken the job, and how each attempt ended."""
        return pages(self._transport, f"{_path(job_id)}/attempts", Attempt)

    def logs(
        self,
        job_id: str,
        *,
        after: int | None = None,
        limit: int | None = None,
        attempt: int | None = None,
    ) -> Iterator[LogLine]:
        """Lines of the job's log, or of one attempt's, oldest first."""
        params = {"attempt": attempt}
        return pages(
            self._transport, f"{_path(job_id)}/logs", LogLine, params=params, after=after, limit=limit
        )

    def events(
        self,
        job_id: str,
        *,
        after: int | None = None,
        limit: int | None = None,
        attempt: int | None = None,
    ) -> Iterator[Event]:
        """What happened to the job, or in one attempt, oldest first."""
        params = {"attempt": attempt}
        return pages(
            self._transport, f"{_path(job_id)}/events", Event, params=params, after=after, limit=limit
        )

    @overload
    def follow(
        self, job_id: str, *, stream: Literal["logs"] = "logs", after: int = 0
    ) -> Iterator[LogLine]: ...
    @overload
    def follow(self, job_id: str, *, stream: Literal["events"], after: int = 0) -> Iterator[Event]: ...
    def follow(
        self, job_id: str, *, stream: Literal["logs", "events"] = "logs", after: int = 0
    ) -> Iterator[LogLine] | Iterator[Event]:
        """Log lines (or events) as they come, until the job is over. Lost connections are taken up where they broke.

        `for line in client.jobs.follow("job_…"): print(line.text)`
        """
        job = self.retrieve(job_id)  # a wrong id or key shows at once
        path = f"{_path(job.id)}/{stream}"

        if stream == "logs":
            return follow(self._transport, path, LogLine, after=after, pause=self._pause)
        return follow(self._transport, path, Event, after=after, pause=self._pause)

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        """Checkpoints on record, with the files of each."""
        return pages(self._transport, f"{_path(job_id)}/checkpoints", Checkpoint)

    def pin(self, job_id: str, step: int, *, name: str) -> Checkpoint:
        """Keep a checkpoint under a name: `client.jobs.pin("job_…", 200, name="best")`."""
        path = f"{_path(job_id)}/checkpoints/{step}/pin"
        return self._transport.request("POST", path, body=PinRequest(name=name)).parse(Checkpoint)

    def unpin(self, job_id: str, step: int) -> Checkpoint:
        """Let a checkpoint be removed like any other again."""
        path = f"{_path(job_id)}/checkpoints/{step}/unpin"
        return self._transport.request("POST", path).parse(Checkpoint)

    def evaluations(self, job_id: str) -> Iterator[Evaluation]:
        """Evaluations, by step."""
        return pages(self._transport, f"{_path(job_id)}/evaluations", Evaluation)

    def download(self, job_id: str, folder: str | Path) -> builtins.list[Path]:
        """Fetch what a job made into `folder` and return the files: `client.jobs.download("job_…", "result")`."""
        with self._transport.stream(f"{_path(job_id)}/archive") as pieces:
            return unpack(pieces, _made(folder), top=job_id)

    def download_checkpoint(
        self, job_id: str, folder: str | Path, *, step: int | None = None
    ) -> builtins.list[Path]:
        """Fetch one checkpoint (the newest, unless `step` names another) file by file, each checked by its hash."""
        found = [c for c in self.checkpoints(job_id) if step is None or c.step == step]
        if not found:
            which = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise NotFound(f"{job_id} has no {which}.", status=404, code="not_found")
        checkpoint = max(found, key=lambda c: (c.step, c.attempt))
        written = []
        for name, file in checkpoint.files.items():
            with self._transport.stream(
                f"{_path(job_id)}/checkpoints/{checkpoint.step}/files/{name}"
            ) as pieces:
                written.append(write_file(_made(folder), name, pieces, sha256=file.sha256))
        return written

    def _post(self, path: str, body: Mapping[str, Any]) -> Job:
        # Made once per call and sent again with each retry, so that a lost answer makes no second job.
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return self._transport.request("POST", path, body=body, headers=headers).parse(Job)


def _whole(spec: JobSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a spec: an open one, since the server checks it."""
    if isinstance(spec, JobSpec):
        return {**spec.model_dump(mode="json", exclude_none=True), **fields}
    return {**(spec or {}), **fields}


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _succeeded(job: Job) -> Job:
    if job.state is JobState.SUCCEEDED:
        return job
    if job.failure is None:
        raise JobFailed(f"{job.id} was {job.state}.", job=job)
    raise JobFailed(
        f"{job.id} failed ({job.failure.reason}): {job.failure.message} {job.failure.remedy}", job=job
    )


def _still_going(job_id: str, job: Job | None, num_failures: int, seconds: float) -> WaitTimeout:
    state = f"{job_id} is still {job.state}" if job else f"{job_id} is not known to be over"
    silent = "; the server does not answer" if num_failures else ""
    return WaitTimeout(f"{state} after {round(seconds, 1):g} s{silent}.", job=job)


def _made(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
