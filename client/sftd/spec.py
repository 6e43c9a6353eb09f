"""The job spec: a whole fine-tuning job as data, validated in one go.

`JobSpec.model_validate(...)` reports every mistake at once, in the user's own field names, each with a remedy.
A spec never names code to import, a shell command or a path outside the allowed roots.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Method = Literal["full", "lora", "qlora"]

# Text a person reads: no control characters, so that a name can stand in a log line or a table.
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]

# A hub id (`org/name` or `name`), an absolute folder, or `job:<id>` with an optional `@step`.
_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?\Z")
JOB_REFERENCE = re.compile(r"^job:(?P<job_id>[A-Za-z0-9_-]{1,64})(@(?P<step>[0-9]{1,12}))?\Z")

_REQUIRED_LABEL = re.compile(r"^[^\x00-\x1f\x7f=,]{1,128}(=[^\x00-\x1f\x7f,]{0,128})?\Z")

# Fields that say when and where a job runs, not what it trains. They may be changed while it waits, and a worker that
# does not know them can run the job all the same.
SCHEDULING_FIELDS = frozenset(
    {"priority", "after", "requires", "max_seconds", "max_gpu_seconds", "max_tokens", "keep_checkpoints"}
)


class SpecModel(BaseModel):
    """Base of everything in a spec: unknown fields are mistakes, types are taken at their word, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class LoraSpec(SpecModel):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685). Used by the methods `lora` and `qlora`."""

    rank: int = Field(16, ge=1, le=4096, description="Rank r of the update.")
    alpha: float = Field(32, gt=0, le=65536, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: (
        Literal["all-linear"] | list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,128}$")]]
    ) = Field(
        "all-linear", description="`all-linear` (all but the output head) or a list of module name endings."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adaptation (arXiv:2402.09353).")

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("the list is empty; name at least one module or write all-linear")
        return value


class WandbSpec(SpecModel):
    """Where Weights & Biases shows the run. The key comes from the worker's environment, never from a spec."""

    project: Label
    name: Label | None = None
    entity: Label | None = None
    tags: list[Label] = Field(default=[], max_length=32)


class EvaluationSpec(SpecModel):
    """Scoring by running generated code. Reserved: the field is checked, and refused until execution is available."""

    problems_file: str
    samples: int = Field(1, ge=1, le=1000)
    k: list[Annotated[int, Field(ge=1)]] = [1]
    max_new_tokens: int = Field(512, ge=1, le=65536)


class RequiresSpec(SpecModel):
    """What a worker must have to be given the job. A job that no worker can take says so in `why_waiting`."""

    gpu_memory_gb: float | None = Field(
        None, gt=0, le=4096, description="Memory that each of its GPUs must have at least, in GiB."
    )
    label: str | list[str] | None = Field(
        None,
        description="Labels that the worker must carry: `name` or `name=value`, one or a list.",
        examples=["site=berlin"],
    )
    worker: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = Field(
        None, description="The name of the one worker that may run it."
    )

    @field_validator("label")
    @classmethod
    def _labels_have_names(cls, value: str | list[str] | None) -> str | list[str] | None:
        wanted = [value] if isinstance(value, str) else value or []
        if len(wanted) > 16:
            raise ValueError("at most 16 labels")
        for label in wanted:
            if not _REQUIRED_LABEL.match(label):
                raise ValueError(f"{label[:80]!r} is not a label; write name or name=value")
        return value

    @property
    def labels(self) -> list[str]:
        """The labels as a list."""
        return [self.label] if isinstance(self.label, str) else list(self.label or [])


