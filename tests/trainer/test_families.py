"""Models of many families, each tiny and random, through the trainer's own loading path: rows laid end to end where the
model can keep them apart, padded with a reason where it cannot, and right both ways.

One model for each way in which attention knows positions, windows and experts, and some that carry state from token to
token. What is right is what plain transformers finds on each row alone.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.comparison import assert_same_movement, assert_same_series, saved_weights
from tests.trainer.harness import Finished
from tests.trainer.reference import examples_of, load_plain, score_one_by_one
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertGenerationConfig,
    BloomConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

IDS: dict[str, Any] = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LIKE_LLAMA: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
OLDER: dict[str, Any] = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LIKE_LLAMA),
    "mistral": lambda: MistralConfig(**LIKE_LLAMA, sliding_window=7),
    "gemma2": lambda: Gemma2Config(**LIKE_LLAMA, head_dim=8, sliding_window=7),
    "gemma3": lambda: Gemma3TextConfig(
        **LIKE_LLAMA, head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(
        **IDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "opt": lambda: OPTConfig(
        **OLDER, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=512
    ),
    "bloom": lambda: BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2),
    "gpt_neox": lambda: GPTNeoXConfig(**OLDER, intermediate_size=64, rotary_pct=0.25),
    "phi": lambda: PhiConfig(**{**LIKE_LLAMA, "num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "falcon": lambda: FalconConfig(**OLDER),
    "falcon alibi": lambda: FalconConfig(**OLDER, alibi=True),
    "mixtral": lambda: MixtralConfig(**LIKE_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LIKE_LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **LIKE_LLAMA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=0,
    ),
    "llama4": lambda: Llama4TextConfig(
        **LIKE_LLAMA,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=32,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **LIKE_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=7
    ),
    "mamba": lambda: MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: Mamba2Config(
        **IDS,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        chunk_size=16,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **LIKE_LLAMA,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: Lfm2Config(**LIKE_LLAMA, layer_types=["conv", "full_attention"]),
    "jamba": lambda: JambaConfig(
        **LIKE_LLAMA,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "falcon_h1": lambda: FalconH1Config(
        **LIKE_LLAMA,
        head_dim=8,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
}

BY_ITSELF = r"its attention cannot be kept apart \(the model computes it by itself and takes no other\)"
CARRIES_STATE = r"it has layers of the kind \w+, which are not known to keep rows apart"
HIDDEN_WINDOW = r"its attention cannot be kept apart \(its window of 32 tokens is in a mask alone\)"
PADDED_BECAUSE = {
    "bloom": BY_ITSELF,
    "mpt": BY_ITSELF,
    "falcon": BY_ITSELF,
    "falcon alibi": BY_ITSELF,
    "qwen2_moe": HIDDEN_WINDOW,
    "llama4": CARRIES_STATE,
    "gpt_oss": r"its attention cannot be kept apart \(the attention option s_aux\)",
    "mamba": CARRIES_STATE,
    "mamba2": CARRIES_STATE,
    "qwen3_next": CARRIES_STATE,
    "lfm2": CARRIES_STATE,
    "jamba": CARRIES_STATE,
    "falcon_h1": CARRIES_STATE,
}
# An expert multiplies as many rows at once as tokens are sent to it, and how a product is rounded depends on that.
EXPERTS = {"mixtral", "qwen2_moe", "llama4", "qwen3_moe", "gpt_oss", "qwen3_next", "jamba"}

FIELDS: dict[str, Any] = {
    "method": "full",
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "max_steps": 3,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "save_steps": 100,
}
ONE_BY_ONE = {"batch_size": 1, "gradient_accumulation_steps": 6, "packing": False}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of a family, made once."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():  # as drawn, attention hardly matters to the loss
                    parameter.add_(0.05 * torch.randn_like(parameter))
            made[name] = tmp_path_factory.mktemp("family") / "base"
            model.save_pretrained(made[name])
            AutoTokenizer.from_pretrained(tiny).save_pretrained(made[name])
        return made[name]

    return base


@pytest.fixture
def texts(tmp_path: Path) -> Callable[[Sequence[str]], dict[str, str]]:
    """Write rows of raw text, which have no beginning in common; returns the job's fields that name them."""

    def write(rows: Sequence[str]) -> dict[str, str]:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        return {"training_path": str(path), "training_name": path.name}

    return write


ROWS = [f"{word} " * length for word, length in zip("abcdef", (3, 40, 1, 17, 60, 9), strict=True)]


def test_a_run_is_what_each_row_gives_alone_and_says_why_it_is_padded(
    family: str,
    bases: Callable[[str], Path],
    texts: Callable[..., dict[str, str]],
    run_job: Callable[..., Finished],
    make_job: Callable[..., Any],
) -> None:
    fields = {**FIELDS, "base_model": str(bases(family)), "job": texts(ROWS)}
    job = make_job("plain", **fields)
    expected = score_one_by_one(load_plain(job), examples_of(job))

    together = run_job("together", **fields)
    alone = run_job("alone", **{**fields, **ONE_BY_ONE})

    said = [line for line in together.log.splitlines() if line.startswith("packing is off")]
    assert len(said) == (family in PADDED_BECAUSE)
    for line in said:
        because = PADDED_BECAUSE[family]
        assert re.fullmatch(f"packing is off for this model: {because}; rows are padded instead", line)
    for run in (together, alone):
        assert run.end is not None
        assert run.end.outcome == "succeeded", run.end.message
        assert run.values("loss")[1] == pytest.approx(expected.loss, rel=1e-6)
        assert run.values("grad_norm")[1] == pytest.approx(expected.grad_norm, rel=1e-5)
    for name in ("loss", "grad_norm"):
        one, other = (list(run.values(name).values()) for run in (together, alone))
        assert_same_series(name, one, other, rtol=5e-6, mean_rtol=1e-6)
    ours, theirs, initial = (
        {name: value for name, value in saved_weights(folder).items() if not _has_no_gradient(name)}
        for folder in (together.folder / "results", alone.folder / "results", bases(family))
    )
    assert_same_movement(ours, theirs, initial, rtol=1e-3, mean_rtol=1e-4)


