"""What `sftd wait` does: the baseline, the job, its gates, its reports."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from sftd._transport import backoff_seconds
from sftd.cli.app import leaving, reason, require_number
from sftd.client import Client
from sftd.errors import ConfigurationError, JobFailed, SftdError, WaitTimeout, may_pass
from sftd.figures import JobFigures
from sftd.gates import KNOWN, MAX_GATES, Gate, GateResult, check_gate, parse_gate
from sftd.output import print_json, printable, printable_lines, say
from sftd.schemas import Job, JobState
from sftd.verdict import Outcome, Verdict, junit, markdown
from sftd.watch import watch

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What was asked for, as it was written."""

    job_id: str
    timeout_seconds: float | None
    gates: tuple[str, ...]
    baseline: str | None
    junit_file: str | None
    summary_file: str | None


def carry_out(asked: Asked, *, as_json: bool) -> tuple[Outcome, bool]:
    """Wait, print what came of it and write the reports; tells how it came out, and whether they were written."""
    require_number("--timeout", asked.timeout_seconds)
    gates = _gates(asked.gates)
    baseline_id = _baseline_id(asked.baseline, gates)
    reports = _Reports(asked.junit_file, asked.summary_file)
    with Client() as client, leaving(asked.job_id):
        verdict = _Waiting(client, asked, gates, baseline_id, as_json=as_json).verdict()
    _print(verdict, as_json=as_json)
    return verdict.outcome, reports.write(verdict)


class _Waiting:
    """One wait: the baseline, then the job, then its gates, all within one limit of time."""

    def __init__(
        self, client: Client, asked: Asked, gates: Sequence[Gate], baseline_id: str | None, *, as_json: bool
    ) -> None:
        self._client = client
        self._job_id = asked.job_id
        self._gates = gates
        self._baseline_id = baseline_id
        self._timeout_seconds = asked.timeout_seconds
        self._deadline = None if asked.timeout_seconds is None else time.monotonic() + asked.timeout_seconds
        self._console = Console(stderr=as_json)  # stdout is left to the result
        self._answered = False

    def verdict(self) -> Verdict:
        job: Job | None = None
        try:
            baseline = self._baseline()
            job = self._watched()
            results = self._checked(job, baseline)
        except JobFailed as error:
            cancelled = error.job.state is JobState.CANCELLED
            return self._unchecked(error.job, Outcome.CANCELLED if cancelled else Outcome.FAILED, str(error))
        except WaitTimeout as error:
            return self._unchecked(job or error.job, Outcome.TIMEOUT, str(error))
        num_missed = sum(not result.met for result in results)
        if num_missed:
            said = f"{job.id} succeeded, and {num_missed} of {len(results)} gates are not met."
            return self._ended(job, Outcome.NOT_MET, said, results)
        met = f", and {len(results)} of {len(results)} gates are met" if results else ""
        return self._ended(job, Outcome.MET, f"{job.id} succeeded{met}.", results)

    def _baseline(self) -> Job | None:
        """The baseline job: looked up first, so that a wrong id shows before hours of waiting."""
        if self._baseline_id is None:
            return None
        wanted = self._baseline_id
        job = self._patiently(lambda: self._client.jobs.retrieve(wanted))
        if job.state is not JobState.SUCCEEDED:
            say(f"the baseline {job.id} is {job.state}: its figures are taken as they are")
        return job

    def _watched(self) -> Job:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return watch(self._client, self._job_id, console=self._console, logs=False, timeout_seconds=left)

    def _checked(self, job: Job, baseline: Job | None) -> list[GateResult]:
        self._answered = True  # without a limit a server that is away from here on is waited for as well
        own = JobFigures(self._client, job, self._patiently)
        # As it is now: it may have gone on meanwhile.
        other = None
        if baseline is not None:
            other_id = baseline.id
            baseline = self._patiently(lambda: self._client.jobs.retrieve(other_id))
            other = JobFigures(self._client, baseline, self._patiently)
        return [check_gate(gate, own, other) for gate in self._gates]

    def _patiently(self, call: Callable[[], T]) -> T:
        """A call that is tried again while the server is away, within the limit."""
        num_failures = 0
        while True:
            try:
                return call()
            except SftdError as error:
                if not may_pass(error) or (self._deadline is None and not self._answered):
                    raise
                if not num_failures:
                    say(f"{reason(error)} Waiting for it.")
            pause = 1 + backoff_seconds(num_failures, first=0.5, most=10.0)
            left = pause if self._deadline is None else self._deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"The server does not answer; {self._timeout_seconds:g} s are over.")
            time.sleep(min(pause, left))
            num_failures += 1

    def _unchecked(self, job: Job | None, outcome: Outcome, message: str) -> Verdict:
        return Verdict(
            self._job_id, job, self._client.url, outcome, message, [], [gate.text for gate in self._gates]
        )

    def _ended(self, job: Job, outcome: Outcome, message: str, results: list[GateResult]) -> Verdict:
        return Verdict(job.id, job, self._client.url, outcome, message, results, [])


