"""How long a claim takes with a long queue: 1,000 queued jobs, 50 workers that claim as they get free.

    python bench/claims.py [--jobs 1000] [--workers 50] [--gap 1.0]

Each worker claims, holds the job for about `gap` seconds, finishes and claims again, against a real server process over
loopback. Prints one JSON line: how often each job was claimed (once), and the times of the claims that brought a job.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

ROWS = b'{"prompt": "2+2?", "completion": "4"}\n'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--gap", type=float, default=1.0, help="mean seconds that a worker holds a job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        environment = {**os.environ, "SFTD_DATA": name, "SFTD_PORT": "0", "XDG_STATE_HOME": name}
        command = [sys.executable, "-m", "sftd_server.app"]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            url = server.stdout.readline().split("listens on ")[1].split(";")[0]
            print(json.dumps(measure(url, data, options)))
        finally:
            server.terminate()
            server.wait(20)


def measure(url: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    admin = httpx.Client(base_url=url, headers=key_of(data / "admin.key"), timeout=60)
    file = admin.post("/files", files={"file": ("rows.jsonl", ROWS)}).json()["id"]
    for i in range(options.jobs):
        spec = {"base_model": "org/model", "training_file": file, "max_steps": 10 + i % 90}
        admin.post("/jobs", json=spec).raise_for_status()
    claimed: list[str] = []
    seconds: list[float] = []
    threads = [
        threading.Thread(target=work, args=(url, data, i, options.gap, claimed, seconds))
        for i in range(options.workers)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds.sort()
    return {
        "jobs": options.jobs,
        "workers": options.workers,
        "gap_seconds": options.gap,
        "claims": len(claimed),
        "claimed_twice": len(claimed) - len(set(claimed)),
        "claims_per_second": round(len(claimed) / (time.monotonic() - began), 1),
        "p50_ms": round(seconds[len(seconds) // 2] * 1000, 1),
        "p99_ms": round(seconds[int(len(seconds) * 0.99)] * 1000, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def work(url: str, data: Path, number: int, gap: float, claimed: list[str], seconds: list[float]) -> None:
    """One worker, until the queue is empty."""
    chance = random.Random(number)
    client = httpx.Client(base_url=url, headers=key_of(data / "worker.key"), timeout=60)
    me = {"worker_id": f"w{number}", "boot_id": "b", "gpus": 1, "protocol": 2}
    client.post("/worker/register", json={**me, "device": "cuda"}).raise_for_status()
    time.sleep(chance.uniform(0, gap))
    for i in range(10**6):
        asked = time.monotonic()
        answer = client.post("/worker/claim", json={**me, "request_id": f"{number}-{i}", "wait_seconds": 0})
        if answer.status_code == 204:
            return
        seconds.append(time.monotonic() - asked)
        lease = answer.json()
        claimed.append(lease["job_id"])
        time.sleep(chance.uniform(0, 2 * gap))
        path, headers = f"/worker/jobs/{lease['job_id']}", {"x-lease-token": lease["token"]}
        client.post(f"{path}/heartbeat", json={"attempt": 1, "started": True}, headers=headers)
        client.post(f"{path}/finish", json={"attempt": 1, "state": "succeeded"}, headers=headers)


def key_of(path: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {path.read_text().strip()}"}


if __name__ == "__main__":
    main()
