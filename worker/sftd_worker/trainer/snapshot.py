"""What a checkpoint holds, as tensors by name: where they are in training, and as a copy in this machine's memory.

The copy is all that training stands still for. Its memory is one more set of weights and optimizer state; it is taken
once, beside the first steps, and used again by every save.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sftd_worker.trainer.memory import available_host_bytes, expected_host_bytes
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.optim import names_in_order
from sftd_worker.trainer.sharding import Shards

_ALIGNMENT = 64  # bytes between which tensors begin in the buffer
_TOUCH_BYTES = 64 * 1024 * 1024
_PORTABLE = 1  # cudaHostRegisterPortable
_SPARE_SHARE = 0.1  # of the memory that is free, this much stays so
# Elements looked at in one call: below the size from which torch would start threads of its own.
_FEW_ELEMENTS = 32_000


@dataclass(frozen=True)
class Tensors:
    """Weights by the names of the model in memory, and the state of the optimizer (of a sharded one, this rank's) by
    `<name of the parameter>/<what it is of it>`."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    plain: dict[str, Any]  # what the optimizer keeps besides tensors

    def all(self) -> list[torch.Tensor]:
        """Every tensor, weights first."""
        return [*self.weights.values(), *self.optimizer.values()]


def live_tensors(model: Model, optimizer: torch.optim.Optimizer) -> Tensors:
    """What a checkpoint would hold now, not copied: the next optimizer step changes it. Tied weights stand once."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:  # Any: optimizers keep what they like
        if isinstance(value, dict):  # bitsandbytes keeps its quantisation in an inner dict
            for key, inner in value.items():
                put(f"{name}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            tensors[name] = (value.to_local() if isinstance(value, DTensor) else value).detach()
        else:
            plain[name] = value

    names = names_in_order(model.net, optimizer)
    for number, state in optimizer.state_dict()["state"].items():
        put(names[number], state)
    return Tensors(live_weights(model), tensors, plain)


def live_weights(model: Model) -> dict[str, torch.Tensor]:
    """The adapter's weights, or all of them with tied ones once, not copied."""
    if model.net is not model.causal:
        # Left to itself peft asks the hub at every save whether the vocabulary has grown, and unpacks 4-bit weights.
        targeted = {name.split(".")[-1] for name in model.net.base_model.targeted_module_names}
        named = model.net.named_parameters(remove_duplicate=False)
        adapter: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model.net,
            state_dict={name: parameter.detach() for name, parameter in named},
            save_embedding_layers=not targeted.isdisjoint(EMBEDDING_LAYER_NAMES),
        )
        return adapter
    weights = dict(model.causal.state_dict())
    for name in model.causal._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    once: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(weights, model.causal)
    return once


def names_on_disk(model: Model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names (and in the shapes) that the base model has on disk, as transformers saves them."""
    if model.net is not model.causal:
        return weights
    renamed: dict[str, torch.Tensor] = revert_weight_conversion(model.causal, weights)
    return renamed


def first_not_finite(weights: dict[str, torch.Tensor]) -> str | None:
    """The name of a weight that holds a NaN or an infinity, or None."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        for piece in tensor.detach().cpu().reshape(-1).split(_FEW_ELEMENTS):  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            if not torch.isfinite(
                torch.stack(torch.aminmax(piece))
            ).all():  # a NaN is both, and passes through
                return name
    return None


class HostMemory:
    """Memory for one copy of everything that a checkpoint holds, page-locked where it is filled from a GPU."""

    def __init__(self, device: torch.device, shards: Shards | None) -> None:
        self._device = device
        self._shards = shards
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._registered = False
        self._taking: threading.Thread | None = None

    def reserve(self, tensors: Tensors) -> bool:
        """Begin to take memory for a copy of `tensors`, beside training. False: there is not enough of it."""
        num_bytes = _layout(self._kept(tensors))[1]
        self._wait()
        if num_bytes <= self._buffer.numel():
            return True
        # On a CPU the steps take gradients and activations from the same memory.
        expected = expected_host_bytes() if self._device.type == "cpu" else 0
        self._release()
        enough = num_bytes + expected <= (1 - _SPARE_SHARE) * available_host_bytes()
        if enough or self._shards is not None:  # of sharded weights there is no way to disk without a copy
            self._taking = threading.Thread(target=self._take, args=(num_bytes,), name="reserve", daemon=True)
            self._taking.start()
        return enough

    def copy(self, tensors: Tensors) -> Tensors | None:
        """A copy that training does not touch, valid until the next one; None where memory does not suffice.

        Where weights are sharded this is collective, and rank 0 alone has a copy of the weights, whole.
        """
        if not self.reserve(tensors) and self._shards is None:
            return None
        self._wait()
        kept = self._kept(tensors)
        if self._buffer.numel() == 0 and kept:
            return None
        places = iter(_layout(kept)[0])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what the processor reads itself must be written by now
        copied = Tensors(
            self._put_weights(tensors.weights, places),
            {name: self._put(value, next(places)) for name, value in tensors.optimizer.items()},
            dict(tensors.plain),
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copied

    def _kept(self, tensors: Tensors) -> list[torch.Tensor]:
        """What this rank copies, in order."""
        if self._shards is not None and not self._shards.world.is_main:
            return list(tensors.optimizer.values())
        return tensors.all()

    def _put_weights(
        self, weights: dict[str, torch.Tensor], places: Iterator[int]
    ) -> dict[str, torch.Tensor]:
        if self._shards is None:
            return {name: self._put(value, next(places)) for name, value in weights.items()}
        copied = {}
        for name, whole in self._shards.gather(weights):
            if self._shards.world.is_main:
                copied[name] = self._put(whole, next(places))
        return copied

    def _put(self, tensor: torch.Tensor, at: int) -> torch.Tensor:
        place = self._buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=self._registered)

    def _take(self, num_bytes: int) -> None:
        """Allocate, and touch every page: the first touch of memory costs more than the copy."""
        try:
            # numpy asks the system for large pages where torch does not.
            array = np.empty(num_bytes, dtype=np.uint8)
            for start in range(0, num_bytes, _TOUCH_BYTES):
                array[start : start + _TOUCH_BYTES] = 0
        except MemoryError:
            return
        self._buffer = torch.from_numpy(array)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins on the first one, whatever its rank's is
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            status = cudart.cudaHostRegister(self._buffer.data_ptr(), num_bytes, _PORTABLE)
            self._registered = int(status) == 0  # if not, the copy takes longer, and is as right

    def _wait(self) -> None:
        if self._taking is not None:
            self._taking.join()
            self._taking = None

    def _release(self) -> None:
        if self._registered:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            cudart.cudaHostUnregister(self._buffer.data_ptr())
            self._registered = False
        self._buffer = torch.empty(0, dtype=torch.uint8)


def _layout(tensors: Iterable[torch.Tensor]) -> tuple[list[int], int]:
    """(where each tensor begins in the buffer, bytes of the buffer)."""
    places, at = [], 0
    for tensor in tensors:
        places.append(at)
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, at
