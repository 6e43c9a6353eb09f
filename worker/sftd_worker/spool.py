"""The spool: `logs/events.jsonl`, appended by the trainer, read here from a byte offset on. It is never written twice.

Only whole lines count. A line that a kill has torn is passed over once the trainer is gone; lines of other attempts are
not ours to tell.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sftd.protocol import TRAINER_LINE, TrainerLine
from sftd_worker.disk import naming

log = logging.getLogger("sftd.worker")

READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class SpoolLine:
    """A line of this attempt, and the offset behind it: where reading goes on once the line is done with."""

    line: TrainerLine
    end: int


class Spool:
    """One attempt's part of events.jsonl: from where the file ended when the attempt began."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self.start = path.stat().st_size
        self._warned_upto = 0  # lines are read again and again; each is complained of once

    def append(self, line: TrainerLine) -> None:
        """Add a line of the agent's own. Only while no trainer runs: there is one writer at a time."""
        with naming(self.path), self.path.open("ab") as file:
            file.write(line.model_dump_json().encode() + b"\n")

    def append_behind(self, lines: Sequence[TrainerLine]) -> None:
        """Add lines behind a trainer that is gone, whose last line a kill may have torn."""
        _end_torn_line(self.path)
        with self.path.open("ab") as file:
            file.write(b"".join(line.model_dump_json().encode() + b"\n" for line in lines))

    def size(self) -> int:
        return self.path.stat().st_size

    def lines(self, offset: int, *, to_end: bool = False) -> Iterator[SpoolLine]:
        """Lines from an offset on, as far as they are written. `to_end`: the writer is gone, the last one may be torn."""
        with self.path.open("rb") as file:
            file.seek(offset)
            rest = b""
            while piece := file.read(READ_BYTES):
                *whole, rest = (rest + piece).split(b"\n")
                for raw in whole:
                    offset += len(raw) + 1
                    yield from self._parsed(raw, offset)
            if to_end and rest:
                yield from self._parsed(rest, offset + len(rest))

    def has_whole_line_after(self, offset: int) -> bool:
        """Has the trainer said anything yet, from `offset` on?"""
        with self.path.open("rb") as file:
            file.seek(offset)
            return b"\n" in file.read(READ_BYTES)

    def _parsed(self, raw: bytes, end: int) -> Iterator[SpoolLine]:
        if not raw.strip():
            return
        try:
            line = TRAINER_LINE.validate_json(raw)
        except ValidationError as error:
            if end > self._warned_upto:
                self._warned_upto = end
                log.warning(
                    "%s: a line cannot be read and is passed over: %s", self.path, error.errors()[0]["msg"]
                )
            return
        if line.attempt == self.attempt:
            yield SpoolLine(line, end)


def _end_torn_line(path: Path) -> None:
    """End the line that a killed attempt may have torn, so that it does not swallow the first of this one."""
    with path.open("a+b") as file:
        if file.tell() == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
