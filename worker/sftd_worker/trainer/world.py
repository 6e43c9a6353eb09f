"""The processes that train together: who am I, on which device, and sums over all of us.

Gradients are summed once a step, after local accumulation, so ranks may run different numbers of micro-batches.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sftd.schemas import FailureReason
from sftd_worker.trainer.errors import RunFailed

_WORD_BYTES = 4000
_BUCKET_BYTES = 64 * 1024 * 1024  # gradients travel in pieces of about this size


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(*, device: str, gpus: int) -> World:
    """Join the process group that torchrun (or accelerate launch) made; refuse a world other than the one asked for.

    Raises RunFailed(wrong_world) if the number of processes is not `gpus`, or there are fewer devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size != gpus:
        raise RunFailed(
            FailureReason.WRONG_WORLD,
            f"{gpus} processes were asked for, {size} came up; start with torchrun --nproc_per_node={gpus}",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise RunFailed(
            FailureReason.WRONG_WORLD, "device cuda was asked for, but torch sees none; use device cpu"
        )
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and torch.cuda.device_count() <= local_rank:
        raise RunFailed(
            FailureReason.WRONG_WORLD,
            f"process {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}; lower gpus",
        )
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(here)
    if size > 1:
        if os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size):  # all on this machine
            # Else gloo asks a name server where this machine is, which may take its time.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if use_cuda else "gloo"
        # A wrong device is found out at once with it, not in the first sum.
        dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=here if use_cuda else None)
    return World(rank, size, here)


def leave_world(world: World) -> None:
    """Say goodbye to the peers; safe to call once at the end of a run."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


def word_of_main(world: World, text: str | None) -> str | None:
    """What rank 0 says; the others' `text` does not count. At most 4,000 bytes."""
    if world.size == 1:
        return text
    said = b"" if text is None or not world.is_main else text.encode()
    letters = torch.zeros(_WORD_BYTES, dtype=torch.uint8)
    letters[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else 0
    letters = letters.to(world.device)
    dist.broadcast(letters, src=0)
    return bytes(letters.tolist()).rstrip(b"\0").decode() or None


def sum_over_ranks(world: World, values: list[float]) -> list[float]:
    """Sum a short list of numbers over all ranks, in double precision."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def any_rank(world: World, *flags: bool) -> list[bool]:
    """For each flag: is it set on some rank? One message for all of them."""
    return [total > 0 for total in sum_over_ranks(world, [float(flag) for flag in flags])]


def most_of_ranks(world: World, count: int) -> int:
    """The largest `count` of all ranks."""
    if world.size == 1:
        return count
    tensor = torch.tensor(count, dtype=torch.int64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def sum_gradients(world: World, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place; a rank without a gradient counts as zero.

    A parameter without one on any rank (an expert that no token went to) keeps None, so that the optimizer passes it
    over, as it does with one rank.
    """
    if world.size == 1:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=world.device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    bucket: list[torch.Tensor] = []
    held = 0
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if not is_used:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        if bucket and (held + grad.nbytes > _BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            _sum_bucket(bucket)
            bucket, held = [], 0
        bucket.append(grad)
        held += grad.nbytes
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, piece in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(piece.view_as(grad))
