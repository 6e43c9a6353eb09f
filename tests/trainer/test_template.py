"""Which text carries the loss, shown by the text itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftd.rows import Row, read_rows
from sftd_worker.trainer.template import CannotRender, Rendered, Template, chatml

# As many models ship it: no generation markers, a default system prompt, Hermes tools.
PLAIN_CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As reasoning models do: the thinking of earlier turns is left out of the history, the last turn has a block of it.
REWRITING = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.last %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MISTRAL = """\
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""

ENDS = ["<|im_end|>", "<|im_start|>", "</s>", "<s>"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TWO_TURNS = [
    {"role": "user", "content": "til 3"},
    {"role": "assistant", "content": "0 1 2\n"},
    {"role": "user", "content": "0 1 2"},
    {"role": "assistant", "content": "a list: 0 1 2"},
]
WITH_TOOL = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def row(messages: list[dict[str, Any]], *, weights: list[int] | None = None, tools: Any = None) -> Row:
    weights = weights or [int(m["role"] == "assistant") for m in messages]
    return Row(1, messages, weights, tools, None, "0" * 64, None)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.fixture(params=[chatml(has_im_end=True), PLAIN_CHATML], ids=["markers", "no markers"])
def template(request: pytest.FixtureRequest) -> Template:
    return Template(request.param, SPECIAL, ENDS)


def test_every_assistant_turn_and_its_end_is_learned_and_nothing_else(template: Template) -> None:
    rendered = template.render(row(TWO_TURNS), "completion")

    assert learned(rendered) == ["0 1 2\n<|im_end|>", "a list: 0 1 2<|im_end|>"]


def test_last_turn_learns_the_last_answer_alone(template: Template) -> None:
    assert learned(template.render(row(TWO_TURNS), "last_turn")) == ["a list: 0 1 2<|im_end|>"]


def test_all_learns_the_whole_text(template: Template) -> None:
    rendered = template.render(row(TWO_TURNS), "all")

    assert learned(rendered) == [rendered.text]


def test_a_message_of_weight_0_is_context(template: Template) -> None:
    rendered = template.render(row(TWO_TURNS, weights=[0, 0, 0, 1]), "completion")

    assert learned(rendered) == ["a list: 0 1 2<|im_end|>"]


def test_tool_calls_are_learned_and_tool_answers_are_not(template: Template) -> None:
    call, answer = learned(template.render(row(WITH_TOOL, tools=TOOLS), "completion"))

    assert "weather" in call
    assert "Ulm" in call
    assert call.endswith("</tool_call><|im_end|>")
    assert answer == "It is sunny.<|im_end|>"


def test_a_template_that_rewrites_history_still_shows_each_answer() -> None:
    rendered = Template(REWRITING, SPECIAL, ENDS).render(row(TWO_TURNS), "completion")

    assert learned(rendered) == ["0 1 2\n<|im_end|>", "<think>\n\n</think>\n\na list: 0 1 2<|im_end|>"]


def test_a_template_without_generation_prompt_learns_from_the_answer_to_its_end_token() -> None:
    rendered = Template(MISTRAL, SPECIAL, ENDS).render(row(TWO_TURNS), "completion")

    assert learned(rendered) == [" 0 1 2\n</s>", " a list: 0 1 2</s>"]


def test_a_template_that_drops_tool_calls_is_refused() -> None:
    with pytest.raises(CannotRender, match="does not show tool calls"):
        Template(MISTRAL, SPECIAL, ENDS).render(row(WITH_TOOL), "completion")


def test_what_a_template_raises_becomes_a_message_about_the_row() -> None:
    refusing = Template("{{ raise_exception('no system role') }}", SPECIAL, ENDS)

    with pytest.raises(CannotRender, match="no system role"):
        refusing.render(row(TWO_TURNS), "completion")


def test_chatml_without_its_token_ends_turns_with_the_end_token_too() -> None:
    rendered = Template(chatml(has_im_end=False), SPECIAL, ENDS).render(row(TWO_TURNS), "last_turn")

    assert learned(rendered) == ["a list: 0 1 2<|im_end|></s>"]


def test_chatml_shows_a_system_message_and_tools_together() -> None:
    rendered = Template(chatml(has_im_end=True), SPECIAL, ENDS).render(
        row([{"role": "system", "content": "Be brief."}, *WITH_TOOL], tools=TOOLS), "completion"
    )

    assert rendered.text.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert rendered.text.count("Be brief.") == 1


def test_real_tool_conversations_render(shared_data: Callable[[str], Path]) -> None:
    template = Template(chatml(has_im_end=True), SPECIAL, ENDS)
    path = shared_data("glaive_toolcall_sharegpt.json")

    for example in read_rows(path, name=path.name):
        assert example.messages is not None
        spans = learned(template.render(example, "completion"))
        speaking = [m for m in example.messages if m["role"] == "assistant"]
        assert len(spans) == len(speaking)
        assert all(span.startswith(m["content"]) for span, m in zip(spans, speaking, strict=True))
        assert all(span.endswith("<|im_end|>") for span in spans)
