"""Write tensors as a safetensors file and hash it on the way, so that nothing is read back.

`safetensors.save_file` holds Python's lock until the whole file is written, and a training loop beside it would stand
still. Here the bytes go from memory to the file and to the hash in pieces, and the lock is free meanwhile.
Format: eight bytes with the header's length, the header as JSON, the tensors' bytes, little-endian, one after another.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sftd.schemas import ManifestFile

_PIECE_BYTES = 8 * 1024 * 1024
_ALIGNMENT = 8  # of the tensors' bytes in the file, as the format asks
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, proceed: Callable[[], None] = lambda: None
) -> ManifestFile:
    """Write `tensors` to `path`, durably; returns its size and hash.

    Tensors on a device are fetched one at a time. `proceed` is called between pieces and may raise to end the work.
    Raises TypeError for a tensor of a type that the format does not have.
    """
    # Larger elements first: then each tensor is aligned to its own elements without gaps, which the format forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header({name: tensors[name] for name in order})
    digest = hashlib.sha256(header)
    size = len(header)
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            data = _bytes_of(tensors[name])
            for start in range(0, len(data), _PIECE_BYTES):
                proceed()
                piece = data[start : start + _PIECE_BYTES]
                file.write(piece)
                digest.update(piece)
            size += len(data)
        file.flush()
        proceed()
        os.fsync(file.fileno())
    return ManifestFile(bytes=size, sha256=digest.hexdigest())


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name}: a safetensors file has no tensors of type {tensor.dtype}")
        end = at + tensor.nbytes
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in order; a view of its memory where that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
