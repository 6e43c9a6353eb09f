"""Training rows: one reader for every accepted format, used by the server at upload and by the trainer.

A file is JSONL or a JSON array, and all its rows have one format: `messages`, `prompt`+`completion`,
`instruction`(+`input`)+`output`, ShareGPT `conversations`, or `text`. Each becomes a `Row` of chat messages (or raw
text). What is wrong is told as `RowProblem`: line, field, what is the matter and what to do. Tokens and masks are
the trainer's business, not this file's.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

Format = Literal["messages", "prompt_completion", "instruction", "sharegpt", "text"]
JsonDict = dict[str, Any]  # a chat message or tool as the templates want it: open by nature

MAX_ROW_BYTES = 32 * 1024 * 1024
MAX_ROW_VALUES = (
    500_000  # lists, objects and what stands in them: small ones take a hundred times their text in memory
)
MAX_PROBLEMS = 20
READ_BYTES = 1024 * 1024
MARK_ROWS, MARK_BYTES = 256, 1024 * 1024  # a mark stands before a row so often at least
FORMATS_HELP = "accepted are: messages | prompt + completion | instruction (+ input) + output | conversations (ShareGPT) | text"

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_HALF_A_PAIR = "holds half of a surrogate pair (\\ud800-\\udfff); write the whole character"
_TOO_MANY_VALUES = f"holds more than {MAX_ROW_VALUES:,} values; split it"
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)  # the last one may not be whole yet
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}


@dataclass(frozen=True)
class RowProblem:
    """Something wrong with one row, in words for the person who made the file."""

    line: int
    field: str
    message: str
    unit: str = "line"  # "item" for a JSON array

    def __str__(self) -> str:
        return f"{self.unit} {self.line}, {self.field}: {self.message}"


class RowsInvalid(ValueError):
    """A data file cannot be trained on. `problems` holds the first of them, `num_problems` how many there are."""

    def __init__(self, name: str, problems: list[RowProblem], num_problems: int | None = None) -> None:
        self.name = name
        self.problems = problems
        self.num_problems = len(problems) if num_problems is None else num_problems
        more = self.num_problems - len(problems)
        lines = [f"{name}: {problem}" for problem in problems]
        if more > 0:
            lines.append(f"{name}: and {more} more")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Row:
    """One training example.

    `messages` is a chat in the shape that chat templates take, or None for a `text` row. `weights[i]` is 1 where
    message i carries the loss, else 0. `task_type` is the row's own label, if it has one.
    """

    line: int
    messages: list[JsonDict] | None
    weights: list[int]
    tools: list[JsonDict] | None
    text: str | None
    digest: str  # sha256 of the row's canonical JSON
    task_type: str | None


@dataclass(frozen=True)
class FileSummary:
    """What a valid data file holds."""

    format: Format
    num_rows: int


@dataclass(frozen=True)
class Mark:
    """Where a row begins: its line (its item in a JSON array), and its first byte in the file."""

    line: int
    offset: int


@dataclass(frozen=True)
class Found:
    """A row that a file was looked into for, or what is wrong with it; and about how long it is in the file."""

    row: "Row | RowProblem"
    format: Format | None  # of the row, as far as is known
    num_bytes: int


@dataclass
class _Reading:
    """State of one pass over a file."""

    name: str
    unit: str = "line"
    format: Format | None = None
    problems: list[RowProblem] = field(default_factory=list)
    num_problems: int = 0
    max_problems: int = MAX_PROBLEMS
    formats: Counter[str] = field(default_factory=Counter)  # rows by format, those that do not fit in as well
    marks: list[Mark] | None = None  # None: none are wanted

    def note(self, line: int, where: str, message: str) -> None:
        self.num_problems += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(RowProblem(line, where, message, self.unit))

    def wants_mark(self, line: int, offset: int) -> bool:
        if self.marks is None:
            return False
        last = self.marks[-1] if self.marks else Mark(1 - MARK_ROWS, 0)
        return line - last.line >= MARK_ROWS or offset - last.offset >= MARK_BYTES


class _Bad(Exception):
    """A row is wrong: the field and what to do."""

    def __init__(self, where: str, message: str) -> None:
        self.where = where
        self.message = message
        super().__init__(message)


def check_file(path: Path, *, name: str, marks: list[Mark] | None = None) -> FileSummary:
    """Read a whole data file; return its format and number of rows. Raises RowsInvalid with every mistake counted.

    `marks` is filled with places that `look_into` may begin at, the file's first row among them.
    """
    reading = _Reading(name, marks=marks)
    num_rows = sum(1 for _ in _read(path, reading))
    if reading.num_problems:
        raise RowsInvalid(name, reading.problems, reading.num_problems)
    assert reading.format is not None
    return FileSummary(reading.format, num_rows)


def read_rows(
    path: Path,
    *,
    name: str,
    max_problems: int = MAX_PROBLEMS,
    formats: Counter[str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a data file. Raises RowsInvalid at the end if any row was wrong: use none of them then.

    `formats` is added to: rows by format, those of another one than the first row's as well.
    """
    reading = _Reading(name, max_problems=max_problems)
    if formats is not None:
        reading.formats = formats
    yield from _read(path, reading)
    if reading.num_problems:
        raise RowsInvalid(name, reading.problems, reading.num_problems)


