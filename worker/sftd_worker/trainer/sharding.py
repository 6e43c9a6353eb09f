"""Several ranks, each with a share of weights, gradients and optimizer (`sharding: fsdp`, FSDP2).

A decoder layer's weights are whole while it computes, and nothing else is: what stands outside the layers (embedding,
norm, head) is whole inside `Shards.whole`. Every pass of one rank is a pass of all, with the same messages in the same
order; a rank with nothing left to do, or whose memory ran out in the middle of a pass, goes through a row of two
tokens instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.memory import is_out_of_memory, release_memory
from sftd_worker.trainer.order import FixedOrder
from sftd_worker.trainer.world import World, barrier, most_of_ranks, sum_over_ranks

T = TypeVar("T")
# Without them ranks that use different experts, or one that broke off, could not keep in step.
_CAN_KEEP_IN_STEP = all(
    hasattr(FSDPModule, name) for name in ("set_reduce_scatter_unused_params", "reset_iter_state")
)
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Pass = Callable[[], object]  # one forward, with its backward where there is one


@dataclass(frozen=True)
class Sharding:
    """How the ranks of a run share its weights, and why."""

    name: str  # "none" (one rank), "ddp" or "fsdp"
    reason: str
    num_ranks: int

    def __str__(self) -> str:
        return f"{self.name} over {self.num_ranks} ranks" if self.num_ranks > 1 else "none, one rank"


def choose_sharding(spec: JobSpec, world: World) -> Sharding:
    """Settle `sharding: auto`, with the reason. Raises RunFailed(bad_spec) where this torch cannot do what is asked."""
    if world.size == 1:
        return Sharding("none", "there is nobody to share with", 1)
    if spec.sharding == "fsdp" and not _CAN_KEEP_IN_STEP:
        raise RunFailed(
            FailureReason.BAD_SPEC,
            f"sharding: fsdp needs torch 2.13 or newer, here is {torch.__version__}; set sharding to ddp",
        )
    if spec.sharding != "auto":
        return Sharding(spec.sharding, "as the spec says", world.size)
    if spec.method != "full":
        return Sharding("ddp", "only an adapter is trained", world.size)
    if spec.optimizer != "adamw":
        return Sharding("ddp", f"{spec.optimizer} knows no shares", world.size)
    if not _CAN_KEEP_IN_STEP:
        return Sharding("ddp", f"torch {torch.__version__} is older than 2.13", world.size)
    return Sharding("fsdp", "all weights are trained", world.size)


def run_passes(
    shards: "Shards | None", passes: Sequence[Pass], idle: Pass, order: FixedOrder | None = None
) -> bool:
    """Run this rank's passes; returns whether they broke off, which leaves what they made without meaning.

    They do where memory runs out, and where `order` could not be kept (and is given up, then). Where weights are sharded
    all ranks call this together, and leave it together.
    """
    if shards is not None:
        return shards.run_passes(passes, idle, order)
    try:
        for one in passes:
            one()
    except Exception as error:
        if not _can_be_done_again(error, order):
            raise
        return True
    return False


def _can_be_done_again(error: Exception, order: FixedOrder | None) -> bool:
    return is_out_of_memory(error) or (order is not None and order.give_up_for(error))


def load_in_shares(
    load: Callable[[torch.device], tuple[Any, Any]], world: World
) -> tuple[Any, Any, "Shards"]:
    """`load` on one rank after the other, into main memory, and leave each rank its share.

    `load` returns (net, causal): the transformers model, and the peft model around it or itself. Neither a device nor
    the machine ever holds more than one whole model. Returns (net, causal, shards).
    """
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    for turn in range(world.size):
        if turn == world.rank:
            net, causal = load(torch.device("cpu"))
            shards = _shard(net, causal, mesh, world)
        barrier(world)
    return net, causal, shards


def _shard(net: Any, causal: Any, mesh: DeviceMesh, world: World) -> "Shards":
    """Leave this rank its share of every parameter of `net`, moving layer after layer to the rank's device.

    Raises RunFailed(model_unsupported) where something would stay whole.
    """
    layers = _layers(causal)
    if not layers:
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            f"sharding: {type(causal).__name__} does not say what its layers are, so that fsdp cannot be used; "
            "set sharding to ddp",
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    root = _Root(net)
    fully_shard(root, mesh=mesh)
    messages = _Messages()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss is divided by the tokens of all ranks before.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(cast(Any, messages.all_gather))  # the base classes are private
            module.set_custom_reduce_scatter(cast(Any, messages.reduce_scatter))
    # A message about a layer's gradients must have the same size on all ranks, whichever experts each one used.
    root.set_reduce_scatter_unused_params(True)
    shards = Shards(root, messages, world)
    shards.require_all()
    return shards


class Shards:
    """The sharded model of this rank: who holds what, and passes in step with the other ranks."""

    def __init__(self, root: "_Root", messages: "_Messages", world: World) -> None:
        self.root = root
        self.world = world
        self._messages = messages
        self._idling = False
        self._used: set[str] = set()  # parameters that got a gradient in a pass of this rank's own rows
        self._whole: dict[str, torch.nn.Parameter] = {}  # what stands for a parameter while it is whole
        self._watch()

    # ---- passes

    def whole(self, compute: Callable[[], T]) -> T:
        """`compute()` with the weights outside the layers whole; those of a layer are while it runs.

        With gradients they stay whole until the backward pass has gone by; without, only meanwhile.
        """
        try:
            result: T = self.root(compute)
        except Exception:
            self._reset()
            raise
        if not torch.is_grad_enabled():
            self.root.reshard()
        return result

    def run_passes(self, passes: Sequence[Pass], idle: Pass, order: FixedOrder | None = None) -> bool:
        """See `run_passes` above."""
        broke_off = False
        for index in range(most_of_ranks(self.world, len(passes))):
            if broke_off or index >= len(passes):
                self._idle(idle)
            elif not self._goes_through(passes[index], order):
                broke_off = True
                release_memory()
                self._messages.say_again()
                self._idle(idle)
                if self._messages.are_behind:
                    raise RunFailed(
                        FailureReason.TRAINER_ERROR,
                        "sharding: after a pass that broke off this rank could not keep in step with the others; "
                        "lower max_tokens_per_step or max_seq_length",
                    )
        return broke_off

    def _goes_through(self, one: Pass, order: FixedOrder | None) -> bool:
        self._messages.count_from_here()
        try:
            one()
        except Exception as error:
            if not _can_be_done_again(error, order):
                raise
        else:
            return True
        self._reset()
        return False

    def _idle(self, idle: Pass) -> None:
        self._idling = True
        try:
            idle()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailed(
                FailureReason.OUT_OF_MEMORY,
                "sharding: there is not even room for one layer's weights; use more gpus",
            ) from error
        finally:
            self._idling = False

    def _reset(self) -> None:
        """Forget a pass that broke off: what was gathered for it, and gradients that have not left this rank."""
        self.root.reset_iter_state()
        for parameter in self._whole.values():
            parameter.grad = None

    # ---- gradients

    def drop_unused(self) -> None:
        """Take the gradient (of zeros) from parameters that no rank used: the optimizer passes them over, as it does
        with one rank. Collective, once a step."""
        trained = [(name, p) for name, p in self.root.net.named_parameters() if p.requires_grad]
        used = torch.tensor(
            [name in self._used for name, _ in trained], dtype=torch.int32, device=self.world.device
        )
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        for (_, parameter), is_used in zip(trained, used.tolist(), strict=True):
            if not is_used:
                parameter.grad = None
        self._used.clear()

    def clip(self, max_norm: float) -> float:
        """Scale the gradient down to the norm `max_norm`; returns the norm that it had, over all ranks. Collective."""
        grads = [p.grad.to_local() for p in self.root.net.parameters() if p.grad is not None]
        squared = float(torch.nn.utils.get_total_norm(grads)) ** 2
        (total,) = sum_over_ranks(self.world, [squared])
        norm = math.sqrt(total)
        if norm > max_norm:
            torch._foreach_mul_(grads, max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does
        return norm

    def forget_uses(self) -> None:
        """Before a step is done again."""
        self._used.clear()

    # ---- what is where

    def require_all(self) -> None:
        """Raise RunFailed unless every parameter is spread over all ranks, by rows."""
        for name, parameter in self.root.net.named_parameters():
            spread = (
                isinstance(parameter, DTensor)
                and parameter.device_mesh.size() == self.world.size
                and tuple(parameter.placements) == (Shard(0),)
            )
            if not spread:
                raise RunFailed(
                    FailureReason.MODEL_UNSUPPORTED,
                    f"sharding: {name} was left whole on each rank; set sharding to ddp",
                )

    def gather(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each of `tensors`, whole, on every rank for a moment. Collective: exhaust it on all ranks."""
        for name, tensor in tensors.items():
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def num_held(self) -> int:
        """Parameters of which this rank holds the values."""
        return sum(p.to_local().numel() for p in self.root.net.parameters())

    # ---- which parameters are used

    def _watch(self) -> None:
        """Take note of the gradients that this rank's own rows make: FSDP2 sends zeros for those they do not."""
        for name, module in self.root.net.named_modules():
            if isinstance(module, FSDPModule):
                hooked: torch.nn.Module = cast(Any, module)
                hooked.register_forward_pre_hook(partial(self._meet, f"{name}."))
        self.root.met = partial(self._meet, "", self.root.net)

    def _meet(self, prefix: str, module: torch.nn.Module, _: Any = None) -> None:
        """The parameters of `module` are whole now; FSDP2 takes the same tensors each time."""
        for local, parameter in module.named_parameters():
            name = prefix + local
            if isinstance(parameter, DTensor) or not parameter.requires_grad:
                continue
            if self._whole.get(name) is not parameter:
                self._whole[name] = parameter
                note: Any = parameter.register_post_accumulate_grad_hook  # torch leaves it unannotated
                note(partial(self._note, name))

    def _note(self, name: str, _: torch.Tensor) -> None:
        if not self._idling:
            self._used.add(name)


