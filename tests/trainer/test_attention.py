"""Rows laid end to end stay apart, bit for bit, and give what the model's own attention gives."""

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

from sftd_worker.trainer import attention
from sftd_worker.trainer.model import _try_end_to_end

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
        out = model.get_decoder()(
            input_ids=torch.cat(rows)[None], position_ids=positions, row_lengths=lengths, use_cache=False
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
    assert _try_end_to_end(model, torch.device("cpu")) == (True, None)


def test_the_probe_refuses_attention_that_leaks() -> None:
    torch.manual_seed(0)
    attention.register()
    model = MODELS["sliding window"]().eval()
    separate = attention.rows_attention

    def leaking(*args: object, row_lengths: object = None, **options: object) -> object:
        return separate(*args, row_lengths=None, **options)  # type: ignore[arg-type]

    attention.AttentionInterface.register(attention.NAME, leaking)
    try:
        separable, because = _try_end_to_end(model, torch.device("cpu"))
    finally:
        attention.register()

    assert not separable
    assert "influence each other" in (because or "")
    assert model.config._attn_implementation == "sdpa"
