"""PATCH, move, pin."""

import pytest

from sftd.spec import JobSpec


def patch(box, job_id: str, **fields):
    return box.admin.patch(f"/jobs/{job_id}", json=fields)


def order(box) -> list[str]:
    """The jobs of the queue as they would be claimed."""
    jobs = box.admin.get("/jobs?state=queued&limit=100").json()["data"]
    return [job["id"] for job in sorted(jobs, key=lambda job: job["queue_position"])]


def move(box, job_id: str, client=None, **where):
    return (client or box.admin).post(f"/jobs/{job_id}/move", json=where)


# ---------------------------------------------------------------- fields


def test_fields_change_with_the_spec(box) -> None:
    job_id = box.submit(name="a", priority=1)

    job = patch(
        box,
        job_id,
        name="b",
        metadata={"x": "y"},
        priority=7,
        max_seconds=60,
        requires={"gpu_memory_gb": 40},
        keep_checkpoints=3,
    ).json()

    assert (job["name"], job["metadata"], job["priority"]) == ("b", {"x": "y"}, 7)
    spec = JobSpec.model_validate(job["spec"])
    assert (spec.priority, spec.max_seconds, spec.keep_checkpoints) == (7, 60, 3)
    assert spec.requires is not None
    assert box.events(job_id)[-1] == "changed"
    assert patch(box, job_id, name=None, requires=None).json()["name"] is None
    assert box.claim().answer["spec"]["priority"] == 7


def test_nothing_changed_is_no_event(box) -> None:
    job_id = box.submit(priority=1)

    assert patch(box, job_id, priority=1).status_code == 200

    assert box.events(job_id) == ["queued"]


def test_what_is_trained_can_not_change(box, assert_error) -> None:
    job_id = box.submit()

    error = assert_error(
        patch(box, job_id, learning_rate=1e-4, prioritty=3, max_tokens=0), 422, "invalid_spec"
    )

    lines = dict(line.split(": ", 1) for line in error["message"].split("\n"))
    assert "clone the job" in lines["learning_rate"]
    assert "did you mean priority?" in lines["prioritty"]
    assert "max_tokens" in lines
    assert patch(box, job_id, prioritty=None).status_code == 422
    assert patch(box, job_id, training_file=None).status_code == 422


def test_a_job_that_is_over_keeps_all_but_its_names(box, assert_error) -> None:
    lease = box.running()
    assert_error(patch(box, lease.job_id, after=[box.submit()]), 409, "wrong_state")
    lease.finish()

    assert_error(patch(box, lease.job_id, priority=3), 409, "job_finished")
    assert patch(box, lease.job_id, name="done", keep_checkpoints=1).status_code == 200


def test_only_the_owner_or_an_admin_changes_a_job(box, assert_error) -> None:
    ann, bob = box.key("ann"), box.key("bob")
    job_id = ann.post("/jobs", json=box.spec()).json()["id"]

    for client, status in ((bob, 403), (ann, 200), (box.admin, 200)):
        assert client.patch(f"/jobs/{job_id}", json={"priority": status}).status_code == status
        assert move(box, job_id, client, position="last").status_code == status
        assert client.post(f"/jobs/{job_id}/checkpoints/1/unpin").status_code == (
            404 if status == 200 else 403
        )
    assert bob.delete(f"/jobs/{job_id}").status_code == 403


def test_a_higher_priority_goes_first_from_then_on(box) -> None:
    first, second = box.submit(), box.submit()

    patch(box, second, priority=1)

    assert order(box) == [second, first]


# ---------------------------------------------------------------- the queue


def test_a_job_is_moved_among_those_of_its_priority(box) -> None:
    a, b, c, d = (box.submit() for _ in range(4))
    high = box.submit(priority=1)
    assert order(box) == [high, a, b, c, d]

    assert move(box, d, position="first").json()["queue_position"] == 2
    assert order(box) == [high, d, a, b, c]
    move(box, a, after=b)
    assert order(box) == [high, d, b, a, c]
    move(box, c, before=b)
    assert order(box) == [high, d, c, b, a]
    move(box, d, position="last")
    assert order(box) == [high, c, b, a, d]
    new = box.submit()
    assert order(box) == [high, c, b, a, new, d]
    assert [box.claim().job_id for _ in range(6)] == [high, c, b, a, new, d]


def test_a_released_job_still_goes_first_after_a_move(box) -> None:
    lease = box.running()
    a, b = box.submit(), box.submit()
    lease.post("release", message="x")

    move(box, b, before=a)

    assert order(box) == [lease.job_id, b, a]


def test_a_user_moves_own_jobs_but_not_ahead_of_others(box, assert_error) -> None:
    ann, bob = box.key("ann"), box.key("bob")
    a1, b1, b2 = (c.post("/jobs", json=box.spec()).json()["id"] for c in (ann, bob, bob))

    assert_error(move(box, b2, bob, position="first"), 403, "admin_only")
    assert move(box, b2, bob, before=b1).status_code == 200
    assert order(box) == [a1, b2, b1]
    assert move(box, b1, box.admin, position="first").status_code == 200
    assert order(box) == [b1, a1, b2]


@pytest.mark.parametrize(
    ("where", "param"),
    [
        ({}, "position"),
        ({"position": "first", "before": "job_x"}, "position"),
        ({"position": "middle"}, "position"),
        ({"before": "job_nope"}, "before"),
        ({"after": "self"}, "after"),
        ({"behind": "x"}, "behind"),
    ],
)
def test_mistakes_of_a_move_are_named(box, assert_error, where: dict, param: str) -> None:
    job_id = box.submit()
    where = {name: job_id if value == "self" else value for name, value in where.items()}

    assert assert_error(move(box, job_id, **where), 422, "invalid_request")["param"] == param


def test_only_queued_jobs_are_moved(box, assert_error) -> None:
    assert_error(move(box, box.running().job_id, position="first"), 409, "wrong_state")


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_pinned_and_unpinned(box, assert_error) -> None:
    lease = box.running()
    lease.checkpoint(10)
    lease.checkpoint(20)
    path = f"/jobs/{lease.job_id}/checkpoints"

    assert box.admin.post(f"{path}/10/pin", json={"name": "best"}).json()["pinned"] == "best"
    assert box.admin.post(f"{path}/10/pin", json={"name": "best"}).status_code == 200
    assert_error(box.admin.post(f"{path}/20/pin", json={"name": "best"}), 409, "name_taken")
    assert_error(box.admin.post(f"{path}/30/pin", json={"name": "x"}), 404, "unknown_checkpoint")
    assert_error(box.admin.post(f"{path}/20/pin", json={"name": "a\nb"}), 422, "invalid_request")
    assert [c["pinned"] for c in box.admin.get(path).json()["data"]] == ["best", None]
    assert box.admin.post(f"{path}/10/unpin").json()["pinned"] is None
    assert box.admin.post(f"{path}/20/pin", json={"name": "best"}).status_code == 200
