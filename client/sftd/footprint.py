"""What a job needs: memory of a device by what it is for, and disk for checkpoints. Pure functions of spec, model and rows.

The terms are those of the trainer's own code (`model.py`, `loss.py`, `snapshot.py`); docs/decisions/0022 tells them, bench/memory.py
compares them with runs.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from sftd.plan import MemoryParts
from sftd.schemas import Answer
from sftd.spec import JobSpec

Device = Literal["cpu", "cuda"]
Precision = Literal["bf16", "fp32"]

# Logits that the loss holds at once, on all devices (loss.py): 128 MiB in bf16, 256 MiB in fp32.
CHUNK_LOGITS = 64 * 1024 * 1024
# NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314): half a byte, a byte for each 64 weights, and four for
# each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Linears(Answer):
    """Linear layers of one name in a model: `count` of `num_in` × `num_out`."""

    name: str = Field(description="The last part of the module's name, as `lora.target_modules` gives it.")
    num_in: int
    num_out: int
    count: int


class ModelFacts(Answer):
    """A base model, counted on torch's meta device: nothing of its weights is read."""

    architecture: str
    parameters: int = Field(description="Tied weights count once.")
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_width: int = Field(description="Width of the keys, of all their heads together.")
    vocab_size: int
    tied_head: bool = Field(description="The output head's weight is the embedding's.")
    linears: list[Linears] = Field(description="All but the output head.")
    stored_bytes: int = Field(description="Of one weight on disk: 2 for bf16.")
    has_template: bool
    max_positions: int | None


@dataclass(frozen=True)
class BatchFacts:
    """The largest micro-batch of a run."""

    num_tokens: int
    num_supervised: int
    longest_row: int
    saves: bool = True  # checkpoints are written while training goes on


def adapter_parameters(spec: JobSpec, facts: ModelFacts) -> int:
    """Weights that LoRA adds (Hu et al. 2021): rank × (in + out) a layer; DoRA one magnitude for each output besides."""
    targets = spec.lora.target_modules
    chosen = [
        linear for linear in facts.linears if targets == "all-linear" or _is_target(linear.name, targets)
    ]
    per_layer = spec.lora.rank
    dora = int(spec.lora.use_dora)
    return sum(
        linear.count * (per_layer * (linear.num_in + linear.num_out) + dora * linear.num_out)
        for linear in chosen
    )


def unknown_targets(spec: JobSpec, facts: ModelFacts) -> list[str]:
    """Names in `lora.target_modules` that no linear layer of the model ends with."""
    targets = spec.lora.target_modules
    if isinstance(targets, str):
        return []
    return [name for name in targets if not any(_is_target(linear.name, [name]) for linear in facts.linears)]


def trainable_parameters(spec: JobSpec, facts: ModelFacts) -> int:
    """Weights that the optimizer moves."""
    return facts.parameters if spec.method == "full" else adapter_parameters(spec, facts)


def checkpoint_bytes(spec: JobSpec, facts: ModelFacts) -> int:
    """A checkpoint on disk: trained weights in fp32 and the optimizer's state of them."""
    return saved_bytes(spec, trainable_parameters(spec, facts))


def saved_bytes(spec: JobSpec, trainable: int) -> int:
    """The same of so many weights that are trained."""
    return (4 + moment_bytes(spec)) * trainable


def moment_bytes(spec: JobSpec) -> int:
    """Of the optimizer, for each trained weight: two moments in fp32, or in 8 bits."""
    return 8 if spec.optimizer == "adamw" else 2


def result_bytes(spec: JobSpec, facts: ModelFacts, precision: Precision) -> int:
    """The result on disk: all weights as the base stores them (fp32 where the run computed in it), or the adapter in fp32."""
    each = 4 if spec.method != "full" or precision == "fp32" else facts.stored_bytes
    return each * trainable_parameters(spec, facts)


def estimate(
    spec: JobSpec, facts: ModelFacts, batch: BatchFacts, *, device: Device, precision: Precision
) -> MemoryParts:
    """Bytes on one device at the fullest moment of a run, without the process itself (Python, libraries, CUDA's context)."""
    if spec.method == "qlora":
        precision = "bf16"  # whatever the device likes best
    trainable = trainable_parameters(spec, facts)
    share = 1.0
    if spec.gpus > 1 and spec.method == "full" and is_sharded(spec):
        share = 1 / spec.gpus
    adapter = 0 if spec.method == "full" else 4 * trainable
    weights = _weight_bytes(spec, facts, precision)
    parts = MemoryParts(
        weights=math.ceil(weights * share),
        adapter=adapter,
        optimizer=math.ceil(moment_bytes(spec) * trainable * share),
        gradients=math.ceil(4 * trainable * share),
        activations=_activations(spec, facts, batch, precision),
        head=_head(spec, facts, batch, device, precision),
        other=0,
    )
    return parts.model_copy(update={"other": _other(spec, facts, parts, batch, device, precision)})


def is_sharded(spec: JobSpec) -> bool:
    """Whether each of several devices keeps a share of the weights (sharding.py)."""
    return spec.sharding == "fsdp" or (
        spec.sharding == "auto" and spec.method == "full" and spec.optimizer == "adamw"
    )


def total(parts: MemoryParts) -> int:
    """All of them."""
    return sum(parts.model_dump().values())


def _is_target(name: str, targets: list[str]) -> bool:
    return any(name == target or target.endswith(f".{name}") for target in targets)


