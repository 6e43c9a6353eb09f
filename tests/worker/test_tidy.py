"""A worker's own data folder does not grow for ever, and nothing goes that is in use or that nobody else has."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd._transport import Transport
from sftd_worker.gpus import Devices, Locks
from sftd_worker.registration import NameLock
from sftd_worker.settings import WorkerSettings
from sftd_worker.tidy import Tidier, items, mark_delivered, unmark
from sftd_worker.worker import Bell, Worker

if TYPE_CHECKING:
    from conftest import Box

DAY = 86400.0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


@pytest.fixture
def name(own: Path) -> NameLock:
    return NameLock(own, "w", "boot")


@pytest.fixture
def worker(own: Path) -> Iterator[Callable[..., Worker]]:
    transport = Transport("http://127.0.0.1:9", "key-of-the-tests")

    def make(**settings: Any) -> Worker:
        values = {"data": own, "own_data": True, "worker_name": "w", "key": "k", **settings}
        return Worker(WorkerSettings.model_validate(values), Devices("cpu", (), 1), transport, "boot")

    yield make
    transport.close()


@pytest.fixture
def tidy(own: Path, name: NameLock, worker: Callable[..., Worker]) -> Callable[..., list[str]]:
    """Tidy once, and say what is left."""

    def run(**settings: Any) -> list[str]:
        tidier = Tidier(worker(**settings), name)
        if tidier.due:
            tidier.tidy()
        return sorted(str(item.path.relative_to(own)) for item in items(own))

    return run


@pytest.fixture
def lay(own: Path) -> Callable[..., Path]:
    """Lay down something that was last used so many days ago."""

    def down(path: str, days: float, *, delivered: bool | None = None, num_bytes: int = 100) -> Path:
        """`delivered`: of a job that ran here; None: a file or a folder that was fetched."""
        target = own / path
        is_job = path.startswith("jobs/")
        file = target / "results" / "model.safetensors" if is_job else target
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * num_bytes)
        touched = [target]
        if delivered is not None:
            (target / "logs").mkdir()
            (target / ".trainer.lock").touch()
            (target / "logs" / "events.jsonl").write_text("{}\n")
            touched.append(target / "logs" / "events.jsonl")
            if delivered:
                mark_delivered(target)
                touched.append(target / ".delivered")
        for entry in touched:
            os.utime(entry, (time.time() - days * DAY,) * 2)
        return target

    return down


def test_what_was_not_used_for_long_goes(lay: Callable[..., Path], tidy: Callable[..., list[str]]) -> None:
    lay("jobs/old", 8, delivered=True), lay("jobs/new", 6, delivered=True)
    lay("jobs/base-old", 8), lay("jobs/base-new", 6)
    lay("blobs/sha256/ab/old", 8), lay("blobs/sha256/ab/new", 6), lay("blobs/sha256/ab/.part-old", 8)
    lay("cache/old.arrow", 8)

    assert tidy(own_data_days=0) != []
    left = tidy()

    assert left == ["blobs/sha256/ab/new", "jobs/base-new", "jobs/new"]


def test_nothing_else_in_the_folder_is_touched(
    own: Path, lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    kept = [lay("models/mine", 1000), lay("worker.key", 1000)]

    tidy(own_data_bytes=1)

    assert all(path.exists() for path in kept)


def test_what_the_server_has_not_heard_of_stays_for_longer(
    lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    lay("jobs/untold", 29, delivered=False), lay("jobs/forgotten", 31, delivered=False)
    unmark(lay("jobs/again", 8, delivered=True))  # another attempt has begun, and was killed

    assert tidy(own_data_bytes=1) == ["jobs/again", "jobs/untold"]


def test_what_was_used_longest_ago_goes_while_there_is_too_much(
    lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    for number in range(1, 6):
        lay(f"blobs/{number}", number, num_bytes=1000)
    lay("jobs/job", 6, delivered=True, num_bytes=5000)

    assert tidy(own_data_bytes=0) == [*(f"blobs/{number}" for number in range(1, 6)), "jobs/job"]
    assert tidy(own_data_bytes=3500) == ["blobs/1", "blobs/2", "blobs/3"]


def test_a_job_that_a_trainer_still_holds_stays(
    lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    """One that was killed and hangs in the kernel, say."""
    held = lay("jobs/held", 8, delivered=True)
    locks = Locks()
    assert locks.take(held, [".trainer.lock"], 1)

    assert tidy() == ["jobs/held"]
    locks.let_go()
    assert tidy() == []


def test_nothing_goes_while_a_job_or_another_worker_is_there(
    own: Path,
    name: NameLock,
    worker: Callable[..., Worker],
    lay: Callable[..., Path],
    tidy: Callable[..., list[str]],
) -> None:
    lay("blobs/old", 8)
    busy = worker()
    tidier = Tidier(busy, name)
    busy.attempt_bells = (Bell(),)
    assert not tidier.due
    tidier.tidy()  # a job that began at this very moment
    assert list(items(own)) != []

    other = Locks()
    assert other.take(own / "locks", ["worker-other.lock"], 1)
    assert tidy() == ["blobs/old"]
    other.let_go()
    assert tidy() == []


def test_what_an_attempt_has_used_meanwhile_stays(
    own: Path, name: NameLock, worker: Callable[..., Worker], lay: Callable[..., Path]
) -> None:
    lay("jobs/used", 8, delivered=True), lay("jobs/old", 8, delivered=True)
    tidier = Tidier(worker(), name)
    listed = list(items(own))
    unmark(own / "jobs" / "used")

    tidier._remove(listed)

    assert [path.name for path in (own / "jobs").iterdir()] == ["used"]


def test_a_shared_folder_is_the_servers_business(
    lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    lay("blobs/old", 1000)

    assert tidy(own_data=False) == ["blobs/old"]


def test_what_a_killed_worker_was_removing_is_removed(
    own: Path, lay: Callable[..., Path], tidy: Callable[..., list[str]]
) -> None:
    lay("jobs/.trash-job", 0)
    file = lay("blobs/sha256/ab/.trash-file", 0)

    assert tidy() == []
    assert list((own / "jobs").iterdir()) == []
    assert not file.exists()


def test_a_worker_tidies_when_it_is_idle_and_fetches_again_what_it_needs(box: "Box") -> None:
    """Everything counts as old here; a job that was never told is there from before."""
    own = box.folder / "one"
    untold = own / "jobs" / "untold" / "logs" / "events.jsonl"
    untold.parent.mkdir(parents=True)
    untold.write_text("{}\n")
    box.start_own_worker("one", own_data_days=1e-9, tidy_seconds=0.1)

    for _ in range(2):
        job = box.post(steps=40, step_seconds=0.02, checkpoint_every=10)
        box.until(lambda job=job: (own / "jobs" / job).exists())  # type: ignore[misc]  # a default of a lambda
        assert box.client.jobs.wait(job, timeout_seconds=30).state == "succeeded"
        assert box.steps(job) == list(range(1, 41))
        box.until(lambda job=job: not (own / "jobs" / job).exists())  # type: ignore[misc]

    box.until(lambda: [path for path in (own / "blobs").rglob("*") if path.is_file()] == [])
    assert untold.exists()
    assert "removed" in box.log("one")
