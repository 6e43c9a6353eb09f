"""Names of models that were made here: `ft:{base}:{owner}:{suffix}:{job id}`, with `:ckpt-step-{n}` for a checkpoint.

A name is made of what never changes of a job, and its id is what counts; the rest must be as the job's own name has it, so
that nobody trains on another model than the one that the name speaks of.
"""

import re
from dataclasses import dataclass

from sqlmodel import Session, select

from sftd.schemas import JobState
from sftd.spec import JOB_REFERENCE
from sftd_server.tables import JobRow

_PREFIX = "ft:"
_CHECKPOINT = re.compile(r"^ckpt-step-(?P<step>[0-9]{1,12})\Z")
_STRANGE = re.compile(r"[^A-Za-z0-9._-]+")
_STRANGE_IN_BASE = re.compile(r"[^A-Za-z0-9._/@-]+")


@dataclass(frozen=True)
class Made:
    """What a name stands for: the result of a job, or one of its checkpoints."""

    job: JobRow
    step: int | None

    @property
    def reference(self) -> str:
        """As a spec has it."""
        return f"job:{self.job.id}" + ("" if self.step is None else f"@{self.step}")


def name_of(row: JobRow, step: int | None = None) -> str:
    """The name of what a job makes, or of its checkpoint of a step."""
    base = _STRANGE_IN_BASE.sub("-", row.base_model.removeprefix("job:"))
    name = f"{_PREFIX}{base}:{_plain(row.owner)}:{_plain(row.suffix or '')}:{row.id}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def is_made(name: str) -> bool:
    """Whether this is the name of a model that a job made."""
    return name.startswith(_PREFIX)


def find(session: Session, name: str) -> Made | None:
    """What a name stands for; None where no job has this name. Whether it is there (still) is another question."""
    whole, _, last = name.rpartition(":")
    checkpoint = _CHECKPOINT.match(last)
    job_id = whole.rpartition(":")[2] if checkpoint else last
    row = session.exec(select(JobRow).where(JobRow.id == job_id)).first()
    step = int(checkpoint["step"]) if checkpoint else None
    return Made(row, step) if row is not None and name_of(row, step) == name else None


def result_name(row: JobRow) -> str | None:
    """The name of a job's model, once it is there and as long as it is."""
    there = row.state == JobState.SUCCEEDED and row.result_deleted_at is None
    return name_of(row) if there else None


def base_name(session: Session, base_model: str) -> str:
    """What a spec builds on, as this surface says it: a model that was made here has a name."""
    reference = JOB_REFERENCE.match(base_model)
    if reference is None:
        return base_model
    row = session.exec(select(JobRow).where(JobRow.id == reference["job_id"])).first()
    if row is None:  # deleted meanwhile
        return base_model
    return name_of(row, None if reference["step"] is None else int(reference["step"]))


def _plain(text: str) -> str:
    return _STRANGE.sub("-", text)
