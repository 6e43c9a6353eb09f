"""Plans: the server's part with a scripted worker that counts; the whole way with a real one is in tests/e2e."""

import threading
from typing import Any

import httpx
import pytest
from tests.server.conftest import ROWS, Box

from sftd.protocol import TOKEN_HEADER

LINEARS = [
    {"name": name, "num_in": num_in, "num_out": num_out, "count": 28}
    for name, num_in, num_out in (
        ("q_proj", 3584, 3584),
        ("k_proj", 3584, 512),
        ("v_proj", 3584, 512),
        ("o_proj", 3584, 3584),
        ("gate_proj", 3584, 18944),
        ("up_proj", 3584, 18944),
        ("down_proj", 18944, 3584),
    )
]
QWEN_7B = {
    "architecture": "Qwen2ForCausalLM",
    "parameters": 7_615_616_512,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_layers": 28,
    "num_heads": 28,
    "kv_width": 512,
    "vocab_size": 152064,
    "tied_head": False,
    "linears": LINEARS,
    "stored_bytes": 2,
    "has_template": True,
    "max_positions": 32768,
}
SHAPE = {"parameters": 7_615_616_512 + 40_370_176, "trainable_parameters": 40_370_176}
STEPS = {
    "total_steps": 1000,
    "num_epochs": 2.5,
    "steps_per_epoch": 400,
    "rows_per_step": 8,
    "tokens_per_step": 4000,
    "supervised_tokens_per_step": 1500,
    "total_tokens": 4e6,
    "warmup_steps": 100,
    "num_evaluations": 0,
    "num_checkpoints": 20,
}
COUNTED = {
    "problems": [],
    "num_problems": 0,
    "model": QWEN_7B,
    "steps": STEPS,
    "largest_tokens": 8192,
    "largest_supervised": 4000,
    "longest_row": 2048,
}


