"""Checks the rows of a data file in a process of its own: `python -m sftd_server.files.rowcheck FILE MARKS`.

Prints one JSON line, a `Verdict`. Beside it, where MARKS names a file, the places that a reader may begin at are left
there for `rows`; a disk without room for them is no fault of the data. Imports nothing but the reader: it starts often.
"""

import json
import os
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sftd.rows import Mark, RowProblem, RowsInvalid, check_file

MAX_LINE = 600  # characters of a problem: it may quote what stands in the file


@dataclass(frozen=True)
class Verdict:
    """What a check found: a format and a number of rows, or what is wrong, a line each."""

    format: str | None
    num_rows: int | None
    problems: str | None

    def problems_of(self, name: str) -> str:
        """What is wrong, each line with the file's name before it."""
        return "\n".join(f"{name}: {line}" for line in (self.problems or "").split("\n"))


def verdict_on(path: Path, marks: list[Mark] | None = None) -> Verdict:
    """Read the whole file."""
    try:
        summary = check_file(path, name="", marks=marks)
    except RowsInvalid as error:
        return Verdict(None, None, _told(error.problems, error.num_problems))
    return Verdict(summary.format, summary.num_rows, None)


def write_marks(path: Path, marks: Iterable[Mark]) -> None:
    """Keep marks: pairs of 64-bit numbers, under a temporary name until they are whole."""
    numbers = array("Q", (number for mark in marks for number in (mark.line, mark.offset)))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(numbers.tobytes())
            file.flush()
            os.fsync(file.fileno())  # an empty file after a power cut would say that there are no rows
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _told(problems: list[RowProblem], num_problems: int) -> str:
    """Of bounded length, each on one line, without NUL, which not every database takes."""
    lines = [_plain(str(problem)) for problem in problems]
    if num_problems > len(lines):
        lines.append(f"and {num_problems - len(lines)} more")
    return "\n".join(lines)


def _plain(text: str) -> str:
    clean = " ".join(text.replace("\x00", "\ufffd").splitlines())
    return clean if len(clean) <= MAX_LINE else clean[:MAX_LINE] + " …"


def main() -> None:
    """Check one file."""
    os.nice(5)  # requests go first
    marks: list[Mark] | None = [] if len(sys.argv) > 2 else None
    verdict = verdict_on(Path(sys.argv[1]), marks)
    if marks is not None:
        write_marks(Path(sys.argv[2]), marks)
    print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
