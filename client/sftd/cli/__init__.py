"""The `sftd` command: a box on this machine, and jobs on any. Each module holds the commands of one subject.

Exit codes: 0 done; 1 the job failed or was cancelled; 2 a mistake in the call or a refusal; 3 no answer. `wait` and `plan`
have their own, told there and in docs/cli.md. Results go to stdout, everything else to stderr.
"""

# The commands stand in the order in which --help lists them:
# isort: skip_file

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from sftd.cli import box, data, submit, plan, jobs, wait, records, workers, keys, login  # noqa: F401
from sftd.cli.app import app, exit_code, reason
from sftd.errors import SftdError
from sftd.output import printable_lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a failure is one clear line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not end a command
    try:
        app(args=None if argv is None else list(argv))
    except SftdError as error:
        _fail(reason(error), exit_code(error))
    except ValidationError as error:  # a value that no server would take
        mistakes = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        _fail("\n".join(mistakes), 2)
    except OSError as error:  # a folder that cannot be written, a full disk
        _fail(str(error), 2)


def _fail(text: str, code: int) -> None:
    print(f"sftd: {printable_lines(text)}", file=sys.stderr)
    sys.exit(code)
