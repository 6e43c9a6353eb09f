"""Configurations that must give the same run: each through the real entry point on a small model.

The mean difference is looked at as well as the largest: a dropped gradient is a drift, not a spike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.comparison import assert_same_movement, assert_same_series, saved_weights
from tests.trainer.harness import Finished, finish_trainer, start_trainer
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

from sftd.protocol import TrainerJob
from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.memory import Budget
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.order import FixedOrder
from sftd_worker.trainer.precision import Precision
from sftd_worker.trainer.probe import Apart
from sftd_worker.trainer.world import World

RunJob = Callable[..., Finished]
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 6, "validation_split": 0.1}


LORA: dict[str, Any] = {**FULL, "method": "lora", "lora": {"rank": 8, "alpha": 16, "dropout": 0.0}}


def assert_same_run(one: Finished, other: Finished, start: Path) -> None:
    """`start` holds the weights that both began with: the base model, or the first adapter."""
    assert one.end is not None
    assert other.end is not None
    assert one.end.outcome == other.end.outcome == "succeeded", (one.end.message, other.end.message)
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        first, second = one.values(name), other.values(name)
        assert first.keys() == second.keys()
        assert_same_series(name, list(first.values()), list(second.values()), rtol=1e-6, mean_rtol=2e-7)
    assert_same_movement(
        saved_weights(one.folder / "results"),
        saved_weights(other.folder / "results"),
        saved_weights(start),
        rtol=1e-4,
        mean_rtol=1e-5,
    )


@pytest.fixture(params=["full", "lora"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(method: str, tiny: Path, first_adapter: Path) -> Path:
    """The weights that a run begins with."""
    return tiny if method == "full" else first_adapter


@pytest.fixture
def fields(method: str, first_adapter: Path) -> dict[str, Any]:
    """The run that the others are compared with: all weights, or an adapter."""
    return FULL if method == "full" else {**LORA, "job": {"adapter_path": str(first_adapter)}}


@pytest.fixture(scope="module")
def kept() -> dict[str, Finished]:
    return {}


@pytest.fixture
def reference(
    method: str,
    fields: dict[str, Any],
    run_job: RunJob,
    kept: dict[str, Finished],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """The run itself, made once, in a folder that outlives the test which happened to need it first."""
    if method not in kept:
        folder = tmp_path_factory.mktemp("reference")
        kept[method] = run_job(**{**fields, "job": {**fields.get("job", {}), "output_dir": str(folder)}})
    return kept[method]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8, "gradient_accumulation_steps": 1},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        {"batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": False},
        {"packing": False, "batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": False},
    ],
    ids=str,
)
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(
    change: dict[str, Any], reference: Finished, fields: dict[str, Any], start: Path, run_job: RunJob
) -> None:
    assert_same_run(reference, run_job("changed", **{**fields, **change}), start)


def test_padded_batches_give_the_same_run(
    reference: Finished,
    fields: dict[str, Any],
    start: Path,
    run_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sftd_worker.trainer.model.try_end_to_end", lambda *_: Apart(False, "told so by a test")
    )

    padded = run_job("padded", **fields)

    assert "packing is off for this model: told so by a test" in padded.log
    assert_same_run(reference, padded, start)


def test_rows_beside_a_long_one_keep_their_rotary_positions(
    run_job: RunJob, tiny: Path, tmp_path: Path
) -> None:
    """longrope takes other frequencies for all of a micro-batch once one row of it is long."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
    }
    config = Phi3Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=4096,
        original_max_position_embeddings=64,
        rope_parameters={**longrope, "original_max_position_embeddings": 64},
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "long")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "long")
    fields = {**FULL, "base_model": str(tmp_path / "long"), "max_steps": 2}

    alone = run_job(
        "alone", **{**fields, "packing": False, "batch_size": 1, "gradient_accumulation_steps": 8}
    )

    assert_same_run(alone, run_job("packed", **fields), tmp_path / "long")
    assert_same_run(alone, run_job("padded", **{**fields, "packing": False}), tmp_path / "long")


