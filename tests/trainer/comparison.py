"""How alike two runs are: what they logged, and where their weights went.

A difference of weights is measured against how far training moved that tensor: against its size, a wrong gradient
would hide behind the weights that the model began with. The mean is looked at as well as the largest: a dropped
gradient is a drift, not a spike.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of results or of a base model, in fp32."""
    return {
        name: value.float()
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_same_series(
    name: str, one: Sequence[float], other: Sequence[float], *, rtol: float, mean_rtol: float
) -> None:
    """Two series agree at every step to `rtol`, and differ on the average, with sign, by at most `mean_rtol`."""
    assert len(one) == len(other), name
    first, second = np.array(one), np.array(other)
    residuals = (first - second) / np.maximum(np.abs(second), 1e-12)
    assert np.abs(residuals).max() <= rtol, (name, residuals)
    assert abs(residuals.mean()) <= mean_rtol, (name, residuals)


def assert_same_movement(
    one: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor],
    *,
    rtol: float,
    mean_rtol: float,
) -> None:
    """||one - other|| / ||other - initial|| of each tensor is at most `rtol`, and on the average `mean_rtol`."""
    assert one.keys() == other.keys() == initial.keys()
    residuals = {}
    for name in one:
        moved = torch.linalg.vector_norm(other[name].double() - initial[name].double()).item()
        apart = torch.linalg.vector_norm(one[name].double() - other[name].double()).item()
        assert moved > 0, f"{name} was not trained"
        residuals[name] = apart / moved
    assert max(residuals.values()) <= rtol, residuals
    assert np.mean(list(residuals.values())) <= mean_rtol, residuals
