"""Time: wall clocks that jump and drift (F13), processes that are starved or stand still for a third of a lease (F14)."""

import glob
import os
import signal
import subprocess
import sys
import time

from tests.faults.line import Line, NotPossible, Run
from tests.faults.world import World

# The one for processes with threads: the other hangs in them.
FAKETIME = ["/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/*/faketime/libfaketimeMT.so.1"]
LEASE_SECONDS = 20.0  # long enough for a busy machine: what is looked for is a job that is lost to a clock


def clocks(line: Run) -> None:
    """F13: the server's wall clock jumps an hour each way and five seconds back, and drifts by 10 %: no job is requeued."""
    library = next((path for pattern in FAKETIME for path in glob.glob(pattern)), None)
    if library is None:
        raise NotPossible("libfaketime is not installed; `apt-get install faketime` brings it")
    world = line.world(lease_seconds=LEASE_SECONDS)
    clock = line.folder / "clock"
    clock.write_text("+0\n")
    environment = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    world.start_server(cold=True, env=environment)
    for i in range(2):
        world.add_worker(f"worker-{i}")
        world.post(steps=2000, save_steps=100, pace=0.05)
    world.wait(lambda: len(world.trainers()) == 2, "two trainers")
    for offset in ("+3600", "+0", "-3600", "+0", "-5", "+0", "+3", "+0", "+0 x1.1"):
        clock.write_text(f"{offset}\n")
        time.sleep(line.times(3, 20))
    line.require(
        _jumps(world) >= 4, f"the clock was moved nine times, and the server has noticed {_jumps(world)}"
    )
    line.require(_lost(world) == 0, f"{_lost(world)} jobs were requeued by a clock")
    # A worker that dies at a jump is found out all the same.
    clock.write_text("+3600\n")
    world.kill_worker("worker-0")
    begun = time.monotonic()
    world.wait(lambda: _lost(world) >= 1, "the dead worker's job to be requeued", seconds=60)
    took = time.monotonic() - begun
    line.require(took < 2 * LEASE_SECONDS, f"a lease lived {took:.1f} s behind its worker's death")
    world.start_worker("worker-0")
    line.figures |= {"clock_jumps_seen": _jumps(world), "requeued_after_death_seconds": round(took, 1)}
    for plan in world.plans.values():
        world.cancel(plan)
    world.wait(world.all_over, "the jobs to end", seconds=60)
    clock.write_text("+0\n")
    for plan in world.plans.values():
        plan.cancel_heard_at = None  # its end was written by a clock that lies
    world.stop_workers()
    world.kill_server()
    world.start_server()
    line.check(world)


def _lost(world: World) -> int:
    return int(world.tables.rows("SELECT count(*) AS n FROM event WHERE type = 'lease_expired'")[0]["n"])


def _jumps(world: World) -> int:
    """How often the server has found its clock moved: an event on each job that ran then."""
    return int(
        world.tables.rows("SELECT count(DISTINCT created_at) AS n FROM event WHERE type = 'clock_jump'")[0][
            "n"
        ]
    )


def starved(line: Run) -> None:
    """F14: every core is wanted by others, and server and worker stand still for a third of a lease: no lease is lost."""
    world = line.world(lease_seconds=12)
    world.start_server()
    world.add_worker("starved", heartbeat_wait_seconds=1)
    plan = world.post(steps=350, save_steps=50, pace=0.05)
    world.wait(world.trainers, "a trainer")
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 2))
    ]
    try:
        process = world.workers["starved"].process
        assert process is not None
        for stopped in (process, world.server, process):
            stopped.signal(signal.SIGSTOP)
            time.sleep(world.lease_seconds / 3)
            stopped.signal(signal.SIGCONT)
            time.sleep(2)
    finally:
        for one in busy:
            one.kill()
            one.wait()
    world.wait(world.all_over, "the job to end")
    attempts = world.job(plan)["attempt"]
    line.require(attempts == 1, f"the lease was lost: {attempts} attempts")
    line.figures["stood_still_share_of_lease"] = 0.33
    line.settle(world)


LINES = [Line("clocks", "F13", clocks, alone=False), Line("starved", "F14", starved)]
