"""Workers of the version before: what they are answered, and who is not served at all."""

import pytest
from tests.server.conftest import Lease
from tests.server.workers import protocol_1

from sftd_server.workers import registration


@pytest.mark.sqlite
def test_every_answer_to_a_worker_of_protocol_1_parses_with_its_models(make_box) -> None:
    box = make_box(preemption="priority")
    hello = {"worker_id": "w1", "boot_id": "b1", "gpus": 1, "device": "cpu"}
    protocol_1.Welcome.model_validate_json(box.worker.post("/worker/register", json=hello).text)
    base = box.running(method="full")
    base.finish()
    (box.server.folder.path / "jobs" / base.job_id / "results").mkdir(parents=True)
    box.submit(
        base_model=f"job:{base.job_id}",
        after=[base.job_id],
        requires={"worker": "w1"},
        max_seconds=1e6,
        max_gpu_seconds=1e6,
        max_tokens=10**9,
        keep_checkpoints=3,
        priority=2,
    )
    answer = box.try_claim(protocol=1)
    lease = protocol_1.Lease.model_validate_json(answer.text)
    assert lease.spec.priority == 2
    held = Lease(box.worker, lease.job_id, lease.attempt, lease.token, answer.json())
    held.start()
    held.checkpoint(10)
    box.admin.post("/workers/w1/drain")
    box.submit(priority=9)
    box.clock.advance(25)
    for _ in range(8):
        directive = held.post("heartbeat", started=True, wait_seconds=0.1)
        protocol_1.Directive.model_validate_json(directive.text)
        box.clock.advance(20)
        box.reap()
    protocol_1.NextSeq.model_validate_json(held.metrics(0, (1, {"loss": 1.0})).text)
    protocol_1.Ok.model_validate_json(held.post("release", message="x").text)
    box.admin.post("/workers/w1/undrain")
    box.admin.post(f"/jobs/{held.job_id}/move", json={"position": "first"})
    while (answer := box.try_claim(protocol=1)).json()["job_id"] != held.job_id:
        pass
    again = protocol_1.Lease.model_validate_json(answer.text)
    assert [ref.step for ref in again.checkpoints] == [10]


def test_a_worker_of_this_version_is_told_everything(box) -> None:
    assert box.register().json()["protocol"] == 2
    box.submit(max_seconds=60)
    lease = box.claim(protocol=2)

    assert lease.answer["spec"]["max_seconds"] == 60
    assert {"make_room", "draining"} <= lease.post("heartbeat", started=True).json().keys()


@pytest.mark.parametrize(("protocol", "oldest", "code"), [(3, 1, "worker_too_new"), (1, 2, "worker_too_old")])
def test_a_worker_of_a_version_that_is_not_served_is_told_so(
    box, assert_error, monkeypatch, protocol: int, oldest: int, code: str
) -> None:
    monkeypatch.setattr(registration, "OLDEST_PROTOCOL", oldest)
    box.submit()

    for answer in (box.register(protocol=protocol), box.try_claim(protocol=protocol)):
        error = assert_error(answer, 426, code)
        assert answer.headers["upgrade"] == "sftd-worker/2"
        assert f"version {protocol}" in error["message"]
    assert box.admin.get("/workers").json()["data"] == []


def test_a_worker_that_cannot_be_told_of_other_servers_is_not_served_where_there_may_be_some(
    box, assert_error
) -> None:
    """It would take a balancer's refusal for a server that is down, and train on while another hands its job on."""
    box.submit()
    answers = [box.register(protocol=1), box.try_claim(protocol=1)]

    if not box.server.db.shared:
        assert [answer.status_code for answer in answers] == [200, 200]
        return
    for answer in answers:
        error = assert_error(answer, 426, "worker_too_old")
        assert "several servers" in error["message"]
        assert "Install" in error["message"]
    assert box.admin.get("/workers").json()["data"] == []
    assert box.register(protocol=2).status_code == 200


def test_a_busy_server_asks_workers_to_report_less_often(box, monkeypatch) -> None:
    box.submit()
    lease = box.claim(protocol=2)
    assert lease.post("heartbeat", started=True).json()["next_upload_seconds"] is None
    monkeypatch.setattr(type(box.server.db), "num_waiting", property(lambda db: 2560))

    assert lease.post("heartbeat", started=True).json()["next_upload_seconds"] == 10
