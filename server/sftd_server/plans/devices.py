"""Which devices a plan looks at: those of registered workers, and types that are named, with what the makers say of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlmodel import Session, col, select

from sftd.footprint import Device, Precision
from sftd_server.tables import WorkerRow

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """A type of GPU, by its maker's data sheet: memory, and dense matrix products a second in the best type of ours."""

    name: str
    pattern: str
    memory_gb: float  # GiB that a process can take, about: some is kept by the driver
    teraflops: float
    has_bf16: bool = True


# NVIDIA's data sheets; 10^12 multiply-adds count twice, without sparsity. The first that fits counts.
KINDS = (
    Kind("B200", r"\bB200\b", 178, 2250),
    Kind("H200", r"\bH200\b", 139, 989),
    Kind("GH200", r"\bGH200\b", 94, 989),
    Kind("H100 NVL", r"\bH100\b.*NVL", 93, 835),
    Kind("H100 PCIe", r"\bH100\b.*PCIe", 79, 756),
    Kind("H100", r"\bH100\b", 79, 989),
    Kind("A100 40GB", r"\bA100\b.*40", 39, 312),
    Kind("A100", r"\bA100\b", 79, 312),
    Kind("L40S", r"\bL40S\b", 44, 362),
    Kind("L40", r"\bL40\b", 44, 181),
    Kind("L4", r"\bL4\b", 22, 121),
    Kind("A40", r"\bA40\b|\bA6000\b", 44, 150),
    Kind("A10", r"\bA10G?\b", 22, 125),
    Kind("5090", r"\b5090\b", 31, 209),
    Kind("4090", r"\b4090\b", 23, 165),
    Kind("3090", r"\b3090\b", 23, 71),
    Kind("V100", r"\bV100\b", 31, 16, has_bf16=False),  # without bf16 we compute in fp32
    Kind("T4", r"\bT4\b", 15, 8, has_bf16=False),
)


@dataclass(frozen=True)
class Target:
    """A type of device to plan for."""

    name: str
    device: Device
    present: bool
    available_bytes: int | None  # of one
    precision: Precision
    teraflops: float | None


def known_kind(name: str) -> Kind | None:
    """What is known of a GPU of that name."""
    return next((kind for kind in KINDS if re.search(kind.pattern, name, re.IGNORECASE)), None)


def targets(session: Session, named: Sequence[str], *, cpu_precision: Precision) -> list[Target]:
    """Named types first, then those of registered workers; each once."""
    found: dict[str, Target] = {}
    for name in named:
        kind = known_kind(name)
        assert kind is not None  # the route has looked
        found[name] = _gpu(name, kind.memory_gb, kind, present=False)
    rows = session.exec(select(WorkerRow).where(col(WorkerRow.gone_at).is_(None)))
    for row in rows:
        if row.device == "cpu":
            found.setdefault("cpu", Target("cpu", "cpu", True, None, cpu_precision, None))
            continue
        for name in row.gpu_names or ["GPU"]:
            found[name] = _gpu(name, row.gpu_memory_gb, known_kind(name), present=True)
    return list(found.values())


def _gpu(name: str, memory_gb: float | None, kind: Kind | None, *, present: bool) -> Target:
    available = None if memory_gb is None else round(memory_gb * GIB)
    precision: Precision = "fp32" if kind is not None and not kind.has_bf16 else "bf16"
    return Target(name, "cuda", present, available, precision, kind.teraflops if kind else None)
