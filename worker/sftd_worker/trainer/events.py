"""What a run tells: `logs/events.jsonl` for machines, `logs/training_log.txt` and stdout for people.

Only rank 0 speaks, from the loop and from the thread that saves. Lines are flushed as they are written; `sync` makes
them durable, before a checkpoint is announced and at the end.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from sftd.protocol import (
    MAX_LINE_CHARS,
    TRAINER_PULSE_FILE,
    CheckpointLine,
    EndLine,
    EventLine,
    LogTextLine,
    StepLine,
    TrainerLine,
)
from sftd_worker.disk import naming
from sftd_worker.trainer.pulse import Pulse


class Events:
    """The voice of one attempt. With `silent` (ranks other than 0) it says nothing, but shows life."""

    def __init__(self, folder: Path, *, attempt: int, silent: bool = False) -> None:
        self.attempt = attempt
        self.alive = Pulse(folder / Path(TRAINER_PULSE_FILE).name).beat  # call it between pieces of long work
        self._lines: TextIO | None = None
        self._log: TextIO | None = None
        self._lock = threading.RLock()  # what one thread says stands together
        if not silent:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / "events.jsonl"
            self._lines = _open_for_append(self._path)
            self._log = _open_for_append(folder / "training_log.txt")

    def log(self, text: str) -> None:
        """A line (or several) for a person."""
        if self._log is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            for line in text.splitlines() or [""]:
                self._log.write(f"{stamp} {line}\n")
                print(line, flush=True)
                self._write(LogTextLine(attempt=self.attempt, at=time.time(), text=line[:MAX_LINE_CHARS]))
            self._log.flush()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Metrics of one optimizer step."""
        self._write(StepLine(attempt=self.attempt, at=time.time(), step=step, values=values))

    def run(self, message: str, data: dict[str, Any]) -> None:
        """The run is described: what was derived from the spec. Once, before the first step."""
        self._write(EventLine(type="run", attempt=self.attempt, at=time.time(), message=message, data=data))

    def evaluation(self, message: str, data: dict[str, Any]) -> None:
        """An evaluation is done."""
        self._write(
            EventLine(type="evaluation", attempt=self.attempt, at=time.time(), message=message, data=data)
        )

    def notice(self, message: str, data: dict[str, Any] | None = None) -> None:
        """Something the user should know; also a line of the log."""
        self.log(message)
        self._write(
            EventLine(type="notice", attempt=self.attempt, at=time.time(), message=message, data=data or {})
        )

    def checkpoint(self, line: CheckpointLine) -> None:
        """A checkpoint is whole on disk."""
        self._write(line)
        self.sync()

    def end(self, line: EndLine) -> None:
        """The attempt's last word."""
        self._write(line)
        self.sync()

    def sync(self) -> None:
        """Make everything said so far survive a power loss."""
        for file in (self._lines, self._log):
            if file is not None:
                with self._lock:
                    file.flush()
                os.fsync(file.fileno())  # may take long: the loop goes on speaking

    def _write(self, line: TrainerLine) -> None:
        if self._lines is not None:
            text = line.model_dump_json() + "\n"
            with self._lock, naming(self._path):
                self._lines.write(text)
                self._lines.flush()


def _open_for_append(path: Path) -> TextIO:
    """Open a log; a torn last line of a killed attempt is ended first, so that no line mixes two attempts."""
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    opened = path.open("a", encoding="utf-8")
    if torn:
        opened.write("\n")
    return opened
