"""Sends what the trainer says to the server: every line once, in the order of the spool, for as long as the lease lives.

A checkpoint is reported only when everything that stands before it has been acknowledged; so a job that resumes from
it has its whole history on the server. Calls, and what to do when one fails, are the outbox's business.
"""

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from sftd.errors import Conflict, SequenceGap
from sftd.protocol import (
    MAX_EVENTS,
    MAX_LINE_CHARS,
    MAX_LOG_BYTES,
    MAX_LOG_LINES,
    MAX_POINTS,
    CheckpointLine,
    CheckpointReport,
    EndLine,
    EventBatch,
    EventLine,
    LogBatch,
    LogTextLine,
    MetricsBatch,
    NextSeq,
    Point,
    StepLine,
    TrainerEvent,
    TrainerLine,
)
from sftd_worker.lease import LeaseKeeper
from sftd_worker.outbox import Fenced, Outbox, Refused
from sftd_worker.spool import Spool
from sftd_worker.transfer import Transfer

log = logging.getLogger("sftd.worker")

Kind = Literal["events", "metrics", "logs"]
Item = Point | str | TrainerEvent
Numbered = tuple[int, Item]  # the how-manieth of its kind in the spool, from 0

KINDS: tuple[Kind, ...] = ("events", "metrics", "logs")  # the order within one round: `run` before its steps
POLL_SECONDS = 0.25
MOST_PACE_SECONDS = 15.0  # between two rounds, whatever the server asks for: steps are seen by them too
MAX_ROUND_LINES = 5000  # read at once; bounds the memory that a long outage costs
MAX_EVENT_CHARS = 16000
TAIL_LINES = 40
REJECTED_FILE = "logs/rejected.jsonl"
CUT_MARK = " … (line cut)"
_MOST_ITEMS: dict[Kind, int] = {"metrics": MAX_POINTS, "logs": MAX_LOG_LINES, "events": MAX_EVENTS}
_MOST_BYTES = MAX_LOG_BYTES - 4096  # of any batch; room for the frame around the items


