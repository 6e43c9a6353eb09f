"""Commands for the installation on this machine: `sftd up`, `sftd admin`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from sftd import up
from sftd.cli.app import BOX, AsJson, app


@app.command("up", rich_help_panel=BOX)
def start_box(
    data: Annotated[Path, typer.Option(help="Data folder: jobs, files, keys, database.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    models: Annotated[
        Path | None, typer.Option(help="Folder with base models. Default: DATA/models.")
    ] = None,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Also start a worker here.")] = True,
    as_json: AsJson = False,
) -> None:
    """Start a server and a worker on this machine; Ctrl-C stops both, saving the running job."""
    box = up.Box(
        data=data.expanduser().absolute(),
        host=host,
        port=port,
        models=models.expanduser().absolute() if models else None,
        worker=worker,
    )

    def say(text: str) -> None:
        print(json.dumps({"message": text, "url": box.url}) if as_json else text, flush=True)

    raise typer.Exit(up.run(box, say=say))


@app.command(
    rich_help_panel=BOX,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def admin(context: typer.Context) -> None:
    """Move (migrate-db), backup, restore or check the installation on this machine; `sftd admin --help` tells more."""
    up.require_extras(worker=False)  # the commands are the server's own, in a process of theirs
    command = [sys.executable, "-m", "sftd_server.admin", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
