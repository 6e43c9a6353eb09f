"""The optimizer's state on disk: one file, or one a rank, read back by any number of ranks.

Every tensor is cut by rows, rank after rank, so that a file says by its shapes alone which rows it holds. Rank 0 writes
the rest of a checkpoint and its manifest; the others leave word of their file beside it, which rank 0 waits for.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from sftd.schemas import FailureReason, ManifestFile
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.tensorfile import write_tensors

_POLL_SECONDS = 0.02
_BY_ELEMENT = {"exp_avg", "exp_avg_sq"}


class Abandoned(Exception):
    """The save is not wanted any more."""


def share_name(rank: int, num_ranks: int) -> str:
    """The file of one rank's share, of `num_ranks`."""
    if num_ranks == 1:
        return "optimizer.safetensors"
    return f"optimizer-{rank + 1:05}-of-{num_ranks:05}.safetensors"


def write_share(
    stage: Path, name: str, tensors: dict[str, torch.Tensor], *, proceed: Callable[[], None]
) -> None:
    """Write the share of a rank other than 0 and leave word of it, or of what went wrong, for rank 0."""
    try:
        word: dict[str, Any] = write_tensors(stage / name, tensors, proceed=proceed).model_dump()
    except Abandoned:
        _leave_word(stage, name, {"abandoned": True})
        raise
    except Exception as error:
        if not stage.exists():  # rank 0 has given this save up, and says why
            raise Abandoned from error
        (stage / name).unlink(missing_ok=True)  # perhaps there is room for a word then
        errno = error.errno if isinstance(error, OSError) else None
        _leave_word(stage, name, {"failed": f"{type(error).__name__}: {error}", "errno": errno})
        raise
    _leave_word(stage, name, word)


def await_shares(stage: Path, num_ranks: int, *, proceed: Callable[[], None]) -> dict[str, ManifestFile]:
    """Wait for the shares of all ranks but 0; returns them by name.

    Raises Abandoned, OSError or RunFailed where one was not written, as the other rank met it. A rank that is killed leaves no word: then this one is killed too, by torchrun.
    """
    found = {}
    for name in (share_name(rank, num_ranks) for rank in range(1, num_ranks)):
        path = _word_of(stage, name)
        while not path.exists():
            proceed()
            time.sleep(_POLL_SECONDS)
        word = json.loads(path.read_text())
        path.unlink()
        if "abandoned" in word:
            raise Abandoned
        if word.get("errno") is not None:
            raise OSError(word["errno"], f"{name} was not written: {word['failed']}")
        if "failed" in word:
            raise RunFailed(FailureReason.TRAINER_ERROR, f"{name} was not written: {word['failed']}")
        found[name] = ManifestFile.model_validate(word)
    return found


def read_shares(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by name, of each sharded parameter the rows that this rank holds.

    `parameters` by the name that stands before the / in the names of their state. Raises
    RunFailed(checkpoint_corrupt) where files are missing or do not fit the parameters.
    """
    tensors = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(folder)]
        for name in files[0].keys():  # noqa: SIM118  # no dict
            parameter = _parameter_of(name, parameters, folder)
            pieces = [file.get_slice(name) for file in files]
            _require_fit(name, [piece.get_shape() for piece in pieces], parameter, folder)
            if not pieces[0].get_shape():  # a number, the same in all files
                tensors[name] = files[0].get_tensor(name)
            elif isinstance(parameter, DTensor):
                local = _rows(pieces, *_held(parameter), name=name, folder=folder, of=len(parameter))
                tensors[name] = DTensor.from_local(
                    local.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            elif len(files) == 1:
                tensors[name] = files[0].get_tensor(name)
            else:
                tensors[name] = _rows(pieces, 0, len(parameter), name=name, folder=folder, of=len(parameter))
    return tensors


def _require_fit(name: str, shapes: list[list[int]], parameter: torch.nn.Parameter, folder: Path) -> None:
    """What stands for each element of a parameter has its shape, in pieces by rows; scales of 8-bit state have others."""
    if name.split("/")[-1] not in _BY_ELEMENT:
        return
    whole = [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []
    if whole != list(parameter.shape):
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT,
            f"{folder.name}: {name} has the shape {whole}, its parameter {list(parameter.shape)}",
        )


def _parameter_of(name: str, parameters: dict[str, torch.nn.Parameter], folder: Path) -> torch.nn.Parameter:
    try:
        return parameters[name.split("/")[0]]
    except KeyError:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT,
            f"{folder.name}: {name} is the state of a parameter that is not trained here",
        ) from None


def _rows(
    pieces: list[Any], first: int, end: int, *, name: str, folder: Path, of: int
) -> torch.Tensor:  # (end - first, ...)
    """Rows `first` to `end` of a tensor that lies in `pieces`, one behind the other, `of` rows in all."""
    found, at = [], 0
    for piece in pieces:
        rows = piece.get_shape()[0]
        start, stop = max(first - at, 0), min(end - at, rows)
        if start < stop:
            found.append(piece[start:stop])
        at += rows
    if at != of:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT,
            f"{folder.name}: the shares of the optimizer's {name} have {at} rows, its parameter has {of}",
        )
    return torch.cat(found) if found else pieces[0][0:0]


def _held(parameter: DTensor) -> tuple[int, int]:
    """Rows (first, end) of a sharded parameter that this rank holds: equal pieces, the last ones shorter or empty."""
    mesh = parameter.device_mesh
    longest = -(-len(parameter) // mesh.size())
    first = min(len(parameter), longest * mesh.get_local_rank())
    return first, first + len(parameter.to_local())


def _files(folder: Path) -> list[Path]:
    whole = folder / share_name(0, 1)
    if whole.exists():
        return [whole]
    found = sorted(folder.glob("optimizer-*-of-*.safetensors"))
    if not found or [path.name for path in found] != [share_name(r, len(found)) for r in range(len(found))]:
        raise RunFailed(
            FailureReason.CHECKPOINT_CORRUPT, f"{folder.name}: shares of the optimizer's state are missing"
        )
    return found


def _word_of(stage: Path, name: str) -> Path:
    return stage / f".{name}.json"


def _leave_word(stage: Path, name: str, word: dict[str, Any]) -> None:
    """Whole or not at all. Where the folder is gone, rank 0 has given the checkpoint up, and says why."""
    path = _word_of(stage, name)
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(json.dumps(word))
        unfinished.rename(path)
    except FileNotFoundError:
        return
