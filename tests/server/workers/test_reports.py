"""Numbered streams, checkpoints, and the history that comes of several attempts."""

import pytest


def steps(box, job_id: str, **params) -> list[dict]:
    return box.admin.get(f"/jobs/{job_id}/metrics", params=params).json()["data"]


def points(first: int, last: int, base: float = 0.0):
    return [(step, {"loss": base + step}) for step in range(first, last + 1)]


BATCHES = {
    "metrics": lambda n: {"points": [{"step": i, "values": {"loss": i}} for i in range(n)]},
    "logs": lambda n: {"lines": [f"line {i}" for i in range(n)]},
    "events": lambda n: {"events": [{"type": "notice", "message": f"{i}"} for i in range(n)]},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_stream_takes_each_batch_once_and_in_order(box, assert_error, kind: str) -> None:
    lease = box.running()
    batch = BATCHES[kind]

    assert lease.post(kind, seq=0, **batch(3)).json() == {"next_seq": 3}
    assert lease.post(kind, seq=0, **batch(3)).json() == {"next_seq": 3}  # sent twice
    assert lease.post(kind, seq=1, **batch(2)).json() == {"next_seq": 3}  # within what is there
    for seq, number in ((4, 1), (2, 2), (0, 4)):  # a gap, and overlaps that bring something new
        gap = lease.post(kind, seq=seq, **batch(number))
        assert "go on with number 3" in assert_error(gap, 416, "sequence_gap")["message"]
        assert gap.headers["x-expected-seq"] == "3"
    assert lease.post(kind, seq=3, **batch(0)).json() == {"next_seq": 3}

    listed = box.admin.get(f"/jobs/{lease.job_id}/{kind}").json()["data"]
    assert len([item for item in listed if item.get("type") in (None, "notice")]) == 3


def test_a_new_attempt_counts_its_streams_from_zero(box) -> None:
    box.running().post("logs", seq=0, lines=["a", "b"])
    box.expire()
    lease = box.claim()

    assert lease.post("logs", seq=0, lines=["c"]).json() == {"next_seq": 1}
    texts = [line["text"] for line in box.admin.get(f"/jobs/{lease.job_id}/logs").json()["data"]]
    assert texts == ["a", "b", "c"]


def test_nan_and_infinities_come_back_exactly(box) -> None:
    lease = box.running()
    values = {
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
        "d": -0.0,
        "e": 1e-320,
        "f": 1.7976931348623157e308,
    }

    lease.metrics(0, (1, values))

    assert steps(box, lease.job_id) == [{"step": 1, **values}]


def test_the_history_is_that_of_an_uninterrupted_run(box) -> None:
    lease = box.running()
    lease.event(0, "run", start_step=-1, total_steps=30)
    lease.metrics(0, *points(0, 25))
    box.expire()
    second = box.claim()
    second.event(0, "run", start_step=20, total_steps=30)
    assert [point["step"] for point in steps(box, lease.job_id)] == list(range(21))
    second.metrics(0, *points(21, 23, base=100))
    box.expire()
    third = box.claim()
    third.event(0, "run", start_step=10, total_steps=30)
    third.metrics(0, *points(11, 30, base=200))

    history = steps(box, lease.job_id)

    assert [point["step"] for point in history] == list(range(31))
    assert [point["loss"] for point in history] == [*range(11), *(200.0 + s for s in range(11, 31))]
    assert box.job(lease.job_id)["step"] == 30


def test_metrics_are_paged_selected_and_thinned(box) -> None:
    lease = box.running()
    lease.metrics(0, *[(s, {"loss": 1.0 * s, "lr": 0.1}) for s in range(1, 101)])
    lease.metrics(100, *[(s, {"eval_loss": 9.0}) for s in (50, 100)])
    url = f"/jobs/{lease.job_id}/metrics"

    page = box.admin.get(url, params={"limit": 30, "names": "loss,eval_loss", "after": 40}).json()
    assert [point["step"] for point in page["data"]] == list(range(41, 71))
    assert (page["has_more"], page["next_after"]) == (True, 70)
    assert page["data"][9] == {"step": 50, "loss": 50.0, "eval_loss": 9.0}
    thin = box.admin.get(url, params={"points": 10}).json()
    shown = [point["step"] for point in thin["data"]]
    assert shown[0] == 1
    assert shown[-1] == 100
    assert 50 in shown
    assert len(shown) <= 12
    assert not thin["has_more"]


def test_a_job_shows_how_far_it_is(box) -> None:
    lease = box.running()
    lease.event(0, "run", start_step=-1, total_steps=100)
    lease.metrics(
        0,
        (9, {"loss": 3.0}),
        (10, {"loss": 2.0, "seconds": 2.0, "tokens_seen": 5000, "tokens_per_second": 99.5}),
    )
    lease.event(1, "evaluation", step=10, eval_loss=2.5, perplexity=12.2, token_accuracy=0.4, num_tokens=77)

    job = box.job(lease.job_id)

    shown = {
        name: job[name] for name in ("step", "total_steps", "progress", "loss", "eval_loss", "tokens_seen")
    }
    assert shown == {
        "step": 10,
        "total_steps": 100,
        "progress": 0.1,
        "loss": 2.0,
        "eval_loss": 2.5,
        "tokens_seen": 5000,
    }
    assert job["estimated_finish_at"] == "2030-01-01T00:03:00Z"  # 90 steps of 2 s


def test_evaluations_follow_the_history_too(box) -> None:
    lease = box.running()
    lease.event(0, "run", start_step=-1)
    numbers = {"perplexity": 1.0, "token_accuracy": 0.5, "num_tokens": 7}
    for seq, step in enumerate((0, 10, 20), start=1):
        lease.event(seq, "evaluation", step=step, eval_loss=1.0, **numbers)
    box.expire()
    second = box.claim()
    second.event(0, "run", start_step=10)
    second.event(1, "evaluation", step=20, eval_loss="NaN", **numbers)

    found = box.admin.get(f"/jobs/{lease.job_id}/evaluations").json()["data"]

    assert [(e["step"], e["attempt"], e["eval_loss"]) for e in found] == [
        (0, 1, 1.0),
        (10, 1, 1.0),
        (20, 2, "NaN"),
    ]


def test_malformed_event_data_is_named(box, assert_error) -> None:
    lease = box.running()

    error = assert_error(lease.event(0, "evaluation", step=-1), 422, "invalid_event")

    assert error["param"] == "events[0].data.step"
    assert lease.event(0, "notice").json() == {"next_seq": 1}  # nothing of it was taken


def test_a_job_has_at_most_a_thousand_metric_names(box, assert_error) -> None:
    lease = box.running()
    lease.metrics(0, (1, {f"m{i}": 1.0 for i in range(1000)}))

    assert_error(lease.metrics(1, (2, {"one-more": 1.0})), 422, "too_many_metric_names")
    assert lease.metrics(1, (2, {"m5": 1.0})).status_code == 200


def test_checkpoints_go_forward_and_may_be_reported_twice(box, assert_error) -> None:
    lease = box.running()

    assert [lease.checkpoint(step).status_code for step in (10, 20, 20, 10)] == [200] * 4
    assert_error(lease.checkpoint(15), 409, "checkpoint_backwards")
    assert_error(lease.checkpoint(20, manifest_sha256="cd" * 32), 409, "checkpoint_backwards")
    listed = box.admin.get(f"/jobs/{lease.job_id}/checkpoints").json()["data"]
    assert [found["step"] for found in listed] == [10, 20]
    assert box.events(lease.job_id).count("checkpoint") == 2


def test_a_corrupt_checkpoint_is_never_offered_again_until_it_is_made_anew(box) -> None:
    lease = box.running()
    lease.checkpoint(10)
    lease.checkpoint(20)
    box.expire()
    second = box.claim()
    assert [c["step"] for c in second.answer["checkpoints"]] == [20, 10]

    second.checkpoint(20, corrupt=True)
    assert [c["step"] for c in box.admin.get(f"/jobs/{lease.job_id}/checkpoints").json()["data"]] == [10]
    assert second.checkpoint(20, manifest_sha256="cd" * 32).status_code == 200

    box.expire()
    found = box.claim().answer["checkpoints"]
    assert [(c["step"], c["manifest_sha256"][:2]) for c in found] == [(20, "cd"), (10, "ab")]
    assert "checkpoint_corrupt" in box.events(lease.job_id)


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        ("metrics", {"points": [{"step": 1, "values": {"loss": 1.0}}]}),
        ("logs", {"lines": ["x"]}),
        ("events", {"events": [{"type": "notice", "message": "x"}]}),
    ],
)
def test_a_number_at_the_edge_of_64_bits_is_refused(box, assert_error, kind: str, items) -> None:
    answer = box.running().post(kind, seq=2**63 - 1, **items)

    assert assert_error(answer, 422, "invalid_request")["param"] == "seq"


def test_a_batch_of_more_names_than_a_query_takes_is_refused(box, assert_error) -> None:
    points = [(step, {f"m{step}_{i}": 1.0 for i in range(9000)}) for step in range(5)]

    assert_error(box.running().metrics(0, *points), 422, "too_many_metric_names")
