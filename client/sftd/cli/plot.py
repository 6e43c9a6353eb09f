"""Curves and bars in a terminal: braille dots where the output has Unicode, plain characters elsewhere.

A plot library would bring its own colours, sizes and width of terminals for what these few lines do.
"""

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from sftd.output import number, printable

Points = Sequence[tuple[float, float]]  # step, value
MARKS = "ox+*%@"  # of every series but the first, and of all without Unicode
COLORS = ("cyan", "yellow", "magenta", "green", "red", "blue")
LINES, MAX_COLUMNS, MIN_COLUMNS = 16, 120, 20
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: column, then row


def print_plot(series: Mapping[str, Points]) -> None:
    """Draw series over their steps, with what each began and ended at; NaN and infinities are counted, not drawn."""
    console = Console()
    unicode = has_unicode()
    columns = min(MAX_COLUMNS, shutil.get_terminal_size((80, 24)).columns)
    text = plot(series, columns=columns, lines=LINES, unicode=unicode)
    if console.is_terminal:
        console.print(text, soft_wrap=True)
    else:
        print(text.plain)


def plot(series: Mapping[str, Points], *, columns: int, lines: int, unicode: bool) -> Text:
    """The plot as lines of text: the axes around the curves, and a line of legend for each series."""
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = [point for points in finite.values() for point in points]
    text = Text()
    if drawn:
        _draw(text, finite, _Scale.of(drawn), columns=columns, lines=lines, unicode=unicode)
    for i, (name, points) in enumerate(series.items()):
        mark = "⣿" if unicode and i == 0 else _mark(i, unicode=unicode)
        text.append(f"{mark} ", COLORS[i % len(COLORS)])
        text.append(f"{printable(name)}: {_summary(points)}\n")
    text.right_crop(1)
    return text


def bar(share: float, *, width: int, unicode: bool) -> str:
    """A bar that fills `share` of `width`."""
    if not unicode:
        return "#" * round(share * width)
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def has_unicode() -> bool:
    """Whether stdout can hold more than ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


@dataclass(frozen=True)
class _Scale:
    """The ranges that are drawn."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Points) -> "_Scale":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        if low == high:  # a flat line lies in the middle
            margin = abs(low) / 10 or 1.0
            low, high = low - margin, high + margin
        return cls(min(xs), max(xs), low, high)

    def place(self, point: tuple[float, float], width: int, height: int) -> tuple[int, int]:
        """Column and row of a point, the highest value in row 0."""
        # By halves: the whole range may be more than a float holds.
        span = (self.last - self.first) or 1
        up = (point[1] / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return round((point[0] - self.first) / span * (width - 1)), round((1 - up) * (height - 1))


def _draw(
    text: Text, series: Mapping[str, Points], scale: _Scale, *, columns: int, lines: int, unicode: bool
) -> None:
    labels = {
        row: f"{scale.high + (scale.low - scale.high) * row / (lines - 1):.4g}" for row in _labelled(lines)
    }
    margin = max(map(len, labels.values()))
    width = max(MIN_COLUMNS, columns - margin - 2)
    cells: dict[tuple[int, int], tuple[str, int]] = {}  # (column, line): the character and its series
    for i, points in enumerate(series.values()):
        if unicode and i == 0:
            cells |= {place: (char, i) for place, char in _curve(points, scale, width, lines).items()}
        else:
            mark = _mark(i, unicode=unicode)
            cells |= {scale.place(point, width, lines): (mark, i) for point in points}
    for row in range(lines):
        text.append(f"{labels.get(row, ''):>{margin}} {'│' if unicode else '|'}")
        for column in range(width):
            char, i = cells.get((column, row), (" ", 0))
            text.append(char, None if char == " " else COLORS[i % len(COLORS)])
        text.append("\n")
    first, last = f"{scale.first:g}", f"{scale.last:g}"
    text.append(" " * (margin + 1) + ("└" + "─" * width if unicode else "+" + "-" * width) + "\n")
    text.append(" " * (margin + 2) + first + f"step {last}".rjust(width - len(first)) + "\n")


def _curve(points: Points, scale: _Scale, width: int, lines: int) -> dict[tuple[int, int], str]:
    """Braille cells of a line through the points: two dots wide and four high each."""
    dots: dict[tuple[int, int], int] = {}
    before: tuple[int, int] | None = None
    for point in points:
        x, y = scale.place(point, width * 2, lines * 4)
        for across, down in _between(before or (x, y), (x, y)):
            cell = (across // 2, down // 4)
            dots[cell] = dots.get(cell, 0) | _DOTS[across % 2][down % 4]
        before = (x, y)
    return {cell: chr(0x2800 + bits) for cell, bits in dots.items()}


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line."""
    num = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * k / num), round(start[1] + (end[1] - start[1]) * k / num))
        for k in range(num + 1)
    ]


def _labelled(lines: int) -> tuple[int, ...]:
    return (0, (lines - 1) // 2, lines - 1)


def _mark(i: int, *, unicode: bool) -> str:
    return MARKS[(i - unicode) % len(MARKS)]


def _summary(points: Points) -> str:
    """`2.31 at step 1, 1.02 at step 100, lowest 0.98 at step 96`."""
    finite = [point for point in points if math.isfinite(point[1])]
    left_out = len(points) - len(finite)
    words = []
    if finite:
        lowest = min(finite, key=lambda point: point[1])
        words = [f"{number(value)} at step {step:g}" for step, value in (finite[0], finite[-1])]
        words.append(f"lowest {number(lowest[1])} at step {lowest[0]:g}")
    if left_out:
        words.append(f"{left_out} not finite")
    return ", ".join(words) or "nothing reported"
