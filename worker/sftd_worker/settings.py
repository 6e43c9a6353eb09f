"""The worker's settings: one object, built in `main()` from flags and environment, then passed down.

Every field can be set by the environment variable beside it; docs/operations.md lists them all.
"""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

_VARIABLES = {"server_url": "SFTD_SERVER_URL", "key": "SFTD_WORKER_KEY", "offline": "HF_HUB_OFFLINE"}
_NAME = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


class SettingsError(Exception):
    """A setting is wrong or missing. The message names each one and what to do."""


class WorkerSettings(BaseModel):
    """How one worker runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    server_url: str = Field("http://127.0.0.1:8000", description="Address of the server.")
    data: Path = Field(
        Path("~/.local/share/sftd"),
        description="The server's data folder: on this machine, or a shared volume.",
    )
    own_data: bool = Field(
        False,
        description="The data folder is this worker's own, empty at first: it fetches and sends files through the server.",
    )
    key: SecretStr | None = Field(
        None, description="The worker's key. Default: what stands in worker.key in the data folder."
    )
    worker_name: str = Field(
        "", description="Name of this worker, the same after a restart. Default: the host's."
    )
    labels: dict[str, str] = Field({}, description="What `sftd workers` shows of it: name=value, by commas.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="What to train on.")
    gpus: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Use so many GPUs, or CPU processes where there are none. Default: all, or 1.",
    )
    model_roots: tuple[Path, ...] = Field(
        (), description="Folders that base models may lie in, separated by colons. Default: <data>/models."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with a base model. Only for models whose code you have read.",
    )
    offline: bool = Field(False, description="Load base models from this machine only, never from the hub.")
    cancel_grace_seconds: float = Field(
        3,
        ge=0,
        description="A cancelled trainer is killed when it has not stopped by itself within this time.",
    )
    checkpoint_grace_seconds: float = Field(
        60,
        ge=0,
        description="How long saving a checkpoint may take when a job is paused or the worker stops.",
    )
    drain_seconds: float = Field(
        0,
        ge=0,
        description="How long running jobs may go on after the first SIGTERM, before they are saved and given back.",
    )
    claim_wait_seconds: float = Field(
        25, ge=0, le=60, description="How long a call for the next job is held open."
    )
    heartbeat_wait_seconds: float = Field(
        3, ge=0, le=10, description="How long a heartbeat is held open, waiting for news."
    )
    lock_wait_seconds: float = Field(
        30, ge=0, description="How long to wait for an earlier trainer on the same device or job to be gone."
    )
    alive_file: Path | None = Field(
        None,
        description="Touched every second while the worker is registered and runs: for health checks. Default: none.",
    )
    warm: bool = Field(
        True,
        description="Keep a process that has imported torch and the rest, and fork trainers off it: jobs start at once.",
    )
    stall_seconds: float = Field(
        600,
        ge=0,
        description="A trainer that shows no life for so long (and for stall_factor usual steps) has stalled; 0: never.",
    )
    start_stall_seconds: float = Field(
        3600,
        ge=0,
        description="The same before its first step, while models are loaded or fetched; 0: never.",
    )
    stall_factor: float = Field(
        20, ge=0, description="Nor has a trainer stalled before so many times the usual time of a step."
    )
    disk_reserve_bytes: int = Field(
        1024**3,
        ge=0,
        lt=2**60,
        description="A job is put aside when less than this would be left free beside its next checkpoint.",
    )
    own_data_days: float = Field(
        7,
        ge=0,
        description="With own_data: files that the server has are removed when they were not used for so long; 0: never.",
    )
    own_data_bytes: int = Field(
        100 * 1024**3,
        ge=0,
        lt=2**60,
        description="With own_data: while the folder holds more, what the server has goes by last use; 0: no limit.",
    )
    # Not settable from outside: how often a lost GPU and unused files are looked for, how long older checkpoints may take to be removed
    # behind a new one, how long a trainer may stay behind its last word, how it and its warm parent are started. Tests
    # put scripted ones here.
    gpu_look_seconds: float = Field(60, exclude=True)
    tidy_seconds: float = Field(3600, exclude=True)
    disk_settle_seconds: float = Field(60, exclude=True)
    last_word_seconds: float = Field(60, exclude=True)
    trainer_argv: tuple[str, ...] = Field((sys.executable, "-m", "sftd_worker.trainer"), exclude=True)
    warm_argv: tuple[str, ...] = Field((sys.executable, "-P", "-m", "sftd_worker.trainer.warm"), exclude=True)

    @field_validator("worker_name")
    @classmethod
    def _name_is_usable(cls, value: str) -> str:
        if not _NAME.match(value):
            raise ValueError("may hold letters, digits and ._:- only, up to 128 of them")
        return value

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:  # whatever the caller gave
        if isinstance(values, dict):
            data = Path(values.get("data") or cls.model_fields["data"].default).expanduser().absolute()
            roots = values.get("model_roots") or (data / "models",)
            name = values.get("worker_name") or re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname())[:128]
            values = {
                **values,
                "data": data,
                "model_roots": tuple(Path(root).expanduser().absolute() for root in roots),
                "worker_name": name or "worker",
            }
        return values

    def read_key(self) -> str:
        """The worker's key, from the setting or from the data folder."""
        if self.key is not None:
            return self.key.get_secret_value().strip()
        path = self.data / "worker.key"
        try:
            return path.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"No key: {path} cannot be read ({error}). Set SFTD_WORKER_KEY, or start the server once so that"
                " it makes one, and give --data the server's folder."
            ) from error


def read_settings(
    environment: Mapping[str, str], **flags: Any
) -> WorkerSettings:  # flags: as the parser gives them
    """Settings from flags, then environment, then defaults. Raises SettingsError naming every mistake."""
    values: dict[str, Any] = {}
    for name in settable_fields():
        if text := environment.get(variable(name), ""):
            values[name] = _parsed(name, text)
    values.update({name: value for name, value in flags.items() if value is not None})
    try:
        return WorkerSettings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{variable(str(line['loc'][0]))}: {line['msg'].removeprefix('Value error, ')}"
            for line in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError("\n".join(lines)) from None


def settable_fields() -> list[str]:
    """The fields that the environment may set."""
    return [name for name, field in WorkerSettings.model_fields.items() if not field.exclude]


def variable(field: str) -> str:
    """The environment variable of a field."""
    return _VARIABLES.get(field, f"SFTD_{field.upper()}")


def _parsed(name: str, text: str) -> Any:  # pydantic checks what comes out
    if name == "model_roots":
        return [part for part in text.split(os.pathsep) if part]
    if name == "labels":
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        return {key.strip(): value.strip() for key, _, value in pairs}
    return text
