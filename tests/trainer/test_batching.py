"""Which rows make a step, and which of them a rank computes."""

from sftd_worker.trainer.batching import make_plan, share_of_rank
from sftd_worker.trainer.packing import lay_out


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


def test_ranks_share_rows_evenly_and_completely() -> None:
    lengths = [100, 1, 50, 49, 99, 2]

    shares = [share_of_rank(lengths, rank=rank, world_size=2) for rank in (0, 1)]

    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert abs(sum(lengths[i] for i in shares[0]) - sum(lengths[i] for i in shares[1])) <= 3


def test_a_rank_may_get_nothing() -> None:
    assert share_of_rank([10], rank=1, world_size=2) == []
    assert lay_out([], batch_size=1, max_tokens=10, packing=True) == []