class _Root(torch.nn.Module):
    """The outermost unit: its forward is whatever is computed while its weights are whole."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.met: Callable[[], None] = lambda: None

    def forward(self, compute: Callable[[], T]) -> T:
        self.met()
        return compute()

    # FSDP2 makes an FSDPModule of this object; its methods, for type checkers.
    reshard: Callable[[], None]
    reset_iter_state: Callable[[], None]
    set_reduce_scatter_unused_params: Callable[[bool], None]


class _Messages:
    """The messages between ranks, counted, so that a rank that broke off a pass can take it up where it stopped.

    Such a rank goes through the pass again with a short row. The messages it has sent and received already are passed
    over (nobody else waits in them any more), the rest is sent.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._behind = 0  # messages still to be passed over
        self.all_gather = _AllGather(self)
        self.reduce_scatter = _ReduceScatter(self)

    @property
    def are_behind(self) -> bool:
        return self._behind > 0

    def count_from_here(self) -> None:
        self._sent = self._behind = 0

    def say_again(self) -> None:
        self._behind = self._sent

    def send(self, message: Callable[[], Any], output: torch.Tensor) -> Any:
        if self._behind:
            self._behind -= 1
            output.zero_()
            return None
        work = message()
        self._sent += 1
        return work


class _Allocating:
    """The memory of a message, as FSDP2 allocates it by itself."""

    def __init__(self, messages: _Messages) -> None:
        self._messages = messages

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocating):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        return self._messages.send(
            lambda: _all_gather(output_tensor, input_tensor, group=group, async_op=async_op),
            output_tensor,
        )


class _ReduceScatter(_Allocating):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        return self._messages.send(
            lambda: _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op),
            output_tensor,
        )


def _layers(causal: Any) -> list[torch.nn.Module]:
    """The outermost modules that transformers says must not be split: decoder layers."""
    kinds = set(causal._no_split_modules or ())
    found: list[torch.nn.Module] = []

    def collect(module: torch.nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in kinds:
                found.append(child)
            else:
                collect(child)

    collect(causal)
    return found
