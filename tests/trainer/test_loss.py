"""The chunked loss with its gradient made in the forward is the plain one, number for number."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sftd_worker.trainer import loss as loss_module
from sftd_worker.trainer.loss import Head, scaled_loss, score

D, V, N = 24, 97, 53


def plain_head(layer: torch.nn.Linear) -> Head:
    learned = tuple(p for p in layer.parameters() if p.requires_grad)
    return Head(layer, V, layer.weight, learned)


def any_head(layer: torch.nn.Linear) -> Head:
    learned = tuple(p for p in layer.parameters() if p.requires_grad)
    return Head(lambda hidden: torch.tanh(layer(hidden) / 5) * 5, V, None, learned)


HEADS = {"plain": plain_head, "with a bias and a cap": any_head}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    return HEADS[request.param](torch.nn.Linear(D, V, bias=request.param != "plain"))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator) * 3
    return hidden.requires_grad_(), torch.randint(0, V, (N,), generator=generator)


def gradients(
    head: Head, hidden: torch.Tensor, loss: Callable[[], torch.Tensor]
) -> tuple[float, list[torch.Tensor]]:
    value = loss()
    return value.item(), list(torch.autograd.grad(value, [hidden, *head.parameters]))


@pytest.mark.parametrize("chunk", [V, 7 * V, 1000 * V], ids=["one row", "seven rows", "all rows"])
def test_loss_and_gradients_are_those_of_full_logits(
    chunk: int,
    head: Head,
    batch: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 3 * V)
    hidden, targets = batch

    ours, our_grads = gradients(head, hidden, lambda: scaled_loss(head, hidden, targets, scale=1 / 40) * 2)
    wanted, wanted_grads = gradients(
        head, hidden, lambda: F.cross_entropy(head.logits(hidden).double(), targets, reduction="sum") / 20
    )

    assert ours == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(our_grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert abs((one - other).double().mean()) < 1e-7


def test_under_autocast_it_is_as_near_to_the_truth_as_torch_is(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.manual_seed(0)
    head = plain_head(torch.nn.Linear(D, V, bias=False))
    hidden, targets = batch
    _, exact = gradients(head, hidden, lambda: F.cross_entropy(head.logits(hidden), targets, reduction="sum"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours = gradients(head, hidden, lambda: scaled_loss(head, hidden, targets, scale=1.0))
        _, theirs = gradients(
            head, hidden, lambda: F.cross_entropy(head.logits(hidden).float(), targets, reduction="sum")
        )

    for truth, one, other in zip(exact, ours, theirs, strict=True):
        assert one.dtype == other.dtype == truth.dtype
        assert (one - truth).norm() <= 1.1 * (other - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied to the embedding"])
def test_a_head_that_adds_up_has_the_gradient_of_autograd_over_micro_batches(
    tied: bool,
    dtype: torch.dtype,
    batch: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 7 * V)
    monkeypatch.setattr(loss_module, "_BLOCK_WEIGHTS", 10 * D)
    torch.manual_seed(0)
    layer = torch.nn.Linear(D, V, bias=False)
    hidden, targets = batch
    found = []
    for adds_up in (False, True):
        layer.weight.grad = None
        head = replace(plain_head(layer), adds_up=adds_up)
        for rows in (slice(0, 20), slice(20, N)):
            states = hidden.detach()[rows]
            states = states + F.embedding(targets[rows], layer.weight) if tied else states.requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = scaled_loss(head, states, targets[rows], scale=1 / N)
            held = layer.weight.grad
            loss.backward()
            assert not adds_up or layer.weight.grad is held  # there is one, and no other was made
        assert layer.weight.grad is not None
        found.append(layer.weight.grad)

    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].abs().max() > 0.01


@pytest.mark.parametrize("adds_up", [False, True])
def test_no_tokens_give_no_loss_and_no_gradient(adds_up: bool) -> None:
    layer = torch.nn.Linear(D, V, bias=False)
    hidden = torch.ones(0, D, requires_grad=True)
    head = replace(plain_head(layer), adds_up=adds_up)

    loss = scaled_loss(head, hidden, torch.ones(0, dtype=torch.int64), scale=1.0)
    loss.backward()

    assert loss.item() == 0
    assert layer.weight.grad is None


def test_a_frozen_head_gets_no_gradient(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    layer = torch.nn.Linear(D, V, bias=False).requires_grad_(False)
    hidden, targets = batch

    scaled_loss(plain_head(layer), hidden, targets, scale=1.0).backward()

    assert layer.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_passes_for_a_gpu_make_the_numbers_of_those_for_a_cpu(dtype: torch.dtype) -> None:
    """They are other operations in another order; here both run on the CPU."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(N, V, generator=generator) * 5).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    one, other = logits.clone(), logits.clone()

    losses = [
        make(grads, targets, 1 / N)
        for make, grads in [
            (loss_module._loss_and_gradient, one),
            (loss_module._loss_and_gradient_at_once, other),
        ]
    ]

    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert torch.equal(one, other)


@pytest.mark.parametrize("learns", [True, False], ids=["trained", "frozen"])
def test_a_head_cast_piece_by_piece_is_the_head_cast_at_once(
    learns: bool, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = plain_head(torch.nn.Linear(D, V, bias=False).requires_grad_(learns))
    hidden, targets = batch
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 7 * V)
    found = []
    for block in (10 * D, 10**6):
        monkeypatch.setattr(loss_module, "_BLOCK_WEIGHTS", block)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(head, hidden, lambda: scaled_loss(head, hidden, targets, scale=1 / N)))

    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)


def test_large_logits_do_not_overflow() -> None:
    layer = torch.nn.Linear(1, 3, bias=False)
    layer.weight.data = torch.tensor([[1e4], [-1e4], [0.0]])
    hidden = torch.ones(1, 1, requires_grad=True)

    loss = scaled_loss(plain_head(layer), hidden, torch.tensor([1]), scale=1.0)
    loss.backward()

    assert loss.item() == 2e4
    assert hidden.grad is not None
    assert hidden.grad.item() == 2e4


def test_score_counts_over_all_tokens(
    head: Head, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * V)
    hidden, targets = batch
    with torch.no_grad():
        logits = head.logits(hidden)

    scores = score(head, hidden, targets)

    assert scores.loss_sum.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item())
    assert scores.num_correct.item() == (logits.argmax(-1) == targets).sum().item()
    assert scores.num_tokens == N
