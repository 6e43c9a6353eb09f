"""What `POST /jobs/plan` answers: everything that can be known about a job before it runs.

A part that is not known, since no worker has counted the data yet, is None; `incomplete` says why.
"""

from datetime import datetime
from typing import Literal

from pydantic import Field

from sftd.schemas import Answer
from sftd.spec import JobSpec


class PlanProblem(Answer):
    """Something that would stop the job (`error`), or that its owner should know (`warning`)."""

    severity: Literal["error", "warning"]
    field: str | None = Field(description="Of the spec; None where it is about no single field.")
    file: str | None = Field(description="Id of the file that it is about.")
    line: int | None = Field(description="Line of the file; the item's number in a JSON array.")
    row_field: str | None = Field(description="Field of that row.")
    message: str
    remedy: str | None


def error(
    message: str,
    *,
    field: str | None = None,
    file: str | None = None,
    line: int | None = None,
    row_field: str | None = None,
) -> PlanProblem:
    """Something that would stop the job. What to do stands behind the last semicolon of the message, as in all of ours."""
    what, mark, remedy = message.rpartition("; ")
    return PlanProblem(
        severity="error",
        field=field,
        file=file,
        line=line,
        row_field=row_field,
        message=what if mark else message,
        remedy=remedy if mark else None,
    )


def warning(field: str | None, message: str, remedy: str | None) -> PlanProblem:
    """Something that the job's owner should know."""
    return PlanProblem(
        severity="warning", field=field, file=None, line=None, row_field=None, message=message, remedy=remedy
    )


class Lines(Answer):
    """Rows of a file, by line."""

    count: int
    lines: list[int] = Field(description="The first of them, at most 100.")


class Histogram(Answer):
    """How a number is spread over rows. `counts[i]` rows lie in `[edges[i], edges[i + 1])`, the last one closed."""

    total: int
    min: int
    mean: float
    median: float
    p95: float
    max: int
    edges: list[int]
    counts: list[int]


class Segment(Answer):
    """A piece of a rendered row, and whether its tokens carry the loss."""

    text: str
    supervised: bool


class RenderedRow(Answer):
    """A row as the model sees it, through its chat template, decoded from its tokens."""

    line: int
    num_tokens: int
    num_supervised: int
    segments: list[Segment]
    shortened: bool = Field(description="Its text is longer than what is shown.")


class Duplicate(Answer):
    """Rows that are the same, or nearly so."""

    lines: list[int] = Field(
        description="Lines of the training file; of a pair across files the training row comes first."
    )
    similarity: float = Field(
        description="Estimated Jaccard similarity of their token 5-grams; 1 for exact ones."
    )
    text: str = Field(description="The beginning of the first of them.")


class Duplicates(Answer):
    """Rows that say nothing new."""

    count: int = Field(description="Rows that have an earlier twin; across files: validation rows with one.")
    examples: list[Duplicate] = Field(description="At most 10.")


class DataPlan(Answer):
    """What a data file comes to under this spec."""

    file_id: str
    filename: str
    num_rows: int
    formats: dict[str, int] = Field(description="Rows by format.")
    num_used: int = Field(description="Rows that are trained on, or evaluated on.")
    dropped: Lines
    truncated: Lines
    fully_masked: Lines = Field(description="Rows with nothing to learn from, whole or after the cut.")
    overlong: Lines = Field(description="Rows over max_seq_length, whatever is done with them.")
    exact_duplicates: Duplicates
    near_duplicates: Duplicates | None = Field(description="None where they are not looked for.")
    tokens: Histogram = Field(description="Per used row, after the cut.")
    supervised_tokens: Histogram
    examples: list[RenderedRow]


class Overlap(Answer):
    """Validation rows that stand among the training rows as well: their loss says little."""

    exact: Duplicates
    near: Duplicates | None


class PackingPlan(Answer):
    """How rows come together in micro-batches."""

    enabled: bool
    micro_batches_per_step: float
    mean_tokens: float = Field(description="Of a micro-batch.")
    max_tokens: int = Field(description="Of the largest micro-batch: it decides on the memory.")
    fill: float = Field(description="Tokens of the micro-batches among the most that they may hold, 0 to 1.")
    efficiency: float = Field(description="Tokens of rows among all positions that are computed, 0 to 1.")
    padded_efficiency: float = Field(description="The same without packing.")


class StepsPlan(Answer):
    """How long the run is, in steps and tokens."""

    total_steps: int
    num_epochs: float
    steps_per_epoch: float
    rows_per_step: int
    tokens_per_step: float
    supervised_tokens_per_step: float
    total_tokens: float = Field(description="Tokens that go through the model in training.")
    warmup_steps: int
    num_evaluations: int
    num_checkpoints: int


class ParametersPlan(Answer):
    """Size of the model."""

    total: int
    trainable: int


class MemoryParts(Answer):
    """Bytes on one device at the fullest moment of a step, by what they are for."""

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    head: int = Field(description="Logits of a chunk, and the output head's gradient where it is kept.")
    other: int = Field(description="Buffers, copies for checkpoints, fragmentation.")


class MemoryPlan(Answer):
    """Whether the job fits on a type of device."""

    device: str = Field(description="`NVIDIA H100 80GB HBM3`, or `cpu`.")
    present: bool = Field(description="A registered worker has it.")
    total_bytes: int
    parts: MemoryParts
    available_bytes: int | None = Field(description="Of one such device; None where it is not known.")
    fits: bool | None
    advice: list[str] = Field(description="What to change to make it fit, the least change first.")


class DiskPlan(Answer):
    """What is written, against what is free."""

    checkpoint_bytes: int
    num_kept: int = Field(description="Checkpoints on disk at once, at most.")
    result_bytes: int
    total_bytes: int
    free_bytes: int
    fits: bool


class TimePlan(Answer):
    """When it would run, for how long, and what that costs."""

    seconds: float | None
    tokens_per_second: float | None
    basis: str = Field(description="Where the speed comes from: measured runs, or a rule.")
    starts_in_seconds: float | None = Field(description="None where no worker can take it.")
    starts_at: datetime | None
    finishes_at: datetime | None
    why_waiting: str | None
    gpu_hours: float | None


class Plan(Answer):
    """Everything knowable about a job before it runs."""

    object: Literal["plan"] = "plan"
    ok: bool = Field(description="Nothing known stands in its way.")
    complete: bool = Field(description="All of it is known; else ask again when `incomplete` says so.")
    incomplete: str | None = Field(description="What is missing, why, and what to do.")
    problems: list[PlanProblem]
    spec: JobSpec | None = Field(
        description="The whole spec, defaults filled in; None where it is not valid."
    )
    training: DataPlan | None
    validation: DataPlan | None
    overlap: Overlap | None
    packing: PackingPlan | None
    steps: StepsPlan | None
    parameters: ParametersPlan | None
    memory: list[MemoryPlan]
    disk: DiskPlan | None
    time: TimePlan | None


class RenderedRows(Answer):
    """Rows of a file as a model would see them."""

    object: Literal["rendered_rows"] = "rendered_rows"
    complete: bool = Field(description="The rows are there; else ask again when `incomplete` says so.")
    incomplete: str | None
    data: list[RenderedRow]
    problems: list[PlanProblem] = Field(description="Why a row that was asked for cannot be shown.")
