"""full, lora and qlora each end with a folder that transformers or peft load by themselves, with the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.trainer.harness import Finished
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.checkpoint import verify
from sftd_worker.trainer.model import Model

RunJob = Callable[..., Finished]
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of the trained model as it stands in memory, taken just before the real export.

    By torch's attention, which loaded models have too: this is about weights.
    """
    seen: list[torch.Tensor] = []
    real = train_module.export

    def look_then_export(output: Path, *, model: Model, **rest: Any) -> Any:
        model.net.eval()
        model.causal.set_attn_implementation("sdpa")
        with torch.no_grad(), model.autocast():
            seen.append(model.causal(input_ids=IDS, use_cache=False).logits.float())
        return real(output, model=model, **rest)

    monkeypatch.setattr(train_module, "export", look_then_export)
    return seen


def logits(model: Any, *, bf16: bool = False) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=IDS, use_cache=False).logits.float()


def test_full_result_loads_with_transformers(run_job: RunJob, in_memory: list[torch.Tensor]) -> None:
    run = run_job(method="full", learning_rate=1e-3)

    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "results")

    assert torch.equal(logits(loaded), in_memory[0])
    assert loaded.config.use_cache is True


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}]
)
def test_lora_result_loads_with_peft(
    lora: dict[str, Any], run_job: RunJob, tiny: Path, in_memory: list[torch.Tensor]
) -> None:
    run = run_job(method="lora", lora={"rank": 4, **lora})

    base = AutoModelForCausalLM.from_pretrained(tiny)
    untrained = logits(base)
    loaded = PeftModel.from_pretrained(base, run.folder / "results")

    assert torch.equal(logits(loaded), in_memory[0])
    assert not torch.allclose(logits(loaded), untrained, atol=1e-3)


