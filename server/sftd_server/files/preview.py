"""Rows of a data file as they were understood, page by page.

A check leaves marks in the cache, places in the file that a reader may begin at: so a page deep in a large file costs
no more than the first. Where they are gone they are made anew, by another check.
"""

import asyncio
import os
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import cast

from sftd.rows import Format, Found, Mark, RowProblem, look_into
from sftd.schemas import File, Page, RowPreview
from sftd_server.errors import Conflict, Invalid, NotFound, Unavailable
from sftd_server.files import store
from sftd_server.files.checks import SMALL_BYTES, CheckFailed
from sftd_server.server import Server

MAX_PAGE_BYTES = 2 * 1024**2  # of the file; a page holds one row at least
MAX_PROBLEM = 1000  # characters: it may quote what stands in the file
_PAIR = 16  # bytes of a mark


async def rows(server: Server, file_id: str, *, after: int, limit: int) -> Page[RowPreview]:
    """Rows after a line. Raises NotFound, Conflict, Invalid."""
    found = await server.db.read(lambda session: store.file(session, file_id))
    if found.purpose not in store.CHECKED:
        raise Invalid(
            f"{file_id} was uploaded for {found.purpose!r}; only files for fine-tune hold rows",
            code="invalid_request",
            param="file_id",
        )
    path = server.folder.path / server.folder.blob_name(found.sha256)
    form = cast("Format | None", found.format)
    mark = None
    if found.bytes > SMALL_BYTES:
        await _require_marks(server, found, path)
        mark = await asyncio.to_thread(_newest_mark, server.checks.marks(found.sha256), after)
    try:
        async with server.checks.previews:
            return await server.uploads.in_thread(_page, path, mark, after, limit, form)
    except FileNotFoundError:
        raise NotFound(f"{found.filename} is no longer on disk.", code="file_gone") from None


async def _require_marks(server: Server, found: File, path: Path) -> None:
    """Marks that are not there are made first."""
    marks = server.checks.marks(found.sha256)
    if await asyncio.to_thread(_are_whole, marks):
        return
    if found.status == "uploaded":
        raise Conflict(
            f"The rows of {found.id} are still being checked; look again when that is done.",
            code="file_not_checked",
        )
    if not path.exists():
        raise NotFound(f"{found.filename} is no longer on disk.", code="file_gone")
    try:
        await server.checks.remake_marks(path, sha256=found.sha256)
    except CheckFailed as error:
        raise Unavailable(
            f"The rows of {found.id} could not be looked through ({error}); try again", code="check_failed"
        ) from error
    await store.drop_unused_marks(server, found.sha256)  # deleted meanwhile


def _are_whole(path: Path) -> bool:
    try:
        return path.stat().st_size % _PAIR == 0
    except OSError:
        return False


def _newest_mark(path: Path, after: int) -> Mark | None:
    """The last mark that is no further than the row after `after`; None, the file's beginning, where there are no marks,
    as in a file without rows."""
    try:
        raw = path.read_bytes()
        os.utime(path)  # what was used last is deleted last
    except OSError:
        return None
    if not raw or len(raw) % _PAIR:
        return None
    numbers = array("Q", raw)
    lines, offsets = numbers[::2], numbers[1::2]
    at = max(0, bisect_right(lines, after + 1) - 1)
    return Mark(lines[at], offsets[at])


def _page(path: Path, mark: Mark | None, after: int, limit: int, form: Format | None) -> Page[RowPreview]:
    data: list[RowPreview] = []
    left = MAX_PAGE_BYTES
    for found in look_into(path, mark=mark, after=after, form=form):
        if len(data) == limit or (data and left < found.num_bytes):
            return Page[RowPreview](data=data, has_more=True, next_after=data[-1].line)
        left -= found.num_bytes
        data.append(_shown(found))
    return Page[RowPreview](data=data, has_more=False, next_after=None)


def _shown(found: Found) -> RowPreview:
    row = found.row
    if isinstance(row, RowProblem):
        return _bad(row.line, f"{row.field}: {row.message}")
    shown = RowPreview(
        line=row.line,
        format=found.format,
        messages=row.messages,
        weights=row.weights,
        tools=row.tools,
        text=row.text,
        problem=None,
    )
    try:
        shown.model_dump_json()
    except (ValueError, RecursionError):
        return _bad(row.line, "row: is nested too deeply to be shown")
    return shown


def _bad(line: int, problem: str) -> RowPreview:
    return RowPreview(
        line=line,
        format=None,
        messages=None,
        weights=[],
        tools=None,
        text=None,
        problem=problem[:MAX_PROBLEM],
    )
