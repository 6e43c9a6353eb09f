"""Which checkpoints are kept, and taking the others off the record. `sweep` then removes their files.

Kept are the newest of a job, its best by eval_loss, pinned ones, and what any job that is not over refers to. A row is
marked as deleted before anything happens on disk, in a transaction that holds the job's row and its checkpoints': so
a lease, whose claim holds the job's row too, never lists a checkpoint that goes.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select as columns
from sqlmodel import Session, and_, col, or_, select, update

from sftd.protocol import BaseRef
from sftd.schemas import JobState, StorageItem
from sftd_server.jobs.service import CHECKPOINT_PATH, JobInputs, Note, add_event
from sftd_server.jobs.states import LEASED, TERMINAL
from sftd_server.settings import Settings
from sftd_server.tables import CheckpointRow, JobRow

LEAST_UNTIL_OVER = 2  # of a job that may go on: where the newest is damaged there is one to fall back to
_ADAPTERS = ("lora", "qlora")
_EVERY = "*"  # of a job: all its checkpoints are needed
_SHOWN_STEPS = 20  # in a message

Needed = Collection[tuple[str, str]]  # (id of a job, name of its checkpoint)


@dataclass(frozen=True)
class Held:
    """A checkpoint on record that has not been deleted."""

    name: str
    step: int
    attempt: int
    corrupt: bool
    pinned: str | None
    eval_loss: float | None  # finite, or none


@dataclass(frozen=True)
class Shelf:
    """A job, as far as its checkpoints go, and these by step and attempt."""

    number: int
    job_id: str
    state: JobState
    attempt: int
    keep: int | None  # as its spec says
    finished_at: datetime | None
    held: Sequence[Held]


@dataclass(frozen=True)
class Doomed:
    """A checkpoint that is not kept, and why."""

    job_id: str
    name: str
    step: int
    bytes: int
    manifest_sha256: str
    corrupt: bool
    why: str

    def item(self) -> StorageItem:
        return StorageItem(
            kind="checkpoint",
            job_id=self.job_id,
            name=self.name,
            step=self.step,
            bytes=self.bytes,
            why=self.why,
        )


# ---------------------------------------------------------------- the rule


def choose(shelf: Shelf, needed: Needed, *, settings: Settings, now: datetime) -> dict[str, str]:
    """The checkpoints of a job that are not kept, by name, and why. A pure function: nothing is read."""
    if shelf.state in LEASED and not any(held.attempt == shelf.attempt for held in shelf.held):
        # Its worker may still be choosing what to resume from, of all that its lease lists, or be reading it.
        return {}
    over = shelf.state in TERMINAL
    keep = shelf.keep or settings.keep_checkpoints
    old = over and _is_past(shelf.finished_at, settings.finished_checkpoint_days, now)
    if old:
        keep = 1
    elif not over:
        keep = max(keep, LEAST_UNTIL_OVER)
    whole = [held for held in shelf.held if not held.corrupt]
    kept = {held.name for held in whole[-keep:]} | _best(whole)
    if whole:  # an attempt that went on from before the newest step distrusts what is beyond it
        kept.add(max(whole, key=lambda held: (held.attempt, held.step)).name)
    doomed = {}
    for held in shelf.held:
        if held.name in kept or _is_held_fast(shelf, held, needed):
            continue
        if held.corrupt:
            if over:  # until then its folder may be written anew, and a person may want to look at it
                doomed[held.name] = "damaged"
        else:
            doomed[held.name] = "age" if old else "not among those kept"
    return doomed


def _best(whole: Sequence[Held]) -> set[str]:
    """The one of the lowest eval_loss. Later ones carry the same value until the next evaluation: the first is meant."""
    rated = [held for held in whole if held.eval_loss is not None]
    return {min(rated, key=lambda held: (held.eval_loss, held.step)).name} if rated else set()


def _is_held_fast(shelf: Shelf, held: Held, needed: Needed) -> bool:
    return held.pinned is not None or (shelf.job_id, held.name) in needed or (shelf.job_id, _EVERY) in needed


def _is_past(since: datetime | None, days: float, now: datetime) -> bool:
    return bool(days) and since is not None and since + timedelta(days=days) <= now


# ---------------------------------------------------------------- looking


def plan(
    session: Session, *, settings: Settings, now: datetime, leased_only: bool = False
) -> dict[str, list[Doomed]]:
    """What would go, by id of the job: of jobs that workers hold only, or of all, the limit on size included."""
    shelves = _shelves(session, leased_only=leased_only)
    needed = _needed(session)
    doomed: dict[str, list[Doomed]] = {}
    for shelf in shelves:
        why = choose(shelf, needed, settings=settings, now=now)
        if why:
            doomed[shelf.job_id] = _with_files(session, shelf, why)
    if settings.artifacts_max_bytes and not leased_only:
        _doom_by_size(session, shelves, needed, doomed, settings)
    return doomed


def _shelves(session: Session, *, leased_only: bool = False, job_id: str | None = None) -> list[Shelf]:
    jobs = columns(
        col(JobRow.number),
        col(JobRow.id),
        col(JobRow.state),
        col(JobRow.attempt),
        col(JobRow.spec),
        col(JobRow.finished_at),
    )
    live = select(CheckpointRow.job).where(col(CheckpointRow.deleted_at).is_(None))
    jobs = jobs.where(col(JobRow.number).in_(live)).order_by(col(JobRow.number))
    if leased_only:
        jobs = jobs.where(col(JobRow.state).in_(LEASED))
    if job_id is not None:
        jobs = jobs.where(col(JobRow.id) == job_id)
    found = session.execute(jobs).all()
    held: dict[int, list[Held]] = defaultdict(list)
    rows = columns(
        col(CheckpointRow.job),
        col(CheckpointRow.name),
        col(CheckpointRow.step),
        col(CheckpointRow.attempt),
        col(CheckpointRow.corrupt),
        col(CheckpointRow.pinned),
        col(CheckpointRow.metrics),
    ).where(col(CheckpointRow.deleted_at).is_(None))
    if len(found) == 1:
        rows = rows.where(col(CheckpointRow.job) == found[0][0])
    rows = rows.order_by(col(CheckpointRow.step), col(CheckpointRow.attempt))
    for number, name, step, attempt, corrupt, pinned, metrics in session.execute(rows):
        held[number].append(Held(name, step, attempt, corrupt, pinned, _loss(metrics)))
    return [
        Shelf(number, id, JobState(state), attempt, _keep(spec), finished_at, held[number])
        for number, id, state, attempt, spec, finished_at in found
    ]


def _needed(session: Session) -> set[tuple[str, str]]:
    """Checkpoints that jobs refer to: what those that are not over begin from, and what finished adapters stand on."""
    over = [str(state) for state in TERMINAL]
    bases = select(JobRow.inputs, JobRow.state).where(
        col(JobRow.base_model).startswith("job:", autoescape=True),
        or_(
            col(JobRow.state).not_in(over),
            and_(JobRow.state == JobState.SUCCEEDED, col(JobRow.method).in_(_ADAPTERS)),
        ),
    )
    needed = set()
    for inputs, state in session.exec(bases):
        base = JobInputs.model_validate(inputs).base
        if base is not None:
            needed |= _checkpoints_of(base, is_over=state in over)
    # A lease of a job that goes on with another's run lists all of the other's: where the newest is damaged, an older.
    seeds = select(JobRow.seed_job).where(col(JobRow.seed_job).is_not(None), col(JobRow.state).not_in(over))
    gone_on_with = select(JobRow.id).where(col(JobRow.number).in_(seeds))
    return needed | {(job_id, _EVERY) for job_id in session.exec(gone_on_with)}


def _checkpoints_of(base: BaseRef, *, is_over: bool) -> set[tuple[str, str]]:
    paths = {base.base_model} if is_over else {base.path, base.base_model}
    found = [CHECKPOINT_PATH.match(path) for path in paths]
    return {(match["job_id"], match["name"]) for match in found if match}


def _with_files(session: Session, shelf: Shelf, why: Mapping[str, str]) -> list[Doomed]:
    query = (
        select(CheckpointRow)
        .where(CheckpointRow.job == shelf.number, col(CheckpointRow.name).in_(why))
        .order_by(col(CheckpointRow.step))
    )
    return [
        Doomed(
            shelf.job_id,
            row.name,
            row.step,
            num_bytes(row.files),
            row.manifest_sha256,
            row.corrupt,
            why[row.name],
        )
        for row in session.exec(query)
    ]


def _doom_by_size(
    session: Session,
    shelves: Sequence[Shelf],
    needed: Needed,
    doomed: dict[str, list[Doomed]],
    settings: Settings,
) -> None:
    """Above the limit: the oldest finished jobs first; in a first round without what is last and best."""
    going = sum(found.bytes for of_job in doomed.values() for found in of_job)
    left = artifact_bytes(session) - going
    over = sorted(
        (shelf for shelf in shelves if shelf.finished_at is not None),
        key=lambda shelf: str(shelf.finished_at),
    )
    for spares in (True, False):
        for shelf in over:
            if left <= settings.artifacts_max_bytes:
                return
            gone = {found.name for found in doomed.get(shelf.job_id, ())}
            whole = [held for held in shelf.held if not held.corrupt]
            spared = {held.name for held in whole[-1:]} | _best(whole) if spares else set()
            why = {
                held.name: "size"
                for held in shelf.held
                if held.name not in gone | spared and not _is_held_fast(shelf, held, needed)
            }
            for found in _with_files(session, shelf, why) if why else ():
                if left > settings.artifacts_max_bytes:
                    doomed.setdefault(shelf.job_id, []).append(found)
                    left -= found.bytes


def artifact_bytes(session: Session) -> int:
    """Bytes of all checkpoints and results on record."""
    files = session.exec(select(CheckpointRow.files).where(col(CheckpointRow.deleted_at).is_(None)))
    results = session.exec(select(JobRow.result).where(JobRow.state == JobState.SUCCEEDED))
    return sum(map(num_bytes, files)) + sum(num_bytes(result or {}) for result in results)


def num_bytes(files: Mapping[str, Any]) -> int:  # a JSON column: a manifest
    """The sizes in a manifest, together."""
    return sum(int(file["bytes"]) for file in files.values())


# ---------------------------------------------------------------- taking off the record


def retire(
    session: Session, job_id: str, *, by_size: Collection[str], settings: Settings, now: datetime
) -> list[Doomed]:
    """Mark a job's checkpoints as deleted: those that the rule does not keep, and of a job that is over `by_size`.

    What was planned is decided anew here, behind the locks: meanwhile a job may have been claimed, or come to refer to
    one of them.
    """
    locked = select(JobRow).where(JobRow.id == job_id).with_for_update()
    row = session.exec(locked).first()
    if row is None:
        return []
    session.exec(select(CheckpointRow.name).where(CheckpointRow.job == row.number).with_for_update()).all()
    shelves = _shelves(session, job_id=job_id)
    if not shelves:
        return []
    shelf, needed = shelves[0], _needed(session)
    why = choose(shelf, needed, settings=settings, now=now)
    for held in shelf.held:
        if held.name in by_size and shelf.state in TERMINAL and not _is_held_fast(shelf, held, needed):
            why.setdefault(held.name, "size")
    if not why:
        return []
    doomed = _with_files(session, shelf, why)
    session.exec(
        update(CheckpointRow)
        .where(
            col(CheckpointRow.job) == shelf.number,
            col(CheckpointRow.name).in_(why),
            col(CheckpointRow.deleted_at).is_(None),
        )
        .values(deleted_at=now)
    )
    add_event(session, row, _note(doomed), now)
    return doomed


def _note(doomed: Sequence[Doomed]) -> Note:
    steps = [found.step for found in doomed]
    total = sum(found.bytes for found in doomed)
    shown = ", ".join(map(str, steps[:_SHOWN_STEPS])) + (" …" if len(steps) > _SHOWN_STEPS else "")
    why = ", ".join(sorted({found.why for found in doomed}))
    message = f"Checkpoints deleted, of step {shown}: {why} ({total:,} bytes)."
    return Note("checkpoints_deleted", message, {"steps": steps, "bytes": total, "why": why})


# ---------------------------------------------------------------- small questions


def _loss(metrics: Mapping[str, Any]) -> float | None:  # a JSON column
    try:
        loss = float(metrics["eval_loss"])
    except (KeyError, TypeError, ValueError):
        return None
    return loss if math.isfinite(loss) else None


def _keep(spec: str) -> int | None:
    keep = json.loads(spec).get("keep_checkpoints")
    return keep if isinstance(keep, int) else None
