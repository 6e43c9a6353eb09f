"""Checkpoints on disk: everything a run needs to go on as if nothing had happened, and never half of it.

Order of a save: files into `.stage-<attempt>`, each fsynced; the manifest of hashes last; one rename to
`checkpoint-<step>`; fsync of the parent; only then is it announced. A folder without a verifying manifest is none.
What goes into one is in `snapshot.py`, when it is written in `saving.py`.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sftd.protocol import TrainerJob
from sftd.schemas import FailureReason, ManifestFile
from sftd.spec import SCHEDULING_FIELDS, JobSpec
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.optim import names_by_shape, names_in_order
from sftd_worker.trainer.sharding import Shards
from sftd_worker.trainer.shares import await_shares, read_shares, share_name
from sftd_worker.trainer.snapshot import Tensors, live_weights, names_on_disk
from sftd_worker.trainer.tensorfile import write_tensors

MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
ADAPTER = "adapter_model.safetensors"
# Fields that change nothing about the numbers of a run.
_NOT_THE_RUN = {"name", "metadata", "wandb", "save_steps", "logging_steps"} | SCHEDULING_FIELDS
# Fields that spread the rows of a step over devices and micro-batches.
_HOW_SPREAD = {"batch_size", "gradient_accumulation_steps", "gpus", "sharding", "max_tokens_per_step"}
# Fields that came after the first checkpoints were written: at their defaults they are left out of the hash, so that
# a job begun under an older version goes on.
_ADDED_LATER = ("max_tokens_per_step", "sharding")


@dataclass
class RunState:
    """All that a run knows besides weights and optimizer. If it is not here, a resumed run does not need it."""

    step: int = 0  # optimizer steps done
    data_sha: str = ""  # of the training file and what is left out of it; "" in older checkpoints
    tokens_seen: int = 0  # through the model, without padding
    evaluated_at: int = -1  # step of the newest evaluation
    whole_budget: dict[str, int] = field(default_factory=dict)  # memory.Budget that the spec gives
    budget: dict[str, int] = field(
        default_factory=dict
    )  # what is left of it for a step; empty before the first
    eval_budget: dict[str, int] = field(default_factory=dict)  # and of an evaluation
    threads: int | None = None  # of this run on CPU; None on GPUs, and in older checkpoints
    unordered: bool = False  # the fixed order of sums was given up (order.py)
    first_loss: float | None = None  # of the run: what a later loss is measured against
    far_off_since: int | None = None  # steps were done when losses began to be far above it (divergence.py)
    tokens_far_off: int = 0  # supervised, since then
    metrics: dict[str, float] = field(default_factory=dict)  # newest loss and evaluation, for the record
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # all of them, as in eval_results.json


def config_sha(spec: JobSpec) -> str:
    """Hash of the part of a spec that decides a run's numbers. A checkpoint of another spec is not resumed from."""
    data = spec.model_dump(mode="json", exclude=_NOT_THE_RUN)
    for name in _ADDED_LATER:
        if data[name] == JobSpec.model_fields[name].default:
            del data[name]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def run_sha(spec: JobSpec) -> str:
    """The same for specs that spread a step differently over devices and micro-batches: equal but for rounding (and
    for the random numbers of dropout, which are each rank's own)."""
    data = spec.model_dump(mode="json", exclude=_NOT_THE_RUN | _HOW_SPREAD)
    data["rows_per_step"] = spec.batch_size * spec.gradient_accumulation_steps * spec.gpus
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def is_of_run(manifest: dict[str, Any], spec: JobSpec) -> bool:
    """May a run of `spec` go on from the checkpoint of this manifest?"""
    return manifest.get("config_sha") == config_sha(spec) or manifest.get("run_sha") == run_sha(spec)


def data_sha_of(job: TrainerJob, training_sha: str | None = None) -> str:
    """What decides which rows are trained on: with a server files never change, in a folder they may."""
    return (training_sha or hash_file(Path(job.training_path))) + "-no-tests" * job.skip_test_translation


def fixed_files(*, model: Model, tokenizer: Any) -> dict[str, bytes]:
    """The files of a checkpoint that are the same at every step, by path: configuration and tokenizer."""
    with tempfile.TemporaryDirectory(prefix="sftd-") as name:
        folder = Path(name)
        if model.net is model.causal:
            _save_full(model, folder, {}, dtype=torch.float32)
        else:
            _save_adapter_config(model, folder)
        tokenizer.save_pretrained(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }


