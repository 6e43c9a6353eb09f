"""`sftd plan`: what a job would come to, before it is posted.

Exit codes: 0 nothing known stands in its way; 1 something does; 4 not all of it is known yet.
"""

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from sftd.cli.app import JOBS, AsJson, Assignments, app, require_number
from sftd.cli.submit import SpecFile, spec_fields, upload_data
from sftd.client import Client
from sftd.output import duration, print_json, printable, say, size, when
from sftd.specfile import Spec

if TYPE_CHECKING:
    from sftd.plan import (
        DataPlan,
        Duplicates,
        Histogram,
        Lines,
        MemoryPlan,
        Overlap,
        Plan,
        PlanProblem,
        RenderedRow,
    )

INCOMPLETE = 4
CALL_SECONDS = 20.0  # of waiting in one call: less than what a proxy cuts off
SHOWN_LINES, SHOWN_ROWS, SHOWN_DUPLICATES = 10, 3, 3
BAR_COLUMNS = 40


@app.command(rich_help_panel=JOBS)
def plan(
    spec: SpecFile,
    assignments: Assignments = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a worker to count the rows of new data.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Say what a job would come to, and post nothing: problems, rows, steps, memory, disk, time.

    Data files that lie here are uploaded, as by submit; the same content is stored once. Exit code 0: nothing known
    stands in its way; 1: something does; 4: not all of it is known yet.
    """
    require_number("--wait", wait)
    fields = spec_fields(spec, assignments)
    with Client() as client:
        upload_data(client, fields, folder=spec.parent)
        found = _planned(client, fields, wait_seconds=wait)
    if as_json:
        print_json(found)
    else:
        _Printer().print(found)
    if not found.ok:
        raise typer.Exit(1)
    if not found.complete:
        raise typer.Exit(INCOMPLETE)


def _planned(client: Client, fields: Spec, *, wait_seconds: float) -> "Plan":
    """The plan, asked for again while a worker counts, and not where the server has nothing to wait for."""
    deadline = time.monotonic() + wait_seconds
    while True:
        asked_at = time.monotonic()
        asked = min(CALL_SECONDS, max(0.0, deadline - asked_at))
        found = client.jobs.plan(spec=fields, wait_seconds=math.ceil(asked))
        now = time.monotonic()
        if found.complete or now >= deadline or now - asked_at < asked / 2:
            return found


def print_rendered(row: "RenderedRow") -> None:
    """A row as the model sees it."""
    _Printer().row(row)


class _Printer:
    """A plan for a person: colours in a terminal, marks elsewhere."""

    def __init__(self) -> None:
        from sftd.cli.plot import bar, has_unicode

        self._console = Console()
        self._unicode = has_unicode()
        self._bar = bar

    def print(self, plan: "Plan") -> None:
        """All of it, problems first."""
        self._problems(plan)
        if plan.training:
            self._data("training", plan.training)
        if plan.validation:
            self._data("validation", plan.validation)
        if plan.overlap:
            self._overlap(plan.overlap)
        self._run(plan)
        for memory in plan.memory:
            self._memory(memory)
        self._box(plan)
        if plan.training:
            self._rows(plan.training)
        self._verdict(plan)

    def _line(self, text: str, style: str | None = None) -> None:
        text = printable(text)
        if self._console.is_terminal:
            self._console.print(Text(text, style or ""), soft_wrap=True)
        else:
            print(text)

    def _fact(self, name: str, value: str) -> None:
        self._line(f"  {name:<14}{value}")

    def _problems(self, plan: "Plan") -> None:
        # Sorted is stable: errors first, else as the server has them.
        for problem in sorted(plan.problems, key=lambda each: each.severity != "error"):
            style = "bold red" if problem.severity == "error" else "yellow"
            self._line(f"{problem.severity}: {_where(problem)}{problem.message}", style)
            if problem.remedy:
                self._line(f"  {problem.remedy}")
        if plan.incomplete:
            self._line(f"not known yet: {plan.incomplete}", "yellow")

    def _data(self, title: str, data: "DataPlan") -> None:
        formats = ", ".join(f"{name} {num:,}" for name, num in data.formats.items())
        self._line(f"{title}: {data.filename} ({data.file_id})", "bold")
        self._fact(
            "rows", f"{data.num_used:,} of {data.num_rows:,} used" + (f"  ({formats})" if formats else "")
        )
        for name, lines in (
            ("dropped", data.dropped),
            ("truncated", data.truncated),
            ("overlong", data.overlong),
            ("all masked", data.fully_masked),
        ):
            if lines.count:
                self._fact(name, _lines(lines))
        self._duplicates("duplicates", data.exact_duplicates)
        if data.near_duplicates:
            self._duplicates("near ones", data.near_duplicates)
        self._histogram("tokens", data.tokens)
        self._fact("supervised", _spread(data.supervised_tokens))

    def _duplicates(self, name: str, found: "Duplicates") -> None:
        if not found.count:
            return
        self._fact(name, f"{found.count:,}")
        for each in found.examples[:SHOWN_DUPLICATES]:
            at = ", ".join(map(str, each.lines))
            alike = "" if each.similarity >= 1 else f" ({each.similarity:.0%} alike)"
            self._line(f"    lines {at}{alike}: {_short(each.text)}")

    def _overlap(self, overlap: "Overlap") -> None:
        self._duplicates("in both", overlap.exact)
        if overlap.near:
            self._duplicates("nearly in both", overlap.near)

    def _histogram(self, name: str, spread: "Histogram") -> None:
        self._fact(name, _spread(spread))
        most = max(spread.counts, default=0)
        edges = list(zip(spread.edges, spread.edges[1:], strict=False))
        width = max((len(f"{a:,}–{b:,}") for a, b in edges), default=0)
        dash = "–" if self._unicode else "-"
        for (low, high), count in zip(edges, spread.counts, strict=False):
            filled = self._bar(count / most if most else 0, width=BAR_COLUMNS, unicode=self._unicode)
            self._line(f"    {f'{low:,}{dash}{high:,}':>{width}}  {filled} {count:,}")

    def _run(self, plan: "Plan") -> None:
        if plan.steps is None and plan.parameters is None and plan.packing is None:
            return
        self._line("run", "bold")
        if plan.steps:
            run = plan.steps
            self._fact(
                "steps",
                f"{run.total_steps:,} ({run.warmup_steps:,} of warm-up), {run.num_epochs:.3g} epochs of"
                f" {run.steps_per_epoch:,.4g}",
            )
            self._fact(
                "a step",
                f"{run.rows_per_step:,} rows, {run.tokens_per_step:,.0f} tokens,"
                f" {run.supervised_tokens_per_step:,.0f} supervised",
            )
            self._fact("in all", f"{run.total_tokens:,.0f} tokens")
            self._fact("saved", f"{run.num_evaluations:,} evaluations, {run.num_checkpoints:,} checkpoints")
        if plan.packing:
            pack = plan.packing
            self._fact(
                "packing",
                f"{'on' if pack.enabled else 'off'}: {pack.efficiency:.1%} of what is computed is rows"
                f" ({pack.padded_efficiency:.1%} without); {pack.micro_batches_per_step:.3g} micro-batches a step,"
                f" {pack.mean_tokens:,.0f} tokens each, at most {pack.max_tokens:,}",
            )
        if plan.parameters:
            total, trained = plan.parameters.total, plan.parameters.trainable
            share = f" ({trained / total:.2%})" if total else ""
            self._fact("parameters", f"{total:,}, trained {trained:,}{share}")

    def _memory(self, memory: "MemoryPlan") -> None:
        there = "" if memory.present else ", which no worker here has"
        free = "" if memory.available_bytes is None else f" of {size(memory.available_bytes)}"
        fits = {True: "fits", False: "DOES NOT FIT", None: "not known whether it fits"}[memory.fits]
        style = "bold red" if memory.fits is False else "bold"
        self._line(f"memory on {memory.device}{there}: {size(memory.total_bytes)}{free}, {fits}", style)
        parts = memory.parts.model_dump()
        shown = [f"{name} {size(num_bytes)}" for name, num_bytes in parts.items() if num_bytes]
        if shown:
            self._fact("parts", ", ".join(shown))
        for advice in memory.advice:
            self._fact("advice", advice)

    def _box(self, plan: "Plan") -> None:
        if plan.disk:
            disk = plan.disk
            fits = "fits" if disk.fits else "DOES NOT FIT"
            self._line(
                f"disk: {size(disk.total_bytes)} of {size(disk.free_bytes)} free, {fits}",
                "bold" if disk.fits else "bold red",
            )
            self._fact(
                "parts",
                f"{disk.num_kept:,} checkpoints of {size(disk.checkpoint_bytes)},"
                f" result {size(disk.result_bytes)}",
            )
        if plan.time:
            self._time(plan)

    def _time(self, plan: "Plan") -> None:
        found = plan.time
        if found is None:
            return
        self._line(f"time: {'not known' if found.seconds is None else duration(found.seconds)}", "bold")
        speed = "" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f} tokens/s, "
        self._fact("speed", f"{speed}{found.basis}")
        if found.starts_in_seconds is not None:
            at = f" ({when(found.starts_at)})" if found.starts_at else ""
            self._fact("starts", f"in {duration(found.starts_in_seconds)}{at}")
        if found.why_waiting:
            self._fact("waits", found.why_waiting)
        if found.finishes_at:
            self._fact("done", when(found.finishes_at))
        if found.gpu_hours is not None:
            self._fact("costs", f"{found.gpu_hours:.3g} GPU-hours")

    def _rows(self, data: "DataPlan") -> None:
        for row in data.examples[:SHOWN_ROWS]:
            self.row(row)

    def row(self, row: "RenderedRow") -> None:
        """A line about it, then its text."""
        self._line(
            f"line {row.line} as the model sees it: {row.num_tokens:,} tokens, {row.num_supervised:,} supervised",
            "bold",
        )
        self._rendered(row)

    def _rendered(self, row: "RenderedRow") -> None:
        """What carries the loss is green in a terminal, and stands between marks elsewhere."""
        left, right = ("⟦", "⟧") if self._unicode else ("[[", "]]")
        console = self._console
        colored = console.is_terminal and console.color_system is not None and not console.no_color
        text = Text()
        for segment in row.segments:
            said = "\n".join(printable(line) for line in segment.text.split("\n"))
            if segment.supervised:
                text.append(said if colored else f"{left}{said}{right}", "green")
            else:
                text.append(said)
        if row.shortened:
            text.append(" …" if self._unicode else " ...")
        if self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
        else:
            print(text.plain)

    def _verdict(self, plan: "Plan") -> None:
        num_errors = sum(problem.severity == "error" for problem in plan.problems)
        if not plan.ok:
            said = (
                f"{num_errors} errors stand"
                if num_errors > 1
                else "an error stands"
                if num_errors
                else "something stands"
            )
            say(f"{said} in the way of this job")
        elif not plan.complete:
            say("nothing known stands in the way of this job, but not all is known yet")
        else:
            say("nothing stands in the way of this job")


def _where(problem: "PlanProblem") -> str:
    """`training_file, file_1 line 3 messages[0].role: `."""
    at = [problem.file, problem.line is not None and f"line {problem.line}", problem.row_field]
    row = " ".join(str(part) for part in at if part)
    places = ", ".join(part for part in (problem.field, row) if part)
    return f"{places}: " if places else ""


def _lines(found: "Lines") -> str:
    shown = ", ".join(map(str, found.lines[:SHOWN_LINES]))
    more = " and more" if found.count > len(found.lines[:SHOWN_LINES]) else ""
    return f"{found.count:,}" + (f"  (lines {shown}{more})" if shown else "")


def _spread(spread: "Histogram") -> str:
    return (
        f"{spread.total:,} in all; a row {spread.min:,} to {spread.max:,}, mean {spread.mean:,.1f},"
        f" median {spread.median:,.0f}, 95% under {spread.p95:,.0f}"
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