class _Reports:
    """The files to write. That they can be written is seen before the waiting, not after hours of it."""

    def __init__(self, junit_file: str | None, summary_file: str | None) -> None:
        # Outside of its CI a variable such as $GITHUB_STEP_SUMMARY is empty: no report then.
        self._junit = Path(junit_file) if junit_file else None
        self._summary = Path(summary_file) if summary_file else None
        for option, path in (("--junit", self._junit), ("--summary", self._summary)):
            if path is not None:
                _require_writable(option, path)

    def write(self, verdict: Verdict) -> bool:
        """Write them; tells whether that worked. Whether the job is good is told all the same."""
        try:
            if self._junit is not None:
                self._junit.write_text(junit(verdict), encoding="utf-8")
            if self._summary is not None:
                with self._summary.open("a", encoding="utf-8") as file:
                    file.write(markdown(verdict))
        except OSError as error:
            say(f"sftd: the report cannot be written: {error}")
            return False
        return True


def _require_writable(option: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigurationError(f"{option} {path} is a folder; name a file.")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigurationError(f"{option} {path}: there is no folder {folder}; make it first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(f"{option} {path} cannot be written: no permission.")


def _gates(texts: Sequence[str]) -> list[Gate]:
    """The gates, read before any waiting; a name that no job reports today is remarked on."""
    if len(texts) > MAX_GATES:
        raise ConfigurationError(f"{len(texts)} gates are too many; the most is {MAX_GATES}.")
    gates = [parse_gate(text) for text in texts]
    for gate in gates:
        for metric in gate.metrics:
            if metric.name not in KNOWN and "@" not in metric.name:
                known = ", ".join(sorted(KNOWN))
                say(
                    f"{gate.text}: {metric.name} is none of {known}; the gate is not met unless the job reports it"
                )
    return gates


def _baseline_id(text: str | None, gates: Sequence[Gate]) -> str | None:
    needed = [gate.text for gate in gates if any(metric.baseline for metric in gate.metrics)]
    if text is None:
        if needed:
            raise ConfigurationError(f"The gate {needed[0]!r} needs --baseline job:ID.")
        return None
    job_id = text.removeprefix("job:")
    if not job_id or any(char in job_id for char in "@/: "):
        raise ConfigurationError(f"--baseline {text!r} is no job; write it as job:ID.")
    return job_id


def _print(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "job_id": verdict.job_id,
                "outcome": verdict.outcome,
                "exit_code": verdict.outcome.code,
                "message": verdict.message,
                "gates": [asdict(gate) for gate in verdict.gates],
                "unchecked_gates": list(verdict.unchecked),
                "job": verdict.job,
            }
        )
        return
    for gate in verdict.gates:
        print(printable(f"{'met    ' if gate.met else 'NOT MET'}  {gate.gate}: {gate.message}"))
    if verdict.outcome is not Outcome.MET:
        print(f"sftd: {printable_lines(verdict.message)}", file=sys.stderr)
