"""Gates: conditions on what a job came to, such as `eval_loss < 1.9` or `pass@1 >= baseline - 0.01`.

    gate       = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum        = product (("+" | "-") product)*
    product    = factor (("*" | "/") factor)*
    factor     = ("-" | "+") factor | number | "(" sum ")" | metric | function "(" metric ")"
    metric     = name | "baseline" | "baseline" "." name
    function   = "min" | "max" | "mean" | "last"          over the job's history

`baseline` alone is the gate's own metric (with its function) on the baseline job. Nothing is ever executed: a gate is read
into a tree and computed with floats. What is unknown, unavailable or NaN meets no gate.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from sftd.errors import ConfigurationError

MAX_CHARS = 500
MAX_DEPTH = 50
MAX_GATES = 100

# What jobs report as they are now. Others are looked for among a job's metrics all the same.
KNOWN = frozenset(
    {
        *("eval_loss", "perplexity", "token_accuracy"),
        *("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"),
        *("step", "total_steps", "tokens_seen", "gpu_seconds", "run_seconds"),
    }
)

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![A-Za-z0-9_@.])"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:@[0-9]+)?)(?![A-Za-z0-9_@])"
    r"|(?P<sign><=|>=|==|!=|[<>+\-*/().])"
)
_SPACE = re.compile(r"[ \t]*")

_FUNCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "last": lambda values: values[-1],
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


class GateError(ConfigurationError):
    """A gate that cannot be read; the message names the place."""


class Unavailable(Exception):
    """A metric that a job does not have, in words."""


class Figures(Protocol):
    """What a job came to. Both raise Unavailable."""

    def value(self, name: str) -> float:
        """A metric as it stood at the end."""
        ...

    def history(self, name: str) -> Sequence[float]:
        """A metric over the job's steps; at least one value."""
        ...


@dataclass(frozen=True)
class Metric:
    """`eval_loss`, `min(eval_loss)`, and the same of the baseline."""

    name: str
    function: str | None = None
    baseline: bool = False

    def __str__(self) -> str:
        name = f"baseline.{self.name}" if self.baseline else self.name
        return f"{self.function}({name})" if self.function else name


@dataclass(frozen=True)
class Operation:
    """Two terms and what is done with them."""

    sign: str
    left: "Term"
    right: "Term"


Term = float | Metric | Operation


@dataclass(frozen=True)
class Gate:
    """A condition, as it was written and as it was understood."""

    text: str
    sign: str
    left: Term
    right: Term

    @property
    def metrics(self) -> list[Metric]:
        """The metrics in it, each once, in the order of the text."""
        return list(dict.fromkeys([*_metrics(self.left), *_metrics(self.right)]))


@dataclass(frozen=True)
class GateResult:
    """How a gate came out: the numbers that were compared, or why there are none."""

    gate: str
    met: bool
    left: float | None
    right: float | None
    values: dict[str, float]
    message: str


def parse_gate(text: str) -> Gate:
    """Read a gate. Raises GateError, which names the place."""
    return _Parser(text).gate()


def check_gate(gate: Gate, figures: Figures, baseline: Figures | None) -> GateResult:
    """Compute a gate. It never raises: what cannot be computed is not met, and says why."""
    values: dict[str, float] = {}
    missing: list[str] = []
    for metric in gate.metrics:
        try:
            values[str(metric)] = _look_up(metric, baseline if metric.baseline else figures)
        except Unavailable as error:
            missing.append(str(error))
    if missing:
        return GateResult(gate.text, False, None, None, values, "; ".join(missing))
    try:
        left, right = _compute(gate.left, values), _compute(gate.right, values)
    except ZeroDivisionError:
        return GateResult(gate.text, False, None, None, values, f"division by zero{_given(values)}")
    if math.isnan(left) or math.isnan(right):
        return GateResult(gate.text, False, left, right, values, f"NaN meets no gate{_given(values)}")
    met = _COMPARISONS[gate.sign](left, right)
    said = f"{_sides(left, gate.sign, right)} is {'true' if met else 'false'}{_given(values)}"
    return GateResult(gate.text, met, left, right, values, said)


def _look_up(metric: Metric, figures: Figures | None) -> float:
    if figures is None:
        raise Unavailable("there is no baseline")
    if metric.function is None:
        return figures.value(metric.name)
    values = figures.history(metric.name)
    # min() and max() would step over NaN or not, by where it stands.
    return math.nan if _any_nan(metric, values) else _FUNCTIONS[metric.function](values)


def _any_nan(metric: Metric, values: Sequence[float]) -> bool:
    return any(map(math.isnan, values[-1:] if metric.function == "last" else values))


def _compute(term: Term, values: dict[str, float]) -> float:
    if isinstance(term, Metric):
        return values[str(term)]
    if isinstance(term, Operation):
        return _ARITHMETIC[term.sign](_compute(term.left, values), _compute(term.right, values))
    return term


def _metrics(term: Term) -> Iterator[Metric]:
    if isinstance(term, Metric):
        yield term
    elif isinstance(term, Operation):
        yield from _metrics(term.left)
        yield from _metrics(term.right)