def test_qlora_result_loads_with_peft_on_a_4_bit_base(
    run_job: RunJob, tiny: Path, in_memory: list[torch.Tensor]
) -> None:
    run = run_job(method="qlora", precision="auto")

    base = AutoModelForCausalLM.from_pretrained(
        tiny,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    loaded = PeftModel.from_pretrained(base, run.folder / "results")
    quick = logits(loaded, bf16=True)  # with bitsandbytes' own layout for inference on this CPU
    assert (quick - in_memory[0]).abs().max() < 0.05

    base = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.bfloat16, quantization_config=base.config.quantization_config
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert torch.equal(
        logits(PeftModel.from_pretrained(base, run.folder / "results"), bf16=True), in_memory[0]
    )


def test_qlora_goes_on_learning_after_an_evaluation(run_job: RunJob) -> None:
    """An evaluation must not leave the 4-bit layers in a layout that has no gradient."""
    often = run_job(
        "often", method="qlora", precision="auto", eval_steps=1, max_steps=6, validation_split=0.1
    )
    never = run_job(
        "never", method="qlora", precision="auto", eval_steps=100, max_steps=6, validation_split=0.1
    )

    assert often.values("loss") == never.values("loss")
    assert often.values("grad_norm") == never.values("grad_norm")


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_train_or_say_why_not(optimizer: str, run_job: RunJob) -> None:
    run = run_job(method="full", learning_rate=1e-3, optimizer=optimizer, max_steps=6)

    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    losses = run.values("loss")
    assert losses[6] < losses[1]


def test_bf16_keeps_trained_weights_in_fp32(run_job: RunJob, in_memory: list[torch.Tensor]) -> None:
    run = run_job(method="full", learning_rate=1e-3, precision="bf16", max_steps=6)

    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "results")

    assert next(loaded.parameters()).dtype == torch.float32  # as the base is stored
    assert torch.equal(logits(loaded, bf16=True), in_memory[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_result_of_a_bf16_base_says_and_is_bf16(
    tied: bool, run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")

    run = run_job(base_model=str(tmp_path / "base"), method="full", learning_rate=1e-3, precision="bf16")

    stored = load_file(run.folder / "results" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not tied
    assert json.loads((run.folder / "results" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(run.folder / "results").dtype == torch.bfloat16
    checkpoint = run.folder / "checkpoints" / "checkpoint-4"
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"


def test_an_end_of_answer_that_generation_does_not_stop_at_is_said(
    run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    """A base model with a chat template: its generation config knows the end of a document alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    told, quiet = (
        run_job("told", base_model=str(tmp_path / "base"), max_steps=1),
        run_job("quiet", max_steps=1),
    )

    assert "answers end with '<|im_end|>', which the model's generation config does not stop at" in told.log
    assert "does not stop at" not in quiet.log


def test_dropout_on_experts_that_are_one_tensor_is_refused_by_its_name(
    run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=1024, num_key_value_heads=2, num_local_experts=2, **small)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "experts")

    refused = run_job("refused", base_model=str(tmp_path / "experts"))
    trained = run_job("trained", base_model=str(tmp_path / "experts"), lora={"dropout": 0.0})

    assert refused.end is not None
    assert (refused.end.message or "").startswith("lora.dropout: must be 0 for this model")
    assert trained.end is not None
    assert trained.end.outcome == "succeeded", trained.end.message


def test_the_folder_has_the_agreed_layout(run_job: RunJob) -> None:
    run = run_job(validation_split=0.1, max_steps=5)

    folder = run.folder
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    ]
    assert all(verify(path) for path in (folder / "checkpoints").iterdir())
    assert verify(folder / "results")
    assert {path.name for path in (folder / "logs").iterdir()} == {
        ".pulse",  # the sign of life that the agent looks at
        "training_log.txt",
        "events.jsonl",
        "eval_results.json",
    }
    assert (folder / "config.yaml").exists()
    assert [e["step"] for e in run.evaluations()] == [0, 2, 4, 5]
    assert "# job_1" in (folder / "results" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "results")
    assert tokenizer.chat_template
    config = json.loads((folder / "results" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"]


def test_a_checkpoint_loads_by_itself(run_job: RunJob, tiny: Path) -> None:
    run = run_job(max_steps=2)

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), run.folder / "checkpoints" / "checkpoint-2"
    )
    result = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run.folder / "results")

    assert torch.equal(logits(loaded), logits(result))


def test_evaluation_is_over_tokens_and_agrees_with_the_loaded_result(run_job: RunJob, tiny: Path) -> None:
    """The last evaluation loss is what plain transformers finds on the held-out rows, token by token."""
    run = run_job(method="full", learning_rate=1e-3, validation_split=0.1)
    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "results").eval()

    from datasets import Dataset

    table = Dataset.from_file(str(next((run.folder.parent / "cache").glob("*.arrow"))))
    loss, correct, tokens = 0.0, 0, 0
    for row in table:
        if row["split_key"] >= 0.1:
            continue
        ids = torch.tensor(row["input_ids"])[None]
        labels = torch.tensor(
            [t if s else -100 for t, s in zip(row["input_ids"], row["supervised"], strict=True)]
        )
        with torch.no_grad():
            scores = loaded(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(
            scores, labels[1:], ignore_index=-100, reduction="sum"
        ).item()
        correct += int((scores.argmax(-1) == labels[1:]).sum())
        tokens += int((labels[1:] != -100).sum())

    last = run.evaluations()[-1]
    assert last["num_tokens"] == tokens
    assert last["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert last["token_accuracy"] == correct / tokens


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"base_model": "/nowhere/model"}, "model_not_found", "does not exist"),
        ({"base_model": "nobody/no-such-model"}, "model_not_found", "no-such-model"),
        ({"lora": {"target_modules": ["nothing"]}}, "bad_spec", "lora.target_modules"),
        ({"gpus": 2}, "wrong_world", "2 processes were asked for, 1 came up"),
        ({"max_seq_length": 8}, "bad_data", "more than max_seq_length 8"),
        ({"validation_split": 1e-9}, "bad_spec", "validation_split"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_failure_has_its_reason(
    change: dict[str, Any], reason: str, words: str, run_job: RunJob
) -> None:
    import re

    run = run_job(**change)

    assert run.end is not None
    assert run.end.outcome == "failed"
    assert run.end.reason == reason, run.end.message
    assert re.search(words, run.end.message or "")
    assert not (run.folder / "results").exists()


def test_a_loss_that_is_no_number_ends_the_run_within_the_step(
    run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "broken")

    run = run_job(base_model=str(tmp_path / "broken"))

    assert run.end is not None
    assert run.end.reason == "diverged"
    assert run.end.message == "the loss of step 1 is nan; there is no checkpoint yet"


def test_a_model_without_safetensors_is_refused(run_job: RunJob, tiny: Path, tmp_path: Path) -> None:
    import shutil

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny, pickled)
    torch.save(AutoModelForCausalLM.from_pretrained(tiny).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()

    run = run_job(base_model=str(pickled))

    assert run.end is not None
    assert run.end.reason == "model_not_found"


def test_an_adapter_can_be_trained_further(run_job: RunJob) -> None:
    first = run_job("first", max_steps=6)

    second = run_job("second", max_steps=6, job={"adapter_path": str(first.folder / "results")})

    assert second.values("loss")[1] < first.values("loss")[1] - 0.05


@pytest.mark.parametrize("name", ["q_docs.jsonl", "alpaca_en_demo.json", "glaive_toolcall_sharegpt.json"])
@pytest.mark.parametrize("bare", [False, True], ids=["with markers", "without template"])
def test_real_files_train(
    name: str,
    bare: bool,
    run_job: RunJob,
    build_model: Callable[..., Path],
    shared_data: Callable[[str], Path],
) -> None:
    path = shared_data(name)
    fields = {
        "max_steps": 5,
        "on_overlong": "drop",
        "max_seq_length": 1024,
        "validation_split": 0.02,
        "learning_rate": 5e-3,
    }

    run = run_job(
        base_model=str(build_model(with_template=not bare)),
        job={"training_path": str(path), "training_name": name},
        **{**fields, "eval_steps": 5},
    )

    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    assert "longer than 1024 tokens" in run.log
    first, last = run.evaluations()
    assert last["eval_loss"] < first["eval_loss"]
