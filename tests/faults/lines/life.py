"""The life of jobs and workers: cancels and drains at any moment (F20, F21), two workers of one name (F17), one GPU for two."""

import itertools
import random
import signal
import stat
import threading
import time

from tests.faults.line import Line, Run
from tests.faults.world import World

CANCEL_SECONDS = 45  # what F20 allows with the default lease


def cancels(line: Run) -> None:
    """F20: a job is cancelled at a random moment of its life, again and again; a third of the trainers ignore signals."""
    world = line.world(lease_seconds=3)
    world.start_server()
    for i in range(3):
        world.add_worker(f"worker-{i}")
    slowest: list[float] = []

    def user(number: int) -> None:
        dice = random.Random(f"cancels {line.seed} {number}")
        for _ in range(line.times(10, 34)):
            stubborn = {"ignore_signals": "1"} if dice.random() < 0.33 else {}
            plan = world.plan(
                steps=10_000, save_steps=10, pace=0.01, metadata={"save_seconds": "0.05", **stubborn}
            )
            world.submit(plan)
            time.sleep(dice.choice([0, dice.uniform(0, 0.3), dice.uniform(0, 1.5)]))
            begun = time.monotonic()
            world.cancel(plan)
            world.wait(
                lambda plan=plan: world.state(plan) == "cancelled",
                "a cancel",
                seconds=CANCEL_SECONDS,
                pause=0.02,
            )  # type: ignore[misc]  # bound now
            slowest.append(time.monotonic() - begun)

    threads = [_guarded(line, user, number) for number in range(3)]
    for thread in threads:
        thread.join()
    last = world.post(steps=5, save_steps=5)
    world.wait(lambda: world.state(last) == "succeeded", "a job after all the cancelled ones", seconds=15)
    line.figures |= {"cancels": len(slowest), "slowest_cancel_seconds": round(max(slowest, default=0), 2)}
    line.require(len(slowest) == 3 * line.times(10, 34), "not every cancel came true")
    line.settle(world)


def drains(line: Run) -> None:
    """F21: a worker is told to stop at a random moment, sometimes twice: no job fails, and no step is made again."""
    world = line.world(lease_seconds=5)
    world.start_server()
    names = ["worker-0", "worker-1"]
    for name in names:
        world.add_worker(name)
    dice = line.random
    for _ in range(6):
        world.post(steps=400, save_steps=25, pace=0.01, metadata={"save_seconds": "0.03"})
    num_drains, twice = 0, 0
    started = dict.fromkeys(names, time.monotonic())
    for _ in range(line.times(16, 100)):
        time.sleep(dice.choice([0.05, dice.uniform(0, 0.4), dice.uniform(0.3, 1.0)]))
        name = dice.choice(names)
        process = world.workers[name].process
        assert process is not None
        process.signal(signal.SIGTERM)
        num_drains += 1
        if dice.random() < 0.3:
            time.sleep(dice.uniform(0, 0.1))
            process.signal(signal.SIGTERM)
            twice += 1
        code = process.wait(20)
        # One that does not listen for signals yet has done nothing yet.
        young = code == -signal.SIGTERM and time.monotonic() - started[name] < 1
        line.require(code == 0 or young, f"a worker that was told to stop ended with {code}")
        world.start_worker(name)
        started[name] = time.monotonic()
    world.wait(world.all_over, "the jobs to end", seconds=90)
    failures = world.tables.rows("SELECT sum(failures) AS n FROM job")[0]["n"]
    line.require(failures == 0, f"{failures} failures by drains")
    lost_steps = _steps_made_again(world)
    line.figures |= {
        "drains": num_drains,
        "told_twice": twice,
        "most_steps_made_again": max(lost_steps, default=0),
    }
    line.require(max(lost_steps, default=0) <= 1, f"{max(lost_steps)} steps were made again after a drain")
    line.settle(world)


def _steps_made_again(world: World) -> list[int]:
    """For each attempt that was given back after one request to stop: steps it had made that the next made again."""
    rows = world.tables.rows(
        "SELECT attempt.job, attempt.attempt, outcome, start_step,"
        " (SELECT max(step) FROM metric WHERE metric.job = attempt.job AND metric.attempt = attempt.attempt) AS last"
        " FROM attempt ORDER BY attempt.job, attempt.attempt"
    )
    hurried = {
        (row["job"], row["attempt"])
        for row in rows
        if not _saved_last(world, row["job"], row["attempt"], row["last"])
    }
    found = []
    for row, after in itertools.pairwise(rows):
        if row["job"] == after["job"] and row["outcome"] == "released" and row["last"] is not None:
            start = after["start_step"] if after["start_step"] is not None else row["last"]
            if (row["job"], row["attempt"]) not in hurried:
                found.append(max(0, row["last"] - max(start, 0)))
    return found