def _sides(left: float, sign: str, right: float) -> str:
    """Both sides in six digits, or in all of them where six do not tell them apart."""
    words = f"{left:.6g}", f"{right:.6g}"
    if left != right and words[0] == words[1]:
        words = repr(left), repr(right)
    return f"{words[0]} {sign} {words[1]}"


def _given(values: dict[str, float]) -> str:
    words = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
    return f" ({words})" if words else ""


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Token:
    kind: str  # number, name, sign or end
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of one gate."""

    def __init__(self, text: str) -> None:
        self._text = text.strip(" \t")
        if len(self._text) > MAX_CHARS:
            raise GateError(f"The gate {self._text[:40]!r}… is longer than {MAX_CHARS} characters.")
        self._tokens = list(self._read())
        self._next = 0
        self._depth = 0

    def gate(self) -> Gate:
        left = self._sum()
        token = self._take()
        if token.text not in _COMPARISONS:
            self._expected("a comparison (< <= > >= == !=)", token)
        right = self._sum()
        rest = self._take()
        if rest.text in _COMPARISONS:
            self._refuse("a gate has one comparison; write two gates", rest)
        if rest.kind != "end":
            self._expected("an operator or the end", rest)
        return self._settled(Gate(self._text, token.text, left, right))

    def _settled(self, gate: Gate) -> Gate:
        """Give a bare `baseline` the name and the function of the gate's own metric."""
        if not gate.metrics:
            raise GateError(f"The gate {gate.text!r} compares no metric; name one, such as eval_loss < 1.9.")
        if all(metric.name for metric in gate.metrics):
            return gate
        own = [metric for metric in gate.metrics if metric.name and not metric.baseline]
        if len(own) != 1:
            raise GateError(
                f"The gate {gate.text!r}: baseline stands for the gate's one metric, and there are {len(own)};"
                " write baseline.NAME."
            )
        same = Metric(own[0].name, own[0].function, baseline=True)
        return Gate(gate.text, gate.sign, _replaced(gate.left, same), _replaced(gate.right, same))

    def _sum(self) -> Term:
        term = self._product()
        while self._peek().text in ("+", "-"):
            term = Operation(self._take().text, term, self._product())
        return term

    def _product(self) -> Term:
        term = self._factor()
        while self._peek().text in ("*", "/"):
            term = Operation(self._take().text, term, self._factor())
        return term

    def _factor(self) -> Term:
        token = self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"it is nested more than {MAX_DEPTH} deep", token)
        term = self._factor_from(token)
        self._depth -= 1
        return term

    def _factor_from(self, token: _Token) -> Term:
        if token.text == "-":
            return Operation("*", -1.0, self._factor())
        if token.text == "+":
            return self._factor()
        if token.text == "(":
            term = self._sum()
            self._must(")")
            return term
        if token.kind == "number":
            return self._number(token)
        if token.kind != "name":
            self._expected("a number, a metric or (", token)
        return self._function(token) if self._peek().text == "(" else self._metric(token)

    def _number(self, token: _Token) -> float:
        value = float(token.text)
        if math.isinf(value):
            self._refuse("the number is too large", token)
        return value

    def _function(self, token: _Token) -> Metric:
        if token.text not in _FUNCTIONS:
            self._refuse(f"there is no function {token.text}; there are {', '.join(_FUNCTIONS)}", token)
        self._must("(")
        name = self._take()
        if name.kind != "name":
            self._expected(f"the name of a metric: {token.text} takes one", name)
        metric = self._metric(name)
        self._must(")")
        if not metric.name:
            self._refuse(f"write {token.text}(baseline.NAME)", name)
        return Metric(metric.name, token.text, baseline=metric.baseline)

    def _metric(self, token: _Token) -> Metric:
        if token.text != "baseline":
            return Metric(token.text)
        if self._peek().text != ".":
            return Metric("", baseline=True)  # named once the whole gate is known
        self._take()
        name = self._take()
        if name.kind != "name":
            self._expected("the name of a metric of the baseline", name)
        return Metric(name.text, baseline=True)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def _must(self, text: str) -> None:
        token = self._take()
        if token.text != text:
            self._expected(text, token)

    def _read(self) -> Iterator[_Token]:
        at = 0
        while True:
            at = _SPACE.match(self._text, at).end()  # type: ignore[union-attr]  # matches the empty text too
            if at == len(self._text):
                yield _Token("end", "", at)
                return
            found = _TOKEN.match(self._text, at)
            if found is None:
                self._refuse(
                    "neither a number, a name nor an operator", _Token("", self._text[at : at + 10], at)
                )
            yield _Token(found.lastgroup or "", found[0], at)
            at = found.end()

    def _expected(self, what: str, token: _Token) -> NoReturn:
        there = f"not {token.text!r}" if token.text else "but the gate ends there"
        self._refuse(f"{what} is expected, {there}", token)

    def _refuse(self, why: str, token: _Token) -> NoReturn:
        raise GateError(f"The gate {self._text!r} is wrong at character {token.at + 1}: {why}.")


def _replaced(term: Term, same: Metric) -> Term:
    if isinstance(term, Metric) and not term.name:
        return same
    if isinstance(term, Operation):
        return Operation(term.sign, _replaced(term.left, same), _replaced(term.right, same))
    return term