def write_checkpoint(
    stage: Path,
    *,
    tensors: Tensors,
    model: Model,
    fixed: dict[str, bytes],
    state: RunState,
    facts: dict[str, Any],
    num_shares: int,
    proceed: Callable[[], None],
    next_piece: Callable[[], None] | None = None,
) -> tuple[dict[str, ManifestFile], str]:
    """Write everything of a checkpoint into the folder `stage`, durably. Returns (files, sha256 of the manifest).

    `publish` makes a checkpoint of it. `proceed` is called again and again and may raise to end the work; instead of it,
    where there is one, `next_piece` is called between pieces that are written. With
    `num_shares` over 1 the other ranks write theirs of the optimizer's state meanwhile (`shares.write_share`).
    """
    next_piece = next_piece or proceed
    stage.mkdir(parents=True, exist_ok=True)
    for name, content in fixed.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(content)
    weights = "model.safetensors" if model.net is model.causal else ADAPTER
    share = share_name(0, num_shares)
    written = {
        weights: write_tensors(stage / weights, names_on_disk(model, tensors.weights), proceed=next_piece),
        share: write_tensors(stage / share, tensors.optimizer, proceed=next_piece),
    }
    written |= await_shares(stage, num_shares, proceed=proceed)
    _write_json(stage / _STATE, {"run": asdict(state), "optimizer": tensors.plain})
    return write_manifest(stage, {"step": state.step, **facts, "metrics": state.metrics}, written=written)


