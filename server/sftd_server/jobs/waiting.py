"""Why a queued job waits, in words, from what is known at this moment."""

import functools
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, case
from sqlmodel import Session, col, func, select

from sftd.schemas import JobState
from sftd_server.jobs import dependencies, limits, scheduling
from sftd_server.jobs.scheduling import Place, Waiting
from sftd_server.jobs.service import JobInputs
from sftd_server.jobs.states import LEASED
from sftd_server.settings import Settings
from sftd_server.tables import FileRow, JobRow

MAX_NAMED = 3  # jobs or workers named in one sentence


class Queue:
    """The queue at one moment, for one answer; what all its jobs need to know is read once, when it is first asked for."""

    def __init__(self, session: Session, settings: Settings, now: datetime) -> None:
        self._session, self._settings, self._now = session, settings, now

    @functools.cached_property
    def used(self) -> dict[str, float]:
        return scheduling.usage(self._session, self._settings, self._now)

    @functools.cached_property
    def places(self) -> list[Place]:
        return scheduling.places(self._session, self._now)

    @functools.cached_property
    def _held(self) -> dict[str, str]:
        """Why jobs of an owner may not start now, by owner."""
        found = limits.standings(self._session, self._now)
        return {owner: why for owner, one in found.items() if (why := one.why_held)}

    @property
    def _is_ready(self) -> ColumnElement[bool]:
        return scheduling.is_ready(self._now, self._held)

    @functools.cached_property
    def _positions(self) -> dict[int | None, int]:
        by = scheduling.order(self._settings, self.used, self._now)
        ready = case((self._is_ready, 1), else_=0)
        line = select(JobRow.number, ready).where(JobRow.state == JobState.QUEUED).order_by(*by)
        found: dict[int | None, int] = {}
        position = 1
        for number, is_ready in self._session.exec(line):
            found[number] = position
            position += is_ready
        return found

    @functools.cached_property
    def _unmet(self) -> dict[int, list[str]]:
        """What the queued jobs still wait for, described, by their numbers."""
        found: dict[int, list[str]] = {}
        for number, needed in dependencies.all_unmet(self._session):
            found.setdefault(number, []).append(_described(needed))
        return found

    @functools.cached_property
    def _making_room(self) -> dict[str | None, list[str]]:
        """Jobs that make room, by the job that they make room for."""
        found: dict[str | None, list[str]] = {}
        query = select(JobRow.yield_to, JobRow.id).where(
            col(JobRow.state).in_(LEASED), col(JobRow.yield_to).is_not(None)
        )
        for waiting, job_id in self._session.exec(query):
            found.setdefault(waiting, []).append(job_id)
        return found

    def position(self, row: JobRow) -> int:
        """1 for the job that goes next. Jobs that could not run yet are not counted before it."""
        return self._positions.get(row.number, 1)

    def why(self, row: JobRow, *, position: int | None = None) -> str:
        """What the job waits for. Without its `position` who goes before it is left out, which costs less."""
        job = scheduling.waiting(row)
        known = [place for place in self.places if job.suits(place)]
        sentences = [self._own_reason(row, job), self._no_worker(job, known)]
        if not any(sentences):
            sentences = [self._no_slots(row, job, known, position)]
        return " ".join(sentence for sentence in sentences if sentence)

    # ------------------------------------------------------------ the job's own

    def _own_reason(self, row: JobRow, job: Waiting) -> str | None:
        if row.checking_files:
            return f"It waits: its {self._unchecked(row)} is still being checked."
        unmet = self._unmet.get(job.number)
        if unmet:
            more = f" and {len(unmet) - MAX_NAMED} more" if len(unmet) > MAX_NAMED else ""
            return f"Waits for {', '.join(unmet[:MAX_NAMED])}{more}."
        if row.not_before > self._now:
            seconds = (row.not_before - self._now).total_seconds()
            at = row.not_before.strftime("%H:%M:%S")
            return f"Is tried again in {seconds:.0f} s, at {at} UTC: its last attempt did not go well."
        return self._held.get(row.owner)

    def _unchecked(self, row: JobRow) -> str:
        """Which of its files it waits for."""
        for field, file in JobInputs.model_validate(row.inputs).files.items():
            status = self._session.exec(select(FileRow.status).where(FileRow.id == file.file_id)).first()
            if status == "uploaded":
                return field.replace("_", " ")
        return "training file"

    # ------------------------------------------------------------ workers

    def _no_worker(self, job: Waiting, known: Sequence[Place]) -> str | None:
        """That no worker can run it, as things stand."""
        if not self.places:
            return f"Needs {_needs(job)}: no worker has registered."
        if not known:
            largest = max(self.places, key=lambda place: (place.gpus, place.gpu_memory_gb or 0))
            return f"Needs {_needs(job)}: no registered worker has that (largest: {_has(largest)})."
        if not any(place.alive for place in known):
            return f"Needs {_needs(job)}: {_workers(known)} could run it, but was not heard of lately."
        alive = [place for place in known if place.alive]
        if all(place.draining for place in alive):
            return f"{_workers(alive).capitalize()} could run it, but drains: it takes no new jobs."
        return None

    def _no_slots(self, row: JobRow, job: Waiting, known: Sequence[Place], position: int | None) -> str:
        """What the workers that could run it do instead."""
        able = [place for place in known if place.alive and not place.draining]
        with_disk = [place for place in able if job.has_disk(place)]
        if not with_disk:
            gigabytes = (job.needs_disk_bytes or 0) / 2**30
            return f"Waits for {gigabytes:.1f} GiB of free disk on {_workers(able)}."
        room = self._making_room.get(row.id)
        if room:
            return f"{', '.join(room[:MAX_NAMED])} makes room for it."
        free = [place for place in with_disk if place.free >= job.gpus]
        ahead = self._who_goes_first(row) if position is not None and position > 1 else ""
        if free:
            if position is None:
                return "Waits for its turn."
            return self._next_on(job, free) or ahead or "A worker is about to take it."
        long_ago = self._now - timedelta(seconds=self._settings.reserve_seconds)
        keeper = scheduling.keeper_for(job, self.places) if job.since <= long_ago else None
        kept = f" Worker {keeper.id} keeps its free slots for it." if keeper and keeper.free else ""
        others = f" {ahead}" if ahead else ""
        return f"{_busy(with_disk, job)}{kept}{others}"

    def _next_on(self, job: Waiting, free: Sequence[Place]) -> str | None:
        """What a worker with slots enough would take now, if that says why this one waits."""
        keeps = None
        for place in free:
            first = next(scheduling.next_jobs(self._session, place, self._settings, self._now), None)
            if first is not None and first.id == job.id:
                return "A worker is about to take it."
            if first is None:
                keeps = f"Worker {place.id} keeps its free slots for a job that needs more of them."
        return keeps

    # ------------------------------------------------------------ the others

    def _who_goes_first(self, row: JobRow) -> str:
        """How many jobs that could run go first: by priority, by rank, by fair share or age."""
        before = scheduling.comes_before(self._session, row, self._settings, self.used, self._now)
        ready = select(func.count()).select_from(JobRow).where(self._is_ready)
        by_priority, by_rank, by_share = (self._session.exec(ready.where(c)).one() for c in before)
        reasons = []
        if by_priority:
            reasons.append(f"{by_priority} of higher priority")
        if by_rank:
            reasons.append(f"{by_rank} that a worker gave back or somebody moved ahead")
        if by_share:
            reasons.append(f"{by_share} {self._by_share(row, before[2])}")
        num = by_priority + by_rank + by_share
        return f"{num} {'job goes' if num == 1 else 'jobs go'} first: {', '.join(reasons)}." if num else ""

    def _by_share(self, row: JobRow, by_share: ColumnElement[bool]) -> str:
        if not self._settings.fair_share:
            return "posted earlier"
        owners = self._session.exec(select(JobRow.owner).where(self._is_ready, by_share).distinct()).all()
        own = self.used.get(row.owner, 0.0)
        lighter = sorted(owner for owner in owners if self.used.get(owner, 0.0) < own - 1.0)
        if lighter:
            named = ", ".join(lighter[:MAX_NAMED])
            return f"by fair share ({named} used less GPU time lately than {row.owner})"
        return "by fair share (shorter, or waiting for longer)"


