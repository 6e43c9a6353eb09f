"""The server alone: killed under writers (F3), away for long (F7), asked by many at once (F18, F19)."""

import asyncio
import json
import threading
import time
from typing import Any

from tests.faults.byhand import Writer
from tests.faults.line import Line, Run
from tests.faults.world import ADMIN_KEY, World


def server_kills(line: Run) -> None:
    """F3: kill -9 in a loop under 8 writers: no acknowledged write lost, quick recovery, no job requeued."""
    world = line.world(lease_seconds=10)
    world.start_server()
    for _ in range(8):
        plan = world.plan(steps=1)
        plan.lawful = False
        world.submit(plan)
    writers = [Writer(world, f"writer-{i}") for i in range(8)]
    for writer in writers:
        writer.start()
    recoveries = []
    for number in range(line.times(20, 200)):
        time.sleep(line.random.uniform(0.05, 0.35))
        world.kill_server(refused=line.random.random() < 0.5)
        cold = number % 5 == 4  # as it is started in life; the others are forked, and take no time
        took = world.start_server(cold=cold)
        if cold:
            recoveries.append(took)
    for writer in writers:
        writer.end()
        line.require(writer.error is None, f"I4: {writer.name}: {writer.error}")
    requeued = world.tables.rows(
        "SELECT count(*) AS n FROM event WHERE type IN ('lease_expired', 'not_started')"
    )[0]["n"]
    line.require(requeued == 0, f"{requeued} jobs were requeued by restarts")
    line.require(world.tables.is_whole(), "SQLite's integrity_check finds the database damaged")
    line.figures |= {
        "recovery_seconds_max": round(max(recoveries), 2),
        "batches": sum(writer.num_batches for writer in writers),
        "requeued": requeued,
    }
    line.within(max(recoveries), 2, "recovery")
    line.settle(world)


def outage(line: Run) -> None:
    """F7: the server is away for many leases while jobs run: none is lost or run again, the spool drains in order."""
    world = line.world(lease_seconds=4)
    world.start_server()
    for i in range(3):
        world.add_worker(f"worker-{i}")
        world.post(steps=180, save_steps=40, pace=0.1)
    world.wait(lambda: len(world.trainers()) == 3, "three trainers")
    time.sleep(1)
    world.kill_server(refused=True)
    away = line.times(16, 1800)
    time.sleep(away)
    world.start_server()
    world.wait(world.all_over, "the jobs to end", seconds=60)
    attempts = [row["attempt"] for row in world.tables.rows("SELECT attempt FROM job")]
    line.require(attempts == [1, 1, 1], f"the jobs have the attempts {attempts}")
    line.figures["outage_leases"] = away / 4
    line.settle(world)


def submits(line: Run) -> None:
    """F19: 100 posts at once with one key: one job, 100 equal answers; some of them lose their first answer."""
    world = line.world()
    world.start_server()
    world.users.faults.lose_answers = 0.2
    for _ in range(line.times(2, 20)):
        plan = world.plan(steps=1)
        plan.lawful = False
        answers: list[str] = []

        def post(plan=plan, answers=answers) -> None:  # type: ignore[no-untyped-def]  # bound now
            answers.append(world.submit(plan))

        threads = [threading.Thread(target=post) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        line.require(
            len(answers) == 100 and len(set(answers)) == 1, f"I9: {len(set(answers))} different answers"
        )
    line.check(world, ends={"queued"})


def claims(line: Run) -> None:
    """F18: 1,000 queued jobs and 50 workers that claim: first at the pace of short jobs, then all that are left at once."""
    world = line.world(lease_seconds=300, audited=False)  # nobody starts what is claimed here
    world.start_server(cold=True)
    spec = world.plan(steps=1).spec
    world.plans.clear()
    taken, seconds, pace = asyncio.run(_claim_all(world, spec, num_jobs=1000, num_workers=50))
    line.require(len(taken) == 1000, f"{len(taken)} of 1,000 jobs were claimed")
    line.require(len(set(taken)) == len(taken), f"I1: {len(taken) - len(set(taken))} jobs were claimed twice")
    seconds.sort()
    p50, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
    line.within(p99, 0.1, "the slowest hundredth of claims")
    line.figures |= {
        "claims": len(taken),
        "paced_claims": len(seconds),
        "paced_claims_per_second": round(50 / pace, 1),
        "claim_p50_ms": round(p50 * 1000, 1),
        "claim_p99_ms": round(p99 * 1000, 1),
    }
    line.check(world, ends={"claimed"})


PACE_SECONDS = 2.5  # between two claims of one worker, at least: 20 a second, jobs of a few seconds each
PACED_CLAIMS = 5  # of each worker
MOST_BUSY = 0.25  # share of the time that a server is to spend on claims at this pace: a busy machine is asked less often


async def _claim_all(
    world: World, spec: dict[str, Any], *, num_jobs: int, num_workers: int
) -> tuple[list[str], list[float], float]:
    """Post the jobs, then let the workers claim until there are none.

    Returns (jobs taken, seconds of paced claims, seconds between two of one worker).
    """
    key = (world.data / "worker.key").read_text().strip()
    installation = (world.data / "installation.id").read_text().strip()
    taken: list[str] = []
    seconds: list[float] = []
    pace = PACE_SECONDS

    async def post() -> None:
        admin = _Raw(world.port, ADMIN_KEY)
        for _ in range(num_jobs // 20):
            status, answer = await admin.post("/jobs", spec)
            assert status == 200, answer

    async def register(raw: "_Raw", number: int) -> dict[str, Any]:
        who = {"worker_id": f"w{number}", "boot_id": f"b{number}"}
        hello = {**who, "gpus": num_jobs, "device": "cpu", "installation_id": installation}
        status, answer = await raw.post("/worker/register", hello)
        assert status == 200, answer
        return who

    async def claim(raw: "_Raw", who: dict[str, Any], request_id: str) -> bool:
        body = {**who, "request_id": request_id, "gpus": num_jobs, "wait_seconds": 0}
        status, answer = await raw.post("/worker/claim", body)
        if status == 204:
            return False
        assert status == 200, answer
        taken.append(str(answer["job_id"]))
        return True

    async def work(number: int) -> None:
        raw = _Raw(world.port, key)
        who = await register(raw, number)
        await asyncio.sleep(number * pace / num_workers)
        for count in range(num_jobs):
            begun = time.monotonic()
            if not await claim(raw, who, f"{number}-{count}"):
                return
            if count < PACED_CLAIMS:
                seconds.append(time.monotonic() - begun)
                await asyncio.sleep(pace)

    await asyncio.gather(*(post() for _ in range(20)))
    first = _Raw(world.port, key)
    who = await register(first, num_workers)
    begun = time.monotonic()
    for count in range(20):
        await claim(first, who, f"first-{count}")
    pace = max(PACE_SECONDS, num_workers * (time.monotonic() - begun) / 20 / MOST_BUSY)
    await asyncio.gather(*(work(number) for number in range(num_workers)))
    return taken, seconds, pace


class _Raw:
    """HTTP with as little of this process's time as can be: what is measured is the server."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(answer.split(" ", 2)[1])
        _, _, after = answer.partition("content-length:")
        length = int(after.split("\r\n")[0]) if after else 0
        found = await reader.readexactly(length)
        return status, json.loads(found) if found else None


LINES = [
    Line("server kills", "F3", server_kills),
    Line("outage", "F7", outage, alone=False),
    Line("submits", "F19", submits),
    Line("claims", "F18", claims),
]
