"""Gates: what is understood, what is refused and where, and that they are computed as arithmetic has it."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftd.figures import EVALUATED, OF_JOB
from sftd.gates import KNOWN, MAX_CHARS, GateError, Metric, Unavailable, check_gate, parse_gate


class Told:
    """Figures as they are given; a list is a history."""

    def __init__(self, **figures: float | list[float]) -> None:
        self.figures = {name.replace("_at_", "@"): figure for name, figure in figures.items()}

    def value(self, name: str) -> float:
        return self.history(name)[-1]

    def history(self, name: str) -> Sequence[float]:
        if name not in self.figures:
            raise Unavailable(f"job_1 has no metric {name}")
        figure = self.figures[name]
        return figure if isinstance(figure, list) else [figure]


NOW = Told(eval_loss=[3.0, 1.5, 1.8], loss=1.0, pass_at_1=0.52, nan=math.nan, inf=math.inf, zero=0.0)
BEFORE = Told(eval_loss=[2.9, 1.7], loss=0.9, pass_at_1=0.53)


def met(text: str) -> bool:
    return check_gate(parse_gate(text), NOW, BEFORE).met


@pytest.mark.parametrize(
    "text",
    [
        "eval_loss<1.9",
        "  eval_loss  <=  1.8  ",
        "1.9 > eval_loss",
        "eval_loss == 1.8",
        "eval_loss != 1.7",
        "loss >= 1",
        "pass@1>=baseline-0.01",
        "pass@1 >= baseline.pass@1 - 1e-2",
        "loss / baseline.loss < 1.2",
        "min(eval_loss) < 1.6",
        "max(eval_loss) == 3 ",
        "last(eval_loss) == eval_loss",
        "mean(eval_loss) > 2.09",
        "min(eval_loss) < baseline",  # like with like: its smallest
        "min(eval_loss) < min(baseline.eval_loss)",
        "-(loss + 1) * 2 == -4",
        "loss - 0.5 - 0.25 == .25",
        "8 / 4 / 2 * loss == 1",
        "2 + 3 * loss == +5.",
        "inf > 1e300",
    ],
)
def test_a_gate_that_is_met(text: str) -> None:
    assert met(text)


@pytest.mark.parametrize("text", ["eval_loss<1.8", "loss > 1", "eval_loss > baseline + 0.2", "loss != 1"])
def test_a_gate_that_is_not_met_shows_its_numbers(text: str) -> None:
    result = check_gate(parse_gate(text), NOW, BEFORE)

    assert not result.met
    assert "is false (" in result.message
    assert result.left is not None


@pytest.mark.parametrize("sign", ["<", "<=", ">", ">=", "==", "!="])
def test_nan_meets_no_gate_on_either_side(sign: str) -> None:
    for text in (
        f"nan {sign} 1",
        f"1 {sign} nan",
        f"nan {sign} nan",
        f"inf - inf {sign} 0",
        f"min(nan) {sign} 1",
    ):
        result = check_gate(parse_gate(text), NOW, None)
        assert (result.met, result.message[:3]) == (False, "NaN")


def test_what_is_unknown_or_cannot_be_computed_is_not_met_and_says_why() -> None:
    for text, why in {
        "nothing < 1": "job_1 has no metric nothing",
        "nothing < 1 + other": "job_1 has no metric nothing; job_1 has no metric other",
        "zero >= baseline": "job_1 has no metric zero",
        "loss / zero > 0": "division by zero (loss = 1, zero = 0)",
    }.items():
        result = check_gate(parse_gate(text), NOW, BEFORE)
        assert (result.met, result.message) == (False, why)
    assert check_gate(parse_gate("loss < baseline"), NOW, None).message == "there is no baseline"


def test_numbers_that_look_alike_are_shown_in_full() -> None:
    result = check_gate(parse_gate("loss < 1.9"), Told(loss=1.9000000001), None)

    assert result.message.startswith("1.9000000001 < 1.9 is false")


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("", 1, "is expected, but the gate ends there"),
        ("loss", 5, "a comparison"),
        ("loss <", 7, "a number, a metric or ("),
        ("loss << 2", 7, "not '<'"),
        ("loss = 2", 6, "neither a number, a name nor an operator"),
        ("1 < loss < 2", 10, "one comparison; write two gates"),
        ("(loss < 2", 7, ") is expected"),
        ("loss < 2)", 9, "an operator or the end"),
        ("loss < 2 3", 10, "an operator or the end"),
        ("loss < 5x", 8, "neither"),
        ("loss < 1.2.3", 8, "neither"),
        ("loss < 1e999", 8, "too large"),
        ("loss < ٣", 8, "neither"),
        ("sum(loss) < 2", 1, "no function sum; there are min, max, mean, last"),
        ("min(2) < 2", 5, "the name of a metric"),
        ("min(min(loss)) < 2", 8, ") is expected"),
        ("min(baseline) < loss", 5, "min(baseline.NAME)"),
        ("loss < baseline.", 17, "the name of a metric of the baseline"),
        ("__import__('os') < 1", 12, "neither"),
        ("loss ** 2 < 1", 7, "a number, a metric or ("),
        ("loss\x1b < 1", 5, "neither"),
        ("loss < " + "-" * 60 + "1", 58, "nested more than 50 deep"),
        ("loss < " + "(" * 200 + "1", 58, "nested more than 50 deep"),
    ],
)
def test_a_gate_that_cannot_be_read_names_the_place(text: str, place: int, why: str) -> None:
    with pytest.raises(GateError) as raised:
        parse_gate(text)

    assert f"at character {place}" in str(raised.value)
    assert why in str(raised.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 < 2", "compares no metric"),
        ("baseline < 1", "write baseline.NAME"),
        ("loss - eval_loss < baseline", "there are 2"),
        ("loss < 1" + " " * 10 + "+ 1" * MAX_CHARS, "longer than 500"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(GateError, match=why):
        parse_gate(text)


def test_the_metrics_of_a_gate_are_named_once_each() -> None:
    gate = parse_gate("loss + loss < 2 * baseline")

    assert gate.metrics == [Metric("loss"), Metric("loss", baseline=True)]


def test_what_jobs_report_is_known_and_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text()

    assert KNOWN.issuperset({*OF_JOB, *EVALUATED})
    assert all(f"`{name}`" in documented for name in (*OF_JOB, *EVALUATED))


NUMBERS = st.floats(min_value=0, max_value=1e6, allow_nan=False).map(repr)
NAMES = st.sampled_from(["loss", "eval_loss", "zero", "pass_1"])
SUMS = st.recursive(
    NUMBERS | NAMES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", "*", " / "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)
VALUES = {"loss": 1.25, "eval_loss": 3.5, "zero": 0.0, "pass_1": 0.52}


@settings(deadline=None)
@given(SUMS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), SUMS)
def test_a_gate_comes_out_as_arithmetic_has_it(left: str, sign: str, right: str) -> None:
    text = f"loss * 0 + {left} {sign} {right}"
    if len(text) > MAX_CHARS:
        return
    try:
        sides = [eval(side, {"__builtins__": {}}, VALUES) for side in (f"loss * 0 + {left}", right)]
        expected = not any(map(math.isnan, sides)) and eval(
            f"a {sign} b", {}, dict(zip("ab", sides, strict=True))
        )
    except ZeroDivisionError:
        expected = False

    assert check_gate(parse_gate(text), Told(**VALUES), None).met is expected


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*"()<>=!+-*/.,@ \t\n;'", "1", "2e3", "loss", "min", "baseline", "é", "\x00"]))
)
def test_any_text_is_a_gate_or_a_clear_error(words: list[str]) -> None:
    text = "".join(words)
    try:
        gate = parse_gate(text)
    except GateError:
        return
    assert all(metric.name for metric in gate.metrics)
