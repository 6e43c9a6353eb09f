"""Every accepted format becomes messages; every mistake is told with line, field and remedy."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftd import rows
from sftd.rows import Row, RowsInvalid, check_file, is_test_translation, read_rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def go(*rows: Any, array: bool = False) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(list(rows)) if array else "\n".join(json.dumps(row) for row in rows))
        return path

    return go


def one(path: Path) -> Row:
    (row,) = read_rows(path, name="data.jsonl")
    return row


def roles(row: Row) -> list[str]:
    assert row.messages is not None
    return [message["role"] for message in row.messages]


def test_messages_keep_weights_and_tools(write: Callable[..., Path]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = one(
        write(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    },
                    {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
                    {"role": "tool", "content": "1", "tool_call_id": "c1"},
                    {"role": "assistant", "content": "done"},
                ],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            }
        )
    )

    assert row.weights == [0, 0, 0, 1]
    assert row.messages is not None
    assert row.messages[0]["content"] == "ab"
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_prompt_messages_are_context_and_completion_messages_are_learned(write: Callable[..., Path]) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]

    row = one(write({"prompt": chat, "completion": [{"role": "assistant", "content": "d"}]}))

    assert row.weights == [0, 0, 0, 1]


def test_instruction_joins_its_input_and_keeps_history(write: Callable[..., Path]) -> None:
    row = one(
        write({"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]]})
    )

    assert roles(row) == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages is not None
    assert row.messages[3]["content"] == "add\n\n1 2"


def test_sharegpt_reads_calls_observations_and_tools_written_as_text(write: Callable[..., Path]) -> None:
    row = one(
        write(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f", "parameters": {}}]',
            }
        )
    )

    assert roles(row) == ["user", "assistant", "tool", "assistant"]
    assert row.weights == [0, 1, 0, 1]
    assert row.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_text_is_kept_as_it_is(write: Callable[..., Path]) -> None:
    assert one(write({"text": " raw "})).text == " raw "


def test_an_array_and_lines_give_the_same_rows(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]

    from_lines = [row.digest for row in read_rows(write(*rows), name="f")]
    from_array = [row.digest for row in read_rows(write(*rows, array=True), name="f")]

    assert from_lines == from_array


def test_a_byte_order_mark_and_blank_lines_are_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n')

    assert [row.line for row in read_rows(path, name="f")] == [1, 3]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "line 1, file: is empty"),
        (b"\n \n", "line 1, file: is empty"),
        (b'{"text": "a"}\n\xff\xfe', "line 2, row: is not UTF-8 (byte 1 of it)"),
        (b'{"text": "a"}\nnot json', "line 2, row: is not JSON"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[1]", "item 1, row: is a number, not an object"),
        (b"3", "line 1, row: is a number, not an object"),
        (b'{"query": 1}', "has no known format (fields found: query); accepted are: messages"),
        (
            b'{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            "line 2, row: has the format prompt_completion, the rows",
        ),
        (b'{"text": ""}', "text: is empty: nothing to learn from"),
        (b'{"text": 3}', "text: is a number; it must be a string"),
        (b'{"messages": []}', "messages: is an empty list"),
        (b'{"messages": "hi"}', "messages: is a string; it must be a list"),
        (b'{"messages": ["hi"]}', "messages[0]: is a string, not an object"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role: is 'bot'; it must be one of"),
        (
            b'{"messages": [{"role": ["user"], "content": "a"}]}',
            "messages[0].role: is ['user']; it must be one",
        ),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content: is missing or null"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "ends with a user message"),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
            "no assistant message of weight 1: nothing to learn from",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
            "weight: is 0.5; it must be 0",
        ),
        (b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "weight: is 1 on a user message"),
        (b'{"prompt": "a", "completion": " "}', "completion: is empty: nothing to learn from"),
        (b'{"instruction": "a", "output": ""}', "output: is empty: nothing to learn from"),
        (b'{"instruction": "a", "output": null}', "output: is missing or null"),
        (b'{"conversations": [{"from": "x", "value": "a"}]}', "conversations[0].from: is 'x'"),
        (
            b'{"conversations": [{"from": "function_call", "value": "f()"}]}',
            "conversations[0].value: is not JSON",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]}',
            "messages[0].tool_calls[0].function.arguments: is not JSON",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '
            b'"{\\"a\\": NaN}"}}]}]}',
            "function.arguments: is not JSON",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '
            b'"{\\"a\\": \\"\\\\ud800\\"}"}}]}]}',
            "function.arguments: holds half of a surrogate pair",
        ),
        (b'{"prompt": "a", "completion": "b", "tools": "{"}', "tools: is not JSON"),
    ],
)
def test_every_mistake_names_line_field_and_remedy(raw: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(raw)

    with pytest.raises(RowsInvalid) as invalid:
        check_file(path, name="f.jsonl")

    assert problem in str(invalid.value)
    assert str(invalid.value).startswith("f.jsonl: ")


def test_a_row_that_is_too_long_is_passed_over_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd.rows.MAX_ROW_BYTES", 100)
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"text": "x" * 500}) + "\n" + json.dumps({"text": 1}))

    with pytest.raises(RowsInvalid) as invalid:
        check_file(path, name="f")

    assert [(p.line, p.field) for p in invalid.value.problems] == [(1, "row"), (2, "text")]


def test_all_mistakes_are_counted_and_the_first_are_told(write: Callable[..., Path]) -> None:
    with pytest.raises(RowsInvalid) as invalid:
        check_file(write(*[{"text": 1}] * 50), name="f")

    assert invalid.value.num_problems == 50
    assert len(invalid.value.problems) == 20
    assert str(invalid.value).endswith("and 30 more")


@pytest.mark.parametrize(
    ("name", "form", "rows"),
    [
        ("q_docs.jsonl", "prompt_completion", 2088),
        ("alpaca_en_demo.json", "instruction", 999),
        ("glaive_toolcall_sharegpt.json", "sharegpt", 300),
    ],
)
def test_real_files_are_read(name: str, form: str, rows: int, shared_data: Callable[[str], Path]) -> None:
    summary = check_file(shared_data(name), name=name)

    assert (summary.format, summary.num_rows) == (form, rows)


@pytest.mark.parametrize(
    ("task", "is_translation"),
    [
        ("translate_test_case", True),
        ("test-case translation", True),
        ("python_test_to_q_test", True),
        ("write_code", False),
        ("python_to_q", False),
        ("run_tests", False),
    ],
)
def test_test_translation_is_known_by_its_words(task: str, is_translation: bool) -> None:
    assert is_test_translation(task) is is_translation


def test_an_array_is_read_item_by_item_wherever_a_piece_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["é\u2028\U0001f600", 'a"]},{"', "x" * 40, "\\"]
    whole = json.dumps([{"text": text, "n": 12345.5e-3} for text in texts], ensure_ascii=False, indent=1)
    path = tmp_path / "f.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + whole.encode() + b" \n")

    for num_bytes in range(1, 30):
        monkeypatch.setattr(rows, "READ_BYTES", num_bytes)
        assert [(row.line, row.text) for row in read_rows(path, name="f")] == list(enumerate(texts, start=1))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"[]", "item 1, file: is empty"),
        (b"[", "item 1, row: is not JSON (Expecting value)"),
        (b'[{"text": "a"}', "item 1, file: is not a JSON array: ',' was expected here, not ''"),
        (b'[{"text": "a"} {"text": "b"}]', "item 1, file: is not a JSON array: ',' was expected here"),
        (b'[{"text": "a"},]', "item 2, row: is not JSON"),
        (b'[{"text": "a"}] x', "item 1, file: is not a JSON array: nothing may follow it"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "file: is not UTF-8 (byte 27 of it)"),
        (b'[{"text": "a"}, {"text": "\xe2\x80', "file: is not UTF-8 (byte 27 of it)"),
        (b'[{"text": "a"}, {"text": "\\ud800"}, 3]', "item 3, row: is a number"),
        (b'[{"text": "a"}, NaN]', "NaN is not JSON"),
        (b'[{"n": ' + b"9" * 5000 + b"}]", "item 1, row: is not JSON"),
    ],
)
def test_what_is_wrong_with_an_array_is_told_with_the_item(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(raw)

    with pytest.raises(RowsInvalid) as raised:
        check_file(path, name="f")

    assert problem in str(raised.value)


def test_a_large_array_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b'[{"text": "a"}' + b', {"text": "a"}' * 300_000 + b"]")

    tracemalloc.start()
    try:
        assert check_file(path, name="f").num_rows == 300_001
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 2 * path.stat().st_size + 4 * 1024**2