class Shipper:
    """Follows the spool from a thread of its own. `done` is set when it has ended; `error` says if by a mistake."""

    def __init__(
        self,
        spool: Spool,
        outbox: Outbox,
        keeper: LeaseKeeper,
        *,
        folder: Path,
        secrets: Sequence[str],
        first: Sequence[CheckpointReport],
        on_done: Callable[[], None],
        transfer: Transfer,
    ) -> None:
        self.error: str | None = None
        self.done = threading.Event()
        self.complete = False  # all that the trainer has said is on the server
        self.num_refused = 0  # checkpoints that the server would not take
        self.end: EndLine | None = None  # the trainer's last word, once it has come by
        self.log_tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._spool = spool
        self._outbox = outbox
        self._keeper = keeper
        self._transfer = transfer
        self._rejected = folder / REJECTED_FILE
        self._secrets = secrets
        self._first = first
        self._on_done = on_done
        self._position = spool.start  # everything before it has been dealt with
        self._num_taken = dict.fromkeys(KINDS, 0)  # items before the position
        self._refused: dict[Kind, set[int]] = {
            kind: set() for kind in KINDS
        }  # items that have no number there
        self._base = {kind: keeper.lease.next_seq.get(kind, 0) for kind in KINDS}
        self._writer_gone = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """The trainer is gone: ship what is left, then end. Returns at once; `done` tells."""
        self._writer_gone.set()

    def _run(self) -> None:
        try:
            for report in self._first:
                self._report(report)
            self._follow()
            self._transfer.drain()
            self.complete = True
        except Fenced:
            pass  # the attempt knows by the lease itself
        except Exception as error:  # the edge of a thread: the attempt must hear of it
            log.exception("shipping for %s ended by a mistake of ours", self._keeper.lease.job_id)
            self.error = repr(error)
        finally:
            self.done.set()
            self._on_done()

    def _follow(self) -> None:
        while True:
            last_round = (
                self._writer_gone.is_set()
            )  # asked before reading: what was written until then is read
            shipped = self._ship_round(to_end=last_round)
            if last_round:
                if not shipped:
                    return
                continue  # the last call waits for it
            pace = min(MOST_PACE_SECONDS, self._keeper.next_upload_seconds or 0)
            self._writer_gone.wait(pace if shipped else max(pace, POLL_SECONDS))

    def _ship_round(self, *, to_end: bool) -> bool:
        """Ship the lines up to the next checkpoint (or so many), then that checkpoint. False: there were none."""
        items: dict[Kind, list[Item]] = {kind: [] for kind in KINDS}
        checkpoint: CheckpointLine | None = None
        position, num_lines = self._position, 0
        for found in self._spool.lines(self._position, to_end=to_end):
            position, num_lines = found.end, num_lines + 1
            if isinstance(found.line, CheckpointLine):
                checkpoint = found.line
                break
            self._remember(found.line)
            if (kind := _kind(found.line)) and (item := self._item(found.line, record=True)) is not None:
                items[kind].append(item)
            if num_lines == MAX_ROUND_LINES:
                break
        for kind in KINDS:
            first = self._num_taken[kind]
            self._deliver(kind, list(enumerate(items[kind], start=first)), upto=first + len(items[kind]))
            self._num_taken[kind] += len(items[kind])
        if checkpoint is not None:
            self._report(_report_of(checkpoint))
        self._position = position
        return num_lines > 0

    def _remember(self, line: TrainerLine) -> None:
        if isinstance(line, EndLine):
            self.end = line
        elif isinstance(line, LogTextLine):
            self.log_tail.append(line.text)
        elif isinstance(line, StepLine):
            self._keeper.step = max(self._keeper.step, line.step)

    # ------------------------------------------------------------ streams

    def _deliver(self, kind: Kind, pending: list[Numbered], *, upto: int) -> None:
        """Send items until the server holds all of them up to the `upto`-th of the spool."""
        most = _MOST_ITEMS[kind]
        while pending:
            batch = _head(pending, most)
            seq = self._seq(kind, batch[0][0])
            try:
                answer = self._outbox.send(kind, self._batch(kind, seq, [item for _, item in batch]))
            except SequenceGap as gap:
                if gap.expected == seq:
                    raise RuntimeError(f"the server refuses {kind} from {seq} and asks for {seq}") from gap
                pending = list(self._from_seq(kind, gap.expected, upto))
                continue
            except Refused as refused:
                # One of the batch is at fault: halve until it stands alone.
                if len(batch) == 1:
                    self._record(kind, str(refused), batch[0][1])
                    if not _has_number(refused):
                        self._refused[kind].add(batch[0][0])
                    pending = pending[1:]
                most = max(1, len(batch) // 2)
                continue
            num_taken = NextSeq.model_validate_json(answer).next_seq - seq
            if num_taken <= 0:
                raise RuntimeError(f"the server took {kind} from {seq} and goes on with {seq + num_taken}")
            pending = pending[num_taken:]
            most = min(_MOST_ITEMS[kind], most * 2)

    def _seq(self, kind: Kind, index: int) -> int:
        """The number that the `index`-th item of the spool has on the server: refused ones have none."""
        return self._base[kind] + index - sum(1 for refused in self._refused[kind] if refused < index)

    def _from_seq(self, kind: Kind, seq: int, upto: int) -> Iterator[Numbered]:
        """Read the spool again for the items from number `seq` on: the server has lost them, or holds some already."""
        index = 0
        for found in self._spool.lines(self._spool.start, to_end=True):
            if index == upto:
                return
            if _kind(found.line) != kind or (item := self._item(found.line, record=False)) is None:
                continue
            if index not in self._refused[kind] and self._seq(kind, index) >= seq:
                yield index, item
            index += 1

    def _batch(
        self, kind: Kind, seq: int, items: list[Any]
    ) -> BaseModel:  # items of one kind, checked by the model
        attempt = self._keeper.lease.attempt
        match kind:
            case "metrics":
                return MetricsBatch(attempt=attempt, seq=seq, points=items)
            case "logs":
                return LogBatch(attempt=attempt, seq=seq, lines=items)
            case "events":
                return EventBatch(attempt=attempt, seq=seq, events=items)

    # ------------------------------------------------------------ items

    def _item(self, line: TrainerLine, *, record: bool) -> Item | None:
        """A line as the server takes it, without secrets; None if it can never be taken. The same each time."""
        try:
            if isinstance(line, StepLine):
                return Point(step=line.step, values=line.values)
            if isinstance(line, LogTextLine):
                return cut(scrubbed(line.text, self._secrets), MAX_LINE_CHARS)
            if isinstance(line, EventLine):
                message = cut(scrubbed(line.message, self._secrets), MAX_EVENT_CHARS)
                return TrainerEvent(
                    type=line.type, message=message, data=_scrubbed_data(line.data, self._secrets)
                )
        except ValidationError as error:
            if record:
                self._record(line.type, str(error), line)
        return None

    def _report(self, report: CheckpointReport) -> None:
        def on_refused(why: str) -> None:
            self.num_refused += not report.corrupt
            self._record("checkpoint", why, report)

        self._transfer.report(report, on_refused=on_refused)

    def _record(self, kind: str, why: str, item: Item | TrainerLine | CheckpointReport) -> None:
        """Keep what the server will not take, for whoever looks into it."""
        log.warning("the server does not take a line of %s (%s): %s", self._keeper.lease.job_id, kind, why)
        told = item if isinstance(item, str) else item.model_dump(mode="json")
        try:
            with self._rejected.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "why": why, "item": told}) + "\n")
        except OSError as error:  # a full disk must not end the job for a remark
            log.warning("it could not be kept either: %s", error)


