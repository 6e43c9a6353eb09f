"""From chat messages to text, and which parts of the text carry the loss.

The spans come from the chat template itself. A template with `{% generation %}` markers says where the assistant
speaks. For one without, the text before an assistant's turn (with the generation prompt) and the text after it are
rendered: what was added is the turn. Where a template rewrites earlier turns (dropping their reasoning, say), the
message is rendered with another content instead, and where the two texts differ is the turn. The message's words are
never searched for.
"""

import faulthandler
import re
import signal
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import FrameType
from typing import Any, Literal

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from sftd.rows import Row
from sftd.schemas import FailureReason
from sftd_worker.trainer.errors import RunFailed

TrainOn = Literal["completion", "all", "last_turn"]
Span = tuple[int, int]  # [start, end) in characters of the rendered text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\ue000"  # a private-use character: no content begins or ends with it
_SPLIT = "\ue001"  # another: it stands inside what must not be read as a token of the model's own
RENDER_SECONDS = (
    20.0  # of computing, for one rendering, which takes milliseconds: then it is taken never to end
)
_HANG_SECONDS = 60.0  # the same, where it could not be interrupted: then the process ends

# ChatML with Hermes-style tools, for models that bring no template of their own. `{% generation %}` marks what is
# learned: the assistant's words, its tool calls, and the end of the turn. `eos` follows where `<|im_end|>` is not a
# token of the model, so that generation stops at something that it knows.
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nA call is a JSON object in <tool_call></tool_call>: {\\"name\\": …, \\"arguments\\": {…}}<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}@EOS@
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def chatml(*, has_im_end: bool, begins_with_bos: bool = False) -> str:
    """The ChatML template, for a vocabulary with or without `<|im_end|>`, for a model that knows all text to begin with
    a token of its own or not."""
    return ("{{- bos_token }}" if begins_with_bos else "") + CHATML.replace(
        "@EOS@", "" if has_im_end else "{{- eos_token }}"
    )