def _saved_last(world: World, job: int, attempt: int, step: int | None) -> bool:
    """Did the attempt save where it stopped? One that is told to stop twice is killed instead."""
    rows = world.tables.rows(
        "SELECT max(step) AS step FROM checkpoint WHERE job = ? AND attempt = ?", job, attempt
    )
    return step is None or (rows[0]["step"] is not None and rows[0]["step"] >= step - 1)


def twins(line: Run) -> None:
    """F17: two workers of one name and one configuration, as a cloned machine starts them: both are served, as two."""
    world = line.world()
    world.start_server()
    for number in range(2):
        box = world.add_worker(f"twin-{number}", start=False, worker_name="twin")
        world.start_worker(box.name)
    for _ in range(6):
        world.post(steps=40, save_steps=10, pace=0.02)
    world.wait(world.all_over, "the jobs to end")
    boots = world.tables.rows("SELECT DISTINCT boot_id FROM attempt WHERE worker_id = 'twin'")
    line.require(len(boots) == 2, f"{len(boots)} boot ids ran jobs")
    line.settle(world)


def one_gpu(line: Run) -> None:
    """I12: two workers share the GPUs of one box, and one is stopped past its lease: its GPU is not used by two trainers."""
    tools = line.folder / "bin"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor i in 0 1; do echo "$i, GPU-fa0170-$i, 24576, Harness"; done\n')
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    world = line.world(lease_seconds=2)
    world.start_server()
    path = f"{tools}:/usr/bin:/bin"
    for i in range(2):
        world.add_worker(f"box-{i}", start=False, device="cuda", gpus=2)
        world.start_worker(f"box-{i}", PATH=path)
    for _ in range(line.times(4, 20)):
        world.post(steps=150, save_steps=10, pace=0.02)
    dice = line.random
    for _ in range(line.times(4, 25)):
        time.sleep(dice.uniform(0.3, 1.0))
        name = dice.choice(["box-0", "box-1"])
        world.workers[name].link.faults.hold_seconds = (world.lease_seconds, 2 * world.lease_seconds)
        world.freeze_worker(name, world.lease_seconds * 1.6, dice)
        time.sleep(world.lease_seconds * 1.6)
        world.wake_worker(name)
    world.wait(world.all_over, "the jobs to end", seconds=90)
    held = (world.watch / "trainers.jsonl").read_text()
    line.require("gpu-GPU-fa0170-0.lock" in held, "no trainer held a GPU's lock")
    line.settle(world)


def comes_back(line: Run) -> None:
    """F1: a worker that was killed and starts again has its jobs back in seconds, not after a lease of half a minute."""
    world = line.world(lease_seconds=30)
    world.start_server()
    world.add_worker("box")
    plan = world.post(steps=600, save_steps=20, pace=0.02)
    waits = []
    for _ in range(line.times(3, 30)):
        step = world.job(plan)["step"]
        world.wait(lambda step=step: world.job(plan)["step"] > step + 15, "some steps")  # type: ignore[misc]  # bound now
        world.kill_worker("box")
        attempt = world.job(plan)["attempt"]
        begun = time.monotonic()
        world.start_worker("box")
        world.wait(lambda attempt=attempt: _runs(world, attempt + 1), "the job to run again", pause=0.02)  # type: ignore[misc]  # bound now
        waits.append(time.monotonic() - begun)
    line.figures["back_after_seconds_max"] = round(max(waits), 2)
    line.require(max(waits) < 5 * line.patience, f"the job ran again after {max(waits):.1f} s")
    world.wait(world.all_over, "the job to end")
    line.settle(world)


def _runs(world: World, attempt: int) -> bool:
    rows = world.tables.rows("SELECT state, attempt FROM job")
    return rows[0]["state"] == "running" and rows[0]["attempt"] >= attempt


def _guarded(line: Run, act: "object", number: int) -> threading.Thread:
    """A thread whose end by an error is a violation."""

    def run() -> None:
        try:
            act(number)  # type: ignore[operator]  # a function of one number
        except Exception as error:  # the edge of a thread
            line.violations.append(f"user {number}: {error!r}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


LINES = [
    Line("cancels", "F20", cancels),
    Line("drains", "F21", drains),
    Line("comes back", "F1", comes_back, alone=False),
    Line("twins", "F17", twins, alone=False),
    Line("one gpu", "F4", one_gpu, must_fence=True, alone=False),
]
