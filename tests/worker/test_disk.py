"""A disk that fills up: a job is put aside before its checkpoint fails, and goes on by itself when there is space."""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.disks import MIB, fill, small_disk
from tests.worker.conftest import HERE, Box

from sftd.protocol import TRAINER_LINE, CheckpointLine, EventLine
from sftd_worker.disk import (
    DiskWatch,
    Hold,
    after_full,
    clear_stages,
    free_bytes,
    full_path,
    hold_after_full,
    naming,
    stage_bytes,
)
from sftd_worker.trainer.events import Events

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 16) as folder:
        yield folder


# ---------------------------------------------------------------- the trainer's voice


def test_a_line_that_a_full_disk_has_cut_is_made_whole_when_there_is_space(disk: Path) -> None:
    events = Events(disk, attempt=1)
    filler = fill(disk)

    said = 0
    with contextlib.suppress(OSError):
        while said < 10_000:  # of the last line the part that fits is written; only then does a write fail
            said += 1
            events.step(said, {"loss": 0.5})
    cut = (disk / "events.jsonl").read_bytes()
    filler.unlink()
    events.step(said + 1, {"loss": 0.5})

    assert said < 10_000
    assert not cut.endswith(b"\n")
    lines = [TRAINER_LINE.validate_json(line) for line in (disk / "events.jsonl").read_bytes().splitlines()]
    assert [line.step for line in lines if line.type == "step"] == list(range(1, said + 2))


# ---------------------------------------------------------------- looking


def watch(folder: Path, *, reserve: int = 2 * MIB, **more: Any) -> DiskWatch:
    return DiskWatch(folder, attempt=1, reserve=reserve, settle_seconds=60, **more)


def saved(step: int, num_bytes: int) -> CheckpointLine:
    files = {"weights.safetensors": {"bytes": num_bytes, "sha256": "ab" * 32}}
    line = {"attempt": 1, "at": 0, "step": step, "name": f"checkpoint-{step}", "manifest_sha256": "ab" * 32}
    return CheckpointLine.model_validate({**line, "files": files})


def begun(**data: Any) -> EventLine:
    return EventLine(type="run", attempt=1, at=0, message="", data={"total_steps": 10, **data})


def look_twice(watched: DiskWatch, now: float = 1000.0) -> None:
    watched.look(now)
    watched.look(now + 1)


def test_what_is_announced_counts_until_a_checkpoint_tells_its_size(disk: Path) -> None:
    watched = watch(disk)
    watched.heard(begun(checkpoint_bytes=5 * MIB), 0)
    assert watched.needed == 5 * MIB

    watched.heard(saved(2, 6 * MIB), 0)
    watched.heard(begun(checkpoint_bytes=1), 0)

    assert watched.needed == 6 * MIB


def test_a_resumed_run_knows_the_size_from_the_start(disk: Path) -> None:
    resumed = disk / "checkpoint-4"
    resumed.mkdir()
    (resumed / "manifest.json").write_text(json.dumps({"files": {"a": {"bytes": 3}, "b": {"bytes": 4}}}))

    assert watch(disk, resume_from=resumed).needed == 7
    assert watch(disk, resume_from=disk / "nothing").needed == 0


@pytest.mark.parametrize(
    ("leaving", "low", "fits"), [(8 * MIB, False, False), (6 * MIB, True, True), (4 * MIB, True, False)]
)
def test_low_is_less_than_a_checkpoint_and_the_reserve(
    disk: Path, leaving: int, low: bool, fits: bool
) -> None:
    watched = watch(disk)
    watched.heard(begun(checkpoint_bytes=5 * MIB), 0)
    fill(disk, leaving=leaving)

    look_twice(watched)

    assert ((watched.low is not None), watched.fits) == (low, fits)
    if watched.low:
        assert watched.low.needs_disk_bytes == 12 * MIB
        assert "12 MiB are free" in watched.low.message


def test_one_look_is_not_believed(disk: Path) -> None:
    watched = watch(disk)
    watched.heard(begun(checkpoint_bytes=5 * MIB), 0)
    filler = fill(disk, leaving=MIB)

    watched.look(1)
    filler.unlink()
    watched.look(2)
    watched.look(3)

    assert watched.low is None


