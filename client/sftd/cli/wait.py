"""`sftd wait`: until a job is over, and whether it came out as it should. Made for CI.

Exit codes: 0 the job succeeded and every gate is met; 1 a gate is not; 2 the job failed; 3 it was cancelled; 4 the time is
over; 5 a mistake in the call or a refusal; 6 no answer from the server (without --timeout).
"""

import sys
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from sftd.cli.app import JOBS, AsJson, JobId, app, reason
from sftd.errors import SftdError, may_pass
from sftd.output import printable_lines

WRONG_CALL, NO_ANSWER = 5, 6
# The command-line library's own, wherever typer keeps it.
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


class _WaitCommand(TyperCommand):
    """A mistake in the call must not look like a job that failed, which is 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:  # as the library has it
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as error:
            error.exit_code = WRONG_CALL  # type: ignore[attr-defined]  # an attribute of every usage error
            raise


@app.command(rich_help_panel=JOBS, cls=_WaitCommand)
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Give up after so many seconds.")] = None,
    fail_unless: Annotated[
        list[str] | None,
        typer.Option(metavar="GATE", help="A condition, such as 'eval_loss < 1.9'; may be repeated."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="job:ID", help="The job that `baseline` in a gate stands for.")
    ] = None,
    junit_file: Annotated[
        str | None, typer.Option("--junit", metavar="FILE", help="Write a JUnit report.")
    ] = None,
    summary_file: Annotated[
        str | None, typer.Option("--summary", metavar="FILE", help="Append a summary in Markdown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job is over, showing how far it is; then check gates, and write reports for a CI.

    Exit code 0: it succeeded and all gates are met; 1: a gate is not met; 2: it failed; 3: it was cancelled; 4: the
    timeout is over; 5: a mistake in the call or a refusal; 6: no answer from the server.
    """
    from sftd.cli.waiting import Asked, carry_out  # gates and reports: only where they are asked for

    asked = Asked(job_id, timeout, tuple(fail_unless or ()), baseline, junit_file, summary_file)
    try:
        outcome, all_written = carry_out(asked, as_json=as_json)
    except SftdError as error:
        print(f"sftd: {printable_lines(reason(error))}", file=sys.stderr)
        raise typer.Exit(NO_ANSWER if may_pass(error) else WRONG_CALL) from error
    raise typer.Exit(outcome.code if all_written or outcome.code else WRONG_CALL)
