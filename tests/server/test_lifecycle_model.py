"""The life of jobs against a model: whatever users, workers, the clock and restarts do, in any order, the database agrees.

SFTD_MODEL_STEPS says how many steps are made on each database (`make faults-long`: 100,000). Everything goes through the
functions that the routes call, each in a transaction of its own.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, event
from sqlmodel import Session, SQLModel, col, func, select

from sftd.protocol import CheckpointReport, Claim, Finish, Heartbeat, Hello, InputFile, LogBatch, Release
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_server import migrations
from sftd_server.auth import Caller
from sftd_server.db import make_engine
from sftd_server.errors import ApiError, SequenceGap
from sftd_server.jobs import service
from sftd_server.jobs.service import JobInputs, Submission
from sftd_server.settings import Settings
from sftd_server.tables import AttemptRow, CheckpointRow, EventRow, FileRow, JobRow, LogLineRow, StreamRow
from sftd_server.workers import claims, endings, leases, registration, reports

T = TypeVar("T")
STEPS = int(os.environ.get("SFTD_MODEL_STEPS", "2000"))
STEPS_OF_A_RUN = 50
LEASE, START, MAX_LOST, MAX_FAILURES = 30.0, 15.0, 3, 2
LEASED, TERMINAL = {"claimed", "running", "stopping"}, {"succeeded", "failed", "cancelled"}
RETRYABLE = FailureReason.TRAINER_DIED
PLAIN = {"synchronize_session": False, "populate_existing": True}  # as the server's own sessions
ME = Caller("key_1", "me", "admin")
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
WORKERS = ["w1", "w2"]


# ---------------------------------------------------------------- the model


@dataclass
class ModelJob:
    """A job as it should stand."""

    number: int
    priority: int
    state: str = "queued"
    want: str = "run"
    rank: int = 0
    attempt: int = 0
    lease_until: float = 0.0
    start_by: float | None = None
    failures: int = 0
    lost_count: int = 0
    lost_step: int = -1
    outcomes: dict[int, str] = field(default_factory=dict)
    lines: dict[int, list[str]] = field(default_factory=dict)
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (step, attempt)

    def settle(self, outcome: str, otherwise: str = "queued") -> None:
        """The attempt is over without a last word of its own: the user's wish decides."""
        self.end({"cancel": "cancelled", "pause": "paused"}.get(self.want, otherwise), outcome)

    def end(self, state: str, outcome: str) -> None:
        self.outcomes[self.attempt] = outcome
        self.state, self.start_by = state, None

    def lose(self) -> None:
        newest = max((step for step, _ in self.checkpoints.values()), default=-1)
        self.lost_count = 1 if newest > self.lost_step else self.lost_count + 1
        self.lost_step = newest
        self.settle("lost", "failed" if self.lost_count >= MAX_LOST else "queued")

    def tell(self) -> None:
        if self.want != "run":
            self.state, self.start_by = "stopping", None

    def steer(self, verb: str) -> bool:
        """A user's wish. False: it is refused."""
        held = self.state in LEASED
        if verb == "cancel":
            if self.state in ("succeeded", "failed"):
                return False
            self.want = "cancel"
            self.state = self.state if held else "cancelled"
        elif verb == "pause":
            if self.state in TERMINAL or (held and self.want == "cancel"):
                return False
            self.want = "pause"
            self.state = self.state if held else "paused"
        else:
            if self.state in TERMINAL | {"stopping"} or self.want == "cancel":
                return False
            self.want = "run"
            self.state = "queued" if self.state == "paused" else self.state
        return True


@dataclass(frozen=True)
class Held:
    """A lease that was handed out once; perhaps it is over."""

    job_id: str
    attempt: int
    token: str
    request: tuple[str, str]  # worker, request id


# ---------------------------------------------------------------- the machine


