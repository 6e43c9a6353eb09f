"""How commands print: tables, JSON, CSV, and the words for numbers and times. Nothing printed can steer a terminal."""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftd.schemas import Job, MetricPoint


def printable_lines(text: str) -> str:
    """Text of several lines without control characters."""
    return "\n".join(printable(line) for line in text.split("\n"))


def print_json(value: Any) -> None:  # an answer, a list of them, or what holds some
    """Answers, for programs."""
    print(_quoted(json.dumps(_plain(value), indent=2, ensure_ascii=False)))


def print_json_line(value: BaseModel, *, flush: bool = False) -> None:
    """One of many answers, in a line of its own."""
    print(_quoted(json.dumps(_plain(value), ensure_ascii=False)), flush=flush)


def print_facts(values: Mapping[str, object]) -> None:
    """A name and its value a line; what is not known is left out."""
    width = max(12, *(len(name) + 2 for name in values))
    for name, value in values.items():
        if value is not None:
            lines = printable_lines(str(value)).replace("\n", "\n" + " " * width)
            print(f"{name:<{width}}{lines}")


def print_csv(points: Sequence[MetricPoint]) -> None:
    """Every metric of every step; a step without one has an empty cell."""
    rows = [point.model_dump() for point in points]
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(sys.stdout)
    writer.writerow([printable(name) for name in names or ["step"]])
    writer.writerows([row.get(name, "") for name in names] for row in rows)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns for a person; tabs where something else reads."""
    console = Console()
    if not console.is_terminal:
        for row in (headers, *rows):
            print("\t".join(printable(cell).replace("\t", " ") for cell in row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def say(text: str) -> None:
    """A remark: not a result, so not on stdout."""
    print(printable(text), file=sys.stderr, flush=True)


def steps(job: Job) -> str:
    """`120/1000`."""
    return f"{job.step}/{job.total_steps}" if job.total_steps else str(job.step or "")


def number(value: float | None) -> str:
    """Six digits, or nothing."""
    return "" if value is None else f"{value:.6g}"


def size(num_bytes: int) -> str:
    """`0 B`, `12 KiB`, `3.4 GiB`."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


def when(at: datetime) -> str:
    """A time on this machine's clock."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def pairs(labels: dict[str, str]) -> str:
    """`name=value, name=value`."""
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def printable(text: str) -> str:
    """Text without control characters: a log line must not steer the terminal."""
    return "".join(
        char if char == "\t" or (char.isprintable()) else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def facts(job: Job) -> str:
    """Step, loss, speed and time left, as far as they are known."""
    parts = [f"step {job.step}/{job.total_steps}" if job.total_steps else f"step {job.step}"]
    if job.loss is not None:
        parts.append(f"loss {job.loss:.4g}")
    if job.eval_loss is not None:
        parts.append(f"eval loss {job.eval_loss:.4g}")
    if job.tokens_per_second is not None:
        parts.append(f"{job.tokens_per_second:,.0f} tokens/s")
    if job.estimated_finish_at is not None:
        left = (job.estimated_finish_at - datetime.now(UTC)).total_seconds()
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _plain(value: Any) -> Any:  # anything that JSON can hold
    """Models as dictionaries; NaN and infinities as the words that the API has for them."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _quoted(text: str) -> str:
    """JSON with escapes in the place of what could steer a terminal."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else json.dumps(char)[1:-1] for char in text)


def duration(seconds: float) -> str:
    """`1 d 2 h`, `3 h 4 min`, `5 min 6 s`, `7 s`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hour} h {minute} min"
    return f"{minute} min {second} s" if minutes else f"{second} s"
