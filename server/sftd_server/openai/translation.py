"""From OpenAI's way of posting a job to the job spec, and the numbers back. docs/openai.md tells these rules.

A body may hold OpenAI's fields and, beside them, the fields of our spec under their own names. What is said in both ways is
refused. Mistakes are collected and told in the names that the user wrote, those of the spec as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import create_model
from sqlmodel import Session

from sftd.spec import JobSpec, Method
from sftd_server.mistakes import Mistake, mistakes_of
from sftd_server.openai import names

# The learning rate of multiplier 1. An adapter takes about ten times that of all weights.
BASE_LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
DEFAULT_METHOD = "lora"
WARMUP_RATIO = 0.1
EPOCHS, MOST_EPOCHS = 3, 25
FEWEST_ROWS_SEEN, MOST_ROWS_SEEN = 100, 25_000
LEAST_ROWS_A_STEP, MOST_ROWS_A_STEP, STEPS_AN_EPOCH = 8, 64, 500
MAX_SUFFIX = 64

OPENAI_FIELDS = (
    "model",
    "training_file",
    "validation_file",
    "hyperparameters",
    "method",
    "suffix",
    "seed",
    "metadata",
    "integrations",
)
SPEC_FIELDS = tuple(name for name in JobSpec.model_fields if name != "base_model")
_Known = create_model("_Known", **dict.fromkeys((*OPENAI_FIELDS, *SPEC_FIELDS), (Any, None)))  # type: ignore[call-overload]  # fields by name
_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
# What stands for a hyperparameter among the fields of the spec.
_SAME_AS = {
    "n_epochs": ("num_epochs", "max_steps"),
    "batch_size": ("batch_size", "gradient_accumulation_steps"),
    "learning_rate_multiplier": ("learning_rate",),
}
_OTHER_METHODS = ("dpo", "reinforcement")
_MAX_LEARNING_RATE = 10

Json = dict[str, Any]  # as posted: open by nature


@dataclass
class Translated:
    """The spec of a posted job, still unchecked, with what is wrong so far."""

    spec: Json = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)  # field of the spec → what the user wrote for it

    def note(self, name: str, message: str) -> None:
        self.mistakes.append(Mistake(name, message))

    def with_mistakes_of_spec(self, found: Sequence[Mistake]) -> list[Mistake]:
        """All mistakes, in the user's names, one a field."""
        told = {mistake.field: mistake for mistake in self.mistakes}
        for mistake in found:
            name = self._name(mistake.field)
            told.setdefault(name, Mistake(name, mistake.message.replace("base_model", "model")))
        return list(told.values())

    def _name(self, name: str) -> str:
        for ours, theirs in self.said.items():
            if name == ours or name.startswith((f"{ours}.", f"{ours}[")):
                return theirs + name.removeprefix(ours)
        return name


def needs_rows(body: Json) -> bool:
    """Whether the number of rows decides on anything."""
    found = _Hyperparameters.read(body, Translated())
    return found.epochs is None or found.batch_size is None


def translate(session: Session, body: Json, num_rows: int | None) -> Translated:
    """The spec that a body asks for. `num_rows` of the training file resolve what is `auto`."""
    to = Translated(said={"base_model": "model"})
    _refuse_unknown(body, to)
    ours = {name: body[name] for name in SPEC_FIELDS if name in body and name not in ("method", "metadata")}
    for name in ("validation_file", "seed"):
        if body.get(name) is None:
            ours.pop(name, None)  # OpenAI's clients may send null for what is not given
    to.spec |= ours
    if body.get("metadata") is not None:
        to.spec["metadata"] = body["metadata"]
    _model(session, body, to)
    _suffix(body, to)
    _integrations(body, to)
    method = body.get("method")
    if isinstance(method, str):
        to.spec["method"] = method
    _resolve(body, to, num_rows)
    return to


