"""Counts a job's data and model for a plan, or renders rows for a preview; nothing is trained and no weights are read.

    python -m sftd_worker.trainer FOLDER    # FOLDER/analysis.json says what to count; the answer lies beside it

Tokens and masks come from the code of a run, and go to the cache where the run will find them.
"""

import contextlib
import gc
import math
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from sftd.footprint import Linears, ModelFacts, unknown_targets
from sftd.plan import (
    DataPlan,
    Duplicate,
    Duplicates,
    Histogram,
    Lines,
    Overlap,
    PackingPlan,
    PlanProblem,
    RenderedRow,
    Segment,
    StepsPlan,
    error,
    warning,
)
from sftd.protocol import (
    ANALYSIS_FILE,
    ANALYSIS_RESULT_FILE,
    MAX_PLAN_PROBLEMS,
    Analysis,
    AnalysisJob,
    AnalysisReport,
    InputFile,
    TrainerJob,
)
from sftd.spec import JobSpec
from sftd_worker.trainer import twins
from sftd_worker.trainer.batching import Plan, make_plan, share_of_rank
from sftd_worker.trainer.data import LookedOver, Tokenizing, after_cut, column, look_over, split_by_hash
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.model import from_hub, hub_options, load_tokenizer
from sftd_worker.trainer.optim import warmup_steps
from sftd_worker.trainer.packing import lay_out
from sftd_worker.trainer.precision import choose_precision
from sftd_worker.trainer.run import end_process

Role = Literal["training_file", "validation_file"]

_MOST_LINES = 100
_MOST_EXAMPLES = 10
_ROWS_SHOWN = 3
_SHOWN_CHARS = 4_000  # of a rendered row
_MOST_SEGMENTS = 100
_TEXT_CHARS = 300  # of a duplicate
_NUM_BINS = 20
_STEPS_LAID_OUT = 2_000  # of a run; the others are like them
_NICE = 10  # counting gives way to training


def analyse_and_end(folder: Path) -> NoReturn:
    """Count, and end this process with 0 unless that was not possible. Does not return."""
    code = 1
    try:
        _give_way()
        analyse(folder)
        code = 0
    except BaseException:  # the process ends here
        traceback.print_exc()
    finally:
        end_process(code)


def _give_way() -> None:
    """Settle this process, which does nothing else: runs go before it."""
    disable_progress_bar()
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # where memory runs out, this goes and not a run
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage
    gc.set_threshold(100_000, 50, 50)


def analyse(folder: Path) -> None:
    """Do what analysis.json in `folder` says, and write the answer beside it, whole or not at all."""
    job = AnalysisJob.model_validate_json((folder / ANALYSIS_FILE).read_text())
    try:
        report = AnalysisReport(analysis=_analysis(job))
    except RunFailed as failure:
        field = "base_model" if failure.reason.startswith("model") else None
        report = AnalysisReport(analysis=_only(error(str(failure), field=field)))
    unfinished = folder / f".{ANALYSIS_RESULT_FILE}"
    unfinished.write_text(report.model_dump_json())
    unfinished.rename(folder / ANALYSIS_RESULT_FILE)


@dataclass(frozen=True)
class _Counted:
    """A data file, and the rows of it that are used."""

    role: Role
    file: InputFile
    looked: LookedOver
    rows: np.ndarray  # int64: positions in the table, in its order
    lengths: np.ndarray  # int64, of those rows after the cut
    supervised: np.ndarray  # int64, the same
    dropped: np.ndarray  # positions
    truncated: np.ndarray
    emptied: np.ndarray
    overlong: np.ndarray
    sketches: twins.Sketches  # of all rows of the table

    @property
    def chosen_sketches(self) -> twins.Sketches:
        """Of the rows that are used."""
        return twins.chosen(self.sketches, self.rows)

    @property
    def lines(self) -> np.ndarray:
        """Line of each row of the table."""
        return column(self.looked.table, "line")


