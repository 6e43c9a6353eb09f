"""Metrics: what is stored, and the history that a user sees.

A job that was interrupted has rows of several attempts. Its history is that of an uninterrupted run: for step s the
row of the highest attempt whose start_step < s. Put the other way: the rows of attempt a are good from its own start
up to the earliest start of any later attempt, which is a window of steps; windows do not overlap.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlmodel import Session, col, select

from sftd_server.tables import AttemptRow, JobMetricRow, MetricNameRow

LAST_STEP = 2**53
ESTIMATE_POINTS = 20


@dataclass(frozen=True)
class Window:
    """The steps for which an attempt's rows are the history: after < step <= last."""

    attempt: int
    after: int
    last: int


@dataclass(frozen=True)
class MetricsPage:
    """Points in step order: step → name → value."""

    points: dict[int, dict[str, float]]
    has_more: bool

    def to_json(self) -> str:
        """The answer's body. NaN and infinities are strings, as everywhere in this API."""
        data = [{"step": step, **to_json(values)} for step, values in self.points.items()]
        cursor = data[-1]["step"] if self.has_more else None
        return json.dumps({"object": "list", "data": data, "has_more": self.has_more, "next_after": cursor})


def to_storage(value: float) -> float | None:
    """SQLite cannot store NaN: NULL stands for it."""
    return None if math.isnan(value) else value


def to_json(values: dict[str, float]) -> dict[str, Any]:
    """Values as JSON has them, which knows neither NaN nor infinities: they are strings, and read back as numbers."""
    return {name: value if math.isfinite(value) else _word(value) for name, value in values.items()}


def from_storage(value: float | None) -> float:
    return math.nan if value is None else value


def windows(session: Session, number: int | None) -> list[Window]:
    """The windows of a job's attempts, in order of steps; empty ones are left out."""
    query = select(AttemptRow.attempt, AttemptRow.start_step).where(AttemptRow.job == number)
    started = [(attempt, start) for attempt, start in session.exec(query).all() if start is not None]
    found: list[Window] = []
    last = LAST_STEP
    for attempt, start in sorted(started, reverse=True):
        if start < last:
            found.append(Window(attempt, start, last))
            last = start
    return found[::-1]


def names(session: Session, number: int | None) -> list[str]:
    """The metrics that a job has."""
    return list(_name_ids(session, number, []).values())


def page(session: Session, number: int | None, names: list[str], *, after: int, limit: int) -> MetricsPage:
    """The next `limit` steps after `after`."""
    points: dict[int, dict[str, float]] = {}
    spans = windows(session, number)
    for name_id, name in _name_ids(session, number, names).items():
        # The first limit+1 steps of every name hold the first limit+1 steps of all of them.
        for step, value in _rows(session, number, name_id, spans, after=after, limit=limit + 1):
            points.setdefault(step, {})[name] = value
    steps = sorted(points)
    return MetricsPage({step: points[step] for step in steps[:limit]}, has_more=len(steps) > limit)


