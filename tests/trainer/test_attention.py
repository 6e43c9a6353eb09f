"""Rows laid end to end stay apart, bit for bit, and give what the model's own attention gives."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from sftd_worker.trainer import attention, cpu_attention
from sftd_worker.trainer.packing import MicroBatch, Prefix, RowLayout, collate
from sftd_worker.trainer.precision import Precision
from sftd_worker.trainer.probe import Apart, try_end_to_end

FP32 = Precision("fp32", "for the test")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MODELS = {
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "softcap and sliding window": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, sliding_window=5, attn_implementation="eager")
    ),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.fixture(params=["in blocks", "row by row"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's own attention, and the one that it takes elsewhere."""
    if request.param == "row by row":
        monkeypatch.setattr(cpu_attention, "fits", lambda query: False)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    attention.register()
    return MODELS[request.param]().eval()


def states(model: torch.nn.Module, rows: list[torch.Tensor], *, end_to_end: bool) -> list[torch.Tensor]:
    with torch.no_grad():
        if not end_to_end:
            return [
                model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows
            ]
        lengths = [len(row) for row in rows]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        layout = RowLayout(tuple(lengths), (None,) * len(lengths), torch.device("cpu"))
        out = model.get_decoder()(
            input_ids=torch.cat(rows)[None], position_ids=positions, row_layout=layout, use_cache=False
        ).last_hidden_state[0]
        return list(torch.split(out, lengths))


def test_end_to_end_gives_what_each_row_gives_alone_under_the_models_own_attention(
    model: torch.nn.Module,
) -> None:
    rows = [torch.randint(0, 97, (n,)) for n in (1, 23, 7, 40)]
    alone = states(model, rows, end_to_end=False)

    model.set_attn_implementation(attention.NAME)
    together = states(model, rows, end_to_end=True)

    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_changing_one_row_changes_no_other_bit(model: torch.nn.Module) -> None:
    rows = [torch.randint(0, 97, (n,)) for n in (9, 23, 7)]
    changed = [rows[0], (rows[1] + 1) % 97, rows[2]]
    model.set_attn_implementation(attention.NAME)

    before, after = states(model, rows, end_to_end=True), states(model, changed, end_to_end=True)

    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_the_probe_accepts_these_models(model: torch.nn.Module) -> None:
    assert try_end_to_end(model, torch.device("cpu"), FP32) == Apart(True, shares_prefixes=True)


def test_a_common_prefix_is_computed_once_and_seen_by_all(model: torch.nn.Module) -> None:
    """Rows longer and shorter than their prefix, two groups, and a row that shares nothing."""
    generator = np.random.default_rng(0)
    long, short = generator.integers(0, 97, 40), generator.integers(0, 97, 17)
    tails = [generator.integers(0, 97, n) for n in (30, 9, 55, 3, 21)]
    starts = [long, long, short, short, np.empty(0, np.int64)]
    rows = [token_row(np.concatenate(pair)) for pair in zip(starts, tails, strict=True)]
    prefixes = [Prefix(0, 40), Prefix(0, 40), Prefix(1, 17), Prefix(1, 17), None]
    alone = states(model, [torch.from_numpy(ids) for ids, _ in rows], end_to_end=False)

    model.set_attn_implementation(attention.NAME)
    batch = collate(rows, device=torch.device("cpu"), prefixes=prefixes)
    parts = own_states(model, batch)

    assert batch.input_ids.shape[1] == sum(len(ids) for ids, _ in rows) - 40 - 17
    for whole, own in zip(alone, parts, strict=True):
        torch.testing.assert_close(whole[-len(own) :], own, rtol=1e-4, atol=1e-5)


def test_rows_with_a_common_prefix_change_no_bit_of_each_other(model: torch.nn.Module) -> None:
    generator = np.random.default_rng(0)
    start = generator.integers(0, 97, 20)
    rows = [np.concatenate([start, generator.integers(0, 97, n)]) for n in (30, 9, 12)]
    changed = [rows[0], np.concatenate([start, (rows[1][20:] + 1) % 97]), rows[2]]
    model.set_attn_implementation(attention.NAME)

    def computed(of: list[np.ndarray]) -> list[torch.Tensor]:
        batch = collate(
            [token_row(ids) for ids in of], device=torch.device("cpu"), prefixes=[Prefix(0, 20)] * 3
        )
        return own_states(model, batch)

    before, after = computed(rows), computed(changed)

    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def own_states(model: torch.nn.Module, batch: MicroBatch) -> list[torch.Tensor]:
    """Of each row, without the prefix that it shares."""
    assert batch.layout is not None
    with torch.no_grad():
        out = model.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            row_layout=batch.layout,
            use_cache=False,
        )
    return list(torch.split(out.last_hidden_state[0], list(batch.layout.lengths)))


def token_row(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids, np.ones(len(ids), dtype=bool)


def test_the_probe_refuses_attention_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention.register()
    model = MODELS["sliding window"]().eval()
    separate = attention.rows_attention

    def leaking(*args: object, row_layout: object = None, **options: object) -> object:
        return separate(*args, row_layout=None, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "rows_attention", leaking)
    found = try_end_to_end(model, torch.device("cpu"), FP32)

    assert not found.end_to_end
    assert "influence each other" in (found.because or "")
    assert model.config._attn_implementation == "sdpa"


def test_a_scaling_that_is_learned_is_refused() -> None:
    """A number would be taken out of it, and its gradient lost."""
    states = torch.zeros(1, 2, 3, 4)
    scaling: Any = torch.ones(1, requires_grad=True)

    with pytest.raises(attention.NotSeparable, match="not a number"):
        attention.rows_attention(torch.nn.Module(), states, states, states, None, scaling=scaling)
