"""What a job needs, from numbers that can be checked by hand; bench/memory.py compares it with runs."""

from typing import Any

import pytest

from sftd.footprint import (
    BatchFacts,
    Linears,
    ModelFacts,
    adapter_parameters,
    checkpoint_bytes,
    estimate,
    result_bytes,
    total,
    unknown_targets,
)
from sftd.spec import JobSpec

MODEL = ModelFacts(
    architecture="Qwen2ForCausalLM",
    parameters=1_000_000,
    hidden_size=64,
    intermediate_size=256,
    num_layers=4,
    num_heads=4,
    kv_width=32,
    vocab_size=1000,
    tied_head=True,
    linears=[
        Linears(name="q_proj", num_in=64, num_out=64, count=4),
        Linears(name="down_proj", num_in=256, num_out=64, count=4),
    ],
    stored_bytes=2,
    has_template=True,
    max_positions=2048,
)
BATCH = BatchFacts(num_tokens=1000, num_supervised=400, longest_row=100)


def spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "org/m", "training_file": "file_1", **fields})


def test_an_adapter_has_rank_times_both_sides_of_each_layer() -> None:
    assert adapter_parameters(spec(lora={"rank": 8}), MODEL) == 4 * 8 * (128 + 320)
    only = spec(lora={"rank": 8, "target_modules": ["q_proj"]})
    assert adapter_parameters(only, MODEL) == 4 * 8 * 128
    assert adapter_parameters(spec(lora={"rank": 8, "use_dora": True}), MODEL) == 4 * (8 * 448 + 128)


def test_targets_are_matched_as_peft_does() -> None:
    named = spec(lora={"target_modules": ["self_attn.q_proj", "up_proj"]})

    assert unknown_targets(named, MODEL) == ["up_proj"]


@pytest.mark.parametrize(
    ("fields", "precision", "weights"),
    [
        ({"method": "full"}, "bf16", 4_000_000),
        ({"method": "lora"}, "bf16", 2_000_000),
        ({"method": "lora"}, "fp32", 4_000_000),
    ],
)
def test_weights_are_kept_as_the_trainer_keeps_them(
    fields: dict[str, Any], precision: Any, weights: int
) -> None:
    assert estimate(spec(**fields), MODEL, BATCH, device="cuda", precision=precision).weights == weights


def test_qlora_packs_linear_layers_alone() -> None:
    packed = 4 * (64 * 64 + 256 * 64)

    found = estimate(spec(method="qlora"), MODEL, BATCH, device="cuda", precision="fp32").weights

    assert found == pytest.approx(0.516 * packed + 2 * (1_000_000 - packed), rel=0.001)


def test_gradients_and_moments_are_of_what_is_trained() -> None:
    full = estimate(spec(method="full"), MODEL, BATCH, device="cuda", precision="bf16")
    eight = estimate(
        spec(method="full", optimizer="adamw_8bit"), MODEL, BATCH, device="cuda", precision="bf16"
    )

    assert (full.gradients, full.optimizer, full.adapter) == (4_000_000, 8_000_000, 0)
    assert eight.optimizer == 2_000_000


def test_checkpointing_keeps_less_and_a_larger_micro_batch_takes_more() -> None:
    def needed(num_tokens: int = 1000, **fields: Any) -> int:
        batch = BatchFacts(num_tokens, 400, 100)
        return total(estimate(spec(**fields), MODEL, batch, device="cuda", precision="bf16"))

    assert needed() < needed(gradient_checkpointing=False)
    assert needed(1000) < needed(4000)


@pytest.mark.parametrize(("sharding", "share"), [("auto", 0.25), ("fsdp", 0.25), ("ddp", 1.0)])
def test_weights_are_shared_out_where_the_trainer_does(sharding: str, share: float) -> None:
    several = spec(method="full", gpus=4, sharding=sharding)

    assert estimate(several, MODEL, BATCH, device="cuda", precision="bf16").weights == share * 4_000_000


def test_a_result_is_saved_as_the_base_is_stored() -> None:
    assert result_bytes(spec(method="full"), MODEL, "bf16") == 2_000_000
    assert result_bytes(spec(method="full"), MODEL, "fp32") == 4_000_000
    assert result_bytes(spec(lora={"rank": 8}), MODEL, "bf16") == 4 * 4 * 8 * 448
    assert checkpoint_bytes(spec(method="full"), MODEL) == 12_000_000


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_combination_has_an_estimate(
    method: str, device: Any, precision: Any, checkpointing: bool
) -> None:
    parts = estimate(
        spec(method=method, gradient_checkpointing=checkpointing),
        MODEL,
        BATCH,
        device=device,
        precision=precision,
    )

    assert all(value >= 0 for value in parts.model_dump().values())
    assert total(parts) > 0