def _weight_bytes(spec: JobSpec, facts: ModelFacts, precision: Precision) -> int:
    """The base: in fp32 where it is trained, else in the precision of the products, linear layers in NF4 with qlora."""
    if spec.method == "full":
        return 4 * facts.parameters
    each = 2 if precision == "bf16" else 4
    if spec.method == "lora":
        return each * facts.parameters
    packed = sum(linear.num_in * linear.num_out * linear.count for linear in facts.linears)
    return math.ceil(NF4_BYTES * packed + each * (facts.parameters - packed))


@dataclass(frozen=True)
class _Types:
    """Bytes of one number, by where it stands."""

    product: int  # what matrix products read and make
    residual: int  # the stream between layers: fp32 where weights are trained


def _types(spec: JobSpec, precision: Precision) -> _Types:
    product = 2 if precision == "bf16" else 4
    return _Types(product, 4 if spec.method == "full" else product)


def _kept_per_layer(facts: ModelFacts, batch: BatchFacts, types: _Types) -> int:
    """What the backward pass of one layer needs of its forward: norms and residuals, queries, keys, values and attention's
    output, the gate, what passes it, and what goes into the last product."""
    per_token = types.product * (5 * facts.hidden_size + 4 * facts.kv_width + 4 * facts.intermediate_size)
    return batch.num_tokens * (per_token + types.residual * 3 * facts.hidden_size)


def _activations(spec: JobSpec, facts: ModelFacts, batch: BatchFacts, precision: Precision) -> int:
    """What is kept for the backward pass when the head is reached, and what a layer's own backward takes beyond the
    logits, which are gone by then."""
    types = _types(spec, precision)
    layer = _kept_per_layer(facts, batch, types)
    if spec.gradient_checkpointing:
        kept = facts.num_layers * batch.num_tokens * facts.hidden_size * types.residual
        working = 2 * layer  # computed again, and its gradients
    else:
        kept = facts.num_layers * layer
        working = layer  # the gradients; what is kept goes layer by layer
    return kept + max(0, working - _logits(facts, batch, types))


def _logits(facts: ModelFacts, batch: BatchFacts, types: _Types) -> int:
    return types.product * min(batch.num_supervised * facts.vocab_size, CHUNK_LOGITS)


def _head(spec: JobSpec, facts: ModelFacts, batch: BatchFacts, device: Device, precision: Precision) -> int:
    """Logits of a chunk, which become their gradient in place; the gradient of the states; on a GPU a copy of the weight in
    the precision of the products, where that is not its own."""
    types = _types(spec, precision)
    copied = 0
    if spec.method == "full" and precision == "bf16" and device == "cuda":
        copied = types.product * facts.vocab_size * facts.hidden_size
    states = batch.num_supervised * facts.hidden_size * (types.product + types.residual)
    return _logits(facts, batch, types) + states + copied


# What the C library and the math libraries hold on a CPU beyond what lives: bytes, and a share of what all layers keep of a
# micro-batch, by method, precision and gradient checkpointing. Fitted to runs of bench/memory.py.
_MIB = 2**20
_HELD: dict[tuple[str, Precision, bool], tuple[int, float]] = {
    ("full", "bf16", True): (300 * _MIB, 0.3),
    ("full", "bf16", False): (300 * _MIB, 0.5),
    ("full", "fp32", True): (250 * _MIB, 0.05),
    ("full", "fp32", False): (150 * _MIB, 0.12),
    ("lora", "bf16", True): (190 * _MIB, 0.15),
    ("lora", "bf16", False): (190 * _MIB, 0.8),
    ("lora", "fp32", True): (150 * _MIB, 0.5),
    ("lora", "fp32", False): (150 * _MIB, 0.48),
    ("qlora", "bf16", True): (180 * _MIB, 0.28),
    ("qlora", "bf16", False): (170 * _MIB, 0.9),
}
_CUDA_SLACK, _CUDA_BUFFERS = 0.05, 96 * _MIB  # a guess: not measured


def _other(
    spec: JobSpec,
    facts: ModelFacts,
    parts: MemoryParts,
    batch: BatchFacts,
    device: Device,
    precision: Precision,
) -> int:
    """On a CPU the copy that checkpoints are written from lies in the same memory, and loading may take more than training."""
    living = parts.optimizer + parts.gradients + parts.activations + parts.head
    if device == "cuda":
        return math.ceil(_CUDA_SLACK * living) + _CUDA_BUFFERS
    copy = 0
    if batch.saves:
        copy = parts.optimizer + (parts.weights if spec.method == "full" else parts.adapter)
    held, share = _HELD[spec.method, precision, spec.gradient_checkpointing]
    kept = facts.num_layers * _kept_per_layer(facts, batch, _types(spec, precision))
    training = living + parts.weights + parts.adapter
    other = copy + held + math.ceil(share * kept)
    return max(other, _loading(spec, facts, parts, precision) - training)


def _loading(spec: JobSpec, facts: ModelFacts, parts: MemoryParts, precision: Precision) -> int:
    """The file is mapped, and stands beside the weights that are made of it where they have another type; one that is packed
    in 4 bits is first made in the precision of the products, and so is the embedding, the largest that stays."""
    same = spec.method != "qlora" and facts.stored_bytes == (
        4 if spec.method == "full" or precision == "fp32" else 2
    )
    if same:
        return 0
    embedding = 2 * facts.vocab_size * facts.hidden_size if spec.method == "qlora" else 0
    return parts.weights + facts.stored_bytes * facts.parameters + embedding