def ask(
    box: Box,
    *,
    client: httpx.Client | None = None,
    wait: float = 0,
    gpu: list[str] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    answer = (client or box.admin).post(
        "/jobs/plan", params={"wait": wait, "gpu": gpu or []}, json=box.spec(**fields)
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def take(box: Box, worker_id: str = "w1", **more: Any) -> httpx.Response:
    body = {"worker_id": worker_id, "boot_id": "b1", "wait_seconds": 0, **more}
    return box.worker.post("/worker/analyses/claim", json=body)


def say(box: Box, task: dict[str, Any], call: str, body: dict[str, Any] | None = None) -> httpx.Response:
    return box.worker.post(
        f"/worker/analyses/{task['id']}/{call}", json=body, headers={TOKEN_HEADER: task["token"]}
    )


def counted(box: Box, **changes: Any) -> None:
    """A worker counts what is wanted."""
    answer = take(box)
    assert answer.status_code == 200, answer.text
    done = say(box, answer.json(), "finish", {"analysis": {**COUNTED, **changes}})
    assert done.status_code == 200, done.text


@pytest.fixture
def registered(box: Box) -> Box:
    box.register(
        installation_id=box.server.installation_id, gpu_memory_gb=79.2, gpu_names=["NVIDIA H100 80GB HBM3"]
    )
    return box


def errors(plan: dict[str, Any]) -> list[str]:
    return [problem["field"] for problem in plan["problems"] if problem["severity"] == "error"]


def warned(plan: dict[str, Any]) -> list[str]:
    return [problem["field"] for problem in plan["problems"] if problem["severity"] == "warning"]


def test_without_a_worker_a_plan_says_what_is_missing_at_once(box: Box) -> None:
    plan = ask(box, wait=20)

    assert (plan["ok"], plan["complete"]) == (True, False)
    assert "No worker" in plan["incomplete"]
    assert plan["time"]["starts_in_seconds"] is None
    assert box.admin.get("/jobs").json()["data"] == []


def test_a_plan_waits_for_its_data_to_be_counted(registered: Box) -> None:
    plans: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: plans.append(ask(registered, wait=20)))
    asking.start()
    answer = take(registered, wait_seconds=20)
    say(registered, answer.json(), "finish", {"analysis": COUNTED})
    asking.join(20)

    (plan,) = plans
    assert plan["complete"]
    assert plan["parameters"] == {"total": 7_615_616_512 + 40_370_176, "trainable": 40_370_176}
    assert plan["steps"]["total_steps"] == 1000


def test_a_plan_that_is_not_counted_in_time_can_be_asked_for_again(registered: Box) -> None:
    first = ask(registered)
    counted(registered)
    second = ask(registered)

    assert (first["complete"], second["complete"]) == (False, True)
    assert "ask again" in first["incomplete"]


def test_the_same_data_is_counted_once_whatever_else_a_spec_says(registered: Box) -> None:
    ask(registered, learning_rate=1e-4, name="one")
    counted(registered)

    again = ask(registered, learning_rate=3e-4, name="two", metadata={"a": "b"}, priority=3)

    assert again["complete"]
    assert take(registered).status_code == 204


@pytest.mark.parametrize(
    "change", [{"max_seq_length": 512}, {"train_on": "all"}, {"seed": 7}, {"batch_size": 2}]
)
def test_what_changes_the_count_is_counted_anew(change: dict[str, Any], registered: Box) -> None:
    ask(registered)
    counted(registered)

    assert not ask(registered, **change)["complete"]


def test_a_worker_that_vanishes_is_followed_by_another(registered: Box) -> None:
    ask(registered)
    lost = take(registered).json()
    registered.clock.advance(61)
    registered.register("w2", installation_id=registered.server.installation_id)

    found = take(registered, "w2").json()

    assert found["id"] == lost["id"]
    assert say(registered, lost, "renew").status_code == 409
    assert say(registered, lost, "finish", {"analysis": COUNTED}).status_code == 409
    assert say(registered, found, "finish", {"analysis": COUNTED}).status_code == 200
    assert ask(registered)["complete"]


def test_a_worker_that_renews_keeps_it(registered: Box) -> None:
    ask(registered)
    task = take(registered).json()
    for _ in range(3):
        registered.clock.advance(40)
        assert say(registered, task, "renew").status_code == 200

    assert take(registered).status_code == 204
    assert say(registered, task, "finish", {"analysis": COUNTED}).status_code == 200


def test_data_that_kills_its_counters_is_given_up(registered: Box) -> None:
    ask(registered)
    for _ in range(3):
        assert take(registered).status_code == 200
        registered.clock.advance(61)
    registered.register(installation_id=registered.server.installation_id)
    assert take(registered).status_code == 204

    plan = ask(registered)

    assert not plan["complete"]
    assert "3 workers vanished" in plan["incomplete"]


def test_what_could_not_be_counted_is_told_and_tried_again_later(registered: Box) -> None:
    ask(registered)
    say(registered, take(registered).json(), "finish", {"error": "the hub is away"})

    assert "the hub is away" in ask(registered)["incomplete"]
    registered.clock.advance(11)
    ask(registered)
    assert take(registered).status_code == 200


def test_a_stopped_worker_gives_back_what_it_counts(registered: Box) -> None:
    ask(registered)
    say(registered, take(registered).json(), "finish", {"error": "stopping", "may_retry": True})

    assert take(registered).status_code == 200


def test_counting_is_for_registered_workers_with_a_workers_key(registered: Box) -> None:
    ask(registered)

    assert take(registered, "stranger").json()["error"]["code"] == "worker_unregistered"
    assert registered.admin.post("/worker/analyses/claim", json={}).status_code == 403


def test_every_mistake_of_a_spec_is_told_and_the_data_is_counted_all_the_same(registered: Box) -> None:
    bad = {"learning_rate": -1, "lora": {"rnak": 8}, "max_steps": 5, "num_epochs": 1}
    ask(registered, **bad)
    row = {
        "severity": "error",
        "field": "training_file",
        "file": "file_1",
        "line": 7,
        "row_field": "completion",
        "message": "is empty",
        "remedy": "fill it",
    }
    counted(registered, problems=[row], num_problems=1)

    plan = ask(registered, **bad)

    assert errors(plan) == ["learning_rate", "lora.rnak", "num_epochs", "training_file"]
    assert plan["problems"][-1]["line"] == 7
    assert (plan["ok"], plan["complete"], plan["spec"]) == (False, True, None)
    answer = registered.admin.post("/jobs", json=registered.spec(**bad))
    assert answer.status_code == 422


def test_without_a_file_nothing_is_counted(registered: Box) -> None:
    answer = registered.admin.post(
        "/jobs/plan", json={"base_model": "org/model", "training_file": "file_none"}
    )

    plan = answer.json()
    assert (answer.status_code, errors(plan)) == (200, ["training_file"])
    assert "training_file" in plan["incomplete"]
    assert take(registered).status_code == 204


@pytest.mark.parametrize("body", ["[]", "3", '"x"', "{}", "{", '{"base_model": 3}'])
def test_any_body_is_answered(body: str, box: Box) -> None:
    answer = box.admin.post("/jobs/plan", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 200:
        assert not answer.json()["ok"]


def test_a_job_that_does_not_fit_says_what_to_change(registered: Box) -> None:
    fields = {"method": "full", "learning_rate": 1e-5}
    ask(registered, **fields)
    counted(registered)

    plan = ask(registered, **fields)

    (memory,) = plan["memory"]
    assert (memory["device"], memory["present"], memory["fits"]) == ("NVIDIA H100 80GB HBM3", True, False)
    assert memory["parts"]["weights"] == 4 * 7_615_616_512
    assert memory["parts"]["optimizer"] == 8 * 7_615_616_512
    assert any("lora" in words for words in memory["advice"])
    assert not plan["ok"]
    assert "GiB" in plan["problems"][-1]["message"] + plan["problems"][-2]["message"]


def test_named_types_are_planned_for_beside_those_that_are_there(registered: Box) -> None:
    ask(registered, method="qlora")
    counted(registered)

    plan = ask(registered, gpu=["T4", "A100"], method="qlora")

    assert [(m["device"], m["present"], m["fits"]) for m in plan["memory"]] == [
        ("T4", False, True),
        ("A100", False, True),
        ("NVIDIA H100 80GB HBM3", True, True),
    ]


def test_the_result_is_as_wide_as_any_device_would_save_it(registered: Box) -> None:
    ask(registered, method="full")
    counted(registered)

    as_stored = ask(registered, method="full")["disk"]
    in_fp32 = ask(registered, method="full", gpu=["V100"])["disk"]

    assert as_stored["result_bytes"] == 2 * 7_615_616_512
    assert in_fp32["result_bytes"] == 4 * 7_615_616_512


def test_an_unknown_type_is_refused_with_those_that_are_known(box: Box) -> None:
    answer = box.admin.post("/jobs/plan", params={"gpu": "H9000"}, json=box.spec())

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "gpu"
    assert "H100" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "steps", "field"),
    [
        ({"warmup_steps": 1000}, {"warmup_steps": 1000}, "warmup_steps"),
        ({"learning_rate": 0.1}, {}, "learning_rate"),
        ({"learning_rate": 1e-9}, {}, "learning_rate"),
        ({}, {"num_epochs": 40.0}, "max_steps"),
        ({}, {"num_epochs": 0.2}, "max_steps"),
        ({"save_steps": 5000}, {}, "save_steps"),
    ],
)
def test_what_is_hardly_meant_is_warned_of(
    fields: dict[str, Any], steps: dict[str, Any], field: str, registered: Box
) -> None:
    ask(registered, **fields)
    counted(registered, steps={**STEPS, **steps})

    plan = ask(registered, **fields)

    assert field in warned(plan)
    assert plan["ok"]