def look_into(path: Path, *, mark: Mark | None, after: int, form: Format | None) -> Iterator[Found]:
    """The rows after a line (or item), good or bad, read from a mark on; without one from the file's beginning.

    Lines before them are passed over unread. `form` is the file's format: a row of another is told as wrong.
    """
    reading = _Reading("", format=form)
    with path.open("rb") as file:
        values = _array_values if _begin(file, reading) else _jsonl_values
        if mark is not None:
            file.seek(mark.offset)
        for line, value, num_bytes in values(file, reading, mark=mark, after=after):
            found: Row | RowProblem | None = None
            if value is not _BROKEN:
                try:
                    found = _row(line, value, reading)
                except _Bad as bad:
                    found = RowProblem(line, bad.where, bad.message, reading.unit)
            yield Found(found or reading.problems.pop(), reading.format, num_bytes)
    for problem in reading.problems[:1]:  # the array itself breaks off
        yield Found(problem, reading.format, 0)


def is_test_translation(task_type: str) -> bool:
    """Is this the task type of a row that translates test cases from one language to another?

    Written as `translate_test_case`, `test_case_translation`, `test-translation`, `python_test_to_q_test`, …
    """
    words = task_type.lower().replace("-", "_").replace(" ", "_").split("_")
    tests = any(word.startswith("test") for word in words)
    return tests and any(word.startswith("translat") or word in ("case", "cases", "to") for word in words)


def _read(path: Path, reading: _Reading) -> Iterator[Row]:
    seen = 0
    for line, value in _json_values(path, reading):
        seen += 1
        if value is _BROKEN:
            continue
        try:
            yield _row(line, value, reading)
        except _Bad as bad:
            reading.note(line, bad.where, bad.message)
    if seen == 0 and not reading.num_problems:
        reading.note(1, "file", "is empty; it needs at least one row")


# ---------------------------------------------------------------- bytes to JSON values

_BROKEN = object()  # stands for a value that could not be read and has been noted


