"""Sums in a fixed order where torch can make them, and a run that goes on where it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.harness import Finished
from transformers import MistralConfig, MistralForCausalLM

from sftd_worker.trainer import attention
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.order import FixedOrder
from sftd_worker.trainer.packing import MicroBatch, collate
from sftd_worker.trainer.precision import Precision
from sftd_worker.trainer.probe import try_end_to_end

RunJob = Callable[..., Finished]
ERROR = 2  # of torch.get_deterministic_debug_mode


class _Unordered(torch.autograd.Function):
    """Passes values and gradients on, by way of an operation that torch has in no fixed order."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, at_once: bool) -> torch.Tensor:
        ctx.at_once = at_once
        return put(states) if at_once else states.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad if ctx.at_once else put(grad), None


def put(states: torch.Tensor) -> torch.Tensor:
    return states.put(torch.arange(states.numel()), states.flatten())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(training?, torch's mode) of each micro-batch of the runs that follow."""
    seen = []
    whole = Model.hidden

    def look(self: Model, batch: MicroBatch) -> torch.Tensor:
        seen.append((self.net.training, torch.get_deterministic_debug_mode()))
        return whole(self, batch)

    monkeypatch.setattr(Model, "hidden", look)
    return seen


def test_training_is_strict_and_evaluation_is_not(run_job: RunJob, watched: list[tuple[bool, int]]) -> None:
    run = run_job(method="full", validation_split=0.1)

    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    assert set(watched) == {(True, ERROR), (False, 1)}
    assert "no fixed order" not in run.log


@pytest.mark.parametrize("at_once", [True, False], ids=["forward", "backward"])
def test_an_operation_without_a_fixed_order_is_done_without_and_said_once(
    at_once: bool, run_job: RunJob, monkeypatch: pytest.MonkeyPatch, watched: list[tuple[bool, int]]
) -> None:
    fields = {"method": "full", "packing": False, "max_tokens_per_step": 300, "validation_split": 0.1}
    plain = run_job("plain", **fields)
    watched.clear()
    whole = Model.hidden

    def unordered(self: Model, batch: MicroBatch) -> torch.Tensor:
        states = whole(self, batch)
        if self.net.training and batch.input_ids.shape[1] > 60:  # not in every micro-batch
            return _Unordered.apply(states, at_once)  # type: ignore[no-any-return, no-untyped-call]
        return states

    monkeypatch.setattr(Model, "hidden", unordered)

    run = run_job("unordered", **fields)

    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    assert run.log.count("put_ adds in no fixed order on this device") == 1
    assert run.values("loss") == plain.values("loss")
    ours, theirs = (load_file(one.folder / "results" / "model.safetensors") for one in (run, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert watched[0] == (False, 1)
    assert watched[-1] == (False, 1)
    assert {mode for training, mode in watched if training} == {ERROR, 1}


def test_memory_that_the_order_takes_is_done_without(
    run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a run fails for it, and for good: a resumed one does not try again."""
    whole = Model.hidden
    refused = []

    def tight(self: Model, batch: MicroBatch) -> torch.Tensor:
        if self.net.training and torch.get_deterministic_debug_mode() == ERROR:
            refused.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Model, "hidden", tight)
    run = run_job(method="full", max_tokens_per_step=10**6)
    num_refused = len(refused)
    resumed = run_job(
        "run",
        method="full",
        max_tokens_per_step=10**6,
        job={"attempt": 2, "resume_from": str(run.folder / "checkpoints" / "checkpoint-2")},
    )

    assert run.log.count("the same step again without a fixed order of sums") == 1
    assert "sums are made in no fixed order, as before" in resumed.log
    for one in (run, resumed):
        assert one.end is not None
        assert one.end.outcome == "succeeded", one.end.message
    assert num_refused > 0
    assert len(refused) == num_refused


def test_an_operation_without_a_fixed_order_is_not_taken_for_memory(
    run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the budget was made smaller three times before."""
    monkeypatch.setattr("sftd_worker.trainer.memory.Budget.is_spent", property(lambda budget: True))
    whole = Model.hidden

    def unordered(self: Model, batch: MicroBatch) -> torch.Tensor:
        states = whole(self, batch)
        return put(states) if self.net.training else states

    monkeypatch.setattr(Model, "hidden", unordered)

    run = run_job(method="full")

    assert run.end is not None
    assert run.end.outcome == "succeeded", run.end.message
    assert run.log.count("put_ adds in no fixed order on this device") == 1
    assert "memory ran out" not in run.log


def test_other_errors_are_not_taken_for_it() -> None:
    order = FixedOrder()
    cannot = "_histc_cuda with floating point input does not have a deterministic implementation, but you set"

    assert not order.give_up_for(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not order.give_up_for(ValueError(cannot))
    assert not order.given_up
    assert order.give_up_for(RuntimeError(cannot))
    assert order.because == "_histc_cuda with floating point input"
    assert not order.give_up_for(RuntimeError(cannot))
    with order.kept():
        assert torch.get_deterministic_debug_mode() == 1
    order.end()
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_rows_give_the_same_gradients_to_the_bit() -> None:
    """Attention of many rows whose common beginning gathers the gradients of all, with grouped heads."""
    order = FixedOrder()  # before the first product: cuBLAS looks then at what it asks for
    device, precision = torch.device("cuda", 0), Precision("bf16", "for the test")
    torch.manual_seed(0)
    attention.register()
    config = MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=None,
    )
    net = MistralForCausalLM(config).to(device)
    with torch.no_grad():
        apart = try_end_to_end(net, device, precision)
    assert apart.end_to_end
    assert (
        apart.kernel == "varlen"
    )  # the weights are fp32, and so are rotated queries; autocast takes them to bf16
    net.set_attn_implementation(attention.NAME)
    model = Model(net, net, precision, device, True, None, torch.float32, apart.kernel, apart.shares_prefixes)
    common = torch.randint(512, (300,)).tolist()
    rows = []
    for length in range(20, 420, 8):
        ids = torch.tensor([*common, *torch.randint(512, (length,)).tolist()]).numpy()
        rows.append((ids, ids >= 0))

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        batch = collate(rows, device=device, prefixes=model.prefixes(rows), kernel=model.kernel)
        with order.kept():
            with model.autocast():
                loss = model.hidden(batch).float().square().mean()
            loss.backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    first = gradients()
    assert not order.given_up
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))
