"""What workers and the server say to each other, and what an agent tells its trainer.

Every worker write carries the fencing pair (attempt, token): the attempt in the body, the token in the header
`X-Lease-Token`, so that it never stands in a URL or a log. The calls are listed in docs/architecture.md.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from sftd.footprint import ModelFacts
from sftd.plan import DataPlan, Overlap, PackingPlan, PlanProblem, RenderedRow, StepsPlan
from sftd.schemas import FailureReason, ManifestFile, Want
from sftd.spec import JobSpec

TOKEN_HEADER = "X-Lease-Token"
PROTOCOL = 2  # what this version speaks; workers that do not say speak 1
OLDEST_PROTOCOL = 1  # what a server of this version still serves; older workers get 426
MAX_POINTS = 5000  # metric points in one batch
MAX_EVENTS = 500  # events in one batch
MAX_LOG_LINES = 5000  # log lines in one batch
MAX_LOG_BYTES = 256 * 1024  # body of one log batch
MAX_LINE_CHARS = 8192  # a longer log line is cut and marked
MAX_PLAN_PROBLEMS = 1000  # told in one plan; the rest is counted
MAX_METRIC_NAMES = 1000  # distinct metric names in one job
PIECE_BYTES = 8 * 1024 * 1024  # of a blob, in one PUT; within the server's limit on a worker's body

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
ArtifactPath = Annotated[
    str, StringConstraints(pattern=rf"^{_PART}(/{_PART}){{0,2}}$")
]  # within a folder, by manifest
ShortText = Annotated[str, StringConstraints(max_length=512)]
Line = Annotated[str, StringConstraints(max_length=MAX_LINE_CHARS + 64)]  # and the mark that it was cut
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


TRAINER_JOB_FILE = "job.json"  # in the job's folder; written by the agent, read by the trainer
TRAINER_LINES_FILE = "logs/events.jsonl"  # appended by the trainer, followed by the agent
TRAINER_PULSE_FILE = "logs/.pulse"  # its time moves while the trainer gets on, at most once a second
TRAINER_STACKS_FILE = "logs/stacks.txt"  # where each process of a trainer writes its stacks on SIGUSR2
WARM_READY = b"ready"  # the warm parent to the agent: what follows are requests, one TrainerStart each
TRAINER_GO = b"go"  # the agent to a forked trainer: you are known, begin


class Message(BaseModel):
    """Base of what workers send: unknown fields are refused, so that a mismatch of versions shows at once."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Reply(BaseModel):
    """Base of what the server answers: a newer server may say more than this worker knows."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class Hello(Message):
    """`POST /worker/register`: who a worker is and whether it sees the server's data folder."""

    worker_id: Identifier
    boot_id: Identifier
    gpus: int = Field(ge=1, le=1024)
    device: Literal["cuda", "cpu"]
    labels: dict[ShortText, ShortText] = Field(default={}, max_length=64)
    versions: dict[ShortText, ShortText] = Field(default={}, max_length=64)
    installation_id: str | None = None  # of the data folder that it sees; None: it has a folder of its own
    protocol: int = Field(1, ge=1, le=10**6)
    replaces_boot_id: Identifier | None = None  # an earlier process of this worker that is known to be dead
    gpu_memory_gb: float | None = Field(None, ge=0, le=10**6)  # of its smallest GPU, in GiB
    gpu_names: list[ShortText] = Field(default=[], max_length=1024)


class Welcome(Reply):
    """Answer to Hello."""

    lease_seconds: float
    installation_id: str
    protocol: int = 1  # the server's
    refused_means_down: bool = True  # a refused connection shows that no server runs (docs/decisions/0007)


class Claim(Message):
    """`POST /worker/claim`: give me a job. Held open up to `wait_seconds`; 204 when there is none.

    The same `request_id` again brings the same lease while the job is still claimed: a lost answer is harmless.
    """

    worker_id: Identifier
    boot_id: Identifier
    request_id: Identifier
    gpus: int = Field(ge=1, le=1024)  # free now
    wait_seconds: float = Field(25, ge=0, le=60)
    protocol: int = Field(1, ge=1, le=10**6)
    disk_free_bytes: int | None = Field(None, ge=0, lt=2**63)  # where it would write checkpoints


