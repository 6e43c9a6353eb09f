"""The edges of a run, through its entry point: which tokens carry the loss, rows that are too long, empty or very short,
last steps that are short, lengths of runs, and evaluations; against plain transformers, row by row."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.rows import order_of_rows
from tests.trainer.comparison import assert_same_movement, assert_same_series, saved_weights
from tests.trainer.harness import Finished
from tests.trainer.reference import IGNORED, Example, Score, score_one_by_one
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftd.protocol import TrainerJob

RunJob = Callable[..., Finished]
Piece = tuple[str, bool]  # text, is it learned

# The first step is at rate 0: the second one still sees the weights of the base.
FIELDS: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "warmup_steps": 10, "max_steps": 1}


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write training rows (and validation rows); returns the job's fields that name them."""

    def write(training: Sequence[Any], validation: Sequence[Any] | None = None) -> dict[str, str]:
        fields = {}
        for name, rows in (("training", training), ("validation", validation)):
            if rows is not None:
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                fields |= {f"{name}_path": str(path), f"{name}_name": path.name}
        return fields

    return write


@pytest.fixture
def plain(tiny: Path) -> Callable[..., Score]:
    """Score examples with plain transformers: the base, or the weights of a folder."""

    def score(examples: Sequence[Example], folder: Path = tiny) -> Score:
        return score_one_by_one(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), examples)

    return score


@pytest.fixture
def example(tiny: Path) -> Callable[..., Example]:
    """A row from pieces of text, each learned or not; cut to `cut` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def make(*pieces: Piece, cut: int | None = None) -> Example:
        ids, labels = [], []
        for text, learned in pieces:
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learned else [IGNORED] * len(part)
        return Example(ids[:cut], labels[:cut])

    return make


def chat(*turns: str, weights: Sequence[int] | None = None) -> dict[str, Any]:
    """A conversation that the user begins; `weights` of the assistant's turns."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    for message, weight in zip(messages[1::2], weights or [], strict=False):
        message["weight"] = weight
    return {"messages": messages}


def pieces_of(*turns: str) -> list[Piece]:
    """The ChatML of a conversation, each answer and its end learned."""
    pieces = []
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        pieces += [
            (f"<|im_start|>{role}\n", False),
            (f"{turn}<|im_end|>", role == "assistant"),
            ("\n", False),
        ]
    return pieces


def assert_step(run: Finished, step: int, expected: Score) -> None:
    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    assert run.values("supervised_tokens")[step] == expected.num_tokens
    assert run.values("loss")[step] == pytest.approx(expected.loss, rel=1e-6)
    assert run.values("grad_norm")[step] == pytest.approx(expected.grad_norm, rel=1e-5)


# ---------------------------------------------------------------- which tokens carry the loss

TURNS = ("sum of 1 2 3?", "6, by `sum`", "and of 4 5?", "9", "thanks", "you are welcome")


