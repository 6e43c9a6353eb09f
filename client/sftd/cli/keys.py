"""Commands for access keys: `sftd keys add | change | ls | rm`."""

from typing import Annotated, Any

import typer

from sftd.cli.app import AsJson, keys, require_number, say_deleted
from sftd.client import Client
from sftd.errors import ConfigurationError
from sftd.output import print_json, print_table, say, when
from sftd.schemas import Key

KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]
ExpiresInDays = Annotated[float | None, typer.Option(min=0.01, help="How long it is good for.")]
MaxRunning = Annotated[
    int | None, typer.Option("--max-running-jobs", min=1, help="Jobs of it that may run at once.")
]
MaxQueued = Annotated[int | None, typer.Option("--max-queued-jobs", min=1, help="Jobs of it that may wait.")]
MaxHours = Annotated[
    float | None,
    typer.Option("--max-gpu-hours-per-month", min=0, help="GPU-hours that it may use in a calendar month."),
]
WITHOUT = ("max-running-jobs", "max-queued-jobs", "max-gpu-hours-per-month", "expiry")
SECONDS_A_DAY = 86400


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    role: Annotated[str, typer.Option(help="user, admin or worker.")] = "user",
    expires_in_days: ExpiresInDays = None,
    max_running_jobs: MaxRunning = None,
    max_queued_jobs: MaxQueued = None,
    max_gpu_hours_per_month: MaxHours = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its secret, which is shown this once."""
    if role not in ("user", "admin", "worker"):
        raise ConfigurationError(f"--role {role}: it is user, admin or worker.")
    with Client() as client:
        key = client.keys.create(
            name=name,
            role=role,  # type: ignore[arg-type]  # checked above
            expires_in_seconds=_seconds(expires_in_days),
            max_running_jobs=max_running_jobs,
            max_queued_jobs=max_queued_jobs,
            max_gpu_hours_per_month=max_gpu_hours_per_month,
        )
    if as_json:
        print_json(key)
        return
    print(key.secret)
    say(f"{key.id} for {key.name}, role {key.role}; keep the secret, it is not shown again.")


@keys.command("change")
def change_key(
    key_id: KeyId,
    expires_in_days: ExpiresInDays = None,
    max_running_jobs: MaxRunning = None,
    max_queued_jobs: MaxQueued = None,
    max_gpu_hours_per_month: MaxHours = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT", help=f"Take a limit away: {', '.join(WITHOUT)}; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a key's limits, or when it expires."""
    given = {
        "max_running_jobs": max_running_jobs,
        "max_queued_jobs": max_queued_jobs,
        "max_gpu_hours_per_month": max_gpu_hours_per_month,
        "expires_in_seconds": _seconds(expires_in_days),
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for limit in without or []:
        if limit not in WITHOUT:
            raise ConfigurationError(f"--without {limit}: it is {', '.join(WITHOUT[:-1])} or {WITHOUT[-1]}.")
        field = "expires_in_seconds" if limit == "expiry" else limit.replace("-", "_")
        if field in fields:
            raise ConfigurationError(f"--without {limit} stands beside a new value; give one of the two.")
        fields[field] = None
    if not fields:
        raise ConfigurationError("Nothing to change; give a limit, --expires-in-days or --without.")
    with Client() as client:
        key = client.keys.change(key_id, **fields)
    if as_json:
        print_json(key)
        return
    say(f"{key_id} is changed: {_limits(key) or 'no limits'}; {_expiry(key)}")


@keys.command("ls")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    with Client() as client:
        found = list(client.keys.list())
    if as_json:
        print_json(found)
        return
    rows = [(key.id, key.name, key.role, when(key.created_at), _expiry(key), _limits(key)) for key in found]
    print_table(("ID", "NAME", "ROLE", "CREATED", "EXPIRES", "LIMITS"), rows)


@keys.command("rm")
def remove_key(key_id: KeyId, as_json: AsJson = False) -> None:
    """Withdraw a key."""
    with Client() as client:
        client.keys.delete(key_id)
    say_deleted(key_id, "withdrawn", as_json=as_json)


def _seconds(days: float | None) -> int | None:
    require_number("--expires-in-days", days)
    return None if days is None else round(days * SECONDS_A_DAY)


def _expiry(key: Key) -> str:
    return when(key.expires_at) if key.expires_at else "never"


def _limits(key: Key) -> str:
    """`2 running, 10 queued, 40 GPU-hours a month`."""
    words = {
        "running": key.max_running_jobs,
        "queued": key.max_queued_jobs,
        "GPU-hours a month": key.max_gpu_hours_per_month,
    }
    return ", ".join(f"{value:g} {word}" for word, value in words.items() if value is not None)