def thinned(
    session: Session, number: int | None, names: list[str], *, after: int, points: int
) -> MetricsPage:
    """About `points` steps, evenly spaced, with the first and the last. Rare metrics (evaluations) are all kept."""
    spans = windows(session, number)
    ids = _name_ids(session, number, names)
    counts = {name_id: _count(session, number, name_id) for name_id in ids}
    rare = [name_id for name_id in ids if counts[name_id] <= points // 4]
    dense = sorted(set(ids) - set(rare), key=lambda name_id: -counts[name_id])
    chosen: set[int] = set()
    for name_id in rare:
        chosen.update(_steps(session, number, name_id, spans, after=after))
    for name_id in dense[:1]:  # the others are reported at the same steps
        chosen.update(_evenly(_steps(session, number, name_id, spans, after=after), points))
    found: dict[int, dict[str, float]] = {step: {} for step in sorted(chosen)}
    for name_id, name in ids.items():
        for step, value in _values_at(session, number, name_id, spans, list(found)):
            found[step][name] = value
    return MetricsPage({step: values for step, values in found.items() if values}, has_more=False)


def newest_at(session: Session, number: int | None, name: str, steps: Sequence[int]) -> dict[int, float]:
    """The value of a metric that was reported last at or before each of these steps."""
    spans = windows(session, number)[::-1]
    query = text(
        "SELECT value FROM metric WHERE job = :job AND name_id = :name AND attempt = :attempt"
        " AND step > :after AND step <= :last ORDER BY step DESC LIMIT 1"
    )
    found: dict[int, float] = {}
    for name_id in _name_ids(session, number, [name]):
        for step in steps:
            for span in spans:
                bound = {"job": number, "name": name_id, "attempt": span.attempt}
                bound |= {"after": span.after, "last": min(step, span.last)}
                row = session.connection().execute(query, bound).first() if span.after < step else None
                if row is not None:
                    found[step] = from_storage(row[0])
                    break
    return found


def recent_seconds(session: Session, number: int | None, attempt: int) -> list[float]:
    """How long the last steps took."""
    query = text(
        "SELECT value FROM metric WHERE job = :job AND attempt = :attempt AND value > 0 AND value < 1e9"
        " AND name_id = (SELECT id FROM metric_name WHERE name = 'seconds') ORDER BY step DESC LIMIT :limit"
    )
    bound = {"job": number, "attempt": attempt, "limit": ESTIMATE_POINTS}
    return [float(row[0]) for row in session.connection().execute(query, bound)]


def _name_ids(session: Session, number: int | None, names: list[str]) -> dict[int, str]:
    query = (
        select(MetricNameRow.id, MetricNameRow.name)
        .join(JobMetricRow, col(JobMetricRow.name_id) == MetricNameRow.id)
        .where(JobMetricRow.job == number)
        .order_by(col(MetricNameRow.name))
    )
    return {
        id: name for id, name in session.exec(query).all() if id is not None and (not names or name in names)
    }


def _rows(
    session: Session, number: int | None, name_id: int, spans: list[Window], *, after: int, limit: int
) -> Iterator[tuple[int, float]]:
    """(step, value) of one metric in step order, window by window: each is one range of the primary key."""
    query = text(
        "SELECT step, value FROM metric WHERE job = :job AND name_id = :name AND step > :after AND step <= :last"
        " AND attempt = :attempt ORDER BY step LIMIT :limit"
    )
    for span in spans:
        if limit <= 0 or span.last <= after:
            continue
        bound = {"job": number, "name": name_id, "attempt": span.attempt, "limit": limit}
        bound |= {"after": max(after, span.after), "last": span.last}
        for step, value in session.connection().execute(query, bound):
            limit -= 1
            yield step, from_storage(value)


def _steps(
    session: Session, number: int | None, name_id: int, spans: list[Window], *, after: int
) -> list[int]:
    return [step for step, _ in _rows(session, number, name_id, spans, after=after, limit=LAST_STEP)]


def _count(session: Session, number: int | None, name_id: int) -> int:
    query = text("SELECT count(*) FROM metric WHERE job = :job AND name_id = :name")
    return int(session.connection().execute(query, {"job": number, "name": name_id}).scalar_one())


def _values_at(
    session: Session, number: int | None, name_id: int, spans: list[Window], steps: list[int]
) -> Iterator[tuple[int, float]]:
    """(step, value) of one metric at these steps: a look-up each, however long the series is."""
    sqlite = session.connection().dialect.name == "sqlite"
    query = text(
        "SELECT step, value FROM metric WHERE job = :job AND name_id = :name AND attempt = :attempt"
        f" AND step IN (SELECT {'value FROM json_each(:steps)' if sqlite else 'unnest(CAST(:steps AS bigint[]))'})"
    )
    for span in spans:
        within = [step for step in steps if span.after < step <= span.last]
        given = json.dumps(within) if sqlite else within  # one variable, however many there are
        bound = {"job": number, "name": name_id, "attempt": span.attempt, "steps": given}
        for step, value in session.connection().execute(query, bound) if within else ():
            yield step, from_storage(value)


def _evenly(steps: list[int], points: int) -> list[int]:
    if len(steps) <= points:
        return steps
    if points == 1:
        return steps[-1:]
    return [steps[round(i * (len(steps) - 1) / (points - 1))] for i in range(points)]


def _word(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