@pytest.mark.parametrize(
    ("train_on", "weights", "learned"),
    [
        ("completion", None, [4, 10, 16]),
        ("last_turn", None, [16]),
        ("all", None, list(range(18))),
        ("completion", [1, 0, 1], [4, 16]),
        ("completion", [0, 1, 0], [10]),
        ("last_turn", [1, 1, 0], [10]),
        ("all", [0, 0, 1], list(range(18))),
    ],
)
def test_the_loss_is_that_of_the_tokens_asked_for(
    train_on: str,
    weights: list[int] | None,
    learned: list[int],  # of the pieces of the conversation
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    pieces = [(text, i in learned) for i, (text, _) in enumerate(pieces_of(*TURNS))]

    run = run_job(**FIELDS, train_on=train_on, job=files([chat(*TURNS, weights=weights)]))

    assert_step(run, 1, plain([example(*pieces)]))


# ---------------------------------------------------------------- rows that are too long, empty or very short

LONG = "word " * 100
MIXED = [chat("a", "b"), chat("c", LONG), chat(LONG, "d"), chat("e", "f g h")]


def test_rows_that_are_too_long_are_named_by_default(
    run_job: RunJob, files: Callable[..., dict[str, str]]
) -> None:
    run = run_job(**FIELDS, max_seq_length=64, job=files(MIXED))

    assert run.end is not None
    assert run.end.reason == "bad_data"
    first, second = (run.end.message or "").splitlines()
    assert first.startswith("training.jsonl: line 2, row: has ")
    assert second.startswith("training.jsonl: line 3, row: has ")
    assert first.endswith("max_seq_length 64; raise max_seq_length, shorten the row, or set on_overlong to "
                          "truncate or drop")  # fmt: skip


def test_dropped_rows_are_counted_said_and_not_trained_on(
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    run = run_job(**FIELDS, max_seq_length=64, on_overlong="drop", job=files(MIXED, MIXED[1:]))

    assert "2 rows to train on, 1 to evaluate on" in run.log
    assert "left out: 2 longer than 64 tokens" in run.log
    assert "left out of the evaluation: 2 longer than 64 tokens" in run.log
    assert_step(run, 1, plain([example(*pieces_of("a", "b")), example(*pieces_of("e", "f g h"))]))


def test_cut_rows_are_counted_and_those_cut_down_to_their_prompt_left_out(
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    run = run_job(**FIELDS, max_seq_length=64, on_overlong="truncate", job=files(MIXED))

    assert "3 rows to train on" in run.log
    assert "1 nothing to learn from after the cut" in run.log
    kept = [pieces_of("a", "b"), pieces_of("c", LONG), pieces_of("e", "f g h")]
    assert_step(run, 1, plain([example(*pieces, cut=64) for pieces in kept]))


def test_a_file_that_the_cut_leaves_nothing_of_is_refused(
    run_job: RunJob, files: Callable[..., dict[str, str]]
) -> None:
    run = run_job(**FIELDS, max_seq_length=64, on_overlong="truncate", job=files([chat(LONG, "d")] * 3))

    assert run.end is not None
    assert run.end.reason == "bad_data"
    assert "no row is left to use; left out: 3 nothing to learn from after the cut" in (run.end.message or "")


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"instruction": "a", "output": " \n"}, "output"),
        (chat("a", ""), "messages"),
        (chat("a", "b", weights=[0]), "messages"),
        ({"text": ""}, "text"),
        ({"text": "<|im_end|>"}, "text"),  # one token in all: nothing comes before it
    ],
    ids=str,
)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_a_row_with_nothing_to_learn_is_refused_by_line_and_field(
    row: dict[str, Any], where: str, train_on: str, run_job: RunJob, files: Callable[..., dict[str, str]]
) -> None:
    good = {name: value or "b" for name, value in row.items()} if "messages" not in row else chat("a", "b")
    good = {"text": "a b"} if "text" in row else good

    run = run_job(**FIELDS, train_on=train_on, job=files([good, row]))

    assert run.end is not None
    assert run.end.reason == "bad_data", run.log
    assert f"training.jsonl: line 2, {where}" in (run.end.message or "")
    assert "remove the row" in (run.end.message or "")