def _json_values(path: Path, reading: _Reading) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every row; item numbers for a JSON array."""
    with path.open("rb") as file:
        values = _array_values if _begin(file, reading) else _jsonl_values
        for line, value, _ in values(file, reading):
            yield line, value


def _begin(file: BinaryIO, reading: _Reading) -> bool:
    """Pass over a byte order mark, which from a Windows editor is no mistake; whether a JSON array follows."""
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    start = file.tell()
    is_array = file.read(4096).lstrip().startswith(b"[")
    file.seek(start)
    reading.unit = "item" if is_array else "line"
    return is_array


def _jsonl_values(
    file: BinaryIO, reading: _Reading, *, mark: Mark | None = None, after: int = 0
) -> Iterator[tuple[int, Any, int]]:
    """(line, value, bytes) of the lines after one that hold something."""
    line = mark.line - 1 if mark else 0
    offset = file.tell()
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if reading.wants_mark(line, offset) and reading.marks is not None:
            reading.marks.append(Mark(line, offset))
        is_too_long, num_bytes = len(raw) > MAX_ROW_BYTES, len(raw)
        if is_too_long:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_ROW_BYTES)
                num_bytes += len(raw)
        offset += num_bytes
        if line <= after:
            continue
        if is_too_long:
            reading.note(line, "row", f"is longer than {MAX_ROW_BYTES:,} bytes; split it")
            yield line, _BROKEN, num_bytes
        elif raw.strip():
            yield line, _parse(raw, line, reading), num_bytes


def _array_values(
    file: BinaryIO, reading: _Reading, *, mark: Mark | None = None, after: int = 0
) -> Iterator[tuple[int, Any, int]]:
    """The items one by one: parsed whole, a large array takes thirty times its size in memory."""
    text = _ArrayText(file)
    item = mark.line - 1 if mark else 0
    try:
        closed = False
        if mark is None:
            text.expect("[")
            closed = text.take("]")
        while not closed:
            item += 1
            if reading.wants_mark(item, text.offset) and reading.marks is not None:
                reading.marks.append(Mark(item, text.exact_offset()))
            value = text.value()
            if item > after:
                try:
                    _check_surrogates(value)
                except UnicodeEncodeError:
                    reading.note(item, "row", _HALF_A_PAIR)
                    value = _BROKEN
                yield item, value, text.num_chars
            closed = text.take("]")
            if not closed:
                text.expect(",")
        text.expect_end()
    except _Bad as bad:
        reading.note(max(1, item), bad.where, bad.message)


class _ArrayText:
    """The text of a JSON array, read as it is needed: never much more of it in memory than one item."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(parse_constant=_no_constant)
        self._text = ""
        self._at = 0
        self._ended = False
        self.offset = file.tell()  # in the file, of the first character of the text that is held
        self.num_chars = 0  # of the newest value

    def exact_offset(self) -> int:
        """Where in the file the next character stands."""
        return self.offset + len(self._text[: self._at].encode("utf-8", "surrogatepass"))

    def value(self) -> Any:
        """The next JSON value."""
        self._skip_space()
        while True:
            complaint = "it breaks off"
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number may go on
                    self.num_chars, self._at = end - self._at, end
                    return value
            except RecursionError:
                raise _Bad("row", "is nested too deeply") from None
            except (
                ValueError
            ) as error:  # broken, or not whole yet; or an integer of more digits than Python reads
                complaint = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            if self._ended:
                raise _Bad("row", f"is not JSON ({complaint}); the file must be one JSON array of objects")
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise _Bad("row", f"is not JSON ({complaint}), or longer than {MAX_ROW_BYTES:,} bytes")
            self._read_on()
            if _has_too_many_values(self._text.encode("utf-8", "surrogatepass")):
                raise _Bad("row", _TOO_MANY_VALUES)

    def take(self, sign: str) -> bool:
        """Pass over `sign` if it comes next."""
        self._skip_space()
        found = self._text.startswith(sign, self._at)
        self._at += found
        return found

    def expect(self, sign: str) -> None:
        """Pass over `sign`, which must come next."""
        if not self.take(sign):
            raise _Bad("file", f"is not a JSON array: {sign!r} was expected here, not {self._here()!r}")

    def expect_end(self) -> None:
        """Nothing but spaces may be left."""
        self._skip_space()
        if self._here():
            raise _Bad("file", f"is not a JSON array: nothing may follow it, but here is {self._here()!r}")

    def _here(self) -> str:
        return self._text[self._at : self._at + 20]

    def _skip_space(self) -> None:
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches the empty text
            if self._at < len(self._text) or self._ended:
                return
            self._read_on()

    def _read_on(self) -> None:
        """Let go of what has been passed over, and read as much again as is left: a long item is not tried too often."""
        rest = self._text[self._at :]
        self.offset = self.exact_offset()
        offset = self._file.tell() - len(self._utf8.getstate()[0])
        raw = self._file.read(max(READ_BYTES, len(rest)))
        self._ended = not raw
        try:
            self._text, self._at = rest + self._utf8.decode(raw, final=self._ended), 0
        except UnicodeDecodeError as error:
            raise _Bad(
                "file", f"is not UTF-8 (byte {offset + error.start + 1} of it); save it as UTF-8"
            ) from None


