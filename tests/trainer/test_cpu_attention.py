"""The CPU's attention against torch's own in double precision: values and gradients, for every way that rows lie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sftd_worker.trainer import attention, cpu_attention
from sftd_worker.trainer.packing import RowLayout

CPU = torch.device("cpu")
LAYOUTS = {
    "one token": RowLayout((1,), (None,), CPU),
    "shorter than a block, a block, longer": RowLayout((7, 64, 65, 200), (None,) * 4, CPU),
    "prefixes": RowLayout((90, 33, 70, 5, 40), (None, slice(0, 50), slice(0, 50), None, slice(90, 110)), CPU),
}
HEADS = {"one key head for all": (6, 1), "in groups": (4, 2), "each its own": (3, 3)}


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, window: int | None
) -> torch.Tensor:
    """Row by row, with a mask that says who sees whom: (1, T, H, D_v)."""
    parts, start = [], 0
    for length, prefix in zip(layout.lengths, layout.prefixes, strict=True):
        own = torch.arange(start, start + length)
        seen = own if prefix is None else torch.cat([torch.arange(prefix.start, prefix.stop), own])
        distance = torch.arange(len(seen) - length, len(seen))[:, None] - torch.arange(len(seen))
        mask = (distance >= 0) & (distance < (window or len(seen)))
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, own], key[:, :, seen], value[:, :, seen], mask, scale=0.3, enable_gqa=True
            )
        )
        start += length
    return torch.cat(parts, 2).transpose(1, 2)


def states(
    layout: RowLayout, heads: tuple[int, int], dtype: torch.dtype, *, width: int = 16, wider: int = 8
) -> list[torch.Tensor]:
    """Query, key, value as models make them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    length = sum(layout.lengths)
    shapes = [(heads[0], width), (heads[1], width), (heads[1], width + wider), (heads[0], width + wider)]
    made = [torch.randn(1, length, *shape, generator=generator).to(dtype) for shape in shapes]
    return [*(state.transpose(1, 2).detach().requires_grad_() for state in made[:3]), made[3]]


def results(compute: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    query, key, value, grad = inputs
    out = compute(query, key, value)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients_are_those_of_torch(
    layout: RowLayout, heads: tuple[int, int], window: int | None
) -> None:
    inputs = states(layout, heads, torch.float32)
    exact = [state.detach().double().requires_grad_(state.requires_grad) for state in inputs]

    found = results(lambda q, k, v: cpu_attention.attend(q, k, v, layout, scale=0.3, window=window), inputs)
    wanted = results(lambda q, k, v: reference(q, k, v, layout, window), exact)

    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_long_row_is_cut_into_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["prefixes"]
    inputs = states(layout, (4, 2), torch.float32)
    attend = lambda q, k, v: cpu_attention.attend(q, k, v, layout, scale=0.3, window=40)  # noqa: E731
    wanted = results(attend, inputs)
    sizes: list[int] = []
    weights = cpu_attention._weights

    def look(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(query.shape[1] // 2)  # by heads of a group
        return weights(query, *rest)

    monkeypatch.setattr(cpu_attention, "_weights", look)
    monkeypatch.setattr(cpu_attention, "_MOST_WEIGHTS", 4 * 70 * 10)

    found = results(attend, inputs)

    assert max(sizes) == 11  # of the row that sees 60 keys; 8 of longer ones
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[1:], ids=list(LAYOUTS)[1:])
def test_in_bf16_it_is_as_exact_as_torchs_own(layout: RowLayout) -> None:
    """Against the kernel that torch takes for such rows. One token alone has no gradient but of its value."""
    inputs = states(layout, (4, 2), torch.bfloat16, width=64, wider=0)
    exact = [state.detach().double().requires_grad_(state.requires_grad) for state in inputs]
    wanted = results(lambda q, k, v: reference(q, k, v, layout, None), exact)

    ours = results(lambda q, k, v: cpu_attention.attend(q, k, v, layout, scale=0.3, window=None), inputs)
    how = attention._How(dropout=0.0, scaling=0.3, window=None, softcap=None)
    torchs = results(lambda q, k, v: attention._attend_in_turn(q, k, v, layout, how), inputs)

    def errors(found: list[torch.Tensor]) -> list[float]:
        pairs = zip(found, wanted, strict=True)
        return [float((one.double() - true).norm() / true.norm()) for one, true in pairs]

    for off, torchs_off in zip(errors(ours), errors(torchs), strict=True):
        assert off < 1.4 * torchs_off
    assert sum(errors(ours)) < sum(errors(torchs))
    assert all(state.dtype == torch.bfloat16 for state in ours)


def test_under_autocast_it_computes_in_its_type_and_gives_back_gradients_in_theirs() -> None:
    layout = LAYOUTS["prefixes"]
    query, key, value, grad = states(layout, (4, 2), torch.float32, width=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_attention.fits(query)
        out = cpu_attention.attend(query, key, value.bfloat16(), layout, scale=0.3, window=None)
    grads = torch.autograd.grad(out, (query, key, value), grad.bfloat16())

    low = [state.detach().bfloat16().requires_grad_() for state in (query, key, value)]
    alone = cpu_attention.attend(*low, layout, scale=0.3, window=None)  # type: ignore[arg-type]
    assert torch.equal(out, alone)
    for one, other in zip(grads, torch.autograd.grad(alone, low, grad.bfloat16()), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_that_changes_changes_no_bit_of_another_ones_values_or_gradients(window: int | None) -> None:
    layout = LAYOUTS["shorter than a block, a block, longer"]
    inputs = states(layout, (4, 2), torch.float32)
    changed = [state.detach().clone() for state in inputs]
    middle = slice(7, 7 + 64)
    for state in changed[:3]:
        state[:, :, middle] += 1.0
    changed = [*(state.requires_grad_() for state in changed[:3]), changed[3]]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cpu_attention.attend(q, k, v, layout, scale=0.3, window=window)

    before, after = results(attend, inputs), results(attend, changed)

    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        at = 1 if number == 0 else 2
        for part in (slice(0, 7), slice(71, 336)):
            assert torch.equal(one.transpose(0, at)[part], other.transpose(0, at)[part])


def test_other_types_and_other_devices_are_not_for_it() -> None:
    assert not cpu_attention.fits(torch.zeros(1, dtype=torch.float64))
    assert not cpu_attention.fits(torch.zeros(1, device="meta"))
    assert cpu_attention.fits(torch.zeros(1))
