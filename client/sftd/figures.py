"""What a job came to, in numbers: the figures that gates are computed with, fetched as they are asked for."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from sftd.client import Client
from sftd.gates import Unavailable
from sftd.schemas import Job

T = TypeVar("T")

# Told by evaluations, over all validation rows; the rest are metrics of steps.
EVALUATED = ("eval_loss", "perplexity", "token_accuracy")
OF_JOB = (
    "step",
    "total_steps",
    "loss",
    "eval_loss",
    "tokens_per_second",
    "tokens_seen",
    "gpu_seconds",
    "run_seconds",
)


class JobFigures:
    """Figures of one job; each series is fetched once. `call` carries out a fetch, and may try again."""

    def __init__(
        self, client: Client, job: Job, call: Callable[[Callable[[], list[float]]], list[float]]
    ) -> None:
        self._client = client
        self._job = job
        self._call = call
        self._series: dict[str, list[float]] = {}

    def value(self, name: str) -> float:
        """A figure as it stood at the end."""
        if name in OF_JOB:
            value = getattr(self._job, name)
            if value is None:
                raise Unavailable(self._without(name))
            return float(value)
        return self.history(name)[-1]

    def history(self, name: str) -> Sequence[float]:
        """A metric over the steps of the job."""
        if name not in self._series:
            self._series[name] = self._call(lambda: self._fetch(name))
        if not self._series[name]:
            raise Unavailable(self._without(name))
        return self._series[name]

    def _fetch(self, name: str) -> list[float]:
        if name in EVALUATED:
            return [float(getattr(found, name)) for found in self._client.jobs.evaluations(self._job.id)]
        points = self._client.jobs.metrics(self._job.id, names=[name])
        values = (point.model_dump().get(name) for point in points)
        return [float(value) for value in values if isinstance(value, int | float)]

    def _without(self, name: str) -> str:
        if name in EVALUATED:
            return f"{self._job.id} has no {name}: it was not evaluated; give validation_split or validation_file"
        return f"{self._job.id} has no metric {name}"
