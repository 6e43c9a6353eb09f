"""Rows to tokens: the mask is checked by decoding, bad rows are refused with line, field and remedy."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sftd.protocol import TrainerJob
from sftd.schemas import FailureReason
from sftd_worker.trainer.checkpoint import hash_file
from sftd_worker.trainer.data import Tokenizing, choose_rows, split_by_hash, tokenize_file
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.model import load_tokenizer

Tokenize = Callable[..., Any]


@pytest.fixture
def tokenize(make_job: Callable[..., TrainerJob], tmp_path: Path) -> Tokenize:
    """Tokenise a file (or rows given here) with the small model's tokenizer; returns (table, tokenizer)."""

    def go(source: Path | list[Any], *, train_on: str = "completion", base_model: str | None = None) -> Any:
        path = source
        if isinstance(source, list):
            path = tmp_path / "rows.jsonl"
            path.write_text("\n".join(json.dumps(row) for row in source))
        job = make_job(**({"base_model": base_model} if base_model else {}))
        tokenizer, template, _ = load_tokenizer(job)
        how = Tokenizing(tokenizer, template, train_on)
        cache = tmp_path / "cache"
        return tokenize_file(
            path, sha256=hash_file(path), name=path.name, how=how, cache_dir=cache
        ), tokenizer

    return go


def learned_text(row: dict[str, Any], tokenizer: Any) -> str:
    ids = np.asarray(row["input_ids"])[np.asarray(row["supervised"])]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


@pytest.mark.parametrize("name", ["q_docs.jsonl", "alpaca_en_demo.json"])
def test_real_rows_learn_exactly_their_answers(
    name: str, tokenize: Tokenize, shared_data: Callable[[str], Path]
) -> None:
    path = shared_data(name)
    raw = path.read_text()
    rows = json.loads(raw) if raw.startswith("[") else [json.loads(line) for line in raw.splitlines()]

    table, tokenizer = tokenize(path)

    assert len(table) == len(rows)
    for given, made in zip(rows, table, strict=True):
        answer = given.get("completion", given.get("output"))
        assert learned_text(made, tokenizer) == f"{answer}<|im_end|>"


def test_real_tool_conversations_learn_calls_and_answers(
    tokenize: Tokenize, shared_data: Callable[[str], Path]
) -> None:
    table, tokenizer = tokenize(shared_data("glaive_toolcall_sharegpt.json"))

    for made in table:
        text = learned_text(made, tokenizer)
        assert "<tool_response>" not in text
        assert "<|im_start|>" not in text
        assert text.endswith("<|im_end|>")
    assert "<tool_call>" in learned_text(table[0], tokenizer)


def test_a_text_row_learns_all_of_it_and_its_end(tokenize: Tokenize) -> None:
    table, tokenizer = tokenize([{"text": "x:1 2 3\nsum x"}])

    assert learned_text(table[0], tokenizer) == "x:1 2 3\nsum x<|im_end|>"


def test_prompt_tokens_are_those_that_generation_starts_from(tokenize: Tokenize) -> None:
    row = chat("give me blank lines", "\n\n\nhere")

    table, tokenizer = tokenize([row])

    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)
    ids = list(table[0]["input_ids"])
    start = int(np.argmax(table[0]["supervised"]))
    assert ids[:start] == list(prompt["input_ids"])
    assert learned_text(table[0], tokenizer) == "\n\n\nhere<|im_end|>"


def test_characters_of_several_bytes_are_learned_whole(tokenize: Tokenize) -> None:
    table, tokenizer = tokenize([chat("say é", "é ⍳ 😀 naïve")])

    assert learned_text(table[0], tokenizer) == "é ⍳ 😀 naïve<|im_end|>"


def test_a_model_without_template_gets_chatml_and_learns_the_same_text(
    tokenize: Tokenize, build_model: Callable[..., Path]
) -> None:
    bare = str(build_model(with_template=False))

    table, tokenizer = tokenize([chat("a", "b", "c", "d")], base_model=bare)

    assert learned_text(table[0], tokenizer) == "b<|im_end|>d<|im_end|>"


