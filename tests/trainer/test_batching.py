"""Which rows make a step, and how they are laid out."""

import pytest

from sftd_worker.trainer.batching import lay_out, make_plan, share_of_rank


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order() -> None:
    plan = make_plan(num_rows=10, rows_per_step=4, max_steps=None, num_epochs=2, seed=1)

    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in plan.rows_of_step(step)] for e in (0, 1)]

    assert plan.total_steps == 6
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert len(plan.rows_of_step(2)) == 2  # the last step of an epoch is short, and knows it


def test_rows_of_a_step_depend_on_nothing_that_came_before() -> None:
    fresh = make_plan(num_rows=50, rows_per_step=8, max_steps=40, num_epochs=None, seed=7)
    used = make_plan(num_rows=50, rows_per_step=8, max_steps=40, num_epochs=None, seed=7)
    for step in range(33):
        used.rows_of_step(step)

    assert fresh.rows_of_step(33) == used.rows_of_step(33)


@pytest.mark.parametrize("packing", [True, False])
def test_a_layout_holds_every_row_once(packing: bool) -> None:
    lengths = [5, 90, 30, 30, 64, 1, 100, 7]

    layout = lay_out(lengths, batch_size=3, max_tokens=100, packing=packing)

    assert sorted(i for group in layout for i in group) == list(range(8))
    if packing:
        assert all(sum(lengths[i] for i in group) <= 100 for group in layout)
        assert len(layout) == 4  # 327 tokens do not fit into three bins of 100
    else:
        assert [len(group) for group in layout] == [3, 3, 2]


def test_a_row_longer_than_a_bin_stands_alone() -> None:
    assert lay_out([10, 500], batch_size=1, max_tokens=100, packing=True) == [[1], [0]]


def test_ranks_share_rows_evenly_and_completely() -> None:
    lengths = [100, 1, 50, 49, 99, 2]

    shares = [share_of_rank(lengths, rank=rank, world_size=2) for rank in (0, 1)]

    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert abs(sum(lengths[i] for i in shares[0]) - sum(lengths[i] for i in shares[1])) <= 3


def test_a_rank_may_get_nothing() -> None:
    assert share_of_rank([10], rank=1, world_size=2) == []
    assert lay_out([], batch_size=1, max_tokens=10, packing=True) == []