def _analysis(job: AnalysisJob) -> Analysis:
    request, spec = job.request, job.request.spec
    as_trainer = _as_trainer_job(job)
    tokenizer, template, own_template = load_tokenizer(as_trainer)
    how = Tokenizing(tokenizer, template, spec.train_on)
    if request.lines is not None:
        return _preview(job, how)
    facts = model_facts(as_trainer, has_template=own_template)
    cache = Path(job.cache_dir)
    looked = _look_over(request.training_file, job.training_path, how, cache)
    problems = list(_problems_of(looked, "training_file", request.training_file))
    num_problems = looked.num_problems
    held_out = None
    if request.validation_file is not None and job.validation_path is not None:
        held_out = _look_over(request.validation_file, job.validation_path, how, cache)
        problems += _problems_of(held_out, "validation_file", request.validation_file)
        num_problems += held_out.num_problems
    training, validation, found = _choose(
        spec, looked, held_out, request.training_file, request.validation_file
    )
    found += _about_model(spec, facts)
    num_problems += len(found)
    counted = [part for part in (training, validation) if part is not None]
    for part in counted:
        overlong = list(_overlong(spec, part))
        problems += overlong
        num_problems += len(part.overlong) if overlong else 0
    own, across = _twins(training, validation)
    run = _run_plan(spec, training) if training is not None else None
    layout = _layout(spec, training, run) if training is not None and run is not None else None
    return Analysis(
        problems=(found + problems)[:MAX_PLAN_PROBLEMS],
        num_problems=num_problems,
        training=_data_plan(training, own, how) if training is not None and own is not None else None,
        validation=None
        if validation is None
        else _data_plan(validation, twins.find_twins(validation.chosen_sketches), how),
        overlap=_overlap(training, validation, across, how) if training and validation and across else None,
        packing=layout.plan if layout else None,
        steps=_steps(spec, training, validation, run) if training is not None and run is not None else None,
        model=facts,
        precision="bf16" if choose_precision(spec, _device(job)).name == "bf16" else "fp32",
        largest_tokens=layout.largest_tokens if layout else 0,
        largest_supervised=layout.largest_supervised if layout else 0,
        longest_row=int(training.lengths.max()) if training is not None else 0,
    )


# ---------------------------------------------------------------- the model