def _parse(raw: bytes, line: int, reading: _Reading) -> Any:
    if _has_too_many_values(raw):
        reading.note(line, "row", _TOO_MANY_VALUES)
        return _BROKEN
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reading.note(line, "row", f"is not UTF-8 (byte {error.start + 1} of it); save the file as UTF-8")
        return _BROKEN
    try:
        value = json.loads(text, parse_constant=_no_constant)
        _check_surrogates(value)
    except UnicodeEncodeError:
        reading.note(line, "row", _HALF_A_PAIR)
    except RecursionError:
        reading.note(line, "row", "is nested too deeply")
    except ValueError as error:  # JSONDecodeError, and integers with more digits than Python reads
        reading.note(line, "row", f"is not JSON ({error}); each line must be one JSON object")
    else:
        return value
    return _BROKEN


def _has_too_many_values(raw: bytes) -> bool:
    if len(raw) <= MAX_ROW_VALUES or _num_signs(raw) <= MAX_ROW_VALUES:
        return False
    return (
        _num_signs(_STRING.sub(b"", raw)) > MAX_ROW_VALUES
    )  # code in a string holds many, which are no values


def _num_signs(raw: bytes) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def _check_surrogates(value: Any) -> None:
    """Raise UnicodeEncodeError for text that cannot be written as UTF-8."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# ---------------------------------------------------------------- JSON values to rows


def _row(line: int, value: Any, reading: _Reading) -> Row:
    if not isinstance(value, dict):
        raise _Bad("row", f"is a {_type_name(value)}, not an object; {FORMATS_HELP}")
    form = _format_of(value)
    reading.formats[form] += 1
    if reading.format is None:
        reading.format = form
    elif form != reading.format:
        raise _Bad(
            "row", f"has the format {form}, the rows before it {reading.format}; use one format in a file"
        )
    messages: list[JsonDict] | None = None
    weights: list[int] = []
    text, tools = None, None
    if form == "text":
        text = _string(value, "text")
        if not text.strip():
            raise _Bad("text", "is empty: nothing to learn from; fill it or remove the row")
    else:
        messages, weights = _READERS[form](value)
        tools = _tools(value.get("tools"))
        _check_chat(messages, weights, form)
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Row(line, messages, weights, tools, text, digest, _task_type(value))


def _format_of(value: JsonDict) -> Format:
    keys = value.keys()
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "prompt" in keys and "completion" in keys:
        return "prompt_completion"
    if "instruction" in keys and "output" in keys:
        return "instruction"
    if "text" in keys:
        return "text"
    found = ", ".join(sorted(map(str, keys))[:8]) or "none"
    raise _Bad("row", f"has no known format (fields found: {found}); {FORMATS_HELP}")


def _from_messages(value: JsonDict) -> tuple[list[JsonDict], list[int]]:
    return _chat(value["messages"], "messages")


def _from_prompt_completion(value: JsonDict) -> tuple[list[JsonDict], list[int]]:
    """Prompt messages are context: only the completion's assistant turns carry the loss."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str):
        before: list[JsonDict] = [{"role": "user", "content": prompt}]
    else:
        before, _ = _chat(prompt, "prompt")
    if isinstance(completion, str):
        after, weights = [{"role": "assistant", "content": completion}], [1]
    else:
        after, weights = _chat(completion, "completion")
    return before + after, [0] * len(before) + weights


