"""OpenAI's numbers and ours, in both directions."""

import pytest

from sftd.spec import JobSpec
from sftd_server.openai.translation import default_batch_size, default_epochs, hyperparameters_of

SPEC = {"base_model": "org/m", "training_file": "file_x"}


@pytest.mark.parametrize(
    ("num_rows", "epochs"),
    [(1, 25), (4, 25), (10, 10), (34, 3), (1000, 3), (8333, 3), (9000, 2), (10**6, 1), (None, 3)],
)
def test_few_rows_are_passed_over_more_often(num_rows: int | None, epochs: int) -> None:
    assert default_epochs(num_rows) == epochs


@pytest.mark.parametrize(
    ("num_rows", "size"), [(1, 1), (5, 5), (100, 8), (5000, 10), (32_000, 64), (10**6, 64), (None, 8)]
)
def test_steps_grow_with_the_rows(num_rows: int | None, size: int) -> None:
    assert default_batch_size(num_rows) == size


def test_a_spec_of_the_own_surface_has_sensible_numbers() -> None:
    spec = JobSpec.model_validate({**SPEC, "max_steps": 100, "gpus": 2, "learning_rate": 1e-4})

    found = hyperparameters_of(spec, 400)

    assert found == {"n_epochs": 4, "batch_size": 16, "learning_rate_multiplier": 0.5}
    assert hyperparameters_of(spec, None)["n_epochs"] is None
    assert hyperparameters_of(spec, 10**6)["n_epochs"] == 1


def test_parts_of_an_epoch_stay_parts() -> None:
    spec = JobSpec.model_validate({**SPEC, "num_epochs": 2.5, "method": "full"})

    assert hyperparameters_of(spec, 9) == {
        "n_epochs": 2.5,
        "batch_size": 8,
        "learning_rate_multiplier": 1.0,
    }
