"""The Python client: `Client().jobs`, `.files`, `.keys`, `.workers`, `.storage`, `.audit`.

from sftd import Client

client = Client()
data = client.files.upload("rows.jsonl")
job = client.jobs.create(base_model="Qwen/Qwen2.5-7B-Instruct", training_file=data.id)
client.jobs.wait(job.id)
client.jobs.download(job.id, "result")
"""

import builtins
from collections.abc import Iterator
from datetime import datetime
from typing import Literal, Self
from urllib.parse import quote

from sftd._transport import Transport
from sftd.discovery import find_address
from sftd.files import Files
from sftd.jobs import Jobs
from sftd.paging import pages
from sftd.schemas import AuditEntry, Collected, Key, KeyRequest, NewKey, OwnKey, Page, Storage, Worker


class Client:
    """Calls to one sftd server. Address and key are found as `sftd.discovery` tells; it may be used as a context."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 2,
        transport: Transport | None = None,
    ) -> None:
        if transport is None:
            address = find_address(url, key)
            transport = Transport(address.url, address.key, timeout_seconds=timeout, max_retries=max_retries)
        self._transport = transport
        self.jobs = Jobs(transport)
        self.files = Files(transport)
        self.keys = Keys(transport)
        self.audit = Audit(transport)
        self.workers = Workers(transport)
        self.storage = StorageOf(transport)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Keys:
    """Access keys. Only an administrator may use this, but for `me`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        *,
        name: str,
        role: Literal["admin", "user", "worker"] = "user",
        expires_in_seconds: int | None = None,
        max_running_jobs: int | None = None,
        max_queued_jobs: int | None = None,
        max_gpu_hours_per_month: float | None = None,
    ) -> NewKey:
        """Make a key. Its `secret` is shown this once: `client.keys.create(name="ci", max_queued_jobs=20).secret`."""
        request = KeyRequest(
            name=name,
            role=role,
            expires_in_seconds=expires_in_seconds,
            max_running_jobs=max_running_jobs,
            max_queued_jobs=max_queued_jobs,
            max_gpu_hours_per_month=max_gpu_hours_per_month,
        )
        # Not sent again when the answer is lost: that would leave a second key that nobody knows.
        return self._transport.request("POST", "/keys", body=request, max_retries=0).parse(NewKey)

    def list(self) -> Iterator[Key]:
        """All keys, without their secrets."""
        return pages(self._transport, "/keys", Key)

    def me(self) -> OwnKey:
        """The key in use and what is used of its limits; anybody may ask: `client.keys.me().gpu_hours_this_month`."""
        return self._transport.request("GET", "/keys/me").parse(OwnKey)

    def change(self, key_id: str, **changes: int | float | None) -> Key:
        """Set limits or `expires_in_seconds`; what is not named stays, None takes a limit away:
        `client.keys.change("key_…", max_running_jobs=2, max_gpu_hours_per_month=None)`."""
        path = f"/keys/{quote(key_id, safe='')}"
        return self._transport.request("PATCH", path, body=changes).parse(Key)

    def delete(self, key_id: str) -> None:
        """Withdraw a key: `client.keys.delete("key_…")`."""
        self._transport.request("DELETE", f"/keys/{quote(key_id, safe='')}")


class Audit:
    """Every change that was made, and by whom. Only an administrator may use this."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(
        self,
        *,
        action: str | None = None,
        key_name: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Iterator[AuditEntry]:
        """Changes, newest first: `client.audit.list(action="job.delete", limit=10)`; `action="job"` is all of jobs."""
        params: dict[str, str | int | None] = {
            "action": action,
            "key_name": key_name,
            "target": target,
            "since": since.isoformat() if since else None,
            "until": until.isoformat() if until else None,
        }
        return pages(self._transport, "/audit", AuditEntry, params=params, after=after, limit=limit)


class Workers:
    """The workers that have registered."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[Worker]:
        """All worker processes, the newest first, with the jobs they hold."""
        return pages(self._transport, "/workers", Worker)

    def drain(self, worker_id: str) -> builtins.list[Worker]:
        """Let a worker take no new jobs and give back those it runs. For administrators."""
        return self._post(worker_id, "drain")

    def undrain(self, worker_id: str) -> builtins.list[Worker]:
        """Let a worker take jobs again. For administrators."""
        return self._post(worker_id, "undrain")

    def _post(self, worker_id: str, verb: str) -> builtins.list[Worker]:
        """The processes of that name, as they are now."""
        path = f"/workers/{quote(worker_id, safe='')}/{verb}"
        return self._transport.request("POST", path).parse(Page[Worker]).data


class StorageOf:
    """The server's disk."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def show(self) -> Storage:
        """How full it is, with what, and what would be deleted next: `client.storage.show().free_bytes`."""
        return self._transport.request("GET", "/storage").parse(Storage)

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Delete now what is not kept; only an administrator may: `client.storage.collect(dry_run=True)`."""
        params = {"dry_run": "true" if dry_run else "false"}
        return self._transport.request("POST", "/storage/collect", params=params).parse(Collected)