@pytest.fixture
def begins_with_bos(build_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model without a chat template whose tokenizer puts a token before every text, as Llama's and Gemma's do."""
    tokenizer = AutoTokenizer.from_pretrained(build_model(with_template=False))
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def test_chats_of_a_model_without_template_begin_with_the_token_that_all_its_texts_begin_with(
    tokenize: Tokenize, begins_with_bos: Path
) -> None:
    table, tokenizer = tokenize([chat("a", "b")], base_model=str(begins_with_bos))

    ids = list(table[0]["input_ids"])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert learned_text(table[0], tokenizer) == "b<|im_end|>"


def test_a_text_that_brings_its_first_token_does_not_get_it_twice(
    tokenize: Tokenize, begins_with_bos: Path
) -> None:
    table, tokenizer = tokenize([{"text": "<|endoftext|>a"}, {"text": "a"}], base_model=str(begins_with_bos))

    assert list(table[0]["input_ids"]) == list(table[1]["input_ids"])
    assert list(table[0]["input_ids"]).count(tokenizer.bos_token_id) == 1


def test_bad_rows_are_refused_with_file_line_field_and_remedy(tokenize: Tokenize) -> None:
    rows = [chat("a", "b"), {"messages": [{"role": "user", "content": 3}]}, chat("a", "  ")]

    with pytest.raises(RunFailed) as refused:
        tokenize(rows)

    assert refused.value.reason is FailureReason.BAD_DATA
    assert str(refused.value).splitlines() == [
        "rows.jsonl: line 2, messages[0].content: is a number; it must be a string",
        "rows.jsonl: line 3, messages: is empty: nothing to learn from; fill it or remove the row",
    ]


def test_a_half_written_cache_is_never_used(tokenize: Tokenize, tmp_path: Path) -> None:
    with pytest.raises(RunFailed):
        tokenize([chat("a", "b")] * 600 + [{"messages": 3}])

    assert list((tmp_path / "cache").iterdir()) == []


def test_the_second_reading_comes_from_the_cache_and_another_template_does_not(
    tokenize: Tokenize, tmp_path: Path, build_model: Callable[..., Path]
) -> None:
    tokenize([chat("a", "b")])
    tokenize([chat("a", "b")])
    assert len(list((tmp_path / "cache").iterdir())) == 1

    tokenize([chat("a", "b")], train_on="all")
    tokenize(
        [chat("a", "b")],
        base_model=str(
            build_model(
                template="{{ messages[0].content }}{% for m in messages %}{{ m.content }}{% endfor %}"
            )
        ),
    )

    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_an_entry_of_the_cache_is_touched_when_it_is_used(tokenize: Tokenize, tmp_path: Path) -> None:
    """The server deletes what was used longest ago, and reads are not noted on every file system."""
    tokenize([chat("a", "b")])
    (entry,) = (tmp_path / "cache").iterdir()
    os.utime(entry, (0, 0))

    tokenize([chat("a", "b")])

    assert time.time() - entry.stat().st_mtime < 60


LONG = [chat("a", "b"), chat("a", "word " * 200), chat("word " * 200, "b")]


def test_overlong_rows_are_named_by_default(tokenize: Tokenize) -> None:
    table, _ = tokenize(LONG)

    with pytest.raises(RunFailed, match=r"line 2, row: has \d+ tokens, more than max_seq_length 64; raise"):
        choose_rows(table, name="rows.jsonl", max_seq_length=64, on_overlong="error")


def test_overlong_rows_are_dropped_and_counted_when_asked(tokenize: Tokenize) -> None:
    table, _ = tokenize(LONG)

    rows = choose_rows(table, name="rows.jsonl", max_seq_length=64, on_overlong="drop")

    assert len(rows) == 1
    assert rows.left_out == {"longer than 64 tokens": 2}


def test_a_row_cut_down_to_its_prompt_is_left_out_and_said(tokenize: Tokenize) -> None:
    table, _ = tokenize(LONG)

    rows = choose_rows(table, name="rows.jsonl", max_seq_length=64, on_overlong="truncate")

    assert len(rows) == 2
    assert rows.left_out == {"nothing to learn from after the cut": 1, "(cut, not left out)": 1}
    ids, supervised = rows.row(1)
    assert len(ids) == 64
    assert rows.num_supervised[1] == supervised[1:].sum()


def test_the_split_depends_on_a_rows_content_alone(tokenize: Tokenize) -> None:
    rows = [chat(f"question {i}", f"answer {i}") for i in range(200)]
    table, _ = tokenize(rows)
    _, held_out = split_by_hash(table, 0.2)
    chosen = {rows[i]["messages"][0]["content"] for i in np.flatnonzero(held_out)}

    fewer = rows[50:][::-1]
    table, _ = tokenize(fewer)
    _, held_out = split_by_hash(table, 0.2)

    assert {fewer[i]["messages"][0]["content"] for i in np.flatnonzero(held_out)} == {
        text for text in chosen if int(text.split()[1]) >= 50
    }
    assert 20 < len(chosen) < 60


def test_test_case_translation_is_left_out_when_asked(tokenize: Tokenize) -> None:
    rows = [
        {**chat("a", "b"), "task_type": "translate_test_case"},
        {**chat("c", "d"), "metadata": {"task_type": "q"}},
    ]
    table, _ = tokenize(rows)

    kept = choose_rows(table, name="f", max_seq_length=64, on_overlong="error", skip_test_translation=True)

    assert len(kept) == 1
    assert kept.left_out == {"test-case translation": 1}


def test_a_saved_tokenizer_renders_the_same_chat(build_model: Callable[..., Path]) -> None:
    folder = build_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    text = tokenizer.apply_chat_template(chat("a", "b")["messages"], tokenize=False)

    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
