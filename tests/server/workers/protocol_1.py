"""What a worker of protocol 1 reads: a frozen copy of its models, which refuse every field that they do not know."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, create_model

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SPEC_FIELDS = [
    "base_model",
    "method",
    "training_file",
    "validation_file",
    "validation_split",
    "max_seq_length",
    "learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "warmup_ratio",
    "max_steps",
    "num_epochs",
    "save_steps",
    "eval_steps",
    "logging_steps",
    "lr_scheduler",
    "optimizer",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "precision",
    "gradient_checkpointing",
    "packing",
    "max_tokens_per_step",
    "train_on",
    "on_overlong",
    "lora",
    "evaluation",
    "wandb",
    "gpus",
    "sharding",
    "priority",
    "name",
    "metadata",
]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Welcome(Message):
    lease_seconds: float
    installation_id: str


class InputFile(Message):
    file_id: str
    filename: str
    sha256: Sha256
    bytes: int
    path: str


class CheckpointRef(Message):
    step: int
    name: FileName
    manifest_sha256: Sha256


class BaseRef(Message):
    path: str
    is_adapter: bool
    base_model: str


JobSpec: Any = create_model("JobSpec", __base__=Message, **dict.fromkeys(SPEC_FIELDS, (Any, ...)))


class Lease(Message):
    job_id: str
    attempt: int
    token: str
    lease_seconds: float
    spec: JobSpec
    folder: str
    training_file: InputFile
    validation_file: InputFile | None
    base: BaseRef | None
    checkpoints: list[CheckpointRef]
    next_seq: dict[Literal["metrics", "logs", "events"], int]


class Directive(Message):
    want: Literal["run", "pause", "cancel"]
    lease_seconds: float


class NextSeq(Message):
    next_seq: int


class Ok(Message):
    ok: bool = True
