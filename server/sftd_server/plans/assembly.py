"""A plan from its parts: mistakes of the spec, what a worker has counted, and what the server knows of devices and queue."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlmodel import Session

from sftd.footprint import (
    BatchFacts,
    ModelFacts,
    Precision,
    checkpoint_bytes,
    estimate,
    result_bytes,
    total,
    trainable_parameters,
)
from sftd.plan import DiskPlan, MemoryPlan, ParametersPlan, Plan, PlanProblem, StepsPlan, error, warning
from sftd.protocol import MAX_PLAN_PROBLEMS, Analysis, AnalysisReport
from sftd.spec import JobSpec
from sftd_server.jobs.submission import Look
from sftd_server.plans.devices import Target, targets
from sftd_server.plans.timing import time_plan
from sftd_server.settings import Settings

MANY_EPOCHS = 10
_MOST_ADVICE = 5
_HIGH_RATES = {"full": 1e-4, "lora": 2e-3, "qlora": 2e-3}
_LOW_RATES = {"full": 1e-7, "lora": 1e-6, "qlora": 1e-6}


@dataclass(frozen=True)
class Parts:
    """What a plan is made of."""

    look: Look
    counted: JobSpec | None  # the spec that was counted by: the posted one without its mistakes
    report: AnalysisReport | None
    incomplete: str | None
    gpus: Sequence[str]  # types that were named


def assemble(session: Session, parts: Parts, settings: Settings, now: datetime) -> Plan:
    """The whole answer."""
    spec = parts.look.spec or parts.counted
    analysis = parts.report.analysis if parts.report else None
    incomplete = parts.incomplete
    problems = [error(mistake.message, field=mistake.field) for mistake in parts.look.mistakes]
    if parts.report is not None and analysis is None:
        incomplete = f"The data could not be counted: {parts.report.error}. Ask again when that is mended."
    num_problems = len(problems)
    if analysis is not None:
        problems += analysis.problems
        num_problems += analysis.num_problems
    if spec is not None:
        problems += _warnings(spec, analysis)
    facts, steps = (analysis.model, analysis.steps) if analysis else (None, None)
    memory, disk, time = [], None, None
    if spec is not None:
        cpu_precision = analysis.precision if analysis else "fp32"
        devices = targets(session, parts.gpus, cpu_precision=cpu_precision)
        if facts is not None and analysis is not None and analysis.largest_tokens:
            memory = [_memory(spec, facts, analysis, device) for device in devices]
            problems += _about_memory(memory)
        if facts is not None and steps is not None:
            in_fp32 = any(_precision(spec, device) == "fp32" for device in devices)
            disk = _disk(spec, facts, steps, settings, precision="fp32" if in_fp32 else "bf16")
            problems += _about_disk(disk)
        time = time_plan(
            session,
            spec,
            facts=facts,
            steps=steps,
            target=next((device for device in devices if device.present), None) or next(iter(devices), None),
            settings=settings,
            now=now,
        )
    if num_problems > MAX_PLAN_PROBLEMS:
        more = num_problems - MAX_PLAN_PROBLEMS
        problems = [*problems[:MAX_PLAN_PROBLEMS], warning(None, f"and {more:,} more problems", None)]
    stands_in_the_way = any(problem.severity == "error" for problem in problems)
    return Plan(
        ok=not stands_in_the_way and parts.look.spec is not None,
        complete=incomplete is None,
        incomplete=incomplete,
        problems=problems,
        spec=parts.look.spec,
        training=analysis.training if analysis else None,
        validation=analysis.validation if analysis else None,
        overlap=analysis.overlap if analysis else None,
        packing=analysis.packing if analysis else None,
        steps=steps,
        parameters=_parameters(spec, facts) if spec is not None and facts is not None else None,
        memory=memory,
        disk=disk,
        time=time,
    )


def _parameters(spec: JobSpec, facts: ModelFacts) -> ParametersPlan:
    trainable = trainable_parameters(spec, facts)
    added = 0 if spec.method == "full" else trainable
    return ParametersPlan(total=facts.parameters + added, trainable=trainable)


# ---------------------------------------------------------------- memory and disk


def _memory(spec: JobSpec, facts: ModelFacts, analysis: Analysis, target: Target) -> MemoryPlan:
    batch = BatchFacts(analysis.largest_tokens, analysis.largest_supervised, analysis.longest_row)
    precision = _precision(spec, target)

    def needed(spec: JobSpec, batch: BatchFacts) -> int:
        return total(estimate(spec, facts, batch, device=target.device, precision=precision))

    parts = estimate(spec, facts, batch, device=target.device, precision=precision)
    fits = None if target.available_bytes is None else total(parts) <= target.available_bytes
    advice = []
    if fits is False:
        assert target.available_bytes is not None
        kinds = set()  # of two numbers of devices the smaller one is enough
        for kind, words, changed, with_batch in _smaller(spec, batch):
            if kind not in kinds and needed(changed, with_batch) <= target.available_bytes:
                kinds.add(kind)
                advice.append(words)
        advice = advice[:_MOST_ADVICE] or ["use a smaller base model, or a device with more memory"]
    return MemoryPlan(
        device=target.name,
        present=target.present,
        total_bytes=total(parts),
        parts=parts,
        available_bytes=target.available_bytes,
        fits=fits,
        advice=advice,
    )


def _precision(spec: JobSpec, target: Target) -> Precision:
    """What the run's products are computed in on that device."""
    if spec.precision != "auto":
        return spec.precision
    return "bf16" if spec.method == "qlora" else target.precision


