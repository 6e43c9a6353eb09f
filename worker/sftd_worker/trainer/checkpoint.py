"""Checkpoints: everything a run needs to go on as if nothing had happened, written so that a half one cannot exist.

Order of a save: files into `.stage-<attempt>`, each fsynced; the manifest of hashes last; one rename to
`checkpoint-<step>`; fsync of the parent; only then is it announced. A folder without a verifying manifest is none.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sftd.protocol import CheckpointLine
from sftd.schemas import FailureReason, ManifestFile
from sftd.spec import JobSpec
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.model import Model

MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
# Fields that change nothing about the numbers of a run.
_NOT_THE_RUN = {"name", "metadata", "priority", "wandb", "save_steps", "logging_steps"}


@dataclass
class RunState:
    """All that a run knows besides weights and optimizer. If it is not here, a resumed run does not need it."""

    step: int = 0  # optimizer steps done
    data_sha: str = ""  # of the training file and what is left out of it; "" in older checkpoints
    tokens_seen: int = 0  # through the model, without padding
    evaluated_at: int = -1  # step of the newest evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # newest loss and evaluation, for the record
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # all of them, as in eval_results.json


def config_sha(spec: JobSpec) -> str:
    """Hash of the part of a spec that decides a run's numbers. A checkpoint of another spec is not resumed from."""
    data = spec.model_dump(mode="json", exclude=_NOT_THE_RUN)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    folder: Path,
    *,
    model: Model,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    spec: JobSpec,
    attempt: int,
    at: float,
    world_size: int,
) -> CheckpointLine:
    """Write `folder`/checkpoint-<step>; returns the line that announces it. Raises RunFailed(disk_full)."""
    stage = folder / f".stage-{attempt}"
    name = f"checkpoint-{state.step}"
    with disk_errors(f"checkpoint of step {state.step}", leaving=stage):
        for half in [*folder.glob(".stage-*"), *folder.glob(".trash-*")]:  # of attempts that were killed
            shutil.rmtree(half, ignore_errors=True)
        stage.mkdir(parents=True)
        save_weights(model, stage)
        tokenizer.save_pretrained(stage)
        tensors, plain = _flatten(optimizer)
        save_file(tensors, stage / _OPTIMIZER)
        _write_json(stage / _STATE, {"run": asdict(state), "optimizer": plain})
        facts = {
            "step": state.step,
            "attempt": attempt,
            "config_sha": config_sha(spec),
            "world_size": world_size,
            "metrics": state.metrics,
        }
        files, digest = write_manifest(stage, facts)
        publish(stage, folder / name)
    return CheckpointLine(
        attempt=attempt,
        at=at,
        step=state.step,
        name=name,
        manifest_sha256=digest,
        files=files,
        metrics=state.metrics,
    )


def load_checkpoint(folder: Path, *, model: Model, optimizer: torch.optim.Optimizer) -> RunState:
    """Put adapter and optimizer back to where they were. All weights of a `full` run are read when the model is loaded."""
    if model.net is not model.causal:
        _load_adapter(model, folder)
    saved = json.loads((folder / _STATE).read_text())
    _unflatten(optimizer, load_file(folder / _OPTIMIZER), saved["optimizer"])
    return RunState(**saved["run"])


def require_whole(folder: Path, spec: JobSpec) -> None:
    """Raise RunFailed where a checkpoint is not whole, or was written under another spec."""
    manifest = verify(folder)
    if manifest is None:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT, f"{folder.name} does not match its manifest; it is not used"
        )
    if manifest["config_sha"] != config_sha(spec):
        raise RunFailed(
            FailureReason.BAD_SPEC,
            f"{folder.name} was written under another spec; post a new job, or use an empty folder",
        )