def _described(row: JobRow) -> str:
    if row.total_steps and row.attempt:
        return f"{row.id} ({row.state}, {min(1.0, row.step / row.total_steps):.0%})"
    return f"{row.id} ({row.state})"


def _needs(job: Waiting) -> str:
    requires = job.requires
    gpus = f"{job.gpus} {'GPU' if job.gpus == 1 else 'GPUs'}"
    memory = f" with {requires.gpu_memory_gb:g} GiB" if requires and requires.gpu_memory_gb else ""
    labels = f" and the label {', '.join(requires.labels)}" if requires and requires.labels else ""
    named = f" on the worker {requires.worker}" if requires and requires.worker else ""
    return f"{gpus}{memory}{labels}{named}"


def _has(place: Place) -> str:
    memory = f" of {place.gpu_memory_gb:g} GiB" if place.gpu_memory_gb else ""
    return f"{place.id} with {place.gpus} {'GPU' if place.gpus == 1 else 'GPUs'}{memory}"


def _workers(places: Sequence[Place]) -> str:
    names = sorted({place.id for place in places})
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{'worker' if len(names) == 1 else 'workers'} {', '.join(names[:MAX_NAMED])}{more}"


def _busy(places: Sequence[Place], job: Waiting) -> str:
    free = max(place.free for place in places)
    if free:
        return f"Needs {_needs(job)}; the most that a worker has free is {free}."
    if len(places) == 1:
        return f"Worker {places[0].id}, the only one that can run it, is busy."
    return f"All {len(places)} workers that can run it are busy."