def test_a_measured_run_of_the_same_shape_gives_the_speed(registered: Box) -> None:
    lease = registered.running()
    lease.event(0, "run", start_step=-1, total_steps=3, device="NVIDIA H100 80GB HBM3", **SHAPE)
    lease.metrics(0, *((step, {"tokens_per_second": 2000.0 + step}) for step in (1, 2, 3)))
    lease.finish()
    ask(registered, learning_rate=1e-4)
    counted(registered)

    time = ask(registered, learning_rate=1e-4)["time"]

    assert time["tokens_per_second"] == 2002
    assert "measured in 1 run" in time["basis"]
    assert time["seconds"] == pytest.approx(4e6 / 2002, rel=0.05)
    assert time["gpu_hours"] == pytest.approx(time["seconds"] / 3600, rel=1e-3)


def test_without_one_the_rule_is_said(registered: Box) -> None:
    ask(registered)
    counted(registered)

    time = ask(registered)["time"]

    assert "by rule" in time["basis"]
    assert "NVIDIA H100" in time["basis"]
    assert time["starts_in_seconds"] == 0


def test_the_start_counts_what_runs_and_what_waits(registered: Box) -> None:
    lease = registered.running(max_steps=100)
    lease.event(0, "run", start_step=-1, total_steps=100)
    lease.metrics(0, *((step, {"seconds": 10.0, "loss": 1.0}) for step in range(1, 11)))
    registered.submit(max_steps=60)

    time = ask(registered)["time"]
    ahead = ask(registered, priority=5)["time"]

    assert ahead["starts_in_seconds"] == pytest.approx(900, rel=0.05)
    assert time["starts_in_seconds"] > ahead["starts_in_seconds"]
    assert "1 queued and 1 running" in time["why_waiting"]


