"""When a job would start, how long it would run, and what that costs: from measured runs where there are any."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from sqlmodel import Session, col, func, select

from sftd.footprint import ModelFacts, trainable_parameters
from sftd.plan import StepsPlan, TimePlan
from sftd.schemas import JobState
from sftd.spec import JobSpec
from sftd_server.jobs import metrics, scheduling
from sftd_server.jobs.scheduling import Place
from sftd_server.jobs.states import LEASED
from sftd_server.plans.devices import Target
from sftd_server.settings import Settings
from sftd_server.tables import EventRow, JobRow

# Where nothing has been measured. A GPU: 40 % of its dense matrix peak in training with row-wise attention; a CPU: 60 GFLOP/s
# a slot, what one core with AVX-512 does.
GPU_SHARE = 0.4
CPU_FLOPS = 60e9
# A token costs 2 FLOPs a weight forward, 2 back to its inputs, 2 for its gradient if it is trained; with gradient
# checkpointing the forward is done twice (Kaplan et al. 2020, arXiv:2001.08361, and Chen et al. 2016, arXiv:1604.06174).
FORWARD, BACK, LEARN = 2, 2, 2
MOST_SECONDS = 10 * 365 * 86400.0
MOST_AHEAD = 1000  # queued jobs that are looked at
START_SECONDS = 10.0  # to load a small model; large ones take longer
RECENT_RUNS = 300  # among these a run of the same shape is looked for
MEASURED_RUNS = 5


@dataclass(frozen=True)
class _Speed:
    tokens_per_second: float
    basis: str


def time_plan(
    session: Session,
    spec: JobSpec,
    *,
    facts: ModelFacts | None,
    steps: StepsPlan | None,
    target: Target | None,
    settings: Settings,
    now: datetime,
) -> TimePlan:
    """All of it, as far as it is known."""
    speed = _measured(session, spec, facts, target) or _by_rule(spec, facts, target)
    seconds = None
    if speed is not None and steps is not None:
        # An evaluation is a forward pass over the validation rows; its share is small and left out.
        seconds = START_SECONDS + steps.total_tokens / speed.tokens_per_second
    waits, why = _wait_seconds(session, spec, settings, now)
    starts_at = _after(now, waits)
    finishes_at = _after(starts_at, seconds)
    return TimePlan(
        seconds=seconds,
        tokens_per_second=None if speed is None else round(speed.tokens_per_second, 1),
        basis="nothing is known of the model yet" if speed is None else speed.basis,
        starts_in_seconds=waits,
        starts_at=starts_at,
        finishes_at=finishes_at,
        why_waiting=why,
        gpu_hours=None if seconds is None else round(seconds * spec.gpus / 3600, 4),
    )


def _after(moment: datetime | None, seconds: float | None) -> datetime | None:
    """None where it is not known, or so far away that nobody will see it."""
    if moment is None or seconds is None or seconds > MOST_SECONDS:
        return None
    return moment + timedelta(seconds=seconds)


# ---------------------------------------------------------------- speed


def _measured(
    session: Session, spec: JobSpec, facts: ModelFacts | None, target: Target | None
) -> _Speed | None:
    """Tokens a second of the newest runs with as many weights, as many of them trained, on as many such devices."""
    if facts is None or target is None:
        return None
    shape = (facts.parameters + _added(spec, facts), trainable_parameters(spec, facts))
    newest = session.exec(select(func.max(EventRow.id))).one() or 0
    query = (
        select(EventRow.data, JobRow)
        .join(JobRow, col(JobRow.number) == col(EventRow.job))
        .where(EventRow.type == "run", col(EventRow.id) > newest - 100 * RECENT_RUNS)
        .where(JobRow.method == spec.method, JobRow.gpus == spec.gpus)
        .where(col(JobRow.state).in_([*LEASED, JobState.SUCCEEDED]))
        .order_by(col(EventRow.id).desc())
        .limit(RECENT_RUNS)
    )
    speeds: dict[str, float] = {}
    worker = None
    for data, row in session.exec(query):
        if (data.get("parameters"), data.get("trainable_parameters")) != shape or row.id in speeds:
            continue
        if str(data.get("device", "")).casefold() != target.name.casefold():
            continue
        speed = _tokens_per_second(session, row)
        if speed is not None:
            speeds[row.id] = speed
            worker = worker or row.worker_id
        if len(speeds) == MEASURED_RUNS:
            break
    if not speeds:
        return None
    runs = f"{len(speeds)} run{'s' * (len(speeds) > 1)} of a model of this shape on {target.name}"
    where = f", the newest on {worker}" if worker else ""
    return _Speed(statistics.median(speeds.values()), f"measured in {runs}{where}")


def _added(spec: JobSpec, facts: ModelFacts) -> int:
    """Weights of an adapter, which a run counts as the model's."""
    return 0 if spec.method == "full" else trainable_parameters(spec, facts)


