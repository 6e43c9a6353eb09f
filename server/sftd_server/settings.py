"""The server's settings: one object, built in `main()` from flags and environment, then passed down.

Every field can be set by the environment variable `SFTD_` + its name in capitals; docs/operations.md lists them all.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from sftd_server.engines import is_shared

_LISTS = {"model_roots": ":", "allowed_hosts": ",", "trusted_proxies": ","}  # what separates their parts
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,253}(:[0-9]{1,5})?")


class SettingsError(Exception):
    """A setting is wrong. The message names each one and what to do."""


class Settings(BaseModel):
    """How one server runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(
        Path("~/.local/share/sftd"),
        description="Data folder: database, keys, uploaded files, the jobs' folders.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    database_url: str = Field(
        "",
        description="Where the database is; `sqlite:///<path>` or `postgresql://user@host/name`. Default: sftd.db in the data folder.",
    )
    admin_key: SecretStr | None = Field(
        None, description="The admin's key. Default: one is made at the first start, in admin.key."
    )
    model_roots: tuple[Path, ...] = Field(
        (), description="Folders that base models may lie in, separated by colons. Default: <data>/models."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Names, besides this machine's own, that the server may be called by, separated by commas; * for all.",
    )
    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="Addresses or networks of reverse proxies whose X-Forwarded-For is believed, separated by commas.",
    )
    max_wrong_keys: int = Field(
        10,
        ge=0,
        description="Wrong keys that an address may send in a minute; then it gets 429. 0: no limit.",
    )
    max_connections: int = Field(2000, ge=10, description="Most connections that are open at once.")
    max_connections_per_address: int = Field(
        256, ge=4, description="Most of one address; then the one that was idle longest makes room."
    )
    head_seconds: float = Field(
        10, gt=0, description="A connection that has not sent the head of a request by then is closed."
    )
    max_upload_bytes: int = Field(2 * 1024**3, ge=1, description="Largest file that can be uploaded.")
    max_body_bytes: int = Field(1024**2, ge=1024, description="Largest JSON body on a user's route.")
    max_worker_body_bytes: int = Field(16 * 1024**2, ge=1024, description="Largest body on a worker's route.")
    body_seconds: float = Field(60, gt=0, description="A request whose body stalls for so long is given up.")
    lease_seconds: float = Field(
        30, gt=0, description="A job is taken back when its worker is silent so long."
    )
    start_seconds: float = Field(
        15, gt=0, description="A claimed job goes back to the queue when it has not started by then."
    )
    max_lost: int = Field(
        5, ge=1, description="A job fails after losing so many workers without a new checkpoint."
    )
    max_failures: int = Field(
        1, ge=1, description="A job whose trainer died fails at this count; before, it is tried again."
    )
    max_stalls: int = Field(
        3,
        ge=0,
        description="A job whose trainer hangs is begun again from its last checkpoint so often without a new one.",
    )
    backoff_seconds: float = Field(
        2, ge=0, description="Wait before a lost job runs again; doubles each time."
    )
    max_backoff_seconds: float = Field(60, ge=0, description="Longest such wait.")
    fair_share: bool = Field(
        True,
        description="Among jobs of one priority, those go first that are short and whose owner has used few GPU-seconds.",
    )
    fair_share_half_life_seconds: float = Field(
        86400, gt=0, description="What an owner has used counts half after so long."
    )
    preemption: Literal["off", "priority", "fair_share"] = Field(
        "off", description="Whether a running job saves, yields and queues again for one of higher priority."
    )
    preempt_after_seconds: float = Field(
        30, ge=0, description="A job waits so long before others make room for it."
    )
    reserve_seconds: float = Field(
        600,
        ge=0,
        description="A job that waits so long for several slots has a worker's free ones kept for it.",
    )
    reap_seconds: float = Field(1, gt=0, description="How often expired leases are looked for.")
    keepalive_seconds: float = Field(15, gt=0, description="A silent event stream sends a comment so often.")
    max_blob_bytes: int = Field(
        128 * 1024**3, ge=1, description="Largest file that a worker without the shared folder may upload."
    )
    max_uploads_bytes: int = Field(
        256 * 1024**3, ge=1, description="Most that uploads of one job may take before they are put in place."
    )
    artifacts_url: str = Field(
        "",
        description="Where a copy of all files is kept: `s3://bucket/prefix` or `file:///folder`. Default: nowhere.",
    )
    artifacts_options: SecretStr = Field(
        SecretStr(""),
        description='Options of its file system as JSON, such as {"endpoint_url": "http://…"}. Keys: AWS_ACCESS_KEY_ID, ….',
    )
    mirror_seconds: float = Field(
        5, gt=0, description="How often files are looked for that the store does not hold yet."
    )
    stop_seconds: float = Field(5, gt=0, description="How long open requests may take to end when stopping.")
    keep_checkpoints: int = Field(
        3, ge=1, description="Newest checkpoints of a job that are kept, where its spec does not say."
    )
    finished_checkpoint_days: float = Field(
        0,
        ge=0,
        description="Jobs that ended so long ago keep their last, best, pinned and needed checkpoints only; 0: off.",
    )
    artifacts_max_bytes: int = Field(
        0,
        ge=0,
        description="Above this the oldest finished jobs lose checkpoints, but no result; 0: no limit.",
    )
    finished_spool_days: float = Field(
        30, ge=0, description="The spool of a job that ended so long ago is deleted; 0: never."
    )
    unused_file_days: float = Field(
        0, ge=0, description="Uploaded files of this age that no job names are deleted; 0: never."
    )
    cache_max_bytes: int = Field(
        0,
        ge=0,
        description="Above this what was used longest ago goes from cache/; 0: no limit.",
    )
    audit_days: float = Field(
        400, ge=0, description="Entries of the audit log are deleted at this age; 0: never."
    )
    janitor_seconds: float = Field(600, gt=0, description="How often what may be deleted is looked for.")
    ballast_bytes: int = Field(
        16 * 1024**2, ge=0, description="A file of this size is given up when the disk is full; 0: none."
    )
    disk_reserve_bytes: int = Field(
        64 * 1024**2,
        ge=0,
        description="With less room than this, the ballast's included, reports, uploads and claims wait.",
    )

    @field_validator("database_url")
    @classmethod
    def _is_a_database(cls, value: str) -> str:
        if value and is_shared(value) and find_spec("psycopg") is None:
            raise ValueError('PostgreSQL needs psycopg: pip install "sftd[postgres]"')
        return value

    @field_validator("artifacts_url")
    @classmethod
    def _store_is_known(cls, value: str) -> str:
        parts = urlsplit(value)
        if not value or (parts.scheme == "file" and not parts.netloc and len(parts.path) > 1):
            return value
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError("must be s3://bucket/prefix or file:///folder")
        return value

    @field_validator("artifacts_options")
    @classmethod
    def _options_are_json(cls, value: SecretStr) -> SecretStr:
        try:
            options = json.loads(value.get_secret_value() or "{}")
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ValueError('must be a JSON object, such as {"endpoint_url": "http://127.0.0.1:9000"}')
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not a name of a host, with or without :port")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                ipaddress.ip_network(text, strict=False)
            except ValueError:
                raise ValueError(
                    f"{text[:80]!r} is neither an address nor a network like 10.0.0.0/8"
                ) from None
        return value

    @field_validator("admin_key")
    @classmethod
    def _key_is_usable(cls, value: SecretStr | None) -> SecretStr | None:
        secret = value.get_secret_value() if value else "x" * 8
        if len(secret) < 8 or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise ValueError("must be at least 8 printable ASCII characters without spaces")
        return value

    @model_validator(mode="before")
    @classmethod
    def _settle_paths(cls, values: Any) -> Any:  # whatever the caller gave
        if isinstance(values, dict):
            data = Path(values.get("data") or cls.model_fields["data"].default).expanduser().absolute()
            roots = values.get("model_roots") or (data / "models",)
            values = {
                **values,
                "data": data,
                "model_roots": tuple(Path(r).expanduser().absolute() for r in roots),
            }
            values["database_url"] = values.get("database_url") or f"sqlite:///{data / 'sftd.db'}"
        return values


def read_settings(
    environment: Mapping[str, str], **flags: Any
) -> Settings:  # flags: as the parser gives them
    """Settings from flags, then environment, then defaults. Raises SettingsError naming every mistake."""
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        text = environment.get(variable(name), "")
        if text:
            mark = _LISTS.get(name)
            values[name] = (
                text if mark is None else [part.strip() for part in text.split(mark) if part.strip()]
            )
    values.update({name: value for name, value in flags.items() if value is not None})
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{variable(str(line['loc'][0]))}: {line['msg'].removeprefix('Value error, ')}"
            for line in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError("\n".join(lines)) from None


def variable(field: str) -> str:
    """The environment variable of a field."""
    return f"SFTD_{field.upper()}"