class Life(RuleBasedStateMachine):
    """Does one thing after another to the server's functions and to the model, and compares."""

    engine: Engine
    server_settings: Settings

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[int, str]] = {}  # idempotency key → (body, job)
        self.leases: list[Held] = []
        self.count = 0
        with self.session() as session:
            for table in reversed(SQLModel.metadata.sorted_tables):
                session.execute(table.delete())
            session.add(
                FileRow(
                    id="file_1",
                    filename="a.jsonl",
                    purpose="fine-tune",
                    bytes=1,
                    sha256="ab" * 32,
                    status="processed",
                    format="prompt_completion",
                    num_rows=1,
                    created_at=BEGIN,
                    owner="me",
                )
            )
            for worker in WORKERS:
                hello = Hello(worker_id=worker, boot_id="boot", gpus=1, device="cuda")
                registration.register(session, hello=hello, settings=self.server_settings, now=BEGIN)

    # ------------------------------------------------------------ what users do

    @rule(key=st.sampled_from([None, "a", "b"]), body=st.integers(0, 1), priority=st.integers(0, 1))
    def submit(self, key: str | None, body: int, priority: int) -> None:
        spec = JobSpec(base_model="org/model", training_file="file_1", priority=priority)
        pinned = InputFile(file_id="file_1", filename="a.jsonl", sha256="ab" * 32, bytes=1, path="blobs/ab")
        inputs = JobInputs(training_file=pinned, validation_file=None, base=None)
        sent = Submission(spec, inputs, "me", key, f"body {body}")
        known = self.keys.get(key or "")
        done = self.act(
            lambda session: service.submit(session, sent, self.now),
            fails=known is not None and known[0] != body,
        )
        if known is not None:
            assert done in (None, known[1])
            return
        assert done is not None
        self.jobs[done] = ModelJob(len(self.jobs) + 1, priority)
        if key is not None:
            self.keys[key] = (body, done)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), verb=st.sampled_from(["cancel", "pause", "resume", "pause", "resume"]))
    def steer(self, data: st.DataObject, verb: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))  # in the order of posting: ids are random
        call = {"cancel": service.cancel, "pause": service.pause, "resume": service.resume}[verb]
        allowed = self.jobs[job_id].steer(verb)
        self.act(lambda session: call(session, job_id, ME, self.now), fails=not allowed)

    # ------------------------------------------------------------ what workers do

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> None:
        self.count += 1
        self._claim(worker, f"request-{self.count}", again=None)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def claim_again(self, data: st.DataObject) -> None:
        """The answer was lost: the same request once more."""
        held = data.draw(st.sampled_from(self.leases))
        self._claim(*held.request, again=held)

    def _claim(self, worker: str, request_id: str, *, again: Held | None) -> None:
        message = Claim(worker_id=worker, boot_id="boot", request_id=request_id, gpus=1, wait_seconds=0)
        waiting = [job for job in self.jobs.values() if job.state == "queued"]
        best = min(waiting, key=lambda job: (-job.priority, job.rank, job.number), default=None)
        if again is not None:
            job = self.jobs[again.job_id]
            best = job if job.state == "claimed" and job.attempt == again.attempt else None
        lease = self.act(
            lambda session: claims.claim(
                session,
                message,
                key_name="worker",
                secret="secret",
                settings=self.server_settings,
                now=self.now,
            ),
            fails=again is not None and best is None,
        )
        assert (lease is None) == (best is None)
        if lease is None or best is None:
            return
        assert self.jobs[lease.job_id] is best
        best.lease_until = self.seconds + LEASE
        if again is not None:
            assert (lease.job_id, lease.attempt, lease.token) == (again.job_id, again.attempt, again.token)
            return
        best.state, best.rank, best.attempt = "claimed", 0, best.attempt + 1
        best.start_by = self.seconds + START
        best.lines[best.attempt] = []
        assert lease.attempt == best.attempt
        assert [ref.step for ref in lease.checkpoints] == sorted(
            (step for step, _ in best.checkpoints.values()), reverse=True
        )
        self.leases.append(Held(lease.job_id, lease.attempt, lease.token, (worker, request_id)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), started=st.booleans())
    def heartbeat(self, data: st.DataObject, started: bool) -> None:
        held, job, stale = self._lease(data)
        beat = Heartbeat(attempt=held.attempt, started=started)
        done = self.act(
            lambda session: leases.heartbeat(
                session, self._holder(held), beat, settings=self.server_settings, now=self.now
            ),
            fails=stale,
        )
        if stale:
            return
        assert done is not None
        assert done[0].want == job.want
        job.lease_until = self.seconds + LEASE
        if job.state == "claimed" and started:
            job.state, job.start_by = "running", None
        job.tell()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), shift=st.sampled_from([0, 0, 0, -1, -2, 1]), num_lines=st.integers(1, 3))
    def append(self, data: st.DataObject, shift: int, num_lines: int) -> None:
        """A batch: at its place, sent again, half known, or with a gap before it."""
        held, job, stale = self._lease(data)
        known = job.lines[held.attempt]
        seq = max(0, len(known) + shift)
        lines = [f"line {seq + i} of attempt {held.attempt}" for i in range(num_lines)]
        batch = LogBatch(attempt=held.attempt, seq=seq, lines=lines)
        repeats = seq + num_lines <= len(known)
        done = self.act(
            lambda session: reports.logs(session, self._holder(held), batch, self.now),
            fails=stale or (seq != len(known) and not repeats),
            gap_at=None if stale else len(known),
        )
        if done is not None:
            if not repeats:
                known += lines
            assert done == len(known)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), step=st.integers(1, 6))
    def checkpoint(self, data: st.DataObject, step: int) -> None:
        held, job, stale = self._lease(data)
        name, sha = f"checkpoint-{step}", hashlib.sha256(f"{step} {held.attempt}".encode()).hexdigest()
        report = CheckpointReport(attempt=held.attempt, step=step, name=name, manifest_sha256=sha, files={})
        repeats = job.checkpoints.get(name) == (step, held.attempt)
        newest = max((s for s, attempt in job.checkpoints.values() if attempt == held.attempt), default=0)
        fails = stale or (step <= newest and not repeats)
        self.act(
            lambda session: reports.checkpoint(session, self._holder(held), report, self.now), fails=fails
        )
        if not fails:
            job.checkpoints[name] = (step, held.attempt)

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        state=st.sampled_from(["succeeded", "failed", "cancelled", "paused", "paused"]),
        retryable=st.booleans(),
    )
    def finish(self, data: st.DataObject, state: str, retryable: bool) -> None:
        held, job, stale = self._lease(data)
        said_before = job.outcomes.get(held.attempt) == state
        reason = (RETRYABLE if retryable else FailureReason.BAD_DATA) if state == "failed" else None
        word = Finish.model_validate({"attempt": held.attempt, "state": state, "reason": reason})
        to = state
        if state == "failed":
            retries = retryable and job.failures + 1 < MAX_FAILURES
            to = {"run": "queued", "pause": "paused"}.get(job.want, "failed") if retries else "failed"
        elif state == "paused":
            to = {"pause": "paused", "cancel": "cancelled"}.get(job.want, "")
        elif state == "cancelled" and job.want != "cancel":
            to = ""
        self.act(
            lambda session: endings.finish(
                session, self._holder(held), word, settings=self.server_settings, now=self.now
            ),
            fails=not said_before and (stale or not to),
        )
        if not stale and to:
            job.failures += state == "failed"
            job.end(to, state)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held, job, stale = self._lease(data)
        said_before = job.outcomes.get(held.attempt) == "released"
        word = Release(attempt=held.attempt, message="The worker is being stopped.")
        lowest = min((other.rank for other in self.jobs.values() if other.state == "queued"), default=0)
        self.act(
            lambda session: endings.release(
                session, self._holder(held), word, settings=self.server_settings, now=self.now
            ),
            fails=stale and not said_before,
        )
        if not stale:
            if job.want == "run":
                job.rank = min(0, lowest) - 1
            job.settle("released")

    # ------------------------------------------------------------ time, and the server's own life

    @rule(seconds=st.sampled_from([1.0, 8.0, 16.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.seconds += seconds

    @rule()
    def reap(self) -> None:
        self.act(lambda session: endings.reap(session, settings=self.server_settings, now=self.now))
        for job in self.jobs.values():
            if job.state in LEASED and job.lease_until < self.seconds:
                job.lose()
            elif job.state == "claimed" and job.start_by is not None and job.start_by < self.seconds:
                job.settle("not_started")

    @rule()
    def restart(self) -> None:
        """A server that starts has its connections new, and gives every lease its full time."""
        type(self).engine.dispose()
        self.act(lambda session: leases.extend_all(session, settings=self.server_settings, now=self.now))
        for job in self.jobs.values():
            if job.state in LEASED:
                job.lease_until = self.seconds + LEASE
            if job.state == "claimed" and job.start_by is not None:
                job.start_by = self.seconds + START

    # ------------------------------------------------------------ what must hold

    @invariant()
    def agrees(self) -> None:
        """The database says what the model says, of every job."""
        with self.session() as session:
            for row in session.exec(select(JobRow)):
                job = self.jobs[row.id]
                found = (row.state, row.want, row.attempt, row.failures, row.lost_count)
                assert found == (job.state, job.want, job.attempt, job.failures, job.lost_count), row.id
                assert (row.token_sha256 is not None) == (job.state in LEASED)
                if job.state in LEASED:
                    assert row.lease_until == BEGIN + timedelta(seconds=job.lease_until)

    def teardown(self) -> None:
        """At the end of a run: every attempt, every line, every checkpoint, one terminal event."""
        with self.session() as session:
            for row in session.exec(select(JobRow)):
                self._compare(session, row, self.jobs[row.id])

    def _compare(self, session: Session, row: JobRow, job: ModelJob) -> None:
        attempts = session.exec(
            select(AttemptRow.attempt, AttemptRow.outcome)
            .where(AttemptRow.job == row.number)
            .order_by(col(AttemptRow.attempt))
        ).all()
        assert [attempt for attempt, _ in attempts] == list(range(1, job.attempt + 1))
        assert {attempt: outcome for attempt, outcome in attempts if outcome} == job.outcomes
        for attempt, lines in job.lines.items():
            query = select(LogLineRow.text).where(LogLineRow.job == row.number, LogLineRow.attempt == attempt)
            assert list(session.exec(query.order_by(col(LogLineRow.id)))) == lines
            stands = select(StreamRow.next_seq).where(
                StreamRow.job == row.number, StreamRow.attempt == attempt, StreamRow.kind == "logs"
            )
            assert session.exec(stands).one() == len(lines)
        kept = session.exec(select(CheckpointRow).where(CheckpointRow.job == row.number)).all()
        assert {found.name: (found.step, found.attempt) for found in kept} == job.checkpoints
        ends = select(func.count()).where(EventRow.job == row.number, col(EventRow.type).in_(TERMINAL))
        assert session.exec(ends).one() == (job.state in TERMINAL)

    # ------------------------------------------------------------ how it is done

    @property
    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.seconds)

    def act(
        self, work: Callable[[Session], T], *, fails: bool = False, gap_at: int | None = None
    ) -> T | None:
        """Do something in a transaction; check that it is refused, or not, as the model says."""
        refused: ApiError | None = None
        done: T | None = None
        try:
            with self.session() as session:
                done = work(session)
        except ApiError as error:
            refused = error
        assert (refused is not None) == fails, f"refused: {refused!r}, and the model says {fails}"
        if isinstance(refused, SequenceGap):
            assert (refused.headers or {})["x-expected-seq"] == str(gap_at)
        return done

    @contextmanager
    def session(self) -> Iterator[Session]:
        with Session(type(self).engine, expire_on_commit=False, execution_options=PLAIN) as session:
            yield session
            session.commit()

    def _lease(self, data: st.DataObject) -> tuple[Held, ModelJob, bool]:
        """Any lease that was ever handed out, rather a late one; its job; and whether it is over."""
        newest = min(3, len(self.leases))
        index = data.draw(st.one_of(st.integers(-newest, -1), st.integers(0, len(self.leases) - 1)))
        held = self.leases[index]
        job = self.jobs[held.job_id]
        return held, job, job.attempt != held.attempt or job.state not in LEASED

    def _holder(self, held: Held) -> leases.Holder:
        return leases.holder(held.job_id, held.attempt, held.token)


def play(engine: Engine, data: Path, steps: int, *, shrink: bool = True) -> None:
    """So many steps on that database. `shrink`: look for the shortest way to a divergence."""

    class Here(Life):
        pass

    Here.engine = engine
    Here.server_settings = Settings(
        data=data,
        lease_seconds=LEASE,
        start_seconds=START,
        max_lost=MAX_LOST,
        max_failures=MAX_FAILURES,
        backoff_seconds=0,
        fair_share=False,
    )
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=max(1, steps // STEPS_OF_A_RUN),
            stateful_step_count=STEPS_OF_A_RUN,
            deadline=None,
            derandomize="SFTD_MODEL_STEPS"
            not in os.environ,  # CI finds the same each time; the long run looks further
            database=None,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").create())
    return f"sqlite:///{tmp_path / 'model.db'}"


def test_life_agrees_with_the_model(url: str, tmp_path: Path) -> None:
    engine = make_engine(url)
    if url.startswith("sqlite"):

        @event.listens_for(engine, "connect")
        def on_connect(
            connection: Any, record: Any
        ) -> None:  # sqlite3.Connection, and SQLAlchemy's own record
            connection.execute("PRAGMA synchronous=OFF")  # what power does to disks is not asked here

    migrations.upgrade(engine)
    play(engine, tmp_path, STEPS)
    engine.dispose()


@pytest.mark.parametrize("planted", ["fenced", "steps"])
def test_the_model_finds_a_planted_bug(tmp_path: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be worth nothing if it agreed with anything."""
    if planted == "fenced":

        def anybody(session: Session, holder: leases.Holder) -> JobRow:
            return session.exec(select(JobRow).where(JobRow.id == holder.job_id)).one()

        for module in (leases, reports, endings):
            monkeypatch.setattr(module, "fenced", anybody)
    else:
        real = leases.deadlines
        monkeypatch.setattr(
            claims, "deadlines", lambda settings, now: real(settings, now - timedelta(seconds=5))
        )
    engine = make_engine(f"sqlite:///{tmp_path / 'model.db'}")
    migrations.upgrade(engine)

    with pytest.raises((AssertionError, ExceptionGroup)):
        play(engine, tmp_path, 1000, shrink=False)

    engine.dispose()
