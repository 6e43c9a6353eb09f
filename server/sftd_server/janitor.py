"""The loop that deletes what is not kept: checkpoints right after a newer one was recorded, and everything at intervals.

What may go is said by `retention` (checkpoints), `sweep` (what a crash left in the folders of jobs) and `garbage` (the
rest). Here it is taken off the record first and off the disk then, one thing after another.
"""

import asyncio
import contextlib
import functools
import logging
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from sftd.schemas import StorageItem
from sftd_server import cursors, garbage, retention, sweep
from sftd_server.audit import queries as audit
from sftd_server.db import DatabaseClosed
from sftd_server.files import parts, store
from sftd_server.plans import service as plans
from sftd_server.retention import Doomed
from sftd_server.server import Server
from sftd_server.workers.reports import CHECKPOINTS

log = logging.getLogger("sftd.server")


class Janitor:
    """One a server. `collect` is one round; `run` goes round for ever."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._busy = asyncio.Lock()  # rounds do not meet
        self._unshipped: dict[Path, int] = {}  # spools that hold what the server does not, and their sizes

    async def run(self) -> None:
        """A round now and at intervals; between them the jobs that have just saved. An error is logged and it goes on."""
        time = asyncio.get_running_loop().time
        next_round = time()
        while True:
            signal = self._server.db.signal(CHECKPOINTS)
            try:
                if time() >= next_round:
                    next_round = time() + self._server.settings.janitor_seconds
                    await self.collect()
                else:
                    await self.tidy_running()
            except DatabaseClosed:
                return
            except Exception:
                log.exception("deleting what is not kept failed; trying again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_round - time())):
                    await signal.wait()
            if self._server.stopping:
                return

    async def tidy_running(self) -> list[StorageItem]:
        """Checkpoints of jobs that are held by workers."""
        async with self._busy:
            return await self._checkpoints(leased_only=True, dry_run=False)

    async def collect(self, *, dry_run: bool = False) -> list[StorageItem]:
        """Everything once. Returns what was deleted; with `dry_run` what would be."""
        async with contextlib.nullcontext() if dry_run else self._busy:
            removed = await self._checkpoints(leased_only=False, dry_run=dry_run)
            # After the checkpoints, of which a crash may have left some.
            removed += await self._leftovers(dry_run=dry_run)
            removed += await self._spools(dry_run=dry_run)
            removed += await self._files(dry_run=dry_run)
            removed += await self._expired_files(dry_run=dry_run)
            removed += await self._parts(dry_run=dry_run)
            removed += await self._blobs(dry_run=dry_run)
            removed += await self._cache(dry_run=dry_run)
            if not dry_run:
                await self._audit()
                await self._analyses()
                await self._gone()
        return removed

    # ------------------------------------------------------------ checkpoints

    async def _checkpoints(self, *, leased_only: bool, dry_run: bool) -> list[StorageItem]:
        server = self._server
        look = functools.partial(
            retention.plan, settings=server.settings, now=server.clock.now(), leased_only=leased_only
        )
        planned = await server.db.read(look)
        if dry_run:
            return [found.item() for doomed in planned.values() for found in doomed]
        removed: list[StorageItem] = []
        for job_id, doomed in planned.items():
            work = functools.partial(
                retention.retire,
                job_id=job_id,
                by_size={found.name for found in doomed if found.why == "size"},
                settings=server.settings,
                now=server.clock.now(),
            )
            gone = await server.db.write(work)
            freed = await asyncio.to_thread(_remove_checkpoints, self._jobs / job_id, gone)
            removed += [found.item() for found in freed]
        return removed

    async def _leftovers(self, *, dry_run: bool) -> list[StorageItem]:
        known = await self._server.db.read(sweep.known_jobs)
        data, now = self._server.folder.path, self._server.clock.now()

        def look() -> list[StorageItem]:
            items = list(sweep.leftovers(self._jobs, known, now=now))
            return items if dry_run else _removed(i for i in items if sweep.remove_leftover(data, i, known))

        return await asyncio.to_thread(look)

    # ------------------------------------------------------------ the rest

    async def _spools(self, *, dry_run: bool) -> list[StorageItem]:
        days = self._server.settings.finished_spool_days
        if not days:
            return []
        before = self._server.clock.now() - timedelta(days=days)
        finished = await self._server.db.read(functools.partial(garbage.finished_jobs, before=before))

        def look() -> list[StorageItem]:
            items = list(garbage.find_spools(self._jobs, finished, self._unshipped))
            return items if dry_run else _removed(item for item in items if self._delete(item))

        return await asyncio.to_thread(look)

    async def _files(self, *, dry_run: bool) -> list[StorageItem]:
        days = self._server.settings.unused_file_days
        if not days:
            return []
        before = self._server.clock.now() - timedelta(days=days)
        items = await self._server.db.read(functools.partial(garbage.find_unused_files, before=before))
        if dry_run:
            return items
        return _removed([item for item in items if await store.remove_unused(self._server, item.name)])

    async def _expired_files(self, *, dry_run: bool) -> list[StorageItem]:
        now = self._server.clock.now()
        items = await self._server.db.read(functools.partial(garbage.find_expired_files, now=now))
        if dry_run:
            return items
        return _removed([item for item in items if await store.remove_expired(self._server, item.name)])

    async def _parts(self, *, dry_run: bool) -> list[StorageItem]:
        items = await parts.sweep(self._server, dry_run=dry_run)
        return items if dry_run else _removed(items)

    async def _blobs(self, *, dry_run: bool) -> list[StorageItem]:
        server, now = self._server, self._server.clock.now()
        on_record = await server.db.read(garbage.blobs_on_record)
        look = functools.partial(garbage.find_orphan_blobs, server.folder.path, on_record, now=now)
        items = await asyncio.to_thread(lambda: list(look()))
        if dry_run or not items:
            return items
        async with server.file_changes:  # an upload of the same bytes makes the blob young again
            on_record = await server.db.read(garbage.blobs_on_record)
            still = [item for item in items if Path(item.name).name not in on_record]
            young = [item for item in still if not garbage.is_orphan_age(server.folder.path / item.name, now)]
            return _removed(item for item in still if item not in young and self._delete(item))

    async def _cache(self, *, dry_run: bool) -> list[StorageItem]:
        server = self._server
        most = server.settings.cache_max_bytes
        if not most:
            return []
        since = await server.db.read(functools.partial(garbage.cache_needed_since, now=server.clock.now()))

        def look() -> list[StorageItem]:
            cache = server.folder.path / "cache"
            items = list(garbage.find_cached(cache, max_bytes=most, needed_since=since))
            if dry_run:
                return items
            unused = [
                item for item in items if garbage.last_use(server.folder.path / item.name) < since.timestamp()
            ]
            return _removed(item for item in unused if self._delete(item))

        return await asyncio.to_thread(look)

    async def _audit(self) -> None:
        """Entries of the audit log that are too old. They are in no list of what goes: they take little room."""
        db, days = self._server.db, self._server.settings.audit_days
        if not days:
            return
        before = self._server.clock.now() - timedelta(days=days)
        while await db.read(functools.partial(audit.any_before, moment=before)):
            if not await db.write(functools.partial(audit.forget, moment=before)):
                return

    async def _analyses(self) -> None:
        """What was counted for plans that nobody has asked for in a while."""
        db, now = self._server.db, self._server.clock.now()
        if await db.read(functools.partial(plans.any_unused, now=now)):
            await db.write(functools.partial(plans.sweep, now=now))

    async def _gone(self) -> None:
        """Places in lists of what was deleted long ago."""
        db, before = self._server.db, self._server.clock.now() - cursors.REMEMBERED
        while ids := await db.read(functools.partial(cursors.forgettable, before=before)):
            await db.write(functools.partial(cursors.forget, ids=ids))

    # ------------------------------------------------------------ small things

    @property
    def _jobs(self) -> Path:
        return self._server.folder.path / "jobs"

    def _delete(self, item: StorageItem) -> bool:
        path = self._server.folder.path / item.name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be deleted: %s", path, error)
            return False
        return True


def _remove_checkpoints(job: Path, gone: Iterable[Doomed]) -> list[Doomed]:
    """Those whose files are gone now; the others are left to a later sweep."""
    return [
        found
        for found in gone
        if sweep.remove_checkpoint(
            job, found.name, manifest_sha256=None if found.corrupt else found.manifest_sha256
        )
    ]


def _removed(items: Iterable[StorageItem]) -> list[StorageItem]:
    """What was deleted, with a line in the log for each: jobs have no event for it."""
    done = list(items)
    for item in done:
        log.info("deleted %s %s (%d bytes): %s", item.kind, item.name, item.bytes, item.why)
    return done