class JobSpec(SpecModel):
    """One supervised fine-tuning job. Every field but `base_model` and `training_file` has a default."""

    base_model: str = Field(
        min_length=1,
        max_length=1024,
        description="A hub id, a local folder under an allowed root, or `job:<id>[@step]`.",
        examples=["Qwen/Qwen2.5-7B-Instruct"],
    )
    method: Method = Field(
        "lora", description="`full` trains all weights, `lora` an adapter, `qlora` an adapter on NF4 weights."
    )
    training_file: str = Field(
        min_length=1, max_length=4096, description="Id of an uploaded file.", examples=["file_0123456789ab"]
    )
    validation_file: str | None = Field(
        None, max_length=4096, description="Id of an uploaded file to evaluate on."
    )
    validation_split: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Or: the share of the training rows to hold out, chosen by a hash of the row.",
    )
    max_seq_length: int = Field(2048, ge=2, le=4_194_304, description="Longest row, in tokens.")
    learning_rate: float = Field(2e-5, gt=0, le=10, description="Peak learning rate.")
    batch_size: int = Field(1, ge=1, le=65536, description="Rows per device per micro-step, before packing.")
    gradient_accumulation_steps: int = Field(8, ge=1, le=65536, description="Micro-steps per optimizer step.")
    warmup_steps: int | None = Field(
        None,
        ge=0,
        le=10**9,
        description="Steps of linear warm-up. Default 100, unless warmup_ratio is given.",
    )
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="Or: warm-up as a share of all steps.")
    max_steps: int | None = Field(
        None, ge=1, le=10**9, description="Optimizer steps. Default 1000, unless num_epochs is given."
    )
    num_epochs: float | None = Field(None, gt=0, le=10**6, description="Or: passes over the training rows.")
    save_steps: int = Field(
        50, ge=1, le=10**9, description="Checkpoint every so many steps; the last step is always saved."
    )
    eval_steps: int = Field(
        20, ge=1, le=10**9, description="Evaluate every so many steps, before the first and after the last."
    )
    logging_steps: int = Field(1, ge=1, le=10**9, description="Report metrics every so many steps.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(
        1.0, ge=0, le=10**6, description="Clip the gradient to this norm; 0 turns clipping off."
    )
    seed: int = Field(42, ge=0, lt=2**32)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="`auto` takes bf16 where the device has it."
    )
    gradient_checkpointing: bool = True
    packing: bool = Field(
        True, description="Lay the rows of a step end to end. Changes the speed, not the training."
    )
    max_tokens_per_step: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="Most tokens of a micro-step with packing, which bounds its memory. Default: batch_size × "
        "max_seq_length. A longer row goes alone.",
    )
    train_on: Literal["completion", "all", "last_turn"] = Field(
        "completion", description="Which tokens carry the loss."
    )
    on_overlong: Literal["error", "truncate", "drop"] = Field(
        "error", description="What to do with rows over max_seq_length."
    )
    lora: LoraSpec = LoraSpec()
    evaluation: EvaluationSpec | None = None
    wandb: WandbSpec | None = None
    gpus: int = Field(
        1, ge=1, le=1024, description="Devices for this job; on a machine without GPUs, CPU processes."
    )
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="With gpus > 1: `ddp` keeps all weights on each device, `fsdp` a share of them. `auto`: fsdp for "
        "`full` with the optimizer `adamw`, else ddp.",
    )
    priority: int = Field(0, ge=-1000, le=1000, description="Higher runs first.")
    after: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]] = Field(
        default=[], max_length=64, description="Ids of jobs that must have succeeded before this one runs."
    )
    requires: RequiresSpec | None = Field(None, description="What a worker must have to be given the job.")
    max_seconds: float | None = Field(
        None,
        gt=0,
        le=10**9,
        description="Budget: the job is paused when it has run so long, over all attempts.",
    )
    max_gpu_seconds: float | None = Field(
        None, gt=0, le=10**12, description="Budget: the same in seconds times gpus."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=2**60,
        description="Budget: the job is paused when so many tokens went through the model.",
    )
    keep_checkpoints: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Keep so many of the newest checkpoints, the best and pinned ones besides. Default: the server's.",
    )
    name: Label | None = None
    metadata: dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field(default={}, max_length=16, description="Up to 16 string pairs, filterable.")

    @field_validator("base_model")
    @classmethod
    def _base_model_form(cls, value: str) -> str:
        if ".." in value.split("/") or any(ord(char) < 32 or 127 <= ord(char) < 160 for char in value):
            raise ValueError(
                "must not contain '..' or control characters; give a hub id (org/name) or an absolute folder"
            )
        if value.startswith("/") or JOB_REFERENCE.match(value) or _HUB_ID.match(value):
            return value
        raise ValueError(
            "is neither a hub id (org/name), an absolute folder, nor job:<id> or job:<id>@<step>"
        )

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, data: Any, handler: ModelWrapValidatorHandler["JobSpec"]) -> "JobSpec":
        """Report mistakes between fields together with mistakes inside them, and settle the paired defaults."""
        problems: list[InitErrorDetails] = []
        if isinstance(data, dict):
            data = _settle_pairs(data)
            problems = [_problem(field, message, data.get(field)) for field, message in _between_fields(data)]
        try:
            spec = handler(data)
        except ValidationError as error:
            problems = [*_details(error), *problems]
        if problems:
            raise ValidationError.from_exception_data("JobSpec", problems)
        return spec


def _settle_pairs(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that depend on whether another field was given."""
    data = dict(data)
    if data.get("max_steps") is None and data.get("num_epochs") is None:
        data["max_steps"] = 1000
    if data.get("warmup_steps") is None and data.get("warmup_ratio") is None:
        data["warmup_steps"] = 100
    return data


def _between_fields(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Mistakes that no single field shows, as (field, message). Tolerates fields of the wrong type."""

    def given(name: str) -> bool:
        return data.get(name) is not None

    problems = []
    if given("max_steps") and given("num_epochs"):
        problems.append(("num_epochs", "stands beside max_steps; give one of the two"))
    if given("warmup_steps") and given("warmup_ratio"):
        problems.append(("warmup_ratio", "stands beside warmup_steps; give one of the two"))
    if given("validation_file") and given("validation_split"):
        problems.append(("validation_split", "stands beside validation_file; give one of the two"))
    if given("evaluation"):
        problems.append(("evaluation", "scoring by execution is not available in this version; leave it out"))
    if data.get("method") == "qlora" and data.get("precision") == "fp32":
        problems.append(("precision", "qlora computes in bf16; leave precision at auto or bf16"))
    if data.get("method") == "qlora" and data.get("sharding") == "fsdp":
        problems.append(
            ("sharding", "qlora keeps its 4-bit weights whole on each device; leave it at auto or ddp")
        )
    if data.get("sharding") == "fsdp" and data.get("optimizer") in ("adamw_8bit", "paged_adamw_8bit"):
        problems.append(
            ("optimizer", f"{data['optimizer']} cannot be shared out; use adamw, or set sharding to ddp")
        )
    return problems


def _problem(field: str, message: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("inconsistent", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=tuple(field.split(".")), input=value)


def _details(error: ValidationError) -> list[InitErrorDetails]:
    """Line errors of a ValidationError, in the form another one can be raised from."""
    return [
        InitErrorDetails(
            type=PydanticCustomError(line["type"], "{message}", {"message": line["msg"]}),
            loc=line["loc"],
            input=line["input"],
        )
        for line in error.errors(include_url=False)
    ]