def test_a_checkpoint_that_is_being_written_counts_as_room(disk: Path) -> None:
    watched = watch(disk)
    watched.heard(begun(checkpoint_bytes=5 * MIB), 0)
    stage = disk / "checkpoints" / ".stage-1"
    stage.mkdir(parents=True)
    (stage / "weights").write_bytes(b"x" * 4 * MIB)
    fill(disk, leaving=4 * MIB)

    look_twice(watched)

    assert stage_bytes(disk, 1) == 4 * MIB
    assert watched.low is None


def test_behind_a_checkpoint_older_ones_have_time_to_go_but_not_for_ever(disk: Path) -> None:
    watched = watch(disk)
    watched.heard(saved(2, 5 * MIB), 1000)
    fill(disk, leaving=MIB)

    for now in range(1000, 1059):
        watched.look(now)
    assert watched.low is None

    # A checkpoint each half minute, and it stays low.
    watched.heard(saved(4, 5 * MIB), 1059)
    watched.look(1061)
    assert watched.low is not None


def test_behind_the_last_checkpoint_no_other_is_made_room_for(disk: Path) -> None:
    watched = watch(disk)
    watched.heard(begun(checkpoint_bytes=5 * MIB), 0)
    watched.heard(saved(10, 5 * MIB), 0)
    fill(disk, leaving=MIB)

    look_twice(watched)

    assert watched.low is None


def test_after_a_full_disk_more_must_be_free_than_was(disk: Path) -> None:
    free = free_bytes(disk)
    assert free is not None

    assert hold_after_full(disk, what="", needed=20 * MIB, reserve=MIB).needs_disk_bytes == 41 * MIB
    assert hold_after_full(disk, what="", needed=MIB, reserve=0).needs_disk_bytes == free + MIB
    assert hold_after_full(disk, what="", needed=0, reserve=0).needs_disk_bytes > free


def test_stages_of_this_and_earlier_attempts_are_cleared_and_no_others(tmp_path: Path) -> None:
    for name in (".stage-1", ".stage-3", ".stage-4", "checkpoint-2", ".trash-checkpoint-2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / ".stage-results-3").mkdir()

    clear_stages(tmp_path, 3)

    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {".stage-4", "checkpoint-2", ".trash-checkpoint-2"}
    assert not (tmp_path / ".stage-results-3").exists()


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path, disk: Path) -> None:
    found = free_bytes(disk / "jobs" / "job_1")

    assert found is not None
    assert found <= 16 * MIB


# ---------------------------------------------------------------- a worker on a small disk


@pytest.fixture
def small(data: Path) -> Iterator[Path]:
    """The disk that the jobs of the scripted server lie on."""
    with small_disk(data / "jobs", 16) as folder:
        yield folder


def last_call(server: "FakeServer") -> dict[str, Any]:
    return dict(server.until(lambda: server.last_calls)[-1][1])