def default_epochs(num_rows: int | None) -> int:
    """`auto`: three passes; more over few rows, so that 100 are seen; fewer over many, so that it ends."""
    if not num_rows:
        return EPOCHS
    if num_rows * EPOCHS < FEWEST_ROWS_SEEN:
        return max(EPOCHS, min(MOST_EPOCHS, FEWEST_ROWS_SEEN // num_rows))
    if num_rows * EPOCHS > MOST_ROWS_SEEN:
        return max(1, MOST_ROWS_SEEN // num_rows)
    return EPOCHS


def default_batch_size(num_rows: int | None) -> int:
    """`auto`: rows of a step. A five hundredth of all rows, from 8 to 64, and no more than there are."""
    if not num_rows:
        return LEAST_ROWS_A_STEP
    wanted = max(LEAST_ROWS_A_STEP, min(MOST_ROWS_A_STEP, num_rows // STEPS_AN_EPOCH))
    return min(wanted, num_rows)


def hyperparameters_of(spec: JobSpec, num_rows: int | None) -> Json:
    """What a spec comes to in OpenAI's numbers; None where nobody can say: epochs of a file that is gone."""
    rows_a_step = spec.batch_size * spec.gradient_accumulation_steps * spec.gpus
    epochs: float | None = spec.num_epochs
    if epochs is None and num_rows:
        epochs = max(1, round((spec.max_steps or 0) * rows_a_step / num_rows))
    multiplier = spec.learning_rate / BASE_LEARNING_RATES[spec.method]
    return {
        "n_epochs": int(epochs) if epochs is not None and epochs == int(epochs) else epochs,
        "batch_size": rows_a_step,
        "learning_rate_multiplier": float(f"{multiplier:.6g}"),
    }


# ---------------------------------------------------------------- field by field


def _refuse_unknown(body: Json, to: Translated) -> None:
    for name in body:
        if name == "base_model":
            to.note("base_model", "is called model here; give it as model")
        elif name not in _Known.model_fields:
            to.mistakes += mistakes_of([{"type": "extra_forbidden", "loc": (name,), "msg": ""}], _Known)


def _model(session: Session, body: Json, to: Translated) -> None:
    name = body.get("model")
    if name is None:
        to.note("model", "is required; give it")
    elif not isinstance(name, str):
        to.note("model", "must be a string")
    elif not names.is_made(name):
        if name.startswith("job:"):
            to.note("model", "is a reference of POST /jobs; here a model is named as GET /v1/models lists it")
        else:
            to.spec["base_model"] = name
    else:
        made = names.find(session, name)
        if made is None:
            to.note("model", f"there is no model {name[:200]!r}; GET /v1/models lists them")
        else:
            to.spec["base_model"] = made.reference


def _suffix(body: Json, to: Translated) -> None:
    suffix = body.get("suffix")
    if suffix is None:
        return
    if not isinstance(suffix, str):
        to.note("suffix", "must be a string")
    elif not 1 <= len(suffix) <= MAX_SUFFIX:
        to.note("suffix", f"must have 1 to {MAX_SUFFIX} characters, not {len(suffix)}")
    elif not suffix.isprintable():
        to.note("suffix", "holds a character that cannot be printed; leave it out")


def _integrations(body: Json, to: Translated) -> None:
    given = body.get("integrations")
    if given is None or given == []:
        return
    if body.get("wandb") is not None:
        to.note("integrations", "stands beside wandb; give one of the two")
    elif not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], dict):
        to.note("integrations", 'must be a list of one object, {"type": "wandb", "wandb": {"project": …}}')
    elif given[0].get("type") != "wandb":
        to.note("integrations[0].type", "must be wandb; there is no other integration")
    else:
        for name in given[0]:
            if name not in ("type", "wandb"):
                to.note(f"integrations[0].{name}", "unknown field; the fields are type and wandb")
        to.said["wandb"] = "integrations[0].wandb"
        if not isinstance(given[0].get("wandb"), dict):
            to.note("integrations[0].wandb", "is required; give an object with a project")
            return
        settings = {name: value for name, value in given[0]["wandb"].items() if value is not None}
        to.spec["wandb"] = settings


# ---------------------------------------------------------------- hyperparameters


@dataclass
class _Hyperparameters:
    """Those that were given a number, and under which name."""

    epochs: int | None = None
    batch_size: int | None = None
    multiplier: float | None = None
    where: str = "hyperparameters"

    @classmethod
    def read(cls, body: Json, to: Translated) -> "_Hyperparameters":
        """From `hyperparameters` and from `method.supervised.hyperparameters`, with their mistakes."""
        old = _checked(body.get("hyperparameters"), "hyperparameters", to)
        new, where = _of_method(body.get("method"), to)
        for name in old.keys() & new.keys():
            if old[name] != new[name]:
                to.note(
                    f"hyperparameters.{name}",
                    f"differs from {where}.{name}; give it once, in method",
                )
        both = {**old, **new}
        for name, value in both.items():
            beside = [ours for ours in _SAME_AS[name] if body.get(ours) is not None]
            if value is not None and beside:
                at = where if name in new else "hyperparameters"
                to.note(f"{at}.{name}", f"stands beside {beside[0]}; give one of the two")
        return cls(
            both.get("n_epochs"),
            both.get("batch_size"),
            both.get("learning_rate_multiplier"),
            where if new else "hyperparameters",
        )


def _of_method(method: Any, to: Translated) -> tuple[Json, str]:  # as posted
    """The hyperparameters in `method`, and where they stand."""
    where = "method.supervised.hyperparameters"
    if method is None or isinstance(method, str):
        return {}, where
    if not isinstance(method, dict):
        to.note(
            "method", f"must be an object of the type supervised, or one of {', '.join(get_args(Method))}"
        )
        return {}, where
    kind = method.get("type")
    if kind in _OTHER_METHODS:
        to.note("method.type", f"{kind} is not available; supervised is")
        return {}, where
    if kind != "supervised":
        to.note("method.type", "must be supervised" if "type" in method else "is required; give supervised")
    for name in method:
        if name in _OTHER_METHODS and method[name] is not None:
            to.note(f"method.{name}", "is not available; supervised is")
        elif name not in ("type", "supervised", *_OTHER_METHODS):
            to.note(f"method.{name}", "unknown field; the fields are type and supervised")
    supervised = method.get("supervised")
    if supervised is None:
        return {}, where
    if not isinstance(supervised, dict):
        to.note("method.supervised", "must be an object")
        return {}, where
    for name in supervised:
        if name != "hyperparameters":
            to.note(f"method.supervised.{name}", "unknown field; the only one is hyperparameters")
    return _checked(supervised.get("hyperparameters"), where, to), where


def _checked(given: Any, where: str, to: Translated) -> Json:  # as posted
    """Hyperparameters by name; None for one that is `auto`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        to.note(where, "must be an object")
        return {}
    found: Json = {}
    for name, value in given.items():
        if name not in _HYPERPARAMETERS:
            to.note(f"{where}.{name}", f"unknown field; the fields are {', '.join(_HYPERPARAMETERS)}")
        elif value is None or value == "auto":
            found[name] = None
        elif isinstance(value, bool) or not isinstance(
            value, int | float if name == "learning_rate_multiplier" else int
        ):
            kind = "a number" if name == "learning_rate_multiplier" else "an integer"
            to.note(f"{where}.{name}", f"must be {kind} or auto")
        elif value <= 0:
            to.note(f"{where}.{name}", f"must be greater than 0, not {value}")
        else:
            found[name] = value
    return found


def _resolve(body: Json, to: Translated, num_rows: int | None) -> None:
    """Settle the numbers of the spec: what was given, or what `auto` comes to."""
    given, spec = _Hyperparameters.read(body, to), to.spec
    if body.get("num_epochs") is None and body.get("max_steps") is None:
        spec["num_epochs"] = float(min(given.epochs or default_epochs(num_rows), 10**12))
        to.said["num_epochs"] = f"{given.where}.n_epochs"
    if body.get("batch_size") is None and body.get("gradient_accumulation_steps") is None:
        gpus = body["gpus"] if type(body.get("gpus")) is int and body["gpus"] > 0 else 1
        rows_a_step = given.batch_size
        if rows_a_step is None:
            rows_a_step = math.ceil(default_batch_size(num_rows) / gpus) * gpus
        elif rows_a_step % gpus:
            to.note(
                f"{given.where}.batch_size",
                f"{rows_a_step} rows cannot be shared out among {gpus} gpus; give a multiple of {gpus}",
            )
        # One row at a time, and so many in turn: packing lays rows together all the same.
        spec["batch_size"], spec["gradient_accumulation_steps"] = 1, max(1, rows_a_step // gpus)
        to.said["gradient_accumulation_steps"] = f"{given.where}.batch_size"
    if body.get("learning_rate") is None:
        method = spec.get("method", DEFAULT_METHOD)
        base = BASE_LEARNING_RATES.get(method, BASE_LEARNING_RATES[DEFAULT_METHOD])
        multiplier = 1.0 if given.multiplier is None else given.multiplier
        most = _MAX_LEARNING_RATE / base
        if multiplier > most:
            to.note(f"{given.where}.learning_rate_multiplier", f"must be at most {most:g}, not {multiplier}")
            multiplier = 1.0
        spec["learning_rate"] = float(f"{base * multiplier:.6g}")
        to.said["learning_rate"] = f"{given.where}.learning_rate_multiplier"
    if body.get("warmup_steps") is None and body.get("warmup_ratio") is None:
        spec["warmup_ratio"] = WARMUP_RATIO
