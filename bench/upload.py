"""Uploading a large data file to a real server: how long it takes, and how much the server grows: `python -m bench.upload`.

Prints a JSON line for each way: in one request (`/v1/files`), and in parts (`/v1/uploads`). `growth_bytes` is the
server's highest resident memory over what it had before; `check_peak_bytes` that of the process that checks the rows.
Linux only: the kernel's own high-water mark is read. Takes --gigabytes of disk three times over.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

KEY = "sftd-admin-key-of-the-bench"
PART_BYTES = 64 * 1024**2
_BOUNDARY = "bench-upload"
_PIECE = 1024**2


@dataclass(frozen=True)
class Uploaded:
    """One file, sent one way."""

    way: str
    num_bytes: int
    row_bytes: int
    seconds: float  # until the server has it
    check_seconds: float  # from then on until its rows are checked
    growth_bytes: int
    check_peak_bytes: int
    status: str
    num_rows: int | None


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--row-bytes", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (process, url):
        for way in ("one request", "parts"):
            num_bytes = int(arguments.gigabytes * 1024**3)
            print(json.dumps(asdict(measure(process, url, way, num_bytes, arguments.row_bytes))), flush=True)


@contextmanager
def server(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server process on loopback, and its address."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SFTD_")},
        "SFTD_ADMIN_KEY": KEY,
        "SFTD_MAX_UPLOAD_BYTES": str(16 * 1024**3),
        "XDG_STATE_HOME": str(folder / "state"),
    }
    command = [sys.executable, "-m", "sftd_server.app", "--data", str(folder / "data"), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split("listens on ")[1].split(";")[0]
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait(30)


def measure(process: psutil.Process, url: str, way: str, num_bytes: int, row_bytes: int) -> Uploaded:
    """Send a file of about so many bytes."""
    row = json.dumps({"text": way}).encode()
    row = row[:-2] + b" " + b"x" * (row_bytes - len(row) - 2) + row[-2:] + b"\n"
    num_rows = max(1, num_bytes // len(row))
    size = num_rows * len(row)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    _call(connection, "GET", "/v1/files")  # what the first request loads is not the upload's
    before = process.memory_info().rss
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark begins anew
    begun = time.monotonic()
    send = _in_one_request if way == "one request" else _in_parts
    made = send(connection, row, num_rows)
    sent = time.monotonic()
    peak = 0
    while made["status"] == "uploaded":
        for child in process.children(recursive=True):
            peak = max(peak, _high_water(child.pid))
        time.sleep(0.01)
        made = _call(connection, "GET", f"/v1/files/{made['id']}")
    done = time.monotonic()
    assert made["bytes"] == size, made
    return Uploaded(
        way=way,
        num_bytes=size,
        row_bytes=len(row),
        seconds=round(sent - begun, 3),
        check_seconds=round(done - sent, 3),
        growth_bytes=_high_water(process.pid) - before,
        check_peak_bytes=peak,
        status=made["status"],
        num_rows=made["num_rows"],
    )


def _in_one_request(connection: http.client.HTTPConnection, row: bytes, num_rows: int) -> dict:
    return _send(connection, "/v1/files", "file", row, num_rows, purpose="fine-tune")


def _in_parts(connection: http.client.HTTPConnection, row: bytes, num_rows: int) -> dict:
    announced = {
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": len(row) * num_rows,
        "mime_type": "text/jsonl",
    }
    upload_id = _call(connection, "POST", "/v1/uploads", announced)["id"]
    rows_a_part, part_ids = max(1, PART_BYTES // len(row)), []
    for begin in range(0, num_rows, rows_a_part):
        part = min(rows_a_part, num_rows - begin)
        part_ids.append(_send(connection, f"/v1/uploads/{upload_id}/parts", "data", row, part)["id"])
    done = _call(connection, "POST", f"/v1/uploads/{upload_id}/complete", {"part_ids": part_ids})
    return done["file"]


def _send(
    connection: http.client.HTTPConnection, path: str, field: str, row: bytes, num_rows: int, **fields: str
) -> dict:
    """A multipart body that is never whole in this process's memory either."""
    head = "".join(
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    head += f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{field}"; filename="rows.jsonl"\r\n\r\n'
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
    rows_a_piece = max(1, _PIECE // len(row))

    def pieces() -> Iterator[bytes]:
        yield head.encode()
        piece = row * rows_a_piece
        for _ in range(num_rows // rows_a_piece):
            yield piece
        yield row * (num_rows % rows_a_piece)
        yield tail

    length = len(head) + len(row) * num_rows + len(tail)
    headers = {
        "content-type": f"multipart/form-data; boundary={_BOUNDARY}",
        "content-length": str(length),
    }
    return _call(connection, "POST", path, pieces(), headers)


def _call(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object = None,
    headers: dict[str, str] | None = None,
) -> dict:
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    connection.request(method, path, body, {"authorization": f"Bearer {KEY}", **(headers or {})})  # type: ignore[arg-type]  # bytes, or pieces of them
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{method} {path}: {answer.status} {content.decode()}")
    return dict(json.loads(content))


def _high_water(pid: int) -> int:
    """Highest resident memory of a process, in bytes; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