def scrubbed(text: str, secrets: Sequence[str]) -> str:
    """The text without the values of secrets."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


def cut(text: str, most_chars: int) -> str:
    """The text, or its beginning with a mark if it is longer."""
    return text if len(text) <= most_chars else text[:most_chars] + CUT_MARK


def _scrubbed_data(value: Any, secrets: Sequence[str]) -> Any:  # JSON of any shape
    if isinstance(value, str):
        return scrubbed(value, secrets)
    if isinstance(value, list):
        return [_scrubbed_data(entry, secrets) for entry in value]
    if isinstance(value, dict):
        return {key: _scrubbed_data(entry, secrets) for key, entry in value.items()}
    return value


def _has_number(refused: Refused) -> bool:
    """Whether the server has something else under the item's number: the next one has the next number all the same."""
    return isinstance(refused.__cause__, Conflict) and refused.__cause__.code == "batch_differs"


def _kind(line: TrainerLine) -> Kind | None:
    if isinstance(line, StepLine):
        return "metrics"
    if isinstance(line, LogTextLine):
        return "logs"
    return "events" if isinstance(line, EventLine) else None


def _head(pending: list[Numbered], most: int) -> list[Numbered]:
    """The first items, as many as one batch holds; at least one, however large."""
    num_bytes = 0
    for num_items, (_, item) in enumerate(pending[:most]):
        text = json.dumps(item) if isinstance(item, str) else item.model_dump_json()
        num_bytes += len(text.encode()) + 1
        if num_bytes > _MOST_BYTES and num_items:
            return pending[:num_items]
    return pending[:most]


def _report_of(line: CheckpointLine) -> CheckpointReport:
    return CheckpointReport(
        attempt=line.attempt,
        step=line.step,
        name=line.name,
        manifest_sha256=line.manifest_sha256,
        files=line.files,
        metrics=line.metrics,
    )
