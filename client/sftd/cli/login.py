"""Commands that keep an address and a key on this machine: `sftd login`, `sftd logout`, `sftd whoami`."""

import os
import sys
from typing import Annotated

import typer

from sftd.cli.app import BOX, AsJson, app
from sftd.client import Client
from sftd.config import Config, config_path, forget_config, read_config, write_config
from sftd.errors import ApiError, ConfigurationError
from sftd.output import print_facts, print_json, say, when

_NO_SUCH_ROUTE = (404, 405)  # a server older than this client


@app.command(rich_help_panel=BOX)
def login(
    url: Annotated[str | None, typer.Option(help="Address of the server; asked for otherwise.")] = None,
    key_stdin: Annotated[
        bool, typer.Option("--key-stdin", help="Read the key from standard input, for scripts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a server's address and a key for it on this machine, once the server has taken the key."""
    if url is None and key_stdin:
        raise ConfigurationError("--key-stdin needs --url: nothing can be asked for then.")
    address = (url or typer.prompt("Address of the server", default=_default_url(), err=True)).strip()
    key = sys.stdin.readline() if key_stdin else typer.prompt("Key", hide_input=True, err=True)
    if not key.strip():
        raise ConfigurationError("The key is empty; an administrator makes one: `sftd keys add NAME`.")
    with Client(address, key.strip()) as client:
        owner = _owner(client)
        path = write_config(Config(url=client.url, key=key.strip()))
    if as_json:
        print_json({"url": client.url, "config": str(path), **owner})
        return
    say(f"signed in at {client.url}{f' as {_words(owner)}' if owner else ''}; kept in {path}")


@app.command(rich_help_panel=BOX)
def logout(as_json: AsJson = False) -> None:
    """Forget the address and key that `login` kept. The key itself stays good: `sftd keys rm` withdraws it."""
    path = config_path()
    was_there = forget_config()
    if as_json:
        print_json({"config": str(path), "deleted": was_there})
        return
    say(f"{path} is deleted" if was_there else "nothing was kept here")


@app.command(rich_help_panel=BOX)
def whoami(as_json: AsJson = False) -> None:
    """Show the server and the key that commands here use, its limits and what is used of them."""
    with Client() as client:
        url, me = client.url, client.keys.me()
    if as_json:
        print_json({"url": url, **me.model_dump(mode="json")})
        return
    print_facts(
        {
            "server": url,
            "name": f"{me.name} ({me.role})",
            "expires": me.expires_at and when(me.expires_at),
            "running": _of(me.running_jobs, me.max_running_jobs),
            "queued": _of(me.queued_jobs, me.max_queued_jobs),
            "GPU-hours": _of(round(me.gpu_hours_this_month, 2), me.max_gpu_hours_per_month) + " this month",
        }
    )


def _of(used: float, most: float | None) -> str:
    return f"{used:g}" if most is None else f"{used:g} of {most:g}"


def _owner(client: Client) -> dict[str, str]:
    """Whose key it is; raises where the server does not take it."""
    try:
        me = client.keys.me()
    except ApiError as error:
        if error.status not in _NO_SUCH_ROUTE:
            raise
        list(client.jobs.list(limit=1))  # any call that needs a key
        return {}
    return {"name": me.name, "role": me.role}


def _words(owner: dict[str, str]) -> str:
    return f"{owner['name']}, role {owner['role']}"


def _default_url() -> str | None:
    if os.environ.get("SFTD_URL"):
        return os.environ["SFTD_URL"]
    try:
        return read_config().url
    except ConfigurationError:  # it is about to be written anew
        return None
