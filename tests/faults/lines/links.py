"""The network alone: cut in every way while a job runs (F8), slow and full of idle connections (F9)."""

import contextlib
import socket
import threading
import time

from tests.faults.line import Line, Run
from tests.faults.network import DEAF, DROP, OPEN, REJECT
from tests.faults.world import World

FLAP = "flap"


def cuts(line: Run) -> None:
    """F8: the worker that holds the job is cut off: another has it within a lease, and never do two train it at once."""
    waits: dict[str, float] = {}
    for mode in (DROP, REJECT, DEAF, FLAP):
        world = line.world(lease_seconds=2)
        world.start_server()
        cut_off = world.add_worker("cut-off")
        plan = world.post(steps=400, save_steps=20, pace=0.02)
        world.wait(lambda world=world: _checkpoints(world), "a checkpoint")
        world.add_worker("spare")
        begun = time.monotonic()
        if mode == FLAP:
            _flap(world, seconds=8)
        else:
            cut_off.link.faults.mode = mode
            world.wait(lambda world=world: _attempt(world) >= 2, "the job to be handed on", seconds=20)
            waits[mode] = round(time.monotonic() - begun, 2)
            # The lease may have been renewed until the worker gave up, where it is deaf.
            most = (1.8 if mode == DEAF else 1.0) * world.lease_seconds + 0.2 + 1.5 * line.patience
            line.require(
                waits[mode] < most, f"{mode}: handed on after {waits[mode]:.1f} s, {most:.1f} s are allowed"
            )
            time.sleep(world.lease_seconds / 2)
        cut_off.link.faults.mode = OPEN
        world.wait(world.all_over, "the job to end", seconds=60)
        line.require(world.state(plan) == "succeeded", f"{mode}: the job is {world.state(plan)}")
        line.settle(world)
        world.close()
    line.figures["handed_on_after_seconds"] = waits


def _flap(world: World, *, seconds: float) -> None:
    """The link comes and goes, each time for less than a lease or a little more."""
    faults = world.workers["cut-off"].link.faults
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        faults.mode = world.random.choice([DROP, REJECT, DEAF])
        time.sleep(world.lease_seconds * world.random.uniform(0.1, 1.2))
        faults.mode = OPEN
        time.sleep(world.lease_seconds * world.random.uniform(0.1, 0.5))


def slow(line: Run) -> None:
    """F9: three seconds of latency, hundreds of connections that say nothing or very little: no lease is lost."""
    world = line.world(lease_seconds=30)  # the default, which is made for such networks
    world.start_server()
    far = world.add_worker("far", claim_wait_seconds=20, heartbeat_wait_seconds=3)
    far.link.faults.latency_seconds = 1.5
    world.add_worker("near", heartbeat_wait_seconds=3)
    far_job = world.post(steps=20, save_steps=20, pace=0.1)
    near_job = world.post(steps=100, save_steps=25, pace=0.1)
    idle = Idlers(world.port, count=line.times(300, 2000))
    slowest = 0.0
    while not world.all_over():
        begun = time.monotonic()
        world.job(near_job)
        slowest = max(slowest, time.monotonic() - begun)
        line.require(time.monotonic() - idle.since < 90, "the jobs did not end within 90 s")
        if line.violations:
            break
        time.sleep(0.2)
    idle.close()
    world.network.heal()
    for plan in (far_job, near_job):
        line.require(world.job(plan)["attempt"] == 1, "a lease was lost though the worker was alive")
    line.figures |= {"idle_connections": idle.count, "slowest_answer_seconds": round(slowest, 2)}
    line.require(slowest < 3 * line.patience, f"an answer took {slowest:.1f} s beside idle connections")
    line.settle(world)


class Idlers:
    """Connections of a stranger that send a request a byte at a time, half a request, or nothing.

    They come from an address of their own: where one address has too many, its own idle ones make room, and that may be
    one whose request has not been read yet.
    """

    def __init__(self, port: int, *, count: int) -> None:
        self.count = count
        self.since = time.monotonic()
        self._ends = threading.Event()
        self._sockets = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                self._sockets.append(
                    socket.create_connection(("127.0.0.1", port), timeout=5, source_address=("127.0.0.2", 0))
                )
        self._thread = threading.Thread(target=self._drip, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        for idle in self._sockets:
            idle.close()

    def _drip(self) -> None:
        request = b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n{" + b" " * 1000
        position = 0
        while not self._ends.wait(0.5):
            for number, idle in enumerate(self._sockets):
                if number % 3:
                    with contextlib.suppress(OSError):
                        idle.send(request[position : position + (1 if number % 3 == 1 else 40)])
            position += 1


def _checkpoints(world: World) -> int:
    return int(world.tables.rows("SELECT count(*) AS n FROM checkpoint")[0]["n"])


def _attempt(world: World) -> int:
    return int(world.tables.rows("SELECT max(attempt) AS n FROM job")[0]["n"])


LINES = [Line("cuts", "F8", cuts, alone=False), Line("slow", "F9", slow, alone=False)]
