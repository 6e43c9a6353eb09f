"""Curves and bars in a terminal: what is drawn where, and that nothing finite or not breaks it."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.cli.plot import bar, plot

FALLING = [(float(step), 1.0 / step) for step in range(1, 101)]


def drawn(text: str) -> str:
    """The inside of the frame."""
    return "".join(line.partition("│")[2] or line.partition("|")[2] for line in text.split("\n"))


def test_a_curve_is_drawn_in_braille_within_its_axes() -> None:
    text = plot({"loss": FALLING, "eval_loss": FALLING[::20]}, columns=60, lines=8, unicode=True).plain

    lines = text.split("\n")
    assert len(lines) == 8 + 2 + 2
    assert max(map(len, lines[:10])) <= 60
    assert lines[0].split("│")[0].strip() == "1"
    assert lines[7].split("│")[0].strip() == "0.01"
    assert lines[9].endswith("step 100")
    assert any("\u2800" < char <= "\u28ff" for char in drawn(text))
    assert drawn(text).count("o") == 5
    assert lines[10] == "⣿ loss: 1 at step 1, 0.01 at step 100, lowest 0.01 at step 100"


def test_without_unicode_it_is_ascii() -> None:
    text = plot({"loss": FALLING, "eval_loss": FALLING[::20]}, columns=60, lines=8, unicode=False).plain

    assert text.isascii()
    assert {"o", "x"} <= set(drawn(text))


def test_what_cannot_be_drawn_is_said() -> None:
    text = plot({"loss": [(1, math.nan), (2, math.inf)], "none": []}, columns=60, lines=8, unicode=True).plain

    assert text.split("\n") == ["⣿ loss: 2 not finite", "o none: nothing reported"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**53), st.floats()), max_size=30),
    st.integers(1, 200),
    st.integers(2, 40),
    st.booleans(),
)
def test_any_series_is_drawn(
    points: list[tuple[float, float]], columns: int, lines: int, unicode: bool
) -> None:
    text = plot({"a": points, "b": points[:3]}, columns=columns, lines=lines, unicode=unicode).plain

    assert "a: " in text


def test_bars_are_as_long_as_their_share() -> None:
    assert [bar(share, width=4, unicode=True) for share in (0, 0.5, 0.53125, 1)] == ["", "██", "██▏", "████"]
    assert [bar(share, width=4, unicode=False) for share in (0, 0.5, 1)] == ["", "##", "####"]
