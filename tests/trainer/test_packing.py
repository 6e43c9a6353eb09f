"""Layouts of rows, and beginnings that rows have in common: computed once, at the same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.harness import Q_BASICS, Finished
from tests.trainer.test_equivalence import assert_same_run

from sftd_worker.trainer import packing as packing_module
from sftd_worker.trainer.packing import Prefix, TokenRow, collate, find_prefixes, lay_out

RunJob = Callable[..., Finished]


@pytest.mark.parametrize("packing", [True, False])
def test_a_layout_holds_every_row_once(packing: bool) -> None:
    lengths = [5, 90, 30, 30, 64, 1, 100, 7]

    layout = lay_out(lengths, batch_size=3, max_tokens=100, packing=packing)

    assert sorted(i for group in layout for i in group) == list(range(8))
    if packing:
        assert all(sum(lengths[i] for i in group) <= 100 for group in layout)
        assert len(layout) == 4  # 327 tokens do not fit into three bins of 100
    else:
        assert [len(group) for group in layout] == [3, 3, 2]


def test_a_row_longer_than_a_bin_stands_alone() -> None:
    assert lay_out([10, 500], batch_size=1, max_tokens=100, packing=True) == [[1], [0]]


def test_rows_with_a_common_prefix_go_together_and_cost_less() -> None:
    a, b = Prefix(0, 50), Prefix(1, 50)

    layout = lay_out([75, 75, 75, 75], batch_size=1, max_tokens=100, packing=True, prefixes=[a, b, a, b])

    assert layout == [[0, 2], [1, 3]]


def row(start: list[int], end: list[int], *, learned: int) -> TokenRow:
    """The last `learned` tokens are supervised."""
    ids = np.array(start + end, dtype=np.int64)
    return ids, np.arange(len(ids)) >= len(ids) - learned


def test_prefixes_end_before_the_token_that_predicts_the_first_learned_one() -> None:
    start = list(range(30))

    found = find_prefixes([row(start, [1, 2, 3], learned=2), row(start, [1, 2, 4], learned=2)])

    assert found[0] == found[1]
    assert found[0] is not None
    assert found[0].length == 30  # 31 tokens are unlearned, the last of which predicts the first learned one


def test_groups_are_chosen_for_what_they_save() -> None:
    long, short = list(range(100, 160)), list(range(20))
    rows = [
        row(short + long, [1, 2], learned=1),
        row(short, [7, 7, 7, 1], learned=1),
        row(short + long, [3, 4], learned=1),
        row([9] * 40, [1, 2], learned=1),
    ]

    found = find_prefixes(rows)

    assert found[0] is not None
    assert found[0] == found[2]
    assert found[0].length == 80  # not 20 for all three
    assert found[1] is None
    assert found[3] is None


def test_few_common_tokens_are_not_worth_it() -> None:
    assert find_prefixes([row([1] * 10, [2, 3], learned=1), row([1] * 10, [4, 5], learned=1)]) == [None, None]


def test_no_row_is_cut_where_everything_is_learned() -> None:
    rows = [row([], list(range(40)), learned=40)] * 2

    assert find_prefixes(rows) == [None, None]


def test_targets_and_positions_of_a_shared_row_are_those_of_the_whole_row() -> None:
    rows = [row(list(range(20)), [50, 51, 52], learned=2), row(list(range(20)), [60, 61], learned=1)]

    batch = collate(rows, device=torch.device("cpu"), prefixes=find_prefixes(rows))

    assert batch.input_ids.tolist() == [[*range(20), 50, 51, 52, 60, 61]]
    assert batch.position_ids.tolist() == [[*range(23), 20, 21]]
    assert batch.targets.tolist() == [51, 52, 61]
    assert [batch.input_ids[0, i].item() for i in batch.predict_at] == [50, 51, 60]


def with_system_prompt(tmp_path: Path) -> Path:
    """The example rows as chats, under one of two long system prompts or none."""
    prompts = ["You write q. " * 12, "Answer in one line of q, and nothing else. " * 6, None]
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for number, line in enumerate(Q_BASICS.read_text().splitlines()):
            messages = json.loads(line)["messages"]
            system = prompts[number % 3]
            if system:
                messages = [{"role": "system", "content": system}, *messages]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_with_common_prefixes_is_the_run_without(
    method: str,
    run_job: RunJob,
    tiny: Path,
    first_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec: dict[str, Any] = {
        "method": method,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "validation_split": 0.1,
        "lora": {"rank": 4, "dropout": 0.0},
        "job": {
            "training_path": str(with_system_prompt(tmp_path)),
            "adapter_path": str(first_adapter) if method == "lora" else None,
        },
    }
    computed: list[int] = []
    real = packing_module.collate

    def counting(*args: Any, **options: Any) -> Any:
        batch = real(*args, **options)
        computed.append(batch.input_ids.numel())
        return batch

    monkeypatch.setattr("sftd_worker.trainer.model.collate", counting)
    shared = run_job("shared", **spec)
    with_sharing = sum(computed)
    computed.clear()
    monkeypatch.setattr("sftd_worker.trainer.model.find_prefixes", lambda rows: [None] * len(rows))
    apart = run_job("apart", **spec)

    assert with_sharing < 0.8 * sum(computed)
    assert shared.values("tokens_seen") == apart.values("tokens_seen")
    assert_same_run(apart, shared, tiny if method == "full" else first_adapter)
