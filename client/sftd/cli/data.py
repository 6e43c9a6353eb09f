"""Commands for data files: `sftd check`, `sftd upload`, `sftd files …`."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import open as open_with_bar

from sftd.cli.app import JOBS, AsJson, app, files, say_deleted
from sftd.client import Client
from sftd.errors import ConfigurationError
from sftd.output import print_facts, print_json, print_json_line, print_table, printable, say, size, when
from sftd.rows import RowsInvalid, check_file
from sftd.schemas import File, RowPreview

DataFile = Annotated[Path, typer.Argument(help="Data file, JSONL or a JSON array.")]
FileId = Annotated[str, typer.Argument(metavar="ID", help="Id of the file.")]
BAR_BYTES = 8 * 1024 * 1024  # smaller files are gone before a bar could be read
Purpose = Annotated[str, typer.Option(help="What it is for.")]


@app.command(rich_help_panel=JOBS)
def check(file: DataFile, as_json: AsJson = False) -> None:
    """Check a data file on this machine, as the server will at upload."""
    try:
        summary = check_file(file, name=file.name)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}.") from error
    except RowsInvalid as error:
        _print_mistakes(error, as_json=as_json)
        raise typer.Exit(2) from error
    if as_json:
        print_json({"ok": True, **asdict(summary), "num_problems": 0, "problems": []})
        return
    print(f"{file}: {summary.num_rows:,} rows, format {summary.format}, no mistakes")


@app.command(rich_help_panel=JOBS)
def upload(file: DataFile, purpose: Purpose = "fine-tune", as_json: AsJson = False) -> None:
    """Upload a data file and print its id."""
    with Client() as client:
        sent = upload_file(client, file, purpose=purpose)
    _print_uploaded(sent, as_json=as_json)


@files.command("upload")
def upload_again(file: DataFile, purpose: Purpose = "fine-tune", as_json: AsJson = False) -> None:
    """The same as `sftd upload`."""
    upload(file, purpose, as_json)


@files.command("ls")
def list_files(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20, as_json: AsJson = False
) -> None:
    """List the uploaded files, newest first."""
    with Client() as client:
        found = list(client.files.list(limit=limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (f.id, f.filename, f.status, _count(f.num_rows), size(f.bytes), f.purpose, when(f.created_at))
        for f in found
    ]
    print_table(("ID", "NAME", "STATUS", "ROWS", "SIZE", "PURPOSE", "CREATED"), rows)


@files.command("show")
def show_file(file_id: FileId, as_json: AsJson = False) -> None:
    """Show one file: its format, its rows, and what is wrong with them."""
    with Client() as client:
        file = client.files.retrieve(file_id)
    if as_json:
        print_json(file)
        return
    print_facts(
        {
            "id": file.id,
            "name": file.filename,
            "purpose": file.purpose,
            "status": file.status,
            "format": file.format,
            "rows": _count(file.num_rows) or None,
            "size": f"{size(file.bytes)} ({file.bytes:,} bytes)",
            "sha256": file.sha256,
            "created": when(file.created_at),
            "expires": file.expires_at and when(file.expires_at),
            "mistakes": file.status_details,
        }
    )


@files.command("rows")
def show_rows(
    file_id: FileId,
    after: Annotated[int | None, typer.Option(min=0, help="Go on after this line.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="Through this base model's chat template, with what is learned marked.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print rows of a file as the server understands them; with --json one object a line."""
    with Client() as client:
        if model is not None:
            _print_rendered(client, file_id, model, after=after or 0, limit=limit, as_json=as_json)
            return
        for row in client.files.rows(file_id, after=after, limit=limit):
            if as_json:
                print_json_line(row)
            else:
                _print_row(row)


@files.command("get")
def get_file(
    file_id: FileId,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write. Default: its name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a file as it was uploaded."""
    with Client() as client:
        path = out or Path(_local_name(client.files.retrieve(file_id).filename) or file_id)
        if out is None and path.exists():
            raise ConfigurationError(f"{path} is here already; name another file with --out.")
        client.files.download(file_id, path)
    if as_json:
        print_json({"id": file_id, "path": str(path), "bytes": path.stat().st_size})
        return
    say(f"{file_id} is in {path}")


@files.command("rm")
def remove_file(file_id: FileId, as_json: AsJson = False) -> None:
    """Delete a file; refused while a job that is not over needs it."""
    with Client() as client:
        client.files.delete(file_id)
    say_deleted(file_id, "deleted", as_json=as_json)


def upload_file(client: Client, path: Path, *, purpose: str = "fine-tune") -> File:
    """Upload, with a bar for a large file on a terminal and a remark on what was understood."""
    console = Console(stderr=True)
    readable = path.is_file() and os.access(path, os.R_OK)  # what is not, the plain way has the words for
    if console.is_terminal and readable and path.stat().st_size >= BAR_BYTES:
        with open_with_bar(path, "rb", description=printable(path.name), console=console) as opened:
            file = client.files.create(file=opened, filename=path.name, purpose=purpose)
    else:
        file = client.files.upload(path, purpose=purpose)
    rows = f", {file.num_rows:,} rows" if file.num_rows is not None else ""
    say(f"{path} uploaded as {file.id}{rows}")
    return file


def _local_name(filename: str) -> str:
    """A name in this folder: what it was uploaded as is somebody's word, and must not be a path or a hidden file."""
    return printable(filename.replace("\\", "/").rpartition("/")[2]).replace("\t", " ").lstrip(".")


def _print_uploaded(file: File, *, as_json: bool) -> None:
    if as_json:
        print_json(file)
    else:
        print(file.id)


def _print_mistakes(error: RowsInvalid, *, as_json: bool) -> None:
    if as_json:
        problems = [asdict(problem) for problem in error.problems]
        print_json({"ok": False, "num_problems": error.num_problems, "problems": problems})
        return
    for line in str(error).split("\n"):
        print(printable(line), file=sys.stderr)


def _print_row(row: RowPreview) -> None:
    """`line 3`, then a message a line; what is trained on is marked."""
    print(f"line {row.line}")
    if row.problem is not None:
        print(f"! {_shown(row.problem)}")
    for message, weight in zip(row.messages or [], row.weights, strict=False):
        said = message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        print(f"{'*' if weight else ' '} {printable(str(message.get('role')))}: {_shown(said)}")
    if row.text is not None:
        print(f"* {_shown(row.text)}")


def _print_rendered(
    client: Client, file_id: str, model: str, *, after: int, limit: int, as_json: bool
) -> None:
    from sftd.cli.plan import print_rendered  # its imports are asked for here alone

    found = client.files.preview(file_id, base_model=model, after=after, limit=limit)
    if as_json:
        for row in found.data:
            print_json_line(row)
        return
    for row in found.data:
        print_rendered(row)
    for problem in found.problems:
        say(f"line {problem.line}: {problem.message}; {problem.remedy or ''}".rstrip("; "))


def _shown(text: Any) -> str:
    """Text in one line."""
    return printable(str(text).replace("\n", "\\n"))


def _count(num: int | None) -> str:
    return "" if num is None else f"{num:,}"
