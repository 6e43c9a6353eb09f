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

# As the first template of Llama 3: whatever is asked for, one more turn is begun.
ALWAYS_PROMPTING = """\
{%- for m in messages %}{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{%- endfor %}
{{- '<|start|>assistant<|end|>\\n\\n' }}"""

# As Mistral's: the system message stands before the user's words only while these are the last.
SYSTEM_WHILE_ASKING = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""

# As Llama 3.1's: a call stands alone; and as that of R1's distilled models: reasoning is cut off every answer.
CALLS_ALONE = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}{%- else %}{{- m.content.split('</think>')[-1] }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

ENDS = ["<|start|>", "<|end|>", "<|eot|>", "<|im_end|>", "<|im_start|>", "</s>", "<s>"]
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


def test_a_template_that_always_begins_one_more_turn_does_not_teach_to_begin_it() -> None:
    rendered = Template(ALWAYS_PROMPTING, SPECIAL, ENDS).render(row(TWO_TURNS), "completion")

    assert learned(rendered) == ["0 1 2<|eot|>", "a list: 0 1 2<|eot|>"]


def test_a_system_message_that_vanishes_from_finished_conversations_is_refused() -> None:
    messages = [{"role": "system", "content": "Answer in q."}, *TWO_TURNS]

    with pytest.raises(CannotRender, match="leaves this system message out") as refused:
        Template(SYSTEM_WHILE_ASKING, SPECIAL, ENDS).render(row(messages), "completion")

    assert refused.value.where == "messages[0]"


def test_a_role_that_the_template_does_not_know_is_refused_instead_of_left_out() -> None:
    silent = (
        "{% for m in messages if m.role != 'developer' %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    )

    with pytest.raises(CannotRender, match="leaves this developer message out"):
        Template(silent, SPECIAL, ENDS).render(
            row([{"role": "developer", "content": "Be brief."}, *TWO_TURNS]), "completion"
        )


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        ({"content": "0 1 2", "reasoning_content": "counting"}, "messages[1].reasoning_content"),
        ({"content": "<think>counting</think>0 1 2"}, "messages[1].content"),
        ({"content": "Let me see.", "tool_calls": WITH_TOOL[1]["tool_calls"]}, "messages[1].content"),
    ],
    ids=["reasoning of its own", "reasoning in the text", "words beside a call"],
)
def test_a_part_of_an_answer_that_the_template_leaves_out_is_refused(
    answer: dict[str, Any], where: str
) -> None:
    messages = [TWO_TURNS[0], {"role": "assistant", **answer}]

    with pytest.raises(CannotRender, match="would not be learned") as refused:
        Template(CALLS_ALONE, SPECIAL, ENDS).render(row(messages), "completion")

    assert refused.value.where == where


def test_reasoning_of_earlier_turns_may_be_left_out() -> None:
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "<think>x</think>0 1 2"}, *TWO_TURNS[2:]]

    rendered = Template(CALLS_ALONE, SPECIAL, ENDS).render(row(messages), "completion")

    assert learned(rendered) == ["0 1 2<|im_end|>", "a list: 0 1 2<|im_end|>"]


def test_the_way_out_that_a_refusal_names_is_one() -> None:
    """A template that marks one of two answers, and one that shows only the number of earlier answers."""
    marks_last = Template(
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}",
        SPECIAL,
        ENDS,
    )
    forgets = Template(
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        SPECIAL,
        ENDS,
    )

    with pytest.raises(CannotRender, match="use train_on: all"):
        marks_last.render(row(TWO_TURNS), "completion")
    with pytest.raises(CannotRender, match="use train_on: last_turn"):
        forgets.render(row(TWO_TURNS), "completion")

    assert "".join(learned(marks_last.render(row(TWO_TURNS), "all"))).startswith("til 3</s>")
    assert learned(forgets.render(row(TWO_TURNS), "last_turn")) == ["a list: 0 1 2</s>"]


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