def test_a_job_that_no_worker_can_take_has_no_start(registered: Box) -> None:
    time = ask(registered, gpus=4)["time"]

    assert (time["starts_in_seconds"], time["starts_at"]) == (None, None)
    assert "No worker" in time["why_waiting"]


def test_a_preview_renders_the_lines_that_are_asked_for(registered: Box) -> None:
    file_id = registered.upload()
    query = {"base_model": "org/model", "after": 1, "limit": 1, "wait": 0}
    waiting = registered.admin.get(f"/files/{file_id}/preview", params=query)
    task = take(registered).json()
    segments = [{"text": "3+3?", "supervised": False}, {"text": "6", "supervised": True}]
    shown = {"line": 2, "num_tokens": 5, "num_supervised": 1, "segments": segments, "shortened": False}
    say(registered, task, "finish", {"analysis": {"problems": [], "num_problems": 0, "rows": [shown]}})

    answer = registered.admin.get(f"/files/{file_id}/preview", params=query)

    assert (waiting.status_code, waiting.json()["complete"]) == (200, False)
    assert "ask again" in waiting.json()["incomplete"]
    assert task["request"]["lines"] == [2]
    assert answer.json()["data"] == [shown]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "base_model"),
        ({"base_model": "../x"}, "base_model"),
        ({"base_model": "m", "train_on": "x"}, "train_on"),
    ],
)
def test_a_wrong_preview_names_its_mistake(query: dict[str, str], param: str, box: Box) -> None:
    answer = box.admin.get(f"/files/{box.upload()}/preview", params=query)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_what_nobody_asks_for_is_forgotten(registered: Box) -> None:
    ask(registered)
    counted(registered)
    registered.clock.advance(8 * 86400)
    registered.run(registered.app.state.janitor.collect())
    registered.register(installation_id=registered.server.installation_id)

    assert not ask(registered)["complete"]


def test_a_run_on_another_device_is_no_measure(registered: Box) -> None:
    lease = registered.running()
    lease.event(0, "run", start_step=-1, total_steps=1, device="CPU", **SHAPE)
    lease.metrics(0, (1, {"tokens_per_second": 3.0}))
    lease.finish()
    ask(registered)
    counted(registered)

    assert "by rule" in ask(registered)["time"]["basis"]


def test_jobs_that_stand_in_nobodys_way_are_not_waited_for(registered: Box) -> None:
    for _ in range(3):
        registered.submit(requires={"worker": "nobody"})
    first = registered.submit(requires={"worker": "nobody"})
    registered.submit(after=[first])

    assert ask(registered)["time"]["starts_in_seconds"] == 0


