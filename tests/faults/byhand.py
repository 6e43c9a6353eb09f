"""A worker's calls made by hand: for lines that want many workers at once, or that write as fast as the server takes it."""

import threading
import time
from typing import Any

import httpx
from tests.faults.network import Link
from tests.faults.world import World


class Gone(Exception):
    """The lease is over."""


class HandWorker:
    """One worker without trainers. Calls are sent again until they are answered."""

    def __init__(self, world: World, name: str, link: Link) -> None:
        key = (world.data / "worker.key").read_text().strip()
        self.name = name
        self.lease: dict[str, Any] = {}
        self._world = world
        self._boot_id = f"boot-{name}"
        self._http = httpx.Client(
            base_url=link.url, headers={"Authorization": f"Bearer {key}"}, timeout=5, trust_env=False
        )
        installation = (world.data / "installation.id").read_text().strip()
        self.send(
            "/worker/register",
            {"worker_id": name, "boot_id": self._boot_id, "gpus": 1, "device": "cpu", "installation_id": installation},
        )  # fmt: skip

    def claim(self, request_id: str, wait_seconds: float = 1) -> bool:
        """Take a job, if there is one."""
        body = {"worker_id": self.name, "boot_id": self._boot_id, "request_id": request_id, "gpus": 1}
        answer = self.send("/worker/claim", {**body, "wait_seconds": wait_seconds})
        self.lease = answer or {}
        return bool(answer)

    def under_lease(self, call: str, **body: Any) -> dict[str, Any]:
        """A call under the lease. Raises Gone where it is over."""
        path = f"/worker/jobs/{self.lease['job_id']}/{call}"
        return self.send(
            path, {"attempt": self.lease["attempt"], **body}, {"X-Lease-Token": self.lease["token"]}
        )

    def send(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Send until there is an answer; {} for 204."""
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = self._http.post(path, json=body, headers=headers or {})
                if answer.status_code == 204:
                    return {}
                if answer.is_success:
                    return dict(answer.json())
                if answer.status_code == 409:
                    raise Gone(answer.text)
                if answer.status_code == 416:
                    return {"expected": int(answer.headers["x-expected-seq"])}
                if answer.status_code < 500:
                    raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} was not answered within 60 s")
            time.sleep(0.02)

    def close(self) -> None:
        self._http.close()


class Writer(threading.Thread):
    """A worker that holds one job and writes logs, metrics and events to it until it is told to end."""

    def __init__(self, world: World, name: str, *, pause: float = 0.0) -> None:
        super().__init__(name=name, daemon=True)
        self.error: str | None = None
        self.num_batches = 0
        self._world = world
        self._link = world.network.link(name)
        self._ends = threading.Event()
        self._pause = pause

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:  # the edge of a thread: the line looks at it
            self.error = repr(error)

    def end(self) -> None:
        """Finish the job and stop."""
        self._ends.set()
        self.join(60)
        if self.is_alive():
            self.error = "it hangs"

    def _write(self) -> None:
        worker = HandWorker(self._world, self.name, self._link)
        if not worker.claim(f"request-{self.name}", wait_seconds=10):
            raise RuntimeError("there was no job to claim")
        worker.under_lease("heartbeat", started=True)
        beaten_at = time.monotonic()
        step = 0
        while not self._ends.is_set():
            lines = [f"line {step + i} of {self.name}" for i in range(3)]
            points = [{"step": step + i + 1, "values": {"loss": (step + i) / 7}} for i in range(3)]
            self._append(worker, "logs", step, lines=lines)
            self._append(worker, "metrics", step, points=points)
            step += 3
            self.num_batches += 2
            if time.monotonic() - beaten_at > self._world.lease_seconds / 8:
                worker.under_lease("heartbeat", started=True, step=step)
                beaten_at = time.monotonic()
            self._ends.wait(self._pause)
        worker.under_lease("finish", state="succeeded")
        worker.close()

    def _append(self, worker: HandWorker, kind: str, seq: int, **items: Any) -> None:
        """A batch that is sent twice because its answer was lost is answered as a repetition, never as a gap."""
        answer = worker.under_lease(kind, seq=seq, **items)
        if "expected" in answer:
            raise RuntimeError(
                f"{kind} {seq}: the server asks for {answer['expected']}: it has lost what it took"
            )
