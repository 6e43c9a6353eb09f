"""Rows that repeat others: exactly by what the model sees of them, nearly by MinHash; the first of its kind is none."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets.features import Features, Sequence, Value

from sftd_worker.trainer.twins import Sketches, Twins, chosen, find_twins, joined, sketch

TEMPLATE = list(range(1, 61))  # what every row begins with


def rows_of(*rows: list[int], masks: dict[int, list[bool]] | None = None) -> Dataset:
    given = masks or {}
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "supervised": [given.get(i, [True] * len(row)) for i, row in enumerate(rows)],
        },
        features=Features({"input_ids": Sequence(Value("int32")), "supervised": Sequence(Value("bool"))}),
    )


def random_rows(num: int, *, length: int = 200, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [TEMPLATE + [int(token) for token in rng.integers(100, 30_000, length)] for _ in range(num)]


def twins_of(table: Dataset, tmp_path: Path) -> Twins:
    return find_twins(sketch(table, tmp_path / "twins.safetensors"))


def pairs(first: np.ndarray) -> dict[int, int]:
    return {int(i): int(first[i]) for i in np.flatnonzero(first >= 0)}


def test_equal_rows_are_twins_of_the_first_of_them(tmp_path: Path) -> None:
    rows = random_rows(30)
    rows[7], rows[20] = list(rows[3]), list(rows[3])

    found = twins_of(rows_of(*rows), tmp_path)

    assert pairs(found.exact) == {7: 3, 20: 3}
    assert found.near is not None
    assert pairs(found.near) == {}  # an exact twin is not counted twice


def test_equal_tokens_with_another_mask_are_no_exact_twins(tmp_path: Path) -> None:
    rows = random_rows(20)
    rows[9] = list(rows[2])
    half = [i >= 100 for i in range(len(rows[9]))]

    found = twins_of(rows_of(*rows, masks={9: half}), tmp_path)

    assert pairs(found.exact) == {}
    assert found.near is not None
    assert pairs(found.near) == {9: 2}
    assert found.similarity[9] == 1


@pytest.mark.parametrize(("changed", "near"), [(1, True), (4, True), (60, False)])
def test_rows_that_differ_in_few_tokens_are_near_twins(changed: int, near: bool, tmp_path: Path) -> None:
    rows = random_rows(40)
    rows[31] = list(rows[5])
    for place in np.random.default_rng(1).choice(np.arange(70, 250), changed, replace=False):
        rows[31][place] += 1

    found = twins_of(rows_of(*rows), tmp_path)

    assert found.near is not None
    assert pairs(found.near) == ({31: 5} if near else {})


def test_what_all_rows_share_makes_no_twins(tmp_path: Path) -> None:
    short_answers = [[*TEMPLATE, 1000 + i, 2000 + i, 3000 + i, 4000 + i, 5000 + i] for i in range(50)]

    found = twins_of(rows_of(*short_answers), tmp_path)

    assert found.near is not None
    assert pairs(found.near) == {}


def test_estimated_similarity_is_that_of_the_sets(tmp_path: Path) -> None:
    rows = random_rows(40, length=400)
    rows[1] = rows[0][:440] + random_rows(1, length=20, seed=9)[0][60:]

    found = twins_of(rows_of(*rows), tmp_path)

    def grams(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + 5]) for i in range(56, len(row) - 4)}

    true = len(grams(rows[0]) & grams(rows[1])) / len(grams(rows[0]) | grams(rows[1]))
    assert true > 0.88
    assert found.similarity[1] == pytest.approx(true, abs=0.1)


def test_sketches_are_kept_and_read_back_the_same(tmp_path: Path) -> None:
    table = rows_of(*random_rows(25))

    first, second = (sketch(table, tmp_path / "twins.safetensors") for _ in range(2))

    assert (first.exact == second.exact).all()
    assert first.minhash is not None
    assert second.minhash is not None
    assert (first.minhash == second.minhash).all()
    assert [path.name for path in tmp_path.iterdir()] == ["twins.safetensors"]


def test_rows_of_two_files_are_compared_in_one_order(tmp_path: Path) -> None:
    rows = random_rows(30)
    training = sketch(rows_of(*rows[:20]), tmp_path / "a.safetensors")
    validation = sketch(rows_of(*rows[20:], rows[4]), tmp_path / "b.safetensors")

    both: Sketches = joined(chosen(training, np.arange(20)), validation)

    assert pairs(find_twins(both).exact) == {30: 4}


def test_rows_shorter_than_a_5_gram_have_their_own_sketch(tmp_path: Path) -> None:
    found = twins_of(rows_of([1, 2], [1, 3], [4], [1, 2]), tmp_path)

    assert pairs(found.exact) == {3: 0}
    assert found.near is not None
    assert pairs(found.near) == {}


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 1.0])
def test_a_text_that_most_rows_repeat_is_found_whatever_its_share(share: float, tmp_path: Path) -> None:
    num = 100
    rows = random_rows(num, length=120)
    repeated = rows[0]
    masks = {}
    for i in range(num):
        if i < share * num:
            rows[i] = [*repeated[:-1], 40_000 + i]
        masks[i] = [place >= len(TEMPLATE) for place in range(len(rows[i]))]

    found = twins_of(rows_of(*rows, masks=masks), tmp_path)

    assert found.near is not None
    assert len(pairs(found.near)) == share * num - 1


def test_a_sketch_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    table, cached = rows_of(*random_rows(20)), tmp_path / "twins.safetensors"
    whole = sketch(table, cached)
    cached.write_bytes(cached.read_bytes()[:200])

    assert (sketch(table, cached).exact == whole.exact).all()