def clear_unfinished(folder: Path) -> None:
    """Remove what attempts that were killed left half written."""
    for half in [*folder.glob(".stage-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(half, ignore_errors=True)


def load_checkpoint(folder: Path, *, model: Model, optimizer: torch.optim.Optimizer) -> RunState:
    """Put the optimizer back to where it was. The weights have been read when the model was loaded.

    Its state is laid on parameters by name: which number one has depends on how they are grouped. In the first
    checkpoints of all it was laid by number, when shapes decided what decays.
    """
    saved = json.loads((folder / _STATE).read_text())
    numbers = {name: number for number, name in enumerate(names_in_order(model.net, optimizer))}
    by_shape = enumerate(names_by_shape(model.net))
    numbers |= {str(old): numbers[name] for old, name in by_shape if name in numbers}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = read_shares(folder, {name: parameters[number] for name, number in numbers.items()})
    _unflatten(optimizer, tensors, saved["optimizer"], numbers)
    return RunState(**saved["run"])


def require_whole(folder: Path, spec: JobSpec) -> None:
    """Raise RunFailed where a checkpoint is not whole, or was written under another spec."""
    manifest = verify(folder)
    if manifest is None:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT, f"{folder.name} does not match its manifest; it is not used"
        )
    if not is_of_run(manifest, spec):
        raise RunFailed(
            FailureReason.BAD_SPEC,
            f"{folder.name} was written under another spec; post a new job, or use an empty folder",
        )


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from, and the damaged ones that are newer."""

    newest: Path | None
    damaged: list[Path]

    def notices(self) -> list[str]:
        """What to tell of the damaged ones."""
        if self.newest is not None:
            instead = f"the run goes on from {self.newest.name}"
        else:
            instead = "there is no whole one before it, and the run begins anew"
        return [
            f"{path.name} does not match its manifest and is not used; {instead}. Check the disk."
            for path in self.damaged
        ]


def find_checkpoint(folder: Path, spec: JobSpec) -> Found:
    """The newest whole checkpoint of this spec under `folder`. For runs without a server."""
    damaged = []
    named = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0]
    for candidate in sorted(named, key=lambda path: -step_of(path)):
        manifest = verify(candidate)
        if manifest is None:
            damaged.append(candidate)
        elif is_of_run(manifest, spec):
            return Found(candidate, damaged)
    return Found(None, damaged)


def verify(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files all have the size and hash it says; None for anything else."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if not manifest["files"]:
            return None
        for name, file in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != file["bytes"] or hash_file(path) != file["sha256"]:
                return None
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 for other names."""
    tail = path.name.removeprefix("checkpoint-")
    return int(tail) if tail.isascii() and tail.isdigit() else -1


# ---------------------------------------------------------------- pieces shared with the export


def save_weights(model: Model, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """The adapter, or all weights, as safetensors that peft or transformers load by themselves.

    Where weights are sharded this is collective, and rank 0 alone writes.
    """
    if model.shards is not None:
        _save_gathered(model, model.shards, folder, dtype or torch.float32)
        return
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
    _save_full(model, folder, weights, dtype=dtype or torch.float32)


def _save_gathered(model: Model, shards: Shards, folder: Path, dtype: torch.dtype) -> None:
    full = model.net is model.causal
    weights = {}
    for name, whole in shards.gather(live_weights(model)):
        if shards.world.is_main:
            cast = dtype if full and whole.is_floating_point() else whole.dtype
            weights[name] = whole.to("cpu", cast, copy=True)
    if shards.world.is_main and full:
        _save_full(model, folder, weights, dtype=dtype)
    elif shards.world.is_main:
        _save_adapter_config(model, folder)
        write_tensors(folder / ADAPTER, weights)


def _save_adapter_config(model: Model, folder: Path) -> None:
    config = copy.copy(model.net.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)


def _save_full(model: Model, folder: Path, weights: dict[str, torch.Tensor], *, dtype: torch.dtype) -> None:
    """What transformers saves of a model; without `weights`, all but these."""
    config = model.causal.config
    kept = config.dtype, config.use_cache
    config.use_cache = True
    try:
        model.causal.save_pretrained(folder, state_dict=weights)
        config.dtype = dtype  # save_pretrained writes the type of the model in memory
        config.save_pretrained(folder)
    finally:
        config.dtype, config.use_cache = kept


def write_manifest(
    folder: Path,
    facts: dict[str, Any],
    *,
    written: dict[str, ManifestFile] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[str, ManifestFile], str]:
    """Hash and fsync every file of a folder, then write its manifest. Returns (files, sha256 of the manifest).

    Files in `written` were hashed and fsynced as they were written.
    """
    files = dict(written or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        alive()
        path.chmod(0o644)  # some writers leave 0600, and the server may run as another user
        name = str(path.relative_to(folder))
        if name not in files:
            files[name] = ManifestFile(bytes=path.stat().st_size, sha256=hash_file(path))
            fsync(path)
    body = json.dumps({**facts, "files": {name: file.model_dump() for name, file in files.items()}}, indent=1)
    manifest = folder / MANIFEST
    manifest.write_text(body)
    fsync(manifest)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync(directory)
    files[MANIFEST] = ManifestFile(bytes=len(body.encode()), sha256=hashlib.sha256(body.encode()).hexdigest())
    return files, files[MANIFEST].sha256


def publish(stage: Path, target: Path) -> None:
    """One rename makes a finished folder visible; an older one of that name (unannounced or broken) goes first."""
    trash = target.parent / f".trash-{target.name}"
    shutil.rmtree(trash, ignore_errors=True)
    if target.exists():
        target.rename(trash)
    stage.rename(target)
    fsync(target.parent)
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
        if self.leaving.is_file():
            self.leaving.unlink(missing_ok=True)
        shutil.rmtree(self.leaving, ignore_errors=True)
        if is_disk_full(error):
            path = os.path.abspath(getattr(error, "filename", None) or self.leaving)
            raise RunFailed(
                FailureReason.DISK_FULL, f"{self.doing}: the disk is full", full_path=path
            ) from error


def is_disk_full(error: BaseException) -> bool:
    """Is this error a full disk or a spent quota, in Python's words or in those of safetensors?"""
    text = str(error)
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left" in text
        or "os error 28" in text
    )


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- helpers


def _unflatten(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    plain: dict[str, Any],
    numbers: dict[str, int],
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        parameter, *path, key = name.split("/")
        place = state.setdefault(numbers[parameter], {})
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    body = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    if getattr(optimizer, "is_paged", False):
        _load_pages(optimizer, body)
    else:
        optimizer.load_state_dict(body)


def _load_pages(optimizer: Any, body: dict[str, Any]) -> None:
    """bitsandbytes' own loading puts paged state onto the device for good, where it was not when the run fitted.

    Its small tensors go to the device at the first step (`to_gpu`), which leaves pages alone.
    """
    optimizer.load_state_dict(body, move_to_device=False)
    for parameter, kept in optimizer.state.items():
        for name in ("state1", "state2"):
            read = kept.get(name)
            if isinstance(read, torch.Tensor) and read.shape == parameter.shape:
                place = optimizer.get_state_buffer(parameter, dtype=read.dtype)
                if parameter.is_cuda:
                    torch.cuda.synchronize(parameter.device)  # it is filled there
                kept[name] = place.copy_(read)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def fsync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