class InputFile(Reply):
    """A file that a job reads, pinned by its hash when the job was posted. `path` is relative to the data folder."""

    file_id: str
    filename: str
    sha256: Sha256
    bytes: int
    path: str


class CheckpointRef(Reply):
    """A checkpoint to resume from; `name` is its folder under the job's `checkpoints/`."""

    step: int
    name: FileName
    manifest_sha256: Sha256
    folder: str | None = None  # of the job that wrote it, relative to the data folder; None: this job's own
    files: dict[ArtifactPath, ManifestFile] = {}  # for a worker that must fetch it


class BaseRef(Reply):
    """A base model that is another job's result or checkpoint. `path` is relative to the data folder."""

    path: str
    is_adapter: bool
    base_model: str  # what the adapter stands on; equal to `path` where there is no adapter


class Lease(Reply):
    """A job handed to a worker, for `lease_seconds` after each heartbeat."""

    job_id: str
    attempt: int
    token: str
    lease_seconds: float
    spec: JobSpec
    folder: str  # the job's folder, relative to the data folder
    training_file: InputFile
    validation_file: InputFile | None
    base: BaseRef | None
    checkpoints: list[CheckpointRef]  # newest first; the first that verifies is resumed from
    next_seq: dict[Literal["metrics", "logs", "events"], int]
    base_sha256: str | None = None  # of a base model in a folder: what earlier attempts trained on


class Heartbeat(Message):
    """`POST /worker/jobs/{id}/heartbeat`. The lease is renewed at once; the answer is held up to `wait_seconds`
    or until what the user wants differs from `seen_want`, so that a cancel arrives at once."""

    attempt: int
    started: bool
    step: int = 0
    seen_want: Want = Want.RUN
    wait_seconds: float = Field(0, ge=0, le=10)
    seen_make_room: bool = False
    seen_draining: bool = False
    base_sha256: Sha256 | None = None  # of a base model in a folder of the worker, once it is known
    # As in Claim, which a busy worker does not send.
    disk_free_bytes: int | None = Field(None, ge=0, lt=2**63)


class Directive(Reply):
    """Answer to a heartbeat: what the user wants of the job, and what the server asks of its worker."""

    want: Want
    lease_seconds: float
    make_room: bool = False  # save the job and give it back: another needs its place
    draining: bool = False  # the worker shall take no new jobs, and give this one back
    refused_means_down: bool = True
    next_upload_seconds: float | None = None  # the server is busy: report no more often than this


class Point(Message):
    """Metrics of one step. NaN and infinities travel as strings."""

    step: int = Field(ge=0, lt=2**53)
    values: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{1,128}$")], float]


class MetricsBatch(Message):
    """`POST /worker/jobs/{id}/metrics`. `seq` numbers the first point within the attempt, from 0."""

    attempt: int
    seq: int = Field(ge=0, lt=2**53)
    points: list[Point] = Field(max_length=MAX_POINTS)


class LogBatch(Message):
    """`POST /worker/jobs/{id}/logs`. `seq` numbers the first line within the attempt, from 0."""

    attempt: int
    seq: int = Field(ge=0, lt=2**53)
    lines: list[Line] = Field(max_length=MAX_LOG_LINES)


class TrainerEvent(Message):
    """Something the trainer announced. `data` differs by type: see EventLine."""

    type: Literal["run", "evaluation", "notice"]
    message: str = Field(max_length=16384)
    data: dict[str, Any] = {}


class EventBatch(Message):
    """`POST /worker/jobs/{id}/events`. `seq` numbers the first event within the attempt, from 0."""

    attempt: int
    seq: int = Field(ge=0, lt=2**53)
    events: list[TrainerEvent] = Field(max_length=MAX_EVENTS)