@pytest.mark.parametrize("packing", [True, False])
def test_rows_with_one_token_to_learn_count_as_much_as_any_token(
    packing: bool,
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    texts = ["a", "b", "x: 1 2 3; the sum of x and its mean", "c"]
    rows = [example((f"{text}<|im_end|>", True)) for text in texts]
    assert [len(row.input_ids) for row in rows if len(row.input_ids) > 2] == [len(rows[2].input_ids)]

    run = run_job(**FIELDS, packing=packing, job=files([{"text": text} for text in texts]))

    assert_step(run, 1, plain(rows))


def test_rows_cut_to_two_tokens_are_trained_on(
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    """The shortest max_seq_length that there is."""
    texts = ["first second third", "1 2 3 4 5", "a"]

    run = run_job(
        **FIELDS, max_seq_length=2, on_overlong="truncate", job=files([{"text": text} for text in texts])
    )

    assert_step(run, 1, plain([example((f"{text}<|im_end|>", True), cut=2) for text in texts]))


# ---------------------------------------------------------------- how long a run is

SEVEN = [chat(f"row {i}", "word " * (1 + 5 * i)) for i in range(7)]  # no two of the same length


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_rows", [5, 7])
def test_a_short_last_step_is_the_mean_over_its_own_tokens(
    num_rows: int,
    packing: bool,
    make_job: Callable[..., TrainerJob],
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    """Two by two rows a step: one row is left, or three."""
    fields = {**FIELDS, "max_steps": None, "num_epochs": 1.0, "batch_size": 2, "packing": packing}
    fields["job"] = files(SEVEN[:num_rows])
    turns = [[message["content"] for message in row["messages"]] for row in SEVEN]
    order = order_of_rows(make_job(**fields), num_rows)

    run = run_job(**fields)

    assert len(run.values("loss")) == 2
    assert_step(run, 1, plain([example(*pieces_of(*turns[i])) for i in order[:4]]))
    assert_step(run, 2, plain([example(*pieces_of(*turns[i])) for i in order[4:]]))


@pytest.mark.parametrize(("num_epochs", "steps"), [(0.1, 1), (1.0, 2), (1.5, 3), (2.6, 6), (3.0, 6)])
def test_epochs_are_so_many_steps(
    num_epochs: float,
    steps: int,
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    tiny: Path,
) -> None:
    fields = {**FIELDS, "batch_size": 2, "warmup_steps": 0, "job": files(SEVEN[:5])}

    by_epochs = run_job("epochs", **{**fields, "max_steps": None, "num_epochs": num_epochs})
    by_steps = run_job("steps", **{**fields, "max_steps": steps})

    assert by_epochs.end is not None
    assert by_epochs.end.outcome == "succeeded", by_epochs.end.message
    for name in ("loss", "learning_rate", "grad_norm", "epoch", "tokens"):
        assert by_epochs.values(name) == by_steps.values(name)
    assert len(by_steps.values("loss")) == steps
    one, other = (saved_weights(run.folder / "results") for run in (by_epochs, by_steps))
    assert_same_movement(one, other, saved_weights(tiny), rtol=0.0, mean_rtol=0.0)


def test_a_warm_up_longer_than_the_run_never_ends_and_is_said(
    run_job: RunJob, files: Callable[..., dict[str, str]]
) -> None:
    run = run_job(**{**FIELDS, "max_steps": 4, "warmup_steps": 100}, job=files(SEVEN))

    assert run.values("learning_rate") == pytest.approx({1: 0.0, 2: 1e-5, 3: 2e-5, 4: 3e-5})
    assert "the warm-up (100 steps) is as long as the run (4): learning_rate is never reached" in run.log


def test_each_of_many_epochs_sees_each_row_once(
    run_job: RunJob, files: Callable[..., dict[str, str]], example: Callable[..., Example]
) -> None:
    fields = {**FIELDS, "max_steps": 16, "batch_size": 1, "gradient_accumulation_steps": 1}
    lengths = [
        len(example(*pieces_of(*(message["content"] for message in row["messages"]))).input_ids)
        for row in SEVEN[:5]
    ]

    run = run_job(**fields, job=files(SEVEN[:5]))

    tokens = list(run.values("tokens").values())
    epochs = [tokens[start : start + 5] for start in (0, 5, 10)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(lengths)] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1  # not always in the same order
    assert tokens[15] in lengths
    assert run.values("epoch")[16] == pytest.approx(3.2)


# ---------------------------------------------------------------- evaluation

UNEVEN = [chat("q", "word " * n) for n in (1, 2, 3, 5, 80, 160)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_evaluation_is_over_tokens_from_the_base_on(
    method: str,
    packing: bool,
    run_job: RunJob,
    files: Callable[..., dict[str, str]],
    example: Callable[..., Example],
    plain: Callable[..., Score],
) -> None:
    """Not a mean of means: that would be another number, as the rows' lengths differ so much.

    transformers' Trainer gives the mean of its batches' losses, which depends on the batch size.
    """
    rows = [example(*pieces_of("q", row["messages"][1]["content"])) for row in UNEVEN]
    fields = {**FIELDS, "method": method, "packing": packing, "max_steps": 6, "warmup_steps": 0}

    run = run_job(**{**fields, "learning_rate": 1e-2, "eval_steps": 100}, job=files(SEVEN, UNEVEN))

    first, last = run.evaluations()
    base = plain(rows)
    assert first["num_tokens"] == base.num_tokens
    assert first["eval_loss"] == pytest.approx(base.loss, rel=1e-6)
    assert first["token_accuracy"] == base.accuracy
    assert first["perplexity"] == pytest.approx(math.exp(first["eval_loss"]), rel=1e-12)
    trained = plain(rows, run.folder / "results")
    assert last["eval_loss"] == pytest.approx(trained.loss, rel=1e-6)
    assert 0 < last["token_accuracy"] == trained.accuracy < 1
    assert last["eval_loss"] < first["eval_loss"]
    mean_of_means = sum(plain([row], run.folder / "results").loss for row in rows) / len(rows)
    assert abs(mean_of_means / trained.loss - 1) > 1e-3


def test_a_split_that_leaves_a_single_row_evaluates_that_row(run_job: RunJob) -> None:
    run = run_job(**FIELDS, validation_split=0.005)

    assert ", 1 to evaluate on" in run.log
    assert all(math.isfinite(evaluation["eval_loss"]) for evaluation in run.evaluations())


# ---------------------------------------------------------------- memory


class Widest(TorchDispatchMode):
    """The most rows of logits that any operation made at once, forward or backward."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.ndim and made.shape[-1] == self.vocab_size:
                rows = made.numel() // self.vocab_size
                if rows != self.hidden_size:  # the head's weight, transposed
                    self.rows = max(self.rows, rows)
        return result


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_more_logits_than_a_chunk_are_ever_held(
    method: str, run_job: RunJob, files: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**FIELDS, "method": method, "max_steps": 2, "eval_steps": 1, "warmup_steps": 0}
    job = files(UNEVEN, UNEVEN)
    with Widest(vocab_size=1024, hidden_size=64) as wide:
        whole = run_job("whole", **fields, job=job)
    monkeypatch.setattr("sftd_worker.trainer.loss.CHUNK_LOGITS", 16 * 1024)  # 16 positions of 1024 logits

    with Widest(vocab_size=1024, hidden_size=64) as widest:
        chunked = run_job("chunked", **fields, job=job)

    assert chunked.end is not None
    assert chunked.end.outcome == "succeeded", chunked.end.message
    assert 0 < widest.rows <= 16 < wide.rows
    for name in ("loss", "grad_norm", "eval_loss", "eval_token_accuracy"):
        one, other = (list(run.values(name).values()) for run in (whole, chunked))
        assert_same_series(name, one, other, rtol=1e-5, mean_rtol=2e-6)


def test_rows_that_spell_out_control_tokens_are_counted_and_said(
    run_job: RunJob, files: Callable[..., dict[str, str]], tiny: Path
) -> None:
    end = AutoTokenizer.from_pretrained(tiny).eos_token
    rows = [{"prompt": "a", "completion": f"b{end}"}, {"prompt": "c", "completion": "d"}]

    assert "control tokens" not in run_job(**FIELDS, job=files(rows[1:])).log
    run = run_job(**FIELDS, job=files(rows))

    assert "1 of 2 training rows spell out control tokens of the model" in run.log