def _from_instruction(value: JsonDict) -> tuple[list[JsonDict], list[int]]:
    messages: list[JsonDict] = []
    if value.get("system"):
        messages.append({"role": "system", "content": _string(value, "system")})
    history = value.get("history") or []
    if not isinstance(history, list):
        raise _Bad("history", f"is a {_type_name(history)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _Bad(f"history[{i}]", "is not a pair of strings [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _string(value, "instruction")
    extra = _string(value, "input") if value.get("input") is not None else ""
    messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra else question})
    messages.append({"role": "assistant", "content": _string(value, "output")})
    return messages, [int(message["role"] == "assistant") for message in messages]


def _from_sharegpt(value: JsonDict) -> tuple[list[JsonDict], list[int]]:
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns:
        raise _Bad("conversations", f"is {_empty_or_type(turns)}; it must be a list of turns")
    messages: list[JsonDict] = []
    if value.get("system"):
        messages.append({"role": "system", "content": _string(value, "system")})
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise _Bad(where, f"is a {_type_name(turn)}, not an object with from and value")
        role = _SHAREGPT_ROLES.get(turn.get("from", "")) if isinstance(turn.get("from"), str) else None
        if role is None:
            raise _Bad(
                f"{where}.from", f"is {turn.get('from')!r}; it must be one of {', '.join(_SHAREGPT_ROLES)}"
            )
        content = _string(turn, "value", where)
        if role == "function_call":
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": _calls_in_text(content, f"{where}.value")}
            )
        else:
            messages.append({"role": role, "content": content})
    return messages, [int(message["role"] == "assistant") for message in messages]


_READERS = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "instruction": _from_instruction,
    "sharegpt": _from_sharegpt,
}


# ---------------------------------------------------------------- chats


def _chat(value: Any, where: str) -> tuple[list[JsonDict], list[int]]:
    if not isinstance(value, list) or not value:
        raise _Bad(where, f"is {_empty_or_type(value)}; it must be a list of messages")
    messages: list[JsonDict] = []
    weights: list[int] = []
    for i, message in enumerate(value):
        clean, weight = _message(message, f"{where}[{i}]")
        messages.append(clean)
        weights.append(weight)
    return messages, weights


