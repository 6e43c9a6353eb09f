"""How many rows an uploaded file has, asked before its check has counted them. What the check finds is `checks`' business.

Whoever posts a job waits for the answer, so it is one pass over the bytes, in pieces of one size whatever the lines are
like, a few files at a time. Nothing is parsed.
"""

from pathlib import Path

from sqlmodel import Session, col, select

from sftd_server.files.store import CHECKED
from sftd_server.server import Server
from sftd_server.tables import FileRow

MAX_COUNTED_BYTES = 1024**3  # seconds to read
PIECE_BYTES = 256 * 1024  # the interpreter's lock is held over each, for half a millisecond
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\x0b\x0c"
_MARKED = bytes(byte if byte == ord("\n") else ord("x") for byte in range(256))


async def num_rows(server: Server, file_id: str) -> int | None:
    """Rows of a file to train on. None where they are not known: there is no such file, it holds no rows, or it is not
    checked yet and an array or too large."""

    def look(session: Session) -> FileRow | None:
        query = select(FileRow).where(FileRow.id == file_id, col(FileRow.purpose).in_(CHECKED))
        return session.exec(query).first()

    found = await server.db.read(look)
    if found is None or found.status != "uploaded" or found.bytes > MAX_COUNTED_BYTES:
        return None if found is None else found.num_rows
    path = server.folder.path / server.folder.blob_name(found.sha256)
    async with server.checks.counts:
        return await server.uploads.in_thread(count_lines, path)


def count_lines(path: Path) -> int | None:
    """Lines of a file that hold something; None for a JSON array, or where it cannot be read."""
    num_lines, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            if file.read(4096).removeprefix(_BOM).lstrip().startswith(b"["):
                return None
            file.seek(0)
            while piece := file.read(PIECE_BYTES):
                # Only where lines begin is left to be seen: an x behind a line break.
                marks = last + piece.translate(_MARKED, _SPACE)
                num_lines += marks.count(b"\nx")
                last = marks[-1:]
    except OSError:
        return None
    return num_lines