def _tokens_per_second(session: Session, row: JobRow) -> float | None:
    """Of a job's steps: the median, which the first ones, slow as they are, do not move."""
    page = metrics.thinned(session, row.number, ["tokens_per_second"], after=-1, points=200)
    values = [point["tokens_per_second"] for point in page.points.values() if "tokens_per_second" in point]
    return statistics.median(values) if values else None


def _by_rule(spec: JobSpec, facts: ModelFacts | None, target: Target | None) -> _Speed | None:
    if facts is None or target is None:
        return None
    again = FORWARD if spec.gradient_checkpointing else 0
    flops = (FORWARD + BACK + again) * facts.parameters + LEARN * trainable_parameters(spec, facts)
    if target.device == "cpu":
        speed, what = CPU_FLOPS, f"{CPU_FLOPS / 1e9:.0f} GFLOP/s a CPU slot"
    elif target.teraflops is not None:
        speed = GPU_SHARE * target.teraflops * 1e12
        what = f"{GPU_SHARE:.0%} of the {target.teraflops:g} TFLOP/s of {target.name}"
    else:
        return None
    return _Speed(
        spec.gpus * speed / flops, f"no run of a model of this shape has been measured; by rule: {what}"
    )


# ---------------------------------------------------------------- the queue


def _wait_seconds(
    session: Session, spec: JobSpec, settings: Settings, now: datetime
) -> tuple[float | None, str | None]:
    """Seconds until its turn, if all goes as expected, and what it would wait for; None: no worker can take it.

    Slots of the workers that suit it come free when their jobs are expected to end; queued jobs of its priority and above
    are served first.
    """
    wanted = scheduling.Waiting(0, "", "", spec.priority, spec.gpus, spec.requires, None, None, now)
    able = [
        place
        for place in scheduling.places(session, now)
        if place.alive and not place.draining and wanted.suits(place)
    ]
    if not able:
        return None, "No worker that is there can take it."
    free_at = _free_at(session, able)
    ahead = _ahead(session, spec, able, settings, now)
    for gpus, seconds in ahead:
        needs = min(gpus, len(free_at))
        begins = _take(free_at, needs)
        free_at += [begins + seconds] * needs
    waits = _take(free_at, min(spec.gpus, len(free_at)))
    if waits <= 0:
        return 0.0, None
    return round(waits, 1), f"{len(ahead)} queued and {_num_running(session)} running jobs go before it."


def _ahead(
    session: Session, spec: JobSpec, able: Sequence[Place], settings: Settings, now: datetime
) -> list[tuple[int, float]]:
    """(gpus, seconds) of the queued jobs that go before a new one on these workers."""
    ready = scheduling.ready_jobs(session, settings, now, col(JobRow.priority) >= spec.priority)
    jobs = [job for job in islice(ready, MOST_AHEAD) if any(job.suits(place) for place in able)]
    query = select(JobRow.number, JobRow.expected_gpu_seconds)
    numbers = [job.number for job in jobs]
    expected = dict(session.exec(query.where(col(JobRow.number).in_(numbers))).all())
    return [(job.gpus, expected.get(job.number, 0.0) / max(1, job.gpus)) for job in jobs]


def _take(free_at: list[float], num: int) -> float:
    """Take the slots that are free first; when the last of them is."""
    free_at.sort()
    taken = [free_at.pop(0) for _ in range(num)]
    return max(taken, default=0.0)


def _free_at(session: Session, able: Sequence[Place]) -> list[float]:
    """Seconds until each slot of these workers is free."""
    found = [0.0 for place in able for _ in range(place.free)]
    names = {place.id for place in able}
    running = select(JobRow).where(col(JobRow.state).in_(LEASED), col(JobRow.worker_id).in_(names))
    for row in session.exec(running):
        left = row.expected_gpu_seconds / max(1, row.gpus)
        if (
            row.total_steps
            and row.step
            and (pace := metrics.recent_seconds(session, row.number, row.attempt))
        ):
            left = (row.total_steps - row.step) * sum(pace) / len(pace)
        found += [left] * row.gpus
    return found or [0.0]


def _num_running(session: Session) -> int:
    return session.exec(select(func.count()).where(col(JobRow.state).in_(LEASED))).one()