class NextSeq(Reply):
    """Answer to a batch: the number the stream goes on with."""

    next_seq: int


class CheckpointReport(Message):
    """`POST /worker/jobs/{id}/checkpoints`: a checkpoint is whole on disk. `files` is its manifest."""

    attempt: int
    step: int = Field(ge=0)
    name: FileName
    manifest_sha256: Sha256
    files: dict[ArtifactPath, ManifestFile]
    metrics: dict[str, float] = {}
    corrupt: bool = False  # True: this recorded checkpoint does not verify any more
    uploaded: bool = False  # its files were sent as blobs: the server puts them in their place


class Finish(Message):
    """`POST /worker/jobs/{id}/finish`: the attempt's last word. Sent again until it is answered with 200 or 409."""

    attempt: int
    state: Literal["succeeded", "failed", "cancelled", "paused"]
    reason: FailureReason | None = None
    message: str | None = Field(None, max_length=16384)
    log_tail: list[Line] = Field(default=[], max_length=200)
    files: dict[ArtifactPath, ManifestFile] = {}  # the result's manifest
    uploaded: bool = False  # the result's files were sent as blobs
    pause_reason: Literal["disk_low"] | None = (
        None  # with `paused`: the worker's own reason, not the user's wish
    )
    needs_disk_bytes: int | None = Field(None, ge=0, lt=2**63)  # with disk_low: free space to go on


class Release(Message):
    """`POST /worker/jobs/{id}/release`: the worker gives the job back; no failure."""

    attempt: int
    message: str = Field(max_length=1024)
    reason: Literal["stopping", "preempted", "gpu_lost", "busy", "wanted_again"] = "stopping"


class FolderFiles(Reply):
    """`GET /worker/jobs/{id}/files/{kind}/{name}`: what a checkpoint or result holds, for a worker that fetches it."""

    files: dict[ArtifactPath, ManifestFile]
    manifest_sha256: Sha256 | None  # of manifest.json; None: a result, which has none


class Restore(Message):
    """`POST /worker/jobs/{id}/restore`: something that the job reads is not in the shared data folder."""

    attempt: int
    kind: Literal["inputs", "checkpoints", "results"]
    name: FileName  # the input's hash, the checkpoint's name, or `results`
    of: Identifier | None = None  # the job that wrote it; None: this one


class Restored(Reply):
    """Answer to Restore. Not ready: the server is at it, ask again."""

    ready: bool


class Ok(Reply):
    """Answer to calls that have nothing else to say."""

    ok: bool


class TrainerJob(Message):
    """`job.json`: all that a trainer is told. Paths are absolute; the trainer knows files only."""

    job_id: str
    attempt: int
    spec: JobSpec
    model_path: str  # a local folder, or a hub id
    adapter_path: str | None = None  # an adapter to continue from
    training_path: str
    training_name: str  # the file's name as the user knows it, for messages
    validation_path: str | None = None
    validation_name: str | None = None
    output_dir: str
    cache_dir: str
    resume_from: str | None = None  # a checkpoint folder that has been verified
    device: Literal["auto", "cuda", "cpu"] = "auto"
    trust_remote_code: bool = False
    local_files_only: bool = False
    skip_test_translation: bool = (
        False  # leave out rows whose task is to translate test cases, and say how many
    )
    wandb_run_id: str | None = None


class TrainerStart(Message):
    """The agent asks its warm parent for a trainer. With it travel, as open files: a channel to the trainer (it says its
    process id, then waits for TRAINER_GO), the file that its output goes to, and the locks that it is to hold."""

    folder: str  # absolute; holds job.json
    environment: dict[str, str]  # the whole of it


class StepLine(Message):
    """A line of events.jsonl: metrics of one step. Evaluations put `eval_loss`, … on the step they were made at."""

    type: Literal["step"] = "step"
    attempt: int
    at: float  # seconds since the epoch, by the trainer's clock; decides nothing
    step: int
    values: dict[str, float]


class LogTextLine(Message):
    """A line of events.jsonl: text for a person."""

    type: Literal["log"] = "log"
    attempt: int
    at: float
    text: str