def test_a_queue_of_centuries_has_no_date(registered: Box) -> None:
    lease = registered.running(max_steps=10)
    lease.event(0, "run", start_step=-1, total_steps=10)
    for _ in range(5):
        registered.submit(max_steps=10**9)
    registered.server.settings.__dict__["fair_share"] = False

    time = ask(registered, max_steps=10**9)["time"]

    assert time["starts_in_seconds"] > 10**9
    assert (time["starts_at"], time["finishes_at"]) == (None, None)


def test_a_base_that_another_job_will_make_is_waited_for(registered: Box) -> None:
    job_id = registered.submit()

    plan = ask(registered, base_model=f"job:{job_id}", after=[job_id])

    assert (plan["ok"], plan["complete"]) == (True, False)
    assert "another job makes" in plan["incomplete"]
    assert take(registered).status_code == 204


def test_an_owner_may_ask_for_so_much_at_a_time(registered: Box) -> None:
    user = registered.key("busy")
    for seed in range(8):
        ask(registered, client=user, seed=seed)
    refused = user.post("/jobs/plan", params={"wait": 0}, json=registered.spec(seed=99))

    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_plans")
    assert refused.headers["retry-after"]
    assert ask(registered)["incomplete"]
    registered.clock.advance(601)  # nobody has asked for them again
    registered.register(installation_id=registered.server.installation_id)
    assert take(registered).status_code == 204
    ask(registered, client=user, seed=99)


def test_a_model_that_could_not_be_read_is_looked_for_again_soon(registered: Box) -> None:
    problem = {
        "severity": "error",
        "field": "base_model",
        "file": None,
        "line": None,
        "row_field": None,
        "message": "the hub is away",
        "remedy": None,
    }
    ask(registered)
    task = take(registered).json()
    say(registered, task, "finish", {"analysis": {"problems": [problem], "num_problems": 1}})

    assert errors(ask(registered)) == ["base_model"]
    registered.clock.advance(11)
    ask(registered)
    assert take(registered).status_code == 200


def test_orderly_stops_of_workers_are_no_crashes(registered: Box) -> None:
    ask(registered)
    for _ in range(4):
        task = take(registered).json()
        say(registered, task, "finish", {"error": "stopping", "may_retry": True})

    assert take(registered).status_code == 200


def test_a_device_of_unknown_size_is_no_reason_to_refuse(registered: Box) -> None:
    registered.register("w-cpu", device="cpu", installation_id=registered.server.installation_id)
    fields = {"method": "full", "learning_rate": 1e-5}
    ask(registered, **fields)
    counted(registered)

    plan = ask(registered, **fields)

    assert [memory["fits"] for memory in plan["memory"]] == [False, None]
    assert plan["ok"]


def test_eight_bits_are_not_shared_out(registered: Box) -> None:
    fields = {"method": "full", "learning_rate": 1e-5, "gpus": 8, "optimizer": "adamw_8bit"}
    ask(registered, **fields)
    counted(registered)

    (memory,) = ask(registered, **fields)["memory"]

    assert memory["parts"]["weights"] == 4 * 7_615_616_512
    assert not any("gpus" in words for words in memory["advice"])


def test_what_is_to_be_counted_can_be_fetched_while_it_is_held(registered: Box) -> None:
    ask(registered)
    task = take(registered).json()
    sha256 = task["request"]["training_file"]["sha256"]

    def fetch(sha256: str, token: str) -> httpx.Response:
        url = f"/worker/analyses/{task['id']}/inputs/{sha256}"
        return registered.worker.get(url, headers={TOKEN_HEADER: token})

    assert fetch(sha256, task["token"]).content == ROWS
    assert fetch("ab" * 32, task["token"]).status_code == 404
    assert fetch(sha256, "another").status_code == 409
    say(registered, task, "finish", {"analysis": COUNTED})
    assert fetch(sha256, task["token"]).status_code == 409