class CannotRender(ValueError):
    """The template cannot show this row. `field` and the message are for the person who made the file."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True)
class Rendered:
    """A row as text, with the spans that carry the loss, in order and apart."""

    text: str
    spans: list[Span]
    add_special_tokens: bool  # raw text: the tokenizer adds what it adds to a document
    # Where a row's own words spell out a control token (`<|im_end|>` in a question about chat templates): tokenised
    # apart, its halves are the text that they are, and end no turn.
    cuts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Template:
    """A chat template and what it takes to render it."""

    source: str
    special_tokens: dict[str, str]  # bos_token, eos_token, … as templates know them
    turn_ends: list[str] = field(default_factory=list)  # special tokens, any of which may end a turn
    control: list[str] = field(
        default_factory=list
    )  # tokens that steer the model; in a row's own words they are text

    @cached_property
    def has_markers(self) -> bool:
        """Does the template mark the assistant's words itself?"""
        return _GENERATION.search(self.source) is not None

    def render(self, row: Row, train_on: TrainOn) -> Rendered:
        """Text and supervised spans of a row. Raises CannotRender."""
        if row.messages is None:
            assert row.text is not None
            return Rendered(row.text, [(0, len(row.text))], add_special_tokens=True)
        rendered = self._render_row(_split_control(row, self.control) or row, train_on)
        return _without_splits(rendered)

    def _render_row(self, row: Row, train_on: TrainOn) -> Rendered:
        assert row.messages is not None
        wanted = [i for i, weight in enumerate(row.weights) if weight]
        if train_on == "all":
            text = self._render(row.messages, row.tools)
            learned = [(0, len(text))]
        else:
            text, learned = self._turns(row, wanted[-1:] if train_on == "last_turn" else wanted)
        self._check_tools(row, text)
        self._check_context(row, text)
        self._check_answers(row, text)
        return Rendered(text, _merge(learned), add_special_tokens=False)

    def _turns(self, row: Row, wanted: list[int]) -> tuple[str, list[Span]]:
        """The text, and the spans that the assistant's messages `wanted` take in it."""
        assert row.messages is not None
        if not self.has_markers:
            text = self._render(row.messages, row.tools)
            return text, [self._turn(row.messages, row.tools, i, text) for i in wanted]
        text, marked = self._render_marked(row.messages, row.tools)
        speaking = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if len(marked) != len(speaking):
            raise CannotRender(
                "messages",
                f"the chat template marks {len(marked)} spans as generated for {len(speaking)} assistant "
                "messages; use train_on: all, or a template that marks each assistant message once",
            )
        return text, [span for i, span in zip(speaking, marked, strict=True) if i in wanted]

    def _turn(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, i: int, text: str
    ) -> Span:
        """Where assistant message i stands in `text`, by rendering what comes before it and with it."""
        before = self._try_render(messages[:i], tools, add_generation_prompt=True)
        with_turn = self._try_render(messages[: i + 1], tools)
        if (
            before is not None
            and with_turn is not None
            and text.startswith(with_turn)
            and with_turn.startswith(before)
        ):
            end = self._without_generation_prompt(messages[: i + 1], tools, with_turn, before)
            return len(before), self._without_separator(text, len(before), end)
        return self._turn_by_contrast(messages, tools, i, text)

    def _without_generation_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, before: str
    ) -> int:
        """Where the last turn of `text` ends. A template that ignores add_generation_prompt (the first one of Llama 3)
        begins one more assistant turn behind each conversation: that beginning is no part of the answer."""
        if self._try_render(messages, tools, add_generation_prompt=True) != text:
            return len(text)
        try:
            start, end = self._turn_by_contrast(messages, tools, len(messages) - 1, text)
        except CannotRender:
            return len(text)
        begins_one_more = start == len(before) and text[end:].strip() and before.endswith(text[end:])
        return end if begins_one_more else len(text)

    def _without_separator(self, text: str, start: int, end: int) -> int:
        """White space after the token that ends a turn separates turns: nobody generates it."""
        trimmed = start + len(text[start:end].rstrip())
        if any(text.endswith(token, start, trimmed) for token in self.turn_ends):
            return trimmed
        return end

    def _turn_by_contrast(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, i: int, text: str
    ) -> Span:
        """Where the text changes when message i says something else, and the token that ends the turn behind it."""
        other = [*messages[:i], {"role": "assistant", "content": _STAND_IN}, *messages[i + 1 :]]
        contrast = self._render(other, tools)
        at = contrast.find(_STAND_IN)
        if at < 0 or text[:at] != contrast[:at]:
            raise CannotRender(
                f"messages[{i}]",
                "the chat template does not show where this assistant message stands in the conversation; use "
                "train_on: last_turn, or a template with {% generation %} markers",
            )
        rest = contrast[at + len(_STAND_IN) :]
        end = len(text) - len(rest)
        if end < at or text[end:] != rest:
            raise CannotRender(
                f"messages[{i}]",
                "the chat template lets this assistant message change other parts of the conversation; use "
                "train_on: last_turn, or a template with {% generation %} markers",
            )
        closing = max((token for token in self.turn_ends if text.startswith(token, end)), key=len, default="")
        return at, end + len(closing)

    def _check_tools(self, row: Row, text: str) -> None:
        """A template that leaves tools out would teach calls out of the blue: say so instead."""
        assert row.messages is not None
        for i, message in enumerate(row.messages):
            if "tool_calls" not in message:
                continue
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._try_render([*row.messages[:i], without, *row.messages[i + 1 :]], row.tools) == text:
                raise CannotRender(
                    f"messages[{i}].tool_calls",
                    "the model's chat template does not show tool calls; choose a model whose template does",
                )
        if row.tools and self._try_render(row.messages, None) == text:
            raise CannotRender(
                "tools",
                "the model's chat template does not show tools; choose a model whose template does, or remove them",
            )

    def _check_context(self, row: Row, text: str) -> None:
        """A template that leaves a message out trains on other prompts than the model will get: say so instead.

        Mistral's shows the system message only while the user speaks last, Qwen's knows no role `developer`.
        """
        assert row.messages is not None
        given = [i for i, m in enumerate(row.messages) if m["role"] != "assistant" and m["content"].strip()]
        marked = self._try_render(
            [
                _appended(m, f"{_STAND_IN}{i}{_STAND_IN}") if i in given else m
                for i, m in enumerate(row.messages)
            ],
            row.tools,
        )
        for i in given:
            if marked is not None and f"{_STAND_IN}{i}{_STAND_IN}" in marked:
                continue
            other = [*row.messages[:i], _appended(row.messages[i], _STAND_IN), *row.messages[i + 1 :]]
            if self._try_render(other, row.tools) == text:
                role = row.messages[i]["role"]
                raise CannotRender(
                    f"messages[{i}]",
                    f"the model's chat template leaves this {role} message out of a conversation that ends with an "
                    "answer; put its words into the user's message, or choose a model whose template shows it",
                )

    def _check_answers(self, row: Row, text: str) -> None:
        """What an assistant says beside its calls, and the reasoning of the last answer, must not vanish unlearned.

        Reasoning of earlier turns is another matter: many templates drop it, in training as in use.
        """
        assert row.messages is not None
        last = len(row.messages) - 1
        for i, (message, weight) in enumerate(zip(row.messages, row.weights, strict=True)):
            if message["role"] != "assistant" or not weight:
                continue
            for name, other in _said_otherwise(message, with_reasoning=i == last):
                if self._try_render([*row.messages[:i], other, *row.messages[i + 1 :]], row.tools) == text:
                    raise CannotRender(
                        f"messages[{i}].{name}",
                        "the model's chat template leaves this out, so that it would not be learned; remove it, or "
                        "choose a model whose template shows it",
                    )

    def _try_render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str | None:
        """A part of a conversation; None where the template insists on a whole one."""
        try:
            return self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        except CannotRender:
            return None

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        texts, _ = self._call(messages, tools, add_generation_prompt=add_generation_prompt)
        return str(texts[0])

    def _render_marked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        texts, indices = self._call(messages, tools, return_assistant_tokens_mask=True)
        return str(texts[0]), [(int(start), int(end)) for start, end in indices[0]]

    def _call(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: bool
    ) -> tuple[list[str], list[list[Span]]]:
        try:
            with _time_limit():
                result: tuple[list[str], list[list[Span]]] = render_jinja_template(
                    [messages], tools=tools, chat_template=self.source, **options, **self.special_tokens
                )
            return result
        except RecursionError:
            raise CannotRender("messages", "is nested too deeply for the model's chat template") from None
        except _RENDER_ERRORS as error:
            said = str(error) or type(error).__name__
            raise CannotRender("messages", f"the model's chat template refuses this row: {said}") from error


