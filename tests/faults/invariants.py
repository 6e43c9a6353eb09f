"""The checker: I1-I12 of the worker protocol over a recorded history, the final database, and what lies on disk.

`check(world)` returns every violation as a sentence that begins with the invariant's name. It asks the running server for
what users see, and the database for what its triggers wrote down (audit.py).
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.faults import audit, law
from tests.faults.world import Plan, World

TERMINAL = {"succeeded", "failed", "cancelled"}
LEASED = {"claimed", "running", "stopping"}
ALLOWED_ERRORS = {503, 507}  # stopping; no space
ITEMS = {"metrics": "points", "logs": "lines", "events": "events"}
ANNOUNCED = ("run", "evaluation", "notice")  # events of the trainer's own
# What the history must say of a move, besides the states that are events themselves.
_GIVEN_BACK = {"released", "lease_expired", "retrying", "preempted", "worker_restarted"}
TOLD_BY = {
    ("claimed", "queued"): _GIVEN_BACK | {"not_started"},
    ("running", "queued"): _GIVEN_BACK,
    ("stopping", "queued"): _GIVEN_BACK,
}


@dataclass(frozen=True)
class Job:
    """A job as the database has it in the end."""

    number: int
    id: str
    state: str
    attempt: int
    plan: Plan | None


def check(world: World, *, ends: set[str] | None = None, slack_seconds: float = 3.0) -> list[str]:
    """All violations. `ends`: how jobs may end whose users did not cancel them."""
    jobs = _jobs(world)
    found = list(world.violations)
    found += _submitted_once(world)
    found += _audited(world, jobs) if world.audited else []
    found += _late_writes(world, jobs)
    found += _answers(world)
    found += _two_trainers(world)
    for job in jobs:
        found += _attempts(world, job)
        found += _streams(world, job)
        found += _ends_once(world, job, ends or {"succeeded"})
        found += _checkpoints(world, job)
        found += _appends(world, job)
        if job.plan is not None and job.plan.lawful:
            found += _history(world, job, job.plan)
            found += _weights(world, job, job.plan)
        if job.plan is not None:
            found += _cancelled_in_time(world, job, job.plan, slack_seconds)
    return found


def _jobs(world: World) -> list[Job]:
    plans = {plan.key: plan for plan in world.plans.values()}
    rows = world.tables.rows("SELECT number, id, state, attempt, idempotency_key FROM job ORDER BY number")
    return [
        Job(row["number"], row["id"], row["state"], row["attempt"], plans.get(row["idempotency_key"]))
        for row in rows
    ]


# ---------------------------------------------------------------- I9: an acknowledged submit exists once


def _submitted_once(world: World) -> Iterator[str]:
    rows = world.tables.rows("SELECT id, idempotency_key FROM job")
    by_key: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_key[row["idempotency_key"]].append(row["id"])
    for key, plan in world.plans.items():
        made = by_key.pop(key, [])
        if len(made) > 1:
            yield f"I9: {key} made {len(made)} jobs: {made}"
        elif plan.job_id is not None and made != [plan.job_id]:
            yield f"I9: {key} was acknowledged as {plan.job_id}, the database has {made}"
    for call in world.calls:
        if call.path == "/jobs" and call.method == "POST" and call.status == 200:
            key = call.body["metadata"]["key"]
            if call.answer["id"] != world.plans[key].job_id:
                yield f"I9: {key} was once answered with {call.answer['id']}"


# ---------------------------------------------------------------- I1, I2, I3, I6, I7, I8 in the order of commits


def _audited(world: World, jobs: list[Job]) -> Iterator[str]:
    """One pass over what the database wrote down."""
    attempt: dict[int, int] = defaultdict(int)
    state = dict.fromkeys((job.number for job in jobs), "queued")
    step: dict[tuple[int, int], int] = {}
    names = {job.number: job.id for job in jobs}
    events: dict[int, list[str]] = defaultdict(list)  # since the last move
    moves: dict[int, tuple[str, str]] = {}  # the last one, whose event is still to come
    for entry in audit.entries(world.tables):
        name = names.get(entry.job, str(entry.job))
        if entry.what == "job":
            yield from _job_changed(entry, name, attempt, state)
            if entry.before != entry.after:
                yield from _unexplained(name, moves.get(entry.job), events[entry.job])
                moves[entry.job] = (entry.before, entry.after)
                events[entry.job] = []
                state[entry.job] = entry.after
            continue
        if entry.what == "attempt":
            continue
        # A row that a worker's call or the server made for an attempt.
        if entry.attempt != attempt[entry.job] and entry.attempt != 0:
            yield f"I3: {name}: {entry.what} {entry.detail} of attempt {entry.attempt} after the claim of {attempt[entry.job]}"
        by_worker = entry.what != "event" or entry.detail in ANNOUNCED
        if by_worker and state[entry.job] not in LEASED:
            yield f"I3: {name}: {entry.what} {entry.detail} of attempt {entry.attempt} while the job is {state[entry.job]}"
        if entry.what == "event":
            events[entry.job].append(entry.detail)
        if entry.what == "checkpoint":
            before = step.get((entry.job, entry.attempt), -1)
            if int(entry.detail) <= before:
                yield f"I8: {name}: attempt {entry.attempt} put a checkpoint of step {entry.detail} on record after {before}"
            step[entry.job, entry.attempt] = int(entry.detail)
    for job in jobs:
        yield from _unexplained(job.id, moves.get(job.number), events[job.number])


def _job_changed(
    entry: audit.Entry, name: str, attempt: dict[int, int], state: dict[int, str]
) -> Iterator[str]:
    if entry.before in TERMINAL and entry.after != entry.before:
        yield f"I7: {name} went from {entry.before} to {entry.after}"
    if entry.before != state[entry.job]:
        yield f"I7: {name} was {state[entry.job]} and goes on as {entry.before}"
    if entry.attempt != entry.old_attempt:
        if entry.attempt != attempt[entry.job] + 1:
            yield f"I2: {name}: attempt {entry.attempt} follows {attempt[entry.job]}"
        if entry.old_token or not entry.new_token:
            yield f"I1: {name}: attempt {entry.attempt} was handed out while another was held"
        attempt[entry.job] = entry.attempt
    elif entry.new_token and entry.new_token != entry.old_token:
        yield f"I1: {name}: attempt {entry.attempt} got a second token"
    if (entry.after in LEASED) != bool(entry.new_token):
        yield f"I1: {name} is {entry.after} {'with' if entry.new_token else 'without'} a token"


def _unexplained(name: str, move: tuple[str, str] | None, events: list[str]) -> Iterator[str]:
    """Each move has its event, written in the same transaction: so it comes before the next move."""
    if move is None:
        return
    before, after = move
    wanted = TOLD_BY.get(move) or {after, "resumed"}
    if not wanted & set(events):
        yield f"I6: {name} went from {before} to {after}, and no event says so (only {events})"
    if before in LEASED and after in {"paused", "cancelled"} and not {after} & set(events):
        yield f"I6: {name} is {after}, and no event says so"


# ---------------------------------------------------------------- I3 again, as the network saw it


def _late_writes(world: World, jobs: list[Job]) -> Iterator[str]:
    """No call of attempt a that began to travel to the server after the claim of a+1 was answered is accepted."""
    claims: dict[tuple[str, int], float] = {}
    for call in world.calls:
        if call.path == "/worker/claim" and call.status == 200:
            where = call.answer["job_id"], call.answer["attempt"]
            claims[where] = min(call.answered_at, claims.get(where, float("inf")))
    for call in world.calls:
        if call.leased_job is None or call.status != 200:
            continue
        later = claims.get((call.leased_job, call.body["attempt"] + 1))
        if later is not None and call.arrived_at > later and not _repeats_last_word(call.kind):
            yield f"I3: {call.leased_job}: {call.kind} of attempt {call.body['attempt']} was accepted after the next was claimed"


def _repeats_last_word(what: str | None) -> bool:
    """A last word that is said again is answered with 200, and changes nothing."""
    return what in ("finish", "release")


def _answers(world: World) -> Iterator[str]:
    """The server never answers with a mistake of its own."""
    for call in world.calls:
        if call.status >= 500 and call.status not in ALLOWED_ERRORS:
            yield f"the server answered {call.method} {call.path} with {call.status} {call.code}"


# ---------------------------------------------------------------- I12: no device is held by two trainers


def _two_trainers(world: World) -> Iterator[str]:
    path = world.watch / "violations.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        told = json.loads(line)
        yield f"I12: {told['job']}, attempt {told['attempt']}: {told['what']}"


# ---------------------------------------------------------------- I2, I5, I6 in the end


def _attempts(world: World, job: Job) -> Iterator[str]:
    rows = world.tables.rows(
        "SELECT attempt, outcome FROM attempt WHERE job = ? ORDER BY attempt", job.number
    )
    if [row["attempt"] for row in rows] != list(range(1, job.attempt + 1)):
        yield f"I2: {job.id} has the attempts {[row['attempt'] for row in rows]}, and says {job.attempt}"
    open_ones = [row["attempt"] for row in rows if row["outcome"] is None]
    if open_ones != ([job.attempt] if job.state in LEASED else []):
        yield f"I1: {job.id} is {job.state}, and the attempts {open_ones} have not ended"


def _streams(world: World, job: Job) -> Iterator[str]:
    """Each stream holds as many items as it has numbers."""
    counts: dict[str, str | None] = {
        "logs": "SELECT count(*) AS n FROM log_line WHERE job = ? AND attempt = ?",
        # The real trainer reports some steps twice: what they train, and what they are evaluated at.
        "metrics": "SELECT count(DISTINCT step) AS n FROM metric WHERE job = ? AND attempt = ?"
        if job.plan is None or job.plan.one_point_a_step
        else None,
        "events": f"SELECT count(*) AS n FROM event WHERE job = ? AND attempt = ? AND type IN {ANNOUNCED!r}",
    }
    streams = world.tables.rows("SELECT attempt, kind, next_seq FROM stream WHERE job = ?", job.number)
    for stream in streams:
        query = counts.get(stream["kind"])
        if query is None:
            continue
        held = world.tables.rows(query, job.number, stream["attempt"])[0]["n"]
        if held != stream["next_seq"]:
            yield (
                f"I5: {job.id}, attempt {stream['attempt']}: {stream['kind']} stand at {stream['next_seq']},"
                f" but {held} are held"
            )


def _ends_once(world: World, job: Job, ends: set[str]) -> Iterator[str]:
    rows = world.tables.rows(
        "SELECT type FROM event WHERE job = ? AND type IN ('succeeded','failed','cancelled')", job.number
    )
    told = [row["type"] for row in rows]
    if told != ([job.state] if job.state in TERMINAL else []):
        yield f"I6: {job.id} is {job.state}, and its history says {told}"
    cancelled = job.plan is not None and job.plan.cancel_asked_at is not None
    if job.state not in ends | ({"cancelled", "succeeded"} if cancelled else set()):
        yield f"{job.id} ended as {job.state}, attempt {job.attempt}: {_why(world, job)}"


def _why(world: World, job: Job) -> str:
    row = world.tables.rows("SELECT failure_reason, failure_message FROM job WHERE number = ?", job.number)[0]
    return f"{row['failure_reason']}: {row['failure_message']}"


# ---------------------------------------------------------------- I4: what was acknowledged is readable


def _appends(world: World, job: Job) -> Iterator[str]:
    """Each batch that the server took stands in the database at its place, unchanged."""
    kept: dict[tuple[int, str], list[Any]] = {}
    points: dict[int, dict[tuple[int, str], float | None]] = defaultdict(
        dict
    )  # by attempt; the last word counts
    batches = [
        call
        for call in world.calls
        if call.leased_job == job.id and call.kind in ITEMS and call.status == 200
    ]
    for call in sorted(batches, key=lambda call: int(call.body["seq"])):
        kind, attempt, seq = str(call.kind), call.body["attempt"], call.body["seq"]
        if (attempt, kind) not in kept:
            kept[attempt, kind] = _kept(world, job, attempt, kind)
        items = [_comparable(kind, item) for item in call.body[ITEMS[kind]]]
        if kind == "metrics":
            points[attempt] |= {
                (step, name): value for step, values in items for name, value in values.items()
            }
        elif kept[attempt, kind][seq : seq + len(items)] != items:
            yield f"I4: {job.id}, attempt {attempt}: {kind} {seq}..{seq + len(items)} were acknowledged and are not there"
    for attempt, acknowledged in points.items():
        held = {
            (step, name): value for step, values in kept[attempt, "metrics"] for name, value in values.items()
        }
        wrong = [place for place, value in acknowledged.items() if place not in held or held[place] != value]
        if wrong:
            yield f"I4: {job.id}, attempt {attempt}: metrics were acknowledged and are not there: {wrong[:3]}"
    # What the trainer said is what was kept, as far as it was sent.
    said = _said(world, job)
    for (attempt, kind), items in kept.items():
        if said and kind != "metrics" and items != said.get((attempt, kind), [])[: len(items)]:
            yield f"I5: {job.id}, attempt {attempt}: the {kind} kept are not those that the trainer said"


def _kept(world: World, job: Job, attempt: int, kind: str) -> list[Any]:
    if kind == "logs":
        query = "SELECT text FROM log_line WHERE job = ? AND attempt = ? ORDER BY id"
        return [row["text"] for row in world.tables.rows(query, job.number, attempt)]
    if kind == "events":
        query = (
            "SELECT type, data FROM event WHERE job = ? AND attempt = ?"
            f" AND type IN {ANNOUNCED!r} ORDER BY id"
        )
        return [
            (row["type"], json.loads(row["data"])) for row in world.tables.rows(query, job.number, attempt)
        ]
    points: dict[int, dict[str, float | None]] = defaultdict(dict)
    query = (
        "SELECT name, step, value FROM metric JOIN metric_name ON metric_name.id = metric.name_id"
        " WHERE job = ? AND attempt = ? ORDER BY step"
    )
    for row in world.tables.rows(query, job.number, attempt):
        points[row["step"]][row["name"]] = row["value"]
    return list(points.items())


def _comparable(kind: str, item: Any) -> Any:
    if kind == "logs":
        return item
    if kind == "events":
        return (item["type"], item.get("data", {}))
    return (item["step"], {name: _number(value) for name, value in item["values"].items()})


def _said(world: World, job: Job) -> dict[tuple[int, str], list[Any]]:
    """What stands in the spool, by attempt and stream."""
    said: dict[tuple[int, str], list[Any]] = defaultdict(list)
    path = world.data / "jobs" / job.id / "logs" / "events.jsonl"
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(raw)
        except ValueError:  # torn by a kill
            continue
        kind = {"step": "metrics", "log": "logs"}.get(line["type"], "events")
        if line["type"] in ("checkpoint", "end"):
            continue
        item = line["text"] if kind == "logs" else line
        said[line["attempt"], kind].append(_comparable(kind, item))
    return said


def _number(value: float | str) -> float | None:
    return None if value == law.NAN else float(value)


# ---------------------------------------------------------------- I8: checkpoints verify


def _checkpoints(world: World, job: Job) -> Iterator[str]:
    rows = world.tables.rows("SELECT * FROM checkpoint WHERE job = ?", job.number)
    for row in rows:
        folder = world.data / "jobs" / job.id / "checkpoints" / row["name"]
        spoiled = (job.id, row["name"]) in world.damaged
        if row["corrupt"] and not spoiled:
            yield f"I8: {job.id}: {row['name']} was found corrupt, and nobody spoiled it"
        if row["corrupt"] or spoiled or row.get("deleted_at"):
            continue
        if problem := _damage(folder, row["manifest_sha256"]):
            yield f"I8: {job.id}: {row['name']} is on record and does not verify: {problem}"


def _damage(folder: Path, manifest_sha256: str) -> str:
    try:
        manifest = (folder / "manifest.json").read_bytes()
        if hashlib.sha256(manifest).hexdigest() != manifest_sha256:
            return "another manifest"
        for name, file in json.loads(manifest)["files"].items():
            content = (folder / name).read_bytes()
            if len(content) != file["bytes"] or hashlib.sha256(content).hexdigest() != file["sha256"]:
                return f"{name} is not as recorded"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- I10 and the weights: as if undisturbed


def _history(world: World, job: Job, plan: Plan) -> Iterator[str]:
    """The metrics and evaluations that users see are a run's that nobody disturbed, from the first step on."""
    points = _pages(world, f"/jobs/{job.id}/metrics")
    expected = [{"step": step, **law.metrics(plan.seed, step)} for step in range(1, len(points) + 1)]
    if points != expected:
        wrong = next((got for got, want in zip(points, expected, strict=True) if got != want), None)
        yield f"I10: {job.id}: its history is not an undisturbed run's, at {wrong}"
    if job.state == "succeeded" and len(points) != plan.steps:
        yield f"I10: {job.id} has succeeded with {len(points)} of {plan.steps} steps in its history"
    for found in _pages(world, f"/jobs/{job.id}/evaluations"):
        wanted = law.evaluation(plan.seed, found["step"])
        if {name: found[name] for name in wanted} != wanted:
            yield f"I10: {job.id}: the evaluation of step {found['step']} is not its own"