def newest_checkpoint(folder: Path, spec: JobSpec) -> Path | None:
    """The newest whole checkpoint of this spec under `folder`, or None. For runs without a server."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -_step_of(path))
    for candidate in found:
        manifest = verify(candidate)
        if manifest is not None and manifest["config_sha"] == config_sha(spec):
            return candidate
    return None


def verify(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files all have the size and hash it says; None for anything else."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        for name, file in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != file["bytes"] or hash_file(path) != file["sha256"]:
                return None
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---------------------------------------------------------------- pieces shared with the export


def save_weights(model: Model, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """The adapter, or all weights, as safetensors that peft or transformers load by themselves."""
    if model.net is not model.causal:
        model.net.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's own card; the result gets ours
        return
    weights = model.causal.state_dict()
    if dtype is not None:
        # By their place in memory: tied weights stay one tensor, and are written once.
        cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
        weights = {
            name: cast.setdefault((value.data_ptr(), value.shape), value.to(dtype))
            if value.is_floating_point()
            else value
            for name, value in weights.items()
        }
    config = model.causal.config
    kept = config.dtype, config.use_cache
    config.use_cache = True
    try:
        model.causal.save_pretrained(folder, state_dict=weights)
        config.dtype = dtype or torch.float32  # save_pretrained writes the type of the model in memory
        config.save_pretrained(folder)
    finally:
        config.dtype, config.use_cache = kept


def write_manifest(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, ManifestFile], str]:
    """Hash and fsync every file of a folder, then write its manifest. Returns (files, sha256 of the manifest)."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(path.relative_to(folder))] = ManifestFile(bytes=path.stat().st_size, sha256=hash_file(path))
        path.chmod(0o644)  # some writers leave 0600, and the server may run as another user
        _fsync(path)
    body = json.dumps({**facts, "files": {name: file.model_dump() for name, file in files.items()}}, indent=1)
    manifest = folder / MANIFEST
    manifest.write_text(body)
    _fsync(manifest)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _fsync(directory)
    files[MANIFEST] = ManifestFile(bytes=len(body.encode()), sha256=hashlib.sha256(body.encode()).hexdigest())
    return files, files[MANIFEST].sha256


def publish(stage: Path, target: Path) -> None:
    """One rename makes a finished folder visible; an older one of that name (unannounced or broken) goes first."""
    trash = target.parent / f".trash-{target.name}"
    shutil.rmtree(trash, ignore_errors=True)
    if target.exists():
        target.rename(trash)
    stage.rename(target)
    _fsync(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


class disk_errors:  # reads as a statement: with disk_errors("…", leaving=stage)
    """A full disk is a reason of its own, not a traceback. What was half written goes, so that there is room to say so."""

    def __init__(self, doing: str, *, leaving: Path) -> None:
        self.doing = doing
        self.leaving = leaving

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        shutil.rmtree(self.leaving, ignore_errors=True)
        text = str(error)
        if (
            (isinstance(error, OSError) and error.errno in (28, 122))
            or "No space left" in text
            or "os error 28" in text
        ):
            raise RunFailed(FailureReason.DISK_FULL, f"{self.doing}: the disk is full") from error


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- helpers


def _load_adapter(model: Model, folder: Path) -> None:
    outcome = set_peft_model_state_dict(model.net, load_file(folder / "adapter_model.safetensors"))
    if outcome.unexpected_keys:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT, f"{folder.name} holds weights that the adapter does not have"
        )


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name and plain values: no pickle on disk."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):  # bitsandbytes keeps its quantisation in an inner dict
            for key, inner in value.items():
                put(f"{name}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            tensors[name] = (
                value.detach().cpu().contiguous().clone()
            )  # clone: some share storage, which is refused
        else:
            plain[name] = value

    for index, state in optimizer.state_dict()["state"].items():
        put(str(index), state)
    return tensors, plain


def _unflatten(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        index, *path, key = name.split("/")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_of(path: Path) -> int:
    tail = path.name.removeprefix("checkpoint-")
    return int(tail) if tail.isdigit() else -1