def test_a_job_saves_once_more_and_is_put_aside(
    small: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start(
        {"steps": 10**6, "step_seconds": 0.02, "checkpoint_bytes": 2 * MIB}, disk_reserve_bytes=4 * MIB
    )
    server.until(lambda: len(server.steps()) > 5)

    fill(small, leaving=5 * MIB)
    body = last_call(server)

    assert (body["state"], body["pause_reason"]) == ("paused", "disk_low")
    assert body["needs_disk_bytes"] == 8 * MIB
    assert [report["step"] for report in server.checkpoints] == [server.steps()[-1]]
    assert worker.trainer_gone()


def test_a_job_whose_checkpoint_finds_no_room_stops_without_one(
    small: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start(
        {"steps": 10**6, "step_seconds": 0.02, "checkpoint_bytes": 2 * MIB}, disk_reserve_bytes=4 * MIB
    )
    server.until(lambda: len(server.steps()) > 5)

    fill(small, leaving=MIB)
    body = last_call(server)

    assert body["pause_reason"] == "disk_low"
    assert "there is no room for one" in body["message"]
    assert server.checkpoints == []
    assert (worker.folder / "signals.txt").read_text() == "SIGTERM\n"


def test_a_job_whose_save_failed_is_put_aside_and_leaves_its_last_checkpoint_alone(
    small: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """No reserve, and an estimate that is far too low: the disk is really full then."""
    server.post_job()
    script = {"steps": 10**6, "step_seconds": 0.02, "checkpoint_bytes": 6 * MIB, "checkpoint_every": 10}
    worker.start(script, disk_reserve_bytes=0, disk_settle_seconds=1000)

    body = last_call(server)

    assert (body["state"], body["pause_reason"]) == ("paused", "disk_low")
    assert "checkpoint of step 30: the disk is full" in body["message"]
    assert body["needs_disk_bytes"] == 12 * MIB
    checkpoints = worker.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    for report in server.checkpoints:
        content = (checkpoints / report["name"] / "adapter.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == report["files"]["adapter.safetensors"]["sha256"]


@pytest.mark.parametrize("end", ["path", "no path", "words"])
def test_a_disk_that_is_full_elsewhere_fails_the_job_by_name(
    end: str, disk: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """Of temporary files, say. There is room where the jobs lie: no server would ever see more of it."""
    fill(disk)
    script = {"steps": 9, "at": 2, "end": "full_words" if end == "words" else "full"}
    if end == "path":
        script["full_path"] = str(disk / "tmp" / "file")
    server.post_job()
    worker.start(script, disk_reserve_bytes=MIB, env={"TMPDIR": "/var/tmp"})

    body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "disk_full")
    assert body["pause_reason"] is None
    assert "TMPDIR" in body["message"]
    assert (str(disk) if end == "path" else "/var/tmp") in body["message"]


def test_where_the_full_disk_is_decides_what_becomes_of_a_job(disk: Path, tmp_path: Path) -> None:
    def found(path: Path | None, folder: Path, reserve: int = 0) -> Hold | str:
        return after_full(folder, what="", path=path and str(path), needed=0, reserve=reserve)

    assert isinstance(found(disk / "x" / "y", tmp_path / "jobs"), str)
    assert isinstance(found(None, tmp_path), str)
    assert isinstance(found(tmp_path / "a", tmp_path / "jobs"), Hold)  # a quota, say
    assert isinstance(found(disk / "x", disk / "jobs"), Hold)
    assert isinstance(found(None, disk, reserve=20 * MIB), Hold)
    fill(disk)
    assert isinstance(found(None, disk), Hold)


def test_a_write_that_finds_no_room_names_its_file(disk: Path) -> None:
    fill(disk)

    with pytest.raises(OSError, match="No space left") as error, naming(disk / "file"):
        (disk / "file").write_bytes(b"x" * MIB)

    assert error.value.filename == str(disk / "file")
    assert full_path(f"Traceback\n  …\n{type(error.value).__name__}: {error.value}") == str(disk / "file")


def test_a_job_that_comes_to_a_full_disk_is_put_aside_before_it_begins(
    small: Path, server: "FakeServer", worker: "WorkerProcess"
) -> None:
    fill(small)
    server.post_job()
    worker.start({"steps": 3}, disk_reserve_bytes=MIB)

    body = last_call(server)

    assert (body["state"], body["pause_reason"]) == ("paused", "disk_low")
    assert body["needs_disk_bytes"] > MIB
    assert worker.process
    assert worker.process.poll() is None


# ---------------------------------------------------------------- with the server


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A server and workers whose jobs lie on a disk of 32 MiB."""
    with small_disk(tmp_path / "data" / "jobs", 32):
        box = Box(tmp_path)
        yield box
        for process in box.processes:
            process.kill()
            process.wait()


SETTINGS = {"disk_reserve_bytes": 4 * MIB, "disk_settle_seconds": 0}


def seconds_until(box: Box, ready: Callable[[], object], most: float) -> float:
    began = time.monotonic()
    box.until(ready, most)
    return time.monotonic() - began


def test_a_job_on_a_full_disk_goes_on_by_itself_and_loses_nothing(box: Box) -> None:
    box.start_worker("one", **SETTINGS)
    job_id = box.post(steps=150, step_seconds=0.03, checkpoint_bytes=3 * MIB)
    box.until(lambda: len(box.steps(job_id)) > 10)

    filler = fill(box.data / "jobs", leaving=5 * MIB)
    box.until(lambda: box.client.jobs.retrieve(job_id).state == "paused", 10)
    paused_at = box.client.jobs.retrieve(job_id).step
    event = [event for event in box.client.jobs.events(job_id) if event.type == "paused"][-1]
    assert event.data == {"pause_reason": "disk_low", "needs_disk_bytes": 10 * MIB}
    assert [found.step for found in box.client.jobs.checkpoints(job_id)] == [paused_at]

    with filler.open(
        "r+b"
    ) as file:  # a little space is not enough: no job comes back only to be put aside again
        file.truncate(filler.stat().st_size - 3 * MIB)
    time.sleep(5)
    assert box.client.jobs.retrieve(job_id).state == "paused"

    filler.unlink()
    resumed = lambda: box.client.jobs.retrieve(job_id).state != "paused"  # noqa: E731
    assert seconds_until(box, resumed, 10) < 10
    job = box.client.jobs.wait(job_id, timeout_seconds=20)

    assert (job.state, job.attempt) == ("succeeded", 2)
    assert box.steps(job_id) == list(range(1, 151))
    assert [event.type for event in box.client.jobs.events(job_id)].count("paused") == 1


def test_a_stalled_job_goes_on_from_its_checkpoint(box: Box) -> None:
    box.start_worker("one", **SETTINGS, stall_seconds=1, stall_factor=5)
    job_id = box.post(steps=60, step_seconds=0.02, checkpoint_every=10, hang_at=35)

    job = box.client.jobs.wait(job_id, timeout_seconds=30)

    assert (job.state, job.attempt) == ("succeeded", 2)
    assert box.steps(job_id) == list(range(1, 61))
    events = list(box.client.jobs.events(job_id))
    assert [event.data for event in events if event.type == "retrying"] == [{"reason": "stalled"}]
    assert any("hang_without_a_word" in line.text for line in box.client.jobs.logs(job_id))


@pytest.mark.slow
def test_the_real_trainer_comes_to_the_same_result_over_a_full_disk(box: Box) -> None:
    from examples import tiny_model

    rows = HERE.parents[1] / "examples" / "q_basics.jsonl"
    model = tiny_model.build(box.data / "models" / "tiny", rows, hidden_size=64, vocab_size=1024)
    file = box.client.files.upload(rows)
    box.start_worker(
        "one", **SETTINGS, offline=True, trainer_argv=[sys.executable, "-m", "sftd_worker.trainer"]
    )

    def post() -> str:
        return box.client.jobs.create(
            base_model=str(model),
            training_file=file.id,
            method="full",
            learning_rate=1e-3,
            max_steps=120,
            save_steps=50,
            batch_size=2,
            gradient_accumulation_steps=1,
            max_seq_length=256,
            on_overlong="truncate",
            precision="fp32",
        ).id

    def result(job_id: str) -> bytes:
        return (box.data / "jobs" / job_id / "results" / "model.safetensors").read_bytes()

    def losses(job_id: str) -> list[tuple[int, float]]:
        return [(point.step, point.loss) for point in box.client.jobs.metrics(job_id)]

    peaceful = post()
    box.client.jobs.wait(peaceful, timeout_seconds=120)
    disturbed = post()
    box.until(lambda: len(box.steps(disturbed)) > 3, 60)
    needed = sum(file.bytes for file in next(iter(box.client.jobs.checkpoints(peaceful))).files.values())
    filler = fill(box.data / "jobs", leaving=needed + 2 * MIB)
    box.until(lambda: box.client.jobs.retrieve(disturbed).state == "paused", 30)
    newest = list(box.client.jobs.checkpoints(disturbed))[-1]
    folder = box.data / "jobs" / disturbed / "checkpoints"
    for name, told in newest.files.items():
        content = (folder / f"checkpoint-{newest.step}" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (told.bytes, told.sha256)
    assert not list(folder.glob(".*"))

    filler.unlink()
    job = box.client.jobs.wait(disturbed, timeout_seconds=120)

    assert (job.state, job.attempt) == ("succeeded", 2)
    assert losses(disturbed) == losses(peaceful)
    assert result(disturbed) == result(peaceful)