# What a template may do wrong; the sandbox answers with OverflowError to a range that is too long.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


def require_bounded(source: str) -> None:
    """Refuse a template that computes powers: one line of them can keep a processor busy for years, in a way that
    cannot be interrupted. Raises RunFailed."""
    try:
        signs = [value for _, kind, value in Environment().lex(source) if kind == "operator"]
    except TemplateSyntaxError:
        return  # rendering says it better, and never comes to compute anything
    if "**" in signs:
        raise RunFailed(
            FailureReason.MODEL_UNSUPPORTED,
            "the model's chat template computes powers (**), which no chat needs; choose another model, or take them out",
        )


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises RunFailed after RENDER_SECONDS of computing, and ends the process after _HANG_SECONDS: a product of giant
    integers lets no handler of Python's run. Time in which the process was stopped does not count. Signals arrive in
    the main thread alone, so only there is a rendering limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    faulthandler.register(signal.SIGVTALRM, chain=True)  # says where it was; what comes then is the end
    earlier = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANG_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, earlier)


def _too_slow(_: int, __: FrameType | None) -> None:
    raise RunFailed(
        FailureReason.MODEL_UNSUPPORTED,
        f"the model's chat template computed for more than {RENDER_SECONDS:g} s at one row; choose another model, or "
        "mend the template",
    )


# ---------------------------------------------------------------- control tokens in a row's own words


def _split_control(row: Row, control: Sequence[str]) -> Row | None:
    """The row with its control tokens split; None where its words hold none."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, str):
            found.update(token for token in control if token in value)
        elif isinstance(value, dict):
            for key, below in value.items():
                look(key)
                look(below)
        elif isinstance(value, list):
            for below in value:
                look(below)

    def split(value: Any) -> Any:
        if isinstance(value, str):
            for token in longest_first:
                value = value.replace(token, token[0] + _SPLIT + token[1:])
            return value
        if isinstance(value, dict):
            return {split(key): split(below) for key, below in value.items()}
        return [split(below) for below in value] if isinstance(value, list) else value

    look(row.messages)
    look(row.tools)
    if not found:
        return None
    longest_first = sorted(found, key=lambda token: (-len(token), token))
    return replace(row, messages=split(row.messages), tools=split(row.tools))


def _without_splits(rendered: Rendered) -> Rendered:
    """The text as it was meant, and where its control tokens are to be cut."""
    marks = [at for at, char in enumerate(rendered.text) if char == _SPLIT] if _SPLIT in rendered.text else []
    if not marks:
        return rendered
    spans = [
        (start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in rendered.spans
    ]
    cuts = [at - i for i, at in enumerate(marks)]
    text = rendered.text.replace(_SPLIT, "")
    return replace(rendered, text=text, spans=spans, cuts=cuts)


def _appended(message: dict[str, Any], words: str) -> dict[str, Any]:
    return {**message, "content": message["content"] + words}


def _said_otherwise(message: dict[str, Any], *, with_reasoning: bool) -> list[tuple[str, dict[str, Any]]]:
    """(field, the message with other words in it), for each field that a template may leave out."""
    others = []
    content = message["content"]
    if "tool_calls" in message and content.strip():
        others.append(("content", _appended(message, _STAND_IN)))
    if not with_reasoning:
        return others
    for key in ("reasoning_content", "thinking"):
        if message.get(key, "").strip():
            others.append((key, {**message, key: message[key] + _STAND_IN}))
    thought, end_of_thought, answer = content.partition("</think>")
    if end_of_thought:
        others.append(("content", {**message, "content": f"{thought}{_STAND_IN}{end_of_thought}{answer}"}))
    return others


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Sort spans and drop empty ones; spans of different turns never overlap."""
    return sorted(span for span in spans if span[1] > span[0])