def _smaller(spec: JobSpec, batch: BatchFacts) -> Iterator[tuple[str, str, JobSpec, BatchFacts]]:
    """Changes that take less memory, those that change the training least first: (kind, what to do, spec, micro-batch)."""
    slower = spec.model_copy(update={"gradient_checkpointing": True})
    if not spec.gradient_checkpointing:
        yield "slower", "turn gradient_checkpointing on (the same training, slower)", slower, batch
    small = batch
    if batch.num_tokens > batch.longest_row > 0:
        share = batch.longest_row / batch.num_tokens
        supervised = max(1, round(batch.num_supervised * share))
        small = replace(batch, num_tokens=batch.longest_row, num_supervised=supervised)
        words = f"set max_tokens_per_step to {batch.longest_row} (the same training in smaller micro-batches)"
        also = "" if spec.gradient_checkpointing else " and gradient_checkpointing on"
        yield "smaller", words + also, slower, small
    if spec.method == "full":
        eight = slower.model_copy(update={"optimizer": "adamw_8bit"})
        yield "optimizer", "use the optimizer adamw_8bit, in smaller micro-batches", eight, small
        for gpus in (2, 4, 8):
            if gpus > spec.gpus:
                update = {"gpus": gpus, "optimizer": "adamw", "sharding": "auto"}
                words = f"use gpus: {gpus} (weights are shared out among them)"
                yield "gpus", words, slower.model_copy(update=update), small
        yield "lora", "use the method lora", slower.model_copy(update={"method": "lora"}), small
    if spec.method != "qlora":
        yield "qlora", "use the method qlora", slower.model_copy(update={"method": "qlora"}), small
    half = max(1, batch.longest_row // 2)
    shorter = replace(
        batch, num_tokens=half, num_supervised=max(1, small.num_supervised // 2), longest_row=half
    )
    words = f"lower max_seq_length to {half} (with on_overlong: truncate or drop)"
    yield "shorter", words, slower, shorter


def _disk(
    spec: JobSpec, facts: ModelFacts, steps: StepsPlan, settings: Settings, *, precision: Precision
) -> DiskPlan:
    """`precision`: the widest that any of the devices would compute in, which a full result is saved in."""
    each = checkpoint_bytes(spec, facts)
    kept = spec.keep_checkpoints or settings.keep_checkpoints
    # The best one is kept besides, and a new one is written before an old one goes.
    most = min(steps.num_checkpoints, kept + 2)
    result = result_bytes(spec, facts, precision)
    free = shutil.disk_usage(settings.data).free
    needed = most * each + result
    return DiskPlan(
        checkpoint_bytes=each,
        num_kept=most,
        result_bytes=result,
        total_bytes=needed,
        free_bytes=free,
        fits=needed + settings.disk_reserve_bytes <= free,
    )


# ---------------------------------------------------------------- problems


def _warnings(spec: JobSpec, analysis: Analysis | None) -> list[PlanProblem]:
    """What would run, and is hardly meant."""
    found = []
    if spec.learning_rate > _HIGH_RATES[spec.method]:
        found.append(
            warning(
                "learning_rate",
                f"{spec.learning_rate:g} is high for {spec.method}: the loss may diverge",
                f"{_HIGH_RATES[spec.method]:g} or less is usual",
            )
        )
    if spec.learning_rate < _LOW_RATES[spec.method]:
        found.append(
            warning(
                "learning_rate",
                f"{spec.learning_rate:g} is low for {spec.method}: little may be learned",
                f"{_LOW_RATES[spec.method]:g} or more is usual",
            )
        )
    steps = analysis.steps if analysis else None
    if steps is not None:
        found += _about_steps(spec, steps)
        found += _about_rows(analysis, steps)
    return found


def _about_steps(spec: JobSpec, steps: StepsPlan) -> list[PlanProblem]:
    found = []
    if steps.warmup_steps >= steps.total_steps:
        found.append(
            warning(
                "warmup_ratio" if spec.warmup_ratio is not None else "warmup_steps",
                f"the warm-up ({steps.warmup_steps} steps) is as long as the run ({steps.total_steps}): learning_rate is never"
                " reached",
                f"lower it to {max(1, steps.total_steps // 20)} or so",
            )
        )
    elif steps.warmup_steps > steps.total_steps / 2:
        found.append(
            warning(
                "warmup_steps",
                f"the warm-up takes {steps.warmup_steps} of {steps.total_steps} steps",
                f"{max(1, steps.total_steps // 20)} or so is usual",
            )
        )
    if steps.num_epochs > MANY_EPOCHS:
        field = "num_epochs" if spec.num_epochs is not None else "max_steps"
        found.append(
            warning(
                field,
                f"every row is seen {steps.num_epochs:.0f} times: the model will learn them by heart",
                f"{max(1, steps.total_steps * 3 // round(steps.num_epochs))} steps are three epochs",
            )
        )
    elif steps.num_epochs < 1:
        found.append(
            warning(
                "num_epochs" if spec.num_epochs is not None else "max_steps",
                f"the run ends after {steps.num_epochs:.0%} of the rows: the others are never seen",
                f"an epoch is {round(steps.steps_per_epoch)} steps",
            )
        )
    if steps.total_steps > 1 and spec.save_steps > steps.total_steps:
        found.append(
            warning(
                "save_steps",
                f"is more than the run's {steps.total_steps} steps: there is no checkpoint before its end to resume from",
                "lower it",
            )
        )
    return found


def _about_rows(analysis: Analysis | None, steps: StepsPlan) -> list[PlanProblem]:
    training = analysis.training if analysis else None
    overlap = analysis.overlap if analysis else None
    found = []
    if training is not None:
        for rows, what, remedy in (
            (training.dropped, "are left out", "see training.dropped"),
            (training.truncated, "are cut to max_seq_length", "raise it, or see training.truncated"),
        ):
            if rows.count:
                found.append(
                    _about_lines(f"{rows.count:,} of {training.num_rows:,} training rows {what}", remedy)
                )
        if training.exact_duplicates.count:
            found.append(
                _about_lines(
                    f"{training.exact_duplicates.count:,} training rows repeat an earlier one exactly",
                    "see training.exact_duplicates",
                )
            )
        if training.near_duplicates is not None and training.near_duplicates.count:
            found.append(
                _about_lines(
                    f"{training.near_duplicates.count:,} training rows nearly repeat an earlier one",
                    "see training.near_duplicates",
                )
            )
    if overlap is not None:
        near = overlap.near.count if overlap.near is not None else 0
        if overlap.exact.count or near:
            found.append(
                warning(
                    "validation_file",
                    f"{overlap.exact.count:,} validation rows stand among the training rows as well, {near:,} more nearly so:"
                    " eval_loss will look better than it is",
                    "take them out of one of the two; see overlap",
                )
            )
    return found


def _about_lines(message: str, remedy: str) -> PlanProblem:
    return warning("training_file", message, remedy)


def _about_memory(memory: list[MemoryPlan]) -> list[PlanProblem]:
    """An error where it fits on no device that is there. Of some it is not known."""
    there = [device for device in memory if device.present]
    if not there or any(device.fits is not False for device in there):
        return []
    largest = max(there, key=lambda device: device.available_bytes or 0)
    return [
        error(
            f"the job needs about {largest.total_bytes / 2**30:.1f} GiB on {largest.device}, which has"
            f" {(largest.available_bytes or 0) / 2**30:.1f} GiB; {', or '.join(largest.advice)}"
        )
    ]


def _about_disk(disk: DiskPlan) -> list[PlanProblem]:
    if disk.fits:
        return []
    return [
        warning(
            "keep_checkpoints",
            f"checkpoints and result take up to {disk.total_bytes / 2**30:.1f} GiB, and {disk.free_bytes / 2**30:.1f} GiB are"
            " free",
            "free some, keep fewer checkpoints, or save less often",
        )
    ]
