"""The gradient of the input embedding, row by row, is the one that torch makes of the whole vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftd_worker.trainer.embedding import add_gradients_by_row

V, D = 50, 8


class Seen(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch calls it
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["alone", "with a gradient of the head's"])
def test_gradients_over_micro_batches_are_those_of_torch(padding_idx: int | None, tied: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Embedding(V, D, padding_idx=padding_idx)
    batches = [torch.randint(0, V, (1, length)) for length in (40, 1, 25)]  # tokens come again and again
    batches[1][:] = 3
    weights = [torch.randn(1, batch.shape[1], D) for batch in batches]

    def gradient() -> torch.Tensor:
        layer.weight.grad = torch.ones_like(layer.weight) if tied else None
        for batch, weight in zip(batches, weights, strict=True):
            (layer(batch) * weight).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    wanted = gradient()
    assert add_gradients_by_row(layer)
    with Seen() as seen:
        found = gradient()

    torch.testing.assert_close(found, wanted)
    assert "embedding_dense_backward" not in seen.names
    assert "_index_put_impl_" in seen.names
    if padding_idx is not None:
        assert torch.equal(found[padding_idx], torch.full((D,), float(tied)))


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Embedding(V, D, max_norm=1.0),
        torch.nn.Embedding(V, D, scale_grad_by_freq=True),
        torch.nn.Embedding(V, D, sparse=True),
        torch.nn.Embedding(V, D).requires_grad_(False),
        torch.nn.Linear(V, D),
    ],
    ids=["max norm", "by frequency", "sparse", "frozen", "no embedding"],
)
def test_other_layers_are_left_alone(layer: torch.nn.Module) -> None:
    assert not add_gradients_by_row(layer)
    assert "forward" not in vars(layer)