def _message(value: Any, where: str) -> tuple[JsonDict, int]:
    if not isinstance(value, dict):
        raise _Bad(where, f"is a {_type_name(value)}, not an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _Bad(f"{where}.role", f"is {role!r}; it must be one of {', '.join(sorted(_ROLES))}")
    calls = _tool_calls(value, where)
    if calls and role != "assistant":
        raise _Bad(f"{where}.tool_calls", f"stands on a {role} message; only the assistant calls tools")
    message: JsonDict = {"role": "tool" if role == "function" else role}
    message["content"] = _content(value.get("content"), f"{where}.content", optional=bool(calls))
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if value.get(key) is not None:
            message[key] = _string(value, key, where)
    return message, _weight(value, role, where)


def _weight(value: JsonDict, role: str, where: str) -> int:
    weight = value.get("weight")
    if weight is None:
        return int(role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _Bad(f"{where}.weight", f"is {weight!r}; it must be 0 (context) or 1 (learn)")
    if weight == 1 and role != "assistant":
        raise _Bad(
            f"{where}.weight", f"is 1 on a {role} message; only the assistant's messages carry the loss"
        )
    return int(weight)


def _content(value: Any, where: str, *, optional: bool) -> str:
    """A string, or a list of text parts, joined. Empty where a message only calls tools."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        parts = []
        for i, part in enumerate(value):
            if not (
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            ):
                raise _Bad(
                    f"{where}[{i}]", 'is not a text part {"type": "text", "text": …}; only text is trained on'
                )
            parts.append(part["text"])
        return "".join(parts)
    if not isinstance(value, str):
        raise _Bad(where, f"is {_missing_or_type(value)}; it must be a string")
    return value


def _tool_calls(value: JsonDict, where: str) -> list[JsonDict]:
    calls = value.get("tool_calls")
    if (
        calls is None and value.get("function_call") is not None
    ):  # the older OpenAI form: one call, not in a list
        calls = [{"function": value["function_call"]}]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise _Bad(f"{where}.tool_calls", f"is a {_type_name(calls)}; it must be a list")
    return [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(value: Any, where: str) -> JsonDict:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _Bad(f"{where}.function.name", "is missing; a call needs a function with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI sends a JSON string; chat templates want the object
        arguments = _json_in(
            arguments or "{}",
            f"{where}.function.arguments",
            "is not JSON; write the arguments as a JSON object",
        )
    if not isinstance(arguments, dict):
        raise _Bad(f"{where}.function.arguments", f"is a {_type_name(arguments)}; it must be a JSON object")
    call: JsonDict = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


def _calls_in_text(text: str, where: str) -> list[JsonDict]:
    """ShareGPT writes a call as JSON text: one object with name and arguments, or a list of them."""
    value = _json_in(text, where, 'is not JSON; a function_call is {"name": …, "arguments": {…}}')
    values = value if isinstance(value, list) else [value]
    return [_tool_call(call, where) for call in values]


def _tools(value: Any) -> list[JsonDict] | None:
    """Tools as a list of OpenAI function specs. ShareGPT keeps them as a JSON string, without the outer object."""
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _json_in(value, "tools", "is not JSON; write a list of function specs")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise _Bad("tools", f"is a {_type_name(value)}; it must be a list of function specs")
    tools = []
    for i, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"tools[{i}].function.name", "is missing; a tool needs a function with a name")
        tools.append({"type": "function", "function": function})
    return tools


def _json_in(text: str, where: str, otherwise: str) -> Any:
    """The value of JSON that stands in a string, held to what is asked of the file around it."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        _check_surrogates(value)
    except UnicodeEncodeError:
        raise _Bad(where, _HALF_A_PAIR) from None
    except (ValueError, RecursionError):
        raise _Bad(where, otherwise) from None
    return value


def _check_chat(messages: list[JsonDict], weights: list[int], form: Format) -> None:
    last = "completion" if form == "prompt_completion" else form.replace("sharegpt", "conversations")
    if messages[-1]["role"] != "assistant":
        raise _Bad(
            last, f"ends with a {messages[-1]['role']} message; end with the assistant's, or remove the rest"
        )
    learned = [message for message, weight in zip(messages, weights, strict=True) if weight]
    if not learned:
        raise _Bad(
            last,
            "has no assistant message of weight 1: nothing to learn from; set a weight or remove the row",
        )
    if not any(_says_something(message) for message in learned):
        where = {"instruction": "output", "prompt_completion": "completion"}.get(form, last)
        raise _Bad(where, "is empty: nothing to learn from; fill it or remove the row")


def _says_something(message: JsonDict) -> bool:
    said = message["content"] or message.get("reasoning_content") or message.get("thinking") or ""
    return bool(said.strip() or message.get("tool_calls"))


# ---------------------------------------------------------------- words


def _task_type(value: JsonDict) -> str | None:
    metadata = value.get("metadata")
    for holder in (value, metadata if isinstance(metadata, dict) else {}):
        if isinstance(holder.get("task_type"), str):
            return str(holder["task_type"])
    return None


def _string(value: JsonDict, key: str, where: str = "") -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise _Bad(f"{where}.{key}" if where else key, f"is {_missing_or_type(text)}; it must be a string")
    return text


def _type_name(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _missing_or_type(value: Any) -> str:
    return "missing or null" if value is None else f"a {_type_name(value)}"


def _empty_or_type(value: Any) -> str:
    return "an empty list" if value == [] else _missing_or_type(value)