def test_a_random_model_that_computes_attention_by_itself_is_padded_too(
    texts: Callable[..., dict[str, str]], run_job: Callable[..., Finished], tiny: Path, tmp_path: Path
) -> None:
    """As drawn it leaks too little to be told from rounding: that it leaks is told from how it is made."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(FAMILIES["bloom"](), dtype=torch.float32).save_pretrained(
        tmp_path / "base"
    )
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")

    run = run_job(**{**FIELDS, "max_steps": 1, "base_model": str(tmp_path / "base"), "job": texts(ROWS)})

    assert re.search(BY_ITSELF, run.log)


@pytest.mark.parametrize(
    "config",
    [
        lambda: Gemma3TextConfig(**LIKE_LLAMA, head_dim=8, use_bidirectional_attention=True),
        lambda: BertGenerationConfig(**OLDER, intermediate_size=64),
    ],
    ids=["gemma3 made bidirectional", "bert"],
)
def test_a_model_whose_tokens_see_the_ones_to_come_is_refused(
    config: Callable[[], PreTrainedConfig], run_job: Callable[..., Finished], tiny: Path, tmp_path: Path
) -> None:
    """It would be asked to predict what it sees: the loss goes to nothing, and the model learns nothing."""
    AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")

    run = run_job(**{**FIELDS, "base_model": str(tmp_path / "base")})

    assert run.end is not None
    assert (run.end.outcome, run.end.reason) == ("failed", "model_unsupported")
    assert "see those that come after them" in (run.end.message or "")


def test_a_cap_on_logits_that_is_not_known_is_noticed_however_small_the_logits_are(
    bases: Callable[[str], Path], run_job: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd_worker.trainer.model._SCALINGS", ())
    monkeypatch.setattr("sftd_worker.trainer.model._CAPS", ())

    run = run_job(**{**FIELDS, "base_model": str(bases("gemma2"))})

    assert run.end is not None
    assert run.end.reason == "model_unsupported"
    assert "its output head does something that is not known here" in (run.end.message or "")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_rotary_positions_that_grow_are_those_of_each_row(
    gradient_checkpointing: bool,
    texts: Callable[..., dict[str, str]],
    run_job: Callable[..., Finished],
    make_job: Callable[..., Any],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """Dynamic NTK: transformers keeps the frequencies of the longest row it has seen, also for shorter ones after it."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**{**LIKE_LLAMA, "max_position_embeddings": 32}, rope_parameters=rope)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    rows = [f"{word} " * length for word, length in zip("abcdef", (20, 120, 25, 60, 18, 45), strict=True)]
    fields = {
        **FIELDS,
        "base_model": str(tmp_path / "base"),
        "job": texts(rows),
        "warmup_steps": 2,
        "gradient_checkpointing": gradient_checkpointing,
    }
    job = make_job("plain", **fields)
    expected = [
        score_one_by_one(load_plain(job), [example]) for example in examples_of(job)
    ]  # each row by a model that has seen no other
    total = sum(one.num_tokens for one in expected)

    run = run_job("run", **fields)

    losses = run.values("loss")
    assert losses[1] == pytest.approx(sum(one.loss * one.num_tokens for one in expected) / total, rel=1e-6)
    assert losses[2] == pytest.approx(losses[1], rel=1e-9)  # the rate of the first step is 0


def test_changing_one_row_changes_no_bit_of_another(
    family: str,
    bases: Callable[[str], Path],
    texts: Callable[..., dict[str, str]],
    run_job: Callable[..., Finished],
    make_job: Callable[..., Any],
) -> None:
    """Packed or padded: the states that the loss of the other rows is made of stay the same, bit for bit."""
    fields = {**FIELDS, "max_steps": 1, "base_model": str(bases(family))}
    seen = []
    for rows in (ROWS, [row.replace("b", "d").replace("e", "f") for row in ROWS]):
        fields["job"] = texts(rows)
        ids = [example.input_ids for example in examples_of(make_job("rows", **fields))]
        with training_states() as states:
            run = run_job("run", **fields)
        assert run.end is not None
        assert run.end.outcome == "succeeded", run.end.message
        seen.append([_states_of(row, states) for row in ids])

    before, after = seen
    assert [len(row) for row in before] == [len(row) for row in after]
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        if i in (1, 4):
            assert not torch.equal(one, other)
        elif family in EXPERTS:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(one, other), i


@contextmanager
def training_states() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(ids (T,), hidden states (T, d)) of every pass through a decoder that a gradient will be taken of."""
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if states is not None and torch.is_grad_enabled():
            passes.append((options["input_ids"].flatten(), states.detach().clone().flatten(0, 1)))

    hook = register_module_forward_hook(look, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def _states_of(row: list[int], passes: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(len(row), d): where the row's tokens stand, in whichever pass and place."""
    wanted = torch.tensor(row)
    found = [
        states[start : start + len(row)]
        for ids, states in passes
        for start in range(len(ids) - len(row) + 1)
        if torch.equal(ids[start : start + len(row)], wanted)
    ]
    assert len(found) == 1
    return found[0]


def _has_no_gradient(name: str) -> bool:
    """A bias of the keys without rotary positions behind it shifts all scores of a query alike: its gradient is rounding,
    whose sign AdamW follows."""
    return name.endswith(("k_proj.bias", "c_attn.bias", "query_key_value.bias"))