def _pages(world: World, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: int | None = None
    while True:
        params = {} if after is None else {"after": after}
        answer = world.client.get(path, params=params)
        answer.raise_for_status()
        page = answer.json()
        found += page["data"]
        if not page.get("has_more"):
            return found
        after = page["next_after"]


def _weights(world: World, job: Job, plan: Plan) -> Iterator[str]:
    if job.state != "succeeded":
        return
    name = "adapter_model.safetensors"
    wanted = law.file_of(law.weights_after(plan.seed, plan.steps), "weights")
    answer = world.client.get(f"/jobs/{job.id}/result/files/{name}")
    if answer.status_code != 200 or answer.content != wanted:
        yield f"{job.id}: the weights are not those of an undisturbed run ({answer.status_code})"


# ---------------------------------------------------------------- I11: a cancel comes true in time


def _cancelled_in_time(world: World, job: Job, plan: Plan, slack_seconds: float) -> Iterator[str]:
    if plan.cancel_heard_at is None:
        return
    rows = world.tables.rows("SELECT finished_at FROM job WHERE number = ?", job.number)
    if rows[0]["finished_at"] is None:
        yield f"I11: {job.id}: its cancel was acknowledged, and it is {job.state}"
        return
    # The server's clock is this machine's, unless a line moves it; such lines do not cancel.
    ended = _monotonic(rows[0]["finished_at"])
    since = max([plan.cancel_heard_at, *(life.started_at for life in world.lives if life.started_at < ended)])
    # A heartbeat may have renewed the lease just before; one whose answers are lost renews it until the worker gives up.
    allowed = 2 * world.lease_seconds + 1 + 1 + slack_seconds
    if ended - since > allowed:
        yield f"I11: {job.id} ended {ended - since:.1f} s after its cancel was acknowledged; {allowed:.1f} s are allowed"


def _monotonic(text: str) -> float:
    """A moment of the database on this process's monotonic clock."""
    at = datetime.fromisoformat(text if "+" in text or text.endswith("Z") else text + "+00:00")
    return time.monotonic() - (time.time() - at.timestamp())