def model_facts(job: TrainerJob, *, has_template: bool) -> ModelFacts:
    """The base model's sizes, from its config alone. Raises RunFailed where it cannot be used."""
    config = from_hub(job, "config", AutoConfig.from_pretrained, job.model_path, **hub_options(job))

    def build() -> Any:  # a transformers model
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=job.trust_remote_code)

    net = from_hub(job, "model", build)
    text = config.get_text_config()
    head = net.get_output_embeddings()
    embedding = net.get_input_embeddings()
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            shape = tuple(module.weight.shape)
            num_in, num_out = shape if isinstance(module, Conv1D) else shape[::-1]
            counts[name.rpartition(".")[2], num_in, num_out] += 1
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    stored = getattr(text, "dtype", None) or torch.float32
    return ModelFacts(
        architecture=type(net).__name__,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        hidden_size=text.hidden_size,
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        kv_width=head_dim * int(getattr(text, "num_key_value_heads", None) or heads),
        vocab_size=int(head.weight.shape[0]),
        tied_head=bool(getattr(text, "tie_word_embeddings", False)) or head.weight is embedding.weight,
        linears=[
            Linears(name=name, num_in=num_in, num_out=num_out, count=count)
            for (name, num_in, num_out), count in counts.items()
        ],
        stored_bytes=stored.itemsize,
        has_template=has_template,
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _about_model(spec: JobSpec, facts: ModelFacts) -> list[PlanProblem]:
    found = []
    unknown = unknown_targets(spec, facts) if spec.method != "full" else []
    known = sorted({linear.name for linear in facts.linears})
    for name in unknown:
        found.append(
            error(
                f"{name!r} is no linear layer of this model; its layers are {', '.join(known)[:500]}",
                field="lora.target_modules",
            )
        )
    if facts.max_positions is not None and spec.max_seq_length > facts.max_positions:
        found.append(
            warning(
                "max_seq_length",
                f"{spec.max_seq_length} is more than the {facts.max_positions} positions that the model was trained on",
                "lower it, unless the model is meant to learn longer ones",
            )
        )
    if not facts.has_template:
        found.append(
            warning(
                "base_model",
                "the model brings no chat template: ChatML is used, and saved with the result",
                "name an instruct model if it should have its own",
            )
        )
    return found


# ---------------------------------------------------------------- the rows


def _look_over(file: InputFile, path: str, how: Tokenizing, cache: Path) -> LookedOver:
    return look_over(
        Path(path),
        sha256=file.sha256,
        name=file.filename,
        how=how,
        cache_dir=cache,
        max_problems=MAX_PLAN_PROBLEMS,
    )


def _choose(
    spec: JobSpec, looked: LookedOver, held_out: LookedOver | None, file: InputFile, other: InputFile | None
) -> tuple[_Counted | None, _Counted | None, list[PlanProblem]]:
    """(training rows, validation rows, what is wrong with the choice)."""
    problems: list[PlanProblem] = []
    everything = np.arange(len(looked.table))
    if not len(everything):
        return None, None, problems
    training, validation = everything, None
    if spec.validation_split is not None:
        try:
            for_training, for_validation = split_by_hash(looked.table, spec.validation_split)
            training, validation = np.flatnonzero(for_training), np.flatnonzero(for_validation)
        except RunFailed as failure:
            problems.append(error(str(failure).removeprefix("validation_split: "), field="validation_split"))
    sketches = _sketches(looked)
    first = _count(spec, "training_file", file, looked, training, sketches)
    second = None
    if validation is not None:
        second = _count(spec, "training_file", file, looked, validation, sketches)
    elif held_out is not None and other is not None and len(held_out.table):
        rows = np.arange(len(held_out.table))
        second = _count(spec, "validation_file", other, held_out, rows, _sketches(held_out))
    for part, what in ((first, "training"), (second, "validation")):
        if part is not None and not len(part.rows):
            problems.append(
                error(
                    f"no row is left for {what}; see what was left out and why",
                    field=part.role,
                    file=part.file.file_id,
                )
            )
    return (first if len(first.rows) else None), (second if second and len(second.rows) else None), problems


def _sketches(looked: LookedOver) -> twins.Sketches:
    return twins.sketch(looked.table, looked.cached.with_suffix(".twins.safetensors"))


def _count(
    spec: JobSpec,
    role: Role,
    file: InputFile,
    looked: LookedOver,
    rows: np.ndarray,
    sketches: twins.Sketches,
) -> _Counted:
    """As `choose_rows` chooses them, which refuses where this goes on."""
    lengths = column(looked.table, "num_tokens").astype(np.int64)
    supervised = column(looked.table, "num_supervised").astype(np.int64)
    overlong = rows[lengths[rows] > spec.max_seq_length]
    none = np.empty(0, np.int64)
    dropped, truncated, emptied = none, none, none
    if spec.on_overlong == "drop":
        dropped = overlong
    else:  # `error` is told as one; what the rows would come to is counted as if they were cut
        supervised, gone = after_cut(looked.table, overlong, supervised, spec.max_seq_length)
        emptied = np.asarray(gone, np.int64)
        truncated = np.setdiff1d(overlong, emptied)
        dropped = emptied
    kept = np.setdiff1d(rows, dropped)
    return _Counted(
        role=role,
        file=file,
        looked=looked,
        rows=kept,
        lengths=np.minimum(lengths[kept], spec.max_seq_length),
        supervised=supervised[kept],
        dropped=dropped,
        truncated=truncated,
        emptied=emptied,
        overlong=overlong,
        sketches=sketches,
    )


def _twins(
    training: _Counted | None, validation: _Counted | None
) -> tuple[twins.Twins | None, twins.Twins | None]:
    """(twins among the training rows, twins of all rows with the training rows first), found in one look."""
    if training is None:
        return None, None
    if validation is None:
        return twins.find_twins(training.chosen_sketches), None
    both = twins.find_twins(twins.joined(training.chosen_sketches, validation.chosen_sketches))
    end = len(training.rows)
    near = None if both.near is None else both.near[:end]
    return twins.Twins(both.exact[:end], near, both.similarity[:end]), both


def _data_plan(part: _Counted, own: twins.Twins, how: Tokenizing) -> DataPlan:
    masked = sorted({*part.looked.masked, *(int(line) for line in part.lines[part.emptied])})
    lines = part.lines[part.rows]
    middle = np.argsort(part.lengths, kind="stable")
    shown = dict.fromkeys([0, int(middle[len(middle) // 2]), int(middle[-1]), *range(_ROWS_SHOWN)])
    return DataPlan(
        file_id=part.file.file_id,
        filename=part.file.filename,
        num_rows=len(part.looked.table) + part.looked.num_problems,
        formats=part.looked.formats,
        num_used=len(part.rows),
        dropped=_lines(part, part.dropped),
        truncated=_lines(part, part.truncated),
        fully_masked=Lines(count=len(masked), lines=masked[:_MOST_LINES]),
        overlong=_lines(part, part.overlong),
        exact_duplicates=_duplicates(own.exact, np.ones(len(lines)), lines, part, how),
        near_duplicates=None if own.near is None else _duplicates(own.near, own.similarity, lines, part, how),
        tokens=_histogram(part.lengths),
        supervised_tokens=_histogram(part.supervised),
        examples=[
            _render(part.looked.table, int(part.rows[i]), int(part.lengths[i]), how.tokenizer)
            for i in islice((i for i in shown if i < len(part.rows)), _ROWS_SHOWN)
        ],
    )


def _lines(part: _Counted, rows: np.ndarray) -> Lines:
    return Lines(count=len(rows), lines=[int(line) for line in part.lines[rows[:_MOST_LINES]]])


def _duplicates(
    first: np.ndarray, similarity: np.ndarray, lines: np.ndarray, part: _Counted, how: Tokenizing
) -> Duplicates:
    repeats = np.flatnonzero(first >= 0)
    groups: dict[int, list[int]] = {}
    for i in repeats[: 50 * _MOST_EXAMPLES]:
        groups.setdefault(int(first[i]), []).append(int(i))
    examples = [
        Duplicate(
            lines=[int(lines[one]), *(int(lines[i]) for i in others[:9])],
            similarity=round(float(similarity[others].mean()), 3),
            text=_beginning(part, one, how),
        )
        for one, others in islice(groups.items(), _MOST_EXAMPLES)
    ]
    return Duplicates(count=len(repeats), examples=examples)


def _overlap(training: _Counted, validation: _Counted, found: twins.Twins, how: Tokenizing) -> Overlap:
    """Validation rows that stand among the training rows."""
    num_training = len(training.rows)

    def across(first: np.ndarray, similarity: np.ndarray) -> Duplicates:
        here = first[num_training:]
        repeats = np.flatnonzero((here >= 0) & (here < num_training))
        examples = [
            Duplicate(
                lines=[
                    int(training.lines[training.rows[here[i]]]),
                    int(validation.lines[validation.rows[i]]),
                ],
                similarity=round(float(similarity[num_training + i]), 3),
                text=_beginning(training, int(here[i]), how),
            )
            for i in repeats[:_MOST_EXAMPLES]
        ]
        return Duplicates(count=len(repeats), examples=examples)

    exact = across(found.exact, np.ones(len(found.exact)))
    return Overlap(exact=exact, near=None if found.near is None else across(found.near, found.similarity))


def _beginning(part: _Counted, row: int, how: Tokenizing) -> str:
    """The beginning of what is learned of a row: its template and system prompt are like those of the others."""
    ids = part.looked.table[int(part.rows[row])]
    tokens = np.asarray(ids["input_ids"])[np.asarray(ids["supervised"], bool)]
    return str(how.tokenizer.decode(tokens[:_TEXT_CHARS]))[:_TEXT_CHARS]


def _histogram(values: np.ndarray) -> Histogram:
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - low) / _NUM_BINS))
    num_bins = max(1, math.ceil((high - low) / width))
    edges = [low + width * i for i in range(num_bins)] + [max(high, low + 1)]
    counts, _ = np.histogram(values, bins=edges)
    return Histogram(
        total=int(values.sum()),
        min=low,
        mean=round(float(values.mean()), 2),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        max=high,
        edges=edges,
        counts=[int(count) for count in counts],
    )


def _render(table: Dataset, index: int, length: int, tokenizer: Any) -> RenderedRow:
    """A row from its tokens, cut to `length` of them: what the model sees, and what of it carries the loss."""
    row = table[index]
    ids = np.asarray(row["input_ids"], dtype=np.int64)[:length]
    supervised = np.asarray(row["supervised"], dtype=bool)[:length].copy()
    supervised[:1] = False  # nothing comes before it that could predict it
    ends = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    segments, room = [], _SHOWN_CHARS
    for start, end in pairwise(ends):
        text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        segments.append(Segment(text=text[:room], supervised=bool(supervised[start])))
        room -= len(text)
        if room <= 0 or len(segments) == _MOST_SEGMENTS:
            break
    return RenderedRow(
        line=int(row["line"]),
        num_tokens=len(ids),
        num_supervised=int(supervised.sum()),
        segments=segments,
        shortened=room < 0 or len(segments) < len(ends) - 1,
    )


def _preview(job: AnalysisJob, how: Tokenizing) -> Analysis:
    """Rows by line, rendered; of a row that cannot be, why."""
    spec, file = job.request.spec, job.request.training_file
    looked = _look_over(file, job.training_path, how, Path(job.cache_dir))
    wanted = job.request.lines or []
    lines = column(looked.table, "line") if len(looked.table) else np.empty(0, np.int64)
    place = {int(lines[i]): int(i) for i in np.flatnonzero(np.isin(lines, wanted))}
    rows = [
        _render(looked.table, place[line], spec.max_seq_length, how.tokenizer)
        for line in wanted
        if line in place
    ]
    problems = [p for p in _problems_of(looked, "training_file", file) if p.line in wanted]
    return Analysis(problems=problems, num_problems=len(problems), rows=rows)


# ---------------------------------------------------------------- steps and micro-batches


def _run_plan(spec: JobSpec, training: _Counted) -> Plan:
    """Which rows each step of the run would take."""
    return make_plan(
        num_rows=len(training.rows),
        rows_per_step=spec.batch_size * spec.gradient_accumulation_steps * spec.gpus,
        max_steps=spec.max_steps,
        num_epochs=spec.num_epochs,
        seed=spec.seed,
    )


def _steps(spec: JobSpec, training: _Counted, validation: _Counted | None, plan: Plan) -> StepsPlan:
    epochs = plan.epoch_at(plan.total_steps)
    steps = plan.steps_per_epoch
    evaluations = 1 + math.ceil(
        plan.total_steps / spec.eval_steps
    )  # before the first step, and after the last
    return StepsPlan(
        total_steps=plan.total_steps,
        num_epochs=round(epochs, 4),
        steps_per_epoch=steps,
        rows_per_step=plan.rows_per_step,
        tokens_per_step=round(float(training.lengths.sum()) / steps, 1),
        supervised_tokens_per_step=round(float(training.supervised.sum()) / steps, 1),
        total_tokens=round(float(training.lengths.sum()) * epochs),
        warmup_steps=warmup_steps(spec, plan.total_steps),
        num_evaluations=0 if validation is None else evaluations,
        num_checkpoints=math.ceil(plan.total_steps / spec.save_steps),
    )


@dataclass(frozen=True)
class _Layout:
    plan: PackingPlan
    largest_tokens: int  # that the model computes at once
    largest_supervised: int


def _layout(spec: JobSpec, training: _Counted, plan: Plan) -> _Layout:
    """Lay out the first steps of the run as it will. What rows share from their start is not taken off."""
    budget = spec.max_tokens_per_step or spec.batch_size * spec.max_seq_length
    lengths, supervised = training.lengths, training.supervised
    num_batches = tokens = computed = largest = most_supervised = padded = 0
    steps = min(plan.total_steps, plan.steps_per_epoch, _STEPS_LAID_OUT)
    for step in range(steps):
        whole = np.asarray(plan.rows_of_step(step))
        of_all = [int(length) for length in lengths[whole]]
        rows = whole[share_of_rank(of_all, rank=0, world_size=spec.gpus)]
        here = [int(length) for length in lengths[rows]]
        layout = lay_out(here, batch_size=spec.batch_size, max_tokens=budget, packing=spec.packing)
        num_batches += len(layout)
        tokens += sum(here)
        for group in layout:
            size = sum(here[i] for i in group)
            filled = size if spec.packing else len(group) * max(here[i] for i in group)
            computed += filled
            largest = max(largest, filled)
            most_supervised = max(most_supervised, int(supervised[rows[group]].sum()))
        for i in range(0, len(here), spec.batch_size):
            together = here[i : i + spec.batch_size]
            padded += len(together) * max(together)
    if steps < plan.steps_per_epoch:  # what is largest may come later
        longest = int(lengths.max())
        whole_budget = budget if spec.packing else spec.batch_size * longest
        largest = max(largest, longest, min(whole_budget, int(lengths.sum())))
        most_supervised = max(most_supervised, int(supervised.max()))
    return _Layout(
        PackingPlan(
            enabled=spec.packing,
            micro_batches_per_step=round(num_batches / steps, 2),
            mean_tokens=round(tokens / num_batches, 1),
            max_tokens=largest,
            fill=round(min(1.0, tokens / (num_batches * budget)), 4),
            efficiency=round(tokens / computed, 4),
            padded_efficiency=round(tokens / padded, 4),
        ),
        largest,
        most_supervised,
    )


# ---------------------------------------------------------------- problems


def _problems_of(looked: LookedOver, role: Role, file: InputFile) -> Iterator[PlanProblem]:
    for problem in looked.problems:
        yield error(
            problem.message, field=role, file=file.file_id, line=problem.line, row_field=problem.field
        )


def _overlong(spec: JobSpec, part: _Counted) -> Iterator[PlanProblem]:
    """Rows that are too long are a mistake only where the spec says nothing else."""
    if spec.on_overlong != "error":
        return
    lengths = column(part.looked.table, "num_tokens")
    for row in part.overlong[:MAX_PLAN_PROBLEMS]:
        yield error(
            f"has {lengths[row]} tokens, more than max_seq_length {spec.max_seq_length}; raise max_seq_length, shorten the"
            " row, or set on_overlong to truncate or drop",
            field=part.role,
            file=part.file.file_id,
            line=int(part.lines[row]),
            row_field="row",
        )


def _only(problem: PlanProblem) -> Analysis:
    return Analysis(problems=[problem], num_problems=1)


# ---------------------------------------------------------------- as a run has it


def _as_trainer_job(job: AnalysisJob) -> TrainerJob:
    """What the code of a run reads of its job."""
    return TrainerJob(
        job_id="plan",
        attempt=0,
        spec=job.request.spec,
        model_path=job.model_path,
        adapter_path=job.adapter_path,
        training_path=job.training_path,
        training_name=job.request.training_file.filename,
        output_dir="",
        cache_dir=job.cache_dir,
        trust_remote_code=job.trust_remote_code,
        local_files_only=job.local_files_only,
    )


def _device(job: AnalysisJob) -> torch.device:
    has_gpu = job.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")
