"""Disks: full (F10), and checkpoints that were spoiled behind the service's back (F16); kills inside a save (F2)."""

import contextlib
import ctypes
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.disks import MIB, fill
from tests.faults.line import Line, NotPossible, Run
from tests.faults.world import World


def full_disk(line: Run) -> None:
    """F10: the disk of database, spools and checkpoints fills under running jobs: 507, nothing lost, back within 10 s."""
    with tmpfs(line.folder / "small", 96 * MIB) as small:
        world = line.world(lease_seconds=3, data=small / "data")
        world.start_server()
        for i in range(2):
            world.add_worker(f"worker-{i}")
        for _ in range(4):
            world.post(steps=300, save_steps=15, pace=0.02)
        world.wait(lambda: len(world.trainers()) == 2, "two trainers")
        recoveries, statuses = [], set()
        for _ in range(line.times(2, 10)):
            time.sleep(1.5)
            filler = fill(small)
            until = time.monotonic() + 3
            while time.monotonic() < until:
                statuses.add(
                    world.client.post("/jobs", json=world.plan(steps=1).spec | {"max_steps": 3}).status_code
                )
                fill(small)  # what was freed meanwhile
                time.sleep(0.1)
            filler.unlink()
            recoveries.append(_seconds_until_taken(world))
        line.require(
            statuses <= {200, 507, 503, 429}, f"with a full disk the server answered {sorted(statuses)}"
        )
        line.require(507 in statuses, f"the disk was never full for the server: {sorted(statuses)}")
        line.require(max(recoveries) < 10, f"recovery took {max(recoveries):.1f} s")
        world.plans = {key: plan for key, plan in world.plans.items() if plan.job_id}
        world.wait(world.all_over, "the jobs to end", seconds=120)
        line.figures |= {"answers": sorted(statuses), "recovery_seconds_max": round(max(recoveries), 2)}
        line.require(world.tables.is_whole(), "SQLite's integrity_check finds the database damaged")
        line.settle(world)
        world.close()


def _seconds_until_taken(world: World) -> float:
    """How long until a job is taken again, by the server and by a worker."""
    begun = time.monotonic()
    plan = world.plan(steps=2, priority=10)
    world.submit(plan)
    world.wait(lambda: world.state(plan) not in ("queued",), "a job to be taken after the disk was full")
    return time.monotonic() - begun


@contextlib.contextmanager
def tmpfs(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A small disk. Raises NotPossible where mounting is not allowed."""
    folder.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={num_bytes}".encode()) != 0:
        raise NotPossible(f"tmpfs can not be mounted here ({os.strerror(ctypes.get_errno())}); it needs root")
    try:
        yield folder
    finally:
        for _ in range(50):
            if libc.umount2(str(folder).encode(), 0) == 0:
                break
            time.sleep(0.1)
        else:
            libc.umount2(str(folder).encode(), 2)  # MNT_DETACH


# ---------------------------------------------------------------- F16


def spoiled(line: Run) -> None:
    """F16: the newest checkpoint is truncated, flipped, swapped, emptied or gone: the run goes on from the one before."""
    ways: dict[str, Callable[[Path], None]] = {
        "truncated": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
        "bit flipped": lambda folder: _flip(folder / "adapter_model.safetensors"),
        "swapped": lambda folder: _swap(
            folder / "adapter_model.safetensors", folder / "optimizer.safetensors"
        ),
        "emptied": lambda folder: os.truncate(folder / "adapter_model.safetensors", 0),
        "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
        "another's files": lambda folder: _copy_older(folder),
        "folder gone": shutil.rmtree,
    }
    world = line.world()
    world.start_server()
    plans = {way: world.post(steps=60, save_steps=10, pace=0.05) for way in ways}
    for i in range(len(ways)):
        world.add_worker(f"worker-{i}")
    world.wait(
        lambda: all(len(recorded(world, plan.job_id)) >= 2 for plan in plans.values()), "two checkpoints each"
    )
    for name in world.workers:
        world.kill_worker(name)
    fell_back_from = {}
    for way, plan in plans.items():
        name = recorded(world, plan.job_id)[-1]
        assert plan.job_id is not None
        ways[way](world.data / "jobs" / plan.job_id / "checkpoints" / name)
        world.damaged.add((plan.job_id, name))
        fell_back_from[way] = (plan, name)
    for name in world.workers:
        world.start_worker(name)
    world.wait(world.all_over, "the jobs to end")
    for way, (plan, name) in fell_back_from.items():
        events = world.tables.rows(
            "SELECT data FROM event JOIN job ON job.number = event.job WHERE job.id = ? AND type = 'checkpoint_corrupt'",
            plan.job_id,
        )
        line.require(
            len(events) == 1 and name in events[0]["data"], f"{way}: {len(events)} events checkpoint_corrupt"
        )
    line.figures["ways"] = sorted(ways)
    world.damaged = {  # a checkpoint that was written anew under the same name must verify again
        (job, name) for job, name in world.damaged if _is_struck(world, job, name)
    }
    line.settle(world)


def recorded(world: World, job_id: str | None) -> list[str]:
    """Names of a job's checkpoints on record, oldest first."""
    rows = world.tables.rows(
        "SELECT checkpoint.name FROM checkpoint JOIN job ON job.number = checkpoint.job WHERE job.id = ?"
        " ORDER BY checkpoint.step",
        job_id,
    )
    return [row["name"] for row in rows]


def _is_struck(world: World, job_id: str, name: str) -> bool:
    rows = world.tables.rows(
        "SELECT corrupt FROM checkpoint JOIN job ON job.number = checkpoint.job WHERE job.id = ? AND checkpoint.name = ?",
        job_id,
        name,
    )
    return bool(rows[0]["corrupt"])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _swap(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def _copy_older(folder: Path) -> None:
    """The whole checkpoint before, under this one's name: each file fits its manifest."""
    older = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


# ---------------------------------------------------------------- F2


def inside_saves(line: Run) -> None:
    """F2: the trainer is killed while a stage lies on disk, again and again: none is stuck, none resumes from half a save."""
    world = line.world(lease_seconds=5)
    world.start_server()
    for i in range(2):
        world.add_worker(f"worker-{i}")
    wanted = line.times(30, 100)
    hits = 0
    begun = time.monotonic()
    while hits < wanted and time.monotonic() - begun < line.times(60, 600):
        if world.states()["queued"] < 2:
            world.post(steps=24, save_steps=4, pace=0.005, metadata={"save_seconds": "0.06"})
        hits += _kill_in_stage(world)
    line.figures["kills_inside_saves"] = hits
    line.require(hits >= wanted, f"only {hits} of {wanted} kills came inside a save")
    world.wait(world.all_over, "the jobs to end", seconds=60)
    line.settle(world)


def _kill_in_stage(world: World) -> int:
    """Kill a trainer whose stage lies on disk now."""
    for job in world.tables.rows("SELECT id FROM job WHERE state = 'running'"):
        folder = world.data / "jobs" / job["id"]
        if not any((folder / "checkpoints").glob(".stage-*")):
            continue
        with contextlib.suppress(OSError, ValueError):
            pid = int((world.watch / f"{job['id']}.lock").read_text().split()[0])
            if pid in world.trainers():
                world.kill_trainer(pid)
                return int(any((folder / "checkpoints").glob(".stage-*")))
    time.sleep(0.005)
    return 0


LINES = [
    Line("inside saves", "F2", inside_saves),
    Line("full disk", "F10", full_disk),
    Line("spoiled checkpoints", "F16", spoiled, alone=False),
]