def test_out_of_memory_on_a_rank_without_rows_is_told_as_such(
    make_job: Callable[..., TrainerJob], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An epoch's last step may leave a rank nothing, while another cannot fit its one row."""
    monkeypatch.setattr(train_module, "any_rank", lambda world, *flags: [False, True, True])
    world = World(rank=1, size=2, device=torch.device("cpu"))
    rows = train_module.StepRows([], [], num_tokens=7, num_supervised=3)
    model = Model(torch.nn.Linear(1, 1), None, Precision("fp32", ""), world.device, True, None, torch.float32)
    events = Events(tmp_path, attempt=1, silent=True)

    with pytest.raises(RunFailed) as failed:
        train_module._accumulate(model, rows, Budget(1, 64), True, 0, 0, 0, FixedOrder(), world, events)

    assert failed.value.reason == "out_of_memory"


def test_chunks_of_the_head_do_not_matter(
    reference: Finished,
    fields: dict[str, Any],
    start: Path,
    run_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sftd_worker.trainer.loss.CHUNK_LOGITS", 1024 * 7)  # 7 positions at a time

    assert_same_run(reference, run_job("chunked", **fields), start)


def test_two_ranks_give_the_run_of_one(
    reference: Finished, fields: dict[str, Any], start: Path, make_job: Callable[..., TrainerJob]
) -> None:
    together = make_job("together", **{**fields, "batch_size": 2, "gpus": 2, "sharding": "ddp"})

    two = finish_trainer(together, start_trainer(together))

    assert two.returncode == 0, two.output
    assert "2 process(es)" in two.log
    assert_same_run(reference, two, start)


def test_a_run_of_two_ranks_ends_once_with_the_reason_of_the_one_that_failed(
    make_job: Callable[..., TrainerJob], tmp_path: Path
) -> None:
    """The other rank sees a broken connection: that is no reason."""
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    job = make_job(gpus=2, job={"training_path": str(tmp_path / "bad.jsonl")})

    run = finish_trainer(job, start_trainer(job))

    assert run.returncode != 0
    assert [line.reason for line in run.lines if line.type == "end"] == ["bad_data"]


class RunOutInBackward(torch.autograd.Function):
    """After the head's gradient has been made."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


@pytest.mark.parametrize("breaks", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    breaks: str,
    reference: Finished,
    fields: dict[str, Any],
    start: Path,
    run_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Model.hidden

    def small_memory(self: Model, batch: Any) -> torch.Tensor:
        if not self.net.training or batch.input_ids.numel() <= 300:
            return whole(self, batch)
        if breaks == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return RunOutInBackward.apply(whole(self, batch))  # type: ignore[no-any-return, no-untyped-call]

    monkeypatch.setattr(Model, "hidden", small_memory)

    squeezed = run_job("squeezed", **fields)

    assert "out of memory; the same step again" in squeezed.log
    assert_same_run(reference, squeezed, start)


@pytest.mark.parametrize(
    ("rows", "said"), [(1, "not even one row"), (32, "three times already; lower max_tokens_per_step")]
)
def test_memory_that_does_not_suffice_fails_with_that_reason(
    rows: int, said: str, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: Model, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "hidden", no_memory)

    run = run_job(max_steps=1, batch_size=rows, gradient_accumulation_steps=2 if rows > 1 else 1)

    assert run.end is not None
    assert run.end.reason == "out_of_memory"
    assert said in (run.end.message or "")
    assert run.log.count("out of memory; the same step again") == (0 if rows == 1 else 3)


def test_evaluation_has_a_budget_of_its_own_that_it_remembers(
    run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Model.hidden

    def small_memory(self: Model, batch: Any) -> torch.Tensor:
        if not self.net.training and batch.input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    untroubled = run_job("untroubled", **FULL)
    monkeypatch.setattr(Model, "hidden", small_memory)
    squeezed = run_job("squeezed", **FULL)

    assert 1 <= squeezed.log.count("evaluation: out of memory") <= 3  # in the first evaluation, not in each
    assert "the same step again" not in squeezed.log
    assert list(squeezed.values("eval_loss").values()) == pytest.approx(
        list(untroubled.values("eval_loss").values()), rel=1e-5
    )


def test_max_tokens_per_step_bounds_a_micro_batch_and_changes_nothing_else(
    reference: Finished,
    fields: dict[str, Any],
    start: Path,
    run_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    whole = Model.hidden

    def measured(self: Model, batch: Any) -> torch.Tensor:
        if self.net.training:
            sizes.append(batch.input_ids.numel())
        return whole(self, batch)

    monkeypatch.setattr(Model, "hidden", measured)

    bounded = run_job("bounded", **fields, max_tokens_per_step=250)

    assert max(sizes) <= 250
    assert_same_run(reference, bounded, start)