class EventLine(Message):
    """A line of events.jsonl: the run is described, an evaluation is done, or something is worth telling.

    `run` comes once, before the first step, with data {start_step, total_steps, resumed_from, checkpoint_bytes, …};
    `evaluation` with data {step, eval_loss, perplexity, token_accuracy, num_tokens}; `notice` with anything.
    """

    type: Literal["run", "evaluation", "notice"]
    attempt: int
    at: float
    message: str
    data: dict[str, Any] = {}


class CheckpointLine(Message):
    """A line of events.jsonl: a checkpoint is whole on disk under checkpoints/<name>."""

    type: Literal["checkpoint"] = "checkpoint"
    attempt: int
    at: float
    step: int
    name: FileName
    manifest_sha256: Sha256
    files: dict[ArtifactPath, ManifestFile]
    metrics: dict[str, float] = {}


class EndLine(Message):
    """The last line of an attempt. `stopped`: the trainer obeyed a signal. `files` is the manifest of results/."""

    type: Literal["end"] = "end"
    attempt: int
    at: float
    outcome: Literal["succeeded", "stopped", "failed"]
    reason: FailureReason | None = None
    message: str | None = None
    files: dict[ArtifactPath, ManifestFile] = {}
    # With `disk_full`: what was written when there was no room, where that is known.
    full_path: str | None = None


TrainerLine = Annotated[
    StepLine | LogTextLine | EventLine | CheckpointLine | EndLine, Field(discriminator="type")
]
TRAINER_LINE: TypeAdapter[TrainerLine] = TypeAdapter(TrainerLine)


# ---------------------------------------------------------------- counting data for plans and previews


ANALYSIS_FILE = "analysis.json"  # in the folder of an analysis; written by the agent: an AnalysisJob
ANALYSIS_RESULT_FILE = "analysis_result.json"  # written by the process that counts: an Analysis


class AnalysisRequest(Reply):
    """What is to be counted. `spec` holds only what decides on it; `lines` asks for rows to be rendered, and nothing else."""

    spec: JobSpec
    training_file: InputFile
    validation_file: InputFile | None = None
    base: BaseRef | None = None
    lines: list[int] | None = Field(None, max_length=100)


class AnalysisClaim(Message):
    """`POST /worker/analyses/claim`: give me data to count. Held open up to `wait_seconds`; 204 when there is none."""

    worker_id: Identifier
    boot_id: Identifier
    wait_seconds: float = Field(25, ge=0, le=60)


class AnalysisTask(Reply):
    """Data to count, until `lease_seconds` have passed."""

    id: str
    token: str
    lease_seconds: float
    request: AnalysisRequest


class AnalysisJob(Message):
    """`analysis.json`: all that the process that counts is told. Paths are absolute."""

    request: AnalysisRequest
    model_path: str
    adapter_path: str | None = None
    training_path: str
    validation_path: str | None = None
    cache_dir: str
    trust_remote_code: bool = False
    local_files_only: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"


class Analysis(Message):
    """What was counted. A part that could not be counted is None; `problems` say why."""

    problems: list[PlanProblem] = Field(max_length=MAX_PLAN_PROBLEMS)
    num_problems: int = Field(ge=0)
    training: DataPlan | None = None
    validation: DataPlan | None = None
    overlap: Overlap | None = None
    packing: PackingPlan | None = None
    steps: StepsPlan | None = None
    model: ModelFacts | None = None
    precision: Literal["bf16", "fp32"] = "fp32"  # what `auto` comes to on this worker
    largest_tokens: int = 0  # of a micro-batch
    largest_supervised: int = 0
    longest_row: int = 0
    rows: list[RenderedRow] = []


class AnalysisReport(Message):
    """`POST /worker/analyses/{id}/finish`: what was counted, or why it could not be."""

    analysis: Analysis | None = None
    error: str | None = Field(None, max_length=4000)
    may_retry: bool = False  # the worker was stopped: another may do it
