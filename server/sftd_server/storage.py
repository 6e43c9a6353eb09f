"""Routes about the disk: what lies on it, what would be deleted next, and deleting it now."""

import asyncio
import functools
import shutil
from collections import Counter
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from sftd.schemas import Collected, Storage, StorageItem
from sftd_server.audit import service as audit
from sftd_server.auth import CallerDep
from sftd_server.ballast import NAME as BALLAST
from sftd_server.ballast import database_folder
from sftd_server.errors import error_responses
from sftd_server.janitor import Janitor
from sftd_server.server import ServerDep
from sftd_server.settings import Settings
from sftd_server.sweep import tree_bytes

MAX_ITEMS = 1000
KINDS = (
    *("checkpoints", "results", "logs", "leftovers", "jobs_other"),
    *("files", "uploads", "cache", "models", "database", "ballast"),
)
_HALVES = (".stage-", ".trash-")
_WHOLE = {"files": "blobs", "uploads": "uploads", "cache": "cache", "models": "models"}
_OF_JOB = {"checkpoints": "checkpoints", "results": "results", "logs": "logs"}


router = APIRouter(prefix="/storage", tags=["server"], responses=error_responses())


def janitor_of(request: Request) -> Janitor:
    """The janitor of the server that this request came to."""
    janitor = request.app.state.janitor
    assert isinstance(janitor, Janitor)
    return janitor


JanitorDep = Annotated[Janitor, Depends(janitor_of)]


@router.get("")
async def show(server: ServerDep, janitor: JanitorDep) -> Storage:
    """How full the disk is, with what, and what would be deleted now."""
    settings = server.settings
    disk = await asyncio.to_thread(shutil.disk_usage, settings.data)
    by_kind = await asyncio.to_thread(functools.partial(bytes_by_kind, settings))
    items = await janitor.collect(dry_run=True)
    return Storage(
        total_bytes=disk.total,
        free_bytes=disk.free,
        reserve_bytes=settings.disk_reserve_bytes,
        low=server.disk.low,
        bytes=by_kind,
        next=items[:MAX_ITEMS],
        next_bytes=sum(item.bytes for item in items),
    )


@router.post("/collect")
async def collect(
    server: ServerDep,
    janitor: JanitorDep,
    caller: CallerDep,
    dry_run: Annotated[bool, Query(description="Delete nothing; say what would be deleted.")] = False,
) -> Collected:
    """Delete now what is not kept. For admins."""
    caller.require_admin()
    if not dry_run:  # before anything goes: not all of that is in the database
        await server.db.write(lambda session: audit.describe(session))
    items: list[StorageItem] = await janitor.collect(dry_run=dry_run)
    freed = sum(item.bytes for item in items)
    return Collected(dry_run=dry_run, freed_bytes=freed, removed=items[:MAX_ITEMS])


def bytes_by_kind(settings: Settings) -> dict[str, int]:
    """What lies in the data folder, by kind. Links are not followed."""
    data, found = settings.data, Counter[str]()
    for job in _folders(data / "jobs"):
        if job.name.startswith(_HALVES):  # of a job that was deleted
            found["leftovers"] += tree_bytes(job)
            continue
        for path in _entries(job):
            if path.name.startswith(_HALVES):
                found["leftovers"] += tree_bytes(path)
            elif path.name == "checkpoints":
                for inner in _entries(path):
                    kind = "leftovers" if inner.name.startswith(_HALVES) else "checkpoints"
                    found[kind] += tree_bytes(inner)
            else:
                found[_OF_JOB.get(path.name, "jobs_other")] += tree_bytes(path)
    found["leftovers"] += tree_bytes(data / "tmp")
    for kind, folder in _WHOLE.items():
        found[kind] += tree_bytes(data / folder)
    database = database_folder(settings)
    for path in _entries(database):
        if path.name.startswith("sftd.db") or ".db-" in path.name or path.suffix == ".db":
            found["database"] += tree_bytes(path)
    found["ballast"] += tree_bytes(database / BALLAST)
    return {kind: found[kind] for kind in KINDS}


def _entries(folder: Path) -> list[Path]:
    try:
        return [] if folder.is_symlink() else sorted(folder.iterdir())
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir() and not path.is_symlink()]
