"""The worker as a process, beside a scripted server and with a scripted trainer: what must hold whatever breaks."""

import json
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from sftd.protocol import CheckpointRef

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess


@pytest.fixture(params=["cold", "warm"], autouse=True)
def way(request: pytest.FixtureRequest, worker: "WorkerProcess") -> None:
    """Whether a trainer is started or forked: all that follows holds for both."""
    worker.warm = request.param == "warm"


def last_call(server: "FakeServer") -> tuple[str, dict[str, object]]:
    found = server.until(lambda: server.last_calls)
    return found[-1][0], found[-1][1]


def test_a_job_is_run_from_claim_to_finish(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start({"steps": 5, "checkpoint_every": 2})
    call, body = last_call(server)

    assert (call, body["state"], list(body["files"])) == ("finish", "succeeded", ["model.txt"])
    assert server.steps() == [1, 2, 3, 4, 5]
    assert server.streams["logs"] == [f"step {step}" for step in range(1, 6)]
    assert [event["type"] for event in server.streams["events"]] == ["run"]
    assert [report["step"] for report in server.checkpoints] == [2, 4]
    assert worker.stop() == 0


def test_a_trainer_that_stays_behind_its_last_word_holds_neither_the_job_nor_its_device(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()

    worker.start({"steps": 3, "linger_seconds": 1000}, last_word_seconds=0.5)
    call, body = last_call(server)

    assert (call, body["state"], list(body["files"])) == ("finish", "succeeded", ["model.txt"])
    assert server.steps() == [1, 2, 3]
    assert worker.trainer_gone()


# ---------------------------------------------------------------- cancel, pause, stop


def test_a_trainer_that_ignores_signals_is_cancelled_within_five_seconds(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True}, cancel_grace_seconds=3)
    server.until(lambda: len(server.steps()) > 3)

    asked_at = time.monotonic()
    server.wish("cancel")
    call, body = last_call(server)

    assert time.monotonic() - asked_at < 5
    assert (call, body["state"]) == ("finish", "cancelled")
    assert worker.trainer_gone()
    assert (worker.folder / "signals.txt").read_text() == "SIGTERM\n"


def test_a_cancel_before_the_trainer_speaks_still_ends_in_a_final_call(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    server.wish("cancel")

    worker.start({"silent_seconds": 60})
    call, body = last_call(server)

    assert (call, body["state"]) == ("finish", "cancelled")
    assert worker.trainer_pids() == []


def test_pause_saves_a_checkpoint_first(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02})
    server.until(lambda: len(server.steps()) > 3)

    server.wish("pause")
    call, body = last_call(server)

    assert (call, body["state"]) == ("finish", "paused")
    assert (worker.folder / "signals.txt").read_text() == "SIGUSR1\n"
    assert server.checkpoints[-1]["step"] == server.steps()[-1]


def test_the_ranks_of_a_launcher_hear_of_a_pause(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "launcher": True})
    server.until(lambda: len(server.steps()) > 3)

    server.wish("pause")
    _, body = last_call(server)

    assert body["state"] == "paused"
    assert server.checkpoints[-1]["step"] == server.steps()[-1]


def test_the_ranks_of_a_launcher_are_killed_with_it(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "launcher": True, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)

    server.wish("cancel")
    _, body = last_call(server)

    assert body["state"] == "cancelled"
    assert worker.trainer_gone()


def test_what_a_trainer_leaves_behind_is_ended_with_it(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start({"steps": 2, "daemon": True})
    _, body = last_call(server)

    assert body["state"] == "succeeded"
    assert len(worker.trainer_pids()) == 2
    assert worker.trainer_gone()


def test_a_stopped_worker_saves_releases_its_job_and_ends_with_zero(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "save_seconds": 0.3})
    server.until(lambda: len(server.steps()) > 3)

    code = worker.stop()

    assert code == 0
    assert [call for call, _ in server.last_calls] == ["release"]
    assert server.checkpoints[-1]["step"] == server.steps()[-1]
    assert worker.trainer_gone()


def test_a_closed_terminal_costs_no_step(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02})
    server.until(lambda: len(server.steps()) > 3)
    assert worker.process

    worker.process.send_signal(signal.SIGHUP)

    assert worker.process.wait(15) == 0
    assert [call for call, _ in server.last_calls] == ["release"]
    assert server.checkpoints[-1]["step"] == server.steps()[-1]


def test_a_second_signal_kills_the_trainer_and_still_releases(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True}, checkpoint_grace_seconds=60)
    server.until(lambda: len(server.steps()) > 3)
    assert worker.process

    worker.process.terminate()
    server.until(lambda: (worker.folder / "signals.txt").exists())
    code = worker.stop(5)

    assert code == 0
    assert [call for call, _ in server.last_calls] == ["release"]
    assert worker.trainer_gone()


def test_an_idle_worker_stops_at_once(server: "FakeServer", worker: "WorkerProcess") -> None:
    worker.start({})
    server.until(lambda: any(path.endswith("claim") for path, _ in server.calls))

    stopped_at = time.monotonic()
    code = worker.stop()

    assert code == 0
    assert time.monotonic() - stopped_at < 2


def test_nothing_is_left_of_a_killed_worker(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)
    assert worker.process

    worker.process.kill()
    worker.process.wait()

    server.until(worker.trainer_gone, 3)


def test_the_next_worker_resumes_where_a_killed_one_left_off(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "checkpoint_every": 5})
    report = server.until(lambda: server.checkpoints)[-1]
    assert worker.process
    worker.process.kill()
    worker.process.wait()

    ref = CheckpointRef(step=report["step"], name=report["name"], manifest_sha256=report["manifest_sha256"])
    server.post_job(checkpoints=[ref])
    worker.start({"steps": report["step"] + 2})
    last_call(server)

    assert server.steps() == [report["step"] + 1, report["step"] + 2]


# ---------------------------------------------------------------- the lease


def test_a_lost_lease_kills_the_trainer_and_publishes_nothing(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)

    server.fence()
    server.until(worker.trainer_gone, 5)
    num_held = len(server.steps())
    server.until(lambda: sum(path.endswith("claim") for path, _ in server.calls) == 2)

    assert server.last_calls == []
    assert len(server.steps()) == num_held


def test_a_worker_that_is_not_answered_lets_go_before_the_lease_ends(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.lease_seconds = 2.0
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)

    server.break_down()
    silent_at = time.monotonic()
    server.until(worker.trainer_gone, 5)

    assert time.monotonic() - silent_at < server.lease_seconds
    assert server.last_calls == []


def test_a_data_folder_that_hangs_does_not_keep_a_trainer_alive_behind_its_lease(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """The attempt's own thread and the shipper hang when they read; as they do on a file system that is gone."""
    server.lease_seconds = 3.0
    server.post_job()
    worker.start({"steps": 9, "hang_at": 3})
    server.until(lambda: (worker.folder / "did_hang").exists())
    spool = worker.folder / "logs" / "events.jsonl"
    os.mkfifo(spool.with_name("fifo"))
    spool.with_name("fifo").rename(spool)
    num_beats = len(server.bodies("heartbeat"))
    server.until(lambda: len(server.bodies("heartbeat")) > num_beats + 1)
    assert not worker.trainer_gone()

    server.break_down()
    begun = time.monotonic()
    server.until(worker.trainer_gone, 10)

    assert time.monotonic() - begun < server.lease_seconds
    assert server.last_calls == []


def test_a_server_that_is_down_for_longer_than_a_lease_gets_everything_later(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.lease_seconds = 2.0
    server.post_job()
    worker.start({"steps": 150, "step_seconds": 0.02, "checkpoint_every": 40})
    server.until(lambda: len(server.steps()) > 3)

    server.down()
    server.until(lambda: '"step":150,' in _spool(worker).replace(" ", ""), 10)
    server.up()
    call, body = last_call(server)

    assert (call, body["state"]) == ("finish", "succeeded")
    assert server.steps() == list(range(1, 151))
    assert len(worker.trainer_pids()) == 1


# ---------------------------------------------------------------- how trainers end


@pytest.mark.parametrize("status", [200, 404, 409, 422, 426])
def test_errors_that_are_not_the_servers_are_an_outage(
    server: "FakeServer", worker: "WorkerProcess", status: int
) -> None:
    """As of a proxy while the server is deployed: every call gets its page for a while, from the first on."""
    server.add_fault("register", times=1, status=status, page=True)
    server.add_fault("claim", times=1, status=status, page=True)
    server.post_job()
    worker.start({"steps": 60, "step_seconds": 0.02})
    server.until(lambda: len(server.steps()) > 3)
    for call in ("heartbeat", "metrics", "logs", "finish"):
        server.add_fault(call, times=2, status=status, page=True)

    call, body = last_call(server)

    assert (call, body["state"], body["attempt"]) == ("finish", "succeeded", 1)
    assert server.steps() == list(range(1, 61))
    assert len(worker.trainer_pids()) == 1


def test_errors_that_are_not_the_servers_end_the_lease_like_any_outage(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.lease_seconds = 2.0
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02})
    server.until(lambda: len(server.steps()) > 3)

    server.add_fault("", times=10**9, status=404, page=True)
    begun = time.monotonic()
    server.until(worker.trainer_gone, 5)

    assert 1 < time.monotonic() - begun < server.lease_seconds


def test_a_named_failure_is_told_with_its_message(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start({"steps": 3, "at": 2, "end": "exception"})
    _, body = last_call(server)

    assert (body["state"], body["reason"], body["message"]) == (
        "failed",
        "diverged",
        "The loss is NaN at step 2.",
    )


def test_a_crash_is_told_with_the_end_of_the_output(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start({"steps": 3, "at": 2, "end": "exit"})
    _, body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "trainer_died")
    assert "exit code 3" in str(body["message"])
    assert body["log_tail"] == ["step 1", "step 2", "RuntimeError: something broke"]


def test_a_kill_in_the_middle_of_a_line_loses_that_line_only(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()

    worker.start({"steps": 3, "at": 2, "end": "torn"})
    _, body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "trainer_died")
    assert "signal 9" in str(body["message"])
    assert server.steps() == [1, 2]


def test_a_torn_line_of_an_earlier_attempt_does_not_swallow_the_next_one(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 3, "at": 2, "end": "torn"})
    last_call(server)

    server.post_job()
    worker._script.write_text(json.dumps({"steps": 3}))
    server.until(lambda: server.last_calls[-1][1].get("state") == "succeeded")

    assert server.steps() == [1, 2, 3]
    assert len(server.streams["events"]) == 1


# ---------------------------------------------------------------- what the trainer may see


def test_no_key_reaches_the_trainer(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start(
        {"steps": 1},
        env={
            "SFTD_ADMIN_KEY": "admin-secret",
            "SFTD_WORKER_KEY": "x",
            "PYTHONPATH": "/evil",
            "HF_TOKEN": "hf_token",
        },
    )
    last_call(server)

    seen = json.loads((worker.folder / "environment.json").read_text())
    assert not [name for name in seen if name.startswith("SFTD_")]
    assert "PYTHONPATH" not in seen
    assert (seen["HF_TOKEN"], seen["CUDA_VISIBLE_DEVICES"]) == ("hf_token", "")


def test_secrets_are_scrubbed_from_the_log(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()

    worker.start(
        {"steps": 1, "log": f"using hf_secret_token with {'x' * 9000}"}, env={"HF_TOKEN": "hf_secret_token"}
    )
    last_call(server)

    (line,) = server.streams["logs"]
    assert line.startswith("using [secret] with x")
    assert line.endswith(" … (line cut)")


# ---------------------------------------------------------------- checkpoints and devices


def test_a_broken_checkpoint_is_reported_and_the_one_before_is_used(
    server: "FakeServer", worker: "WorkerProcess", checkpoint_on_disk: Callable[[int], CheckpointRef]
) -> None:
    older, newer = checkpoint_on_disk(2), checkpoint_on_disk(4)
    (worker.folder / "checkpoints" / newer.name / "adapter.safetensors").write_bytes(b"WEIGHTS")
    server.post_job(checkpoints=[newer, older])

    worker.start({"steps": 5})
    last_call(server)

    assert [(report["name"], report["corrupt"]) for report in server.checkpoints] == [(newer.name, True)]
    assert server.steps() == [3, 4, 5]
    assert [event["type"] for event in server.streams["events"]] == ["notice", "run"]
    told = f"{newer.name} is damaged (adapter.safetensors has another hash) and is not used; the run goes on from {older.name}"
    assert told in server.streams["events"][0]["message"]
    assert any(told in line for line in server.streams["logs"])


def test_a_job_without_any_whole_checkpoint_fails_and_says_so(
    server: "FakeServer", worker: "WorkerProcess", checkpoint_on_disk: Callable[[int], CheckpointRef]
) -> None:
    ref = checkpoint_on_disk(4)
    (worker.folder / "checkpoints" / ref.name / "manifest.json").write_text("{}")
    server.post_job(checkpoints=[ref])

    worker.start({"steps": 5})
    _, body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "checkpoint_corrupt")


def test_two_trainers_never_share_a_job_folder(server: "FakeServer", worker: "WorkerProcess") -> None:
    """The agent is stopped past its lease, its trainer lives on; the next attempt must wait for it to be gone."""
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02, "ignore_signals": True}, lock_wait_seconds=60)
    server.until(lambda: len(server.steps()) > 3)
    assert worker.process
    frozen = worker.process
    os.kill(frozen.pid, signal.SIGSTOP)

    server.post_job()
    worker.start({"steps": 2}, worker_name="second")
    server.until(lambda: any(b.get("attempt") == 2 and p.endswith("heartbeat") for p, b in server.calls))
    assert len(worker.trainer_pids()) == 1
    frozen.kill()
    frozen.wait()
    _, body = last_call(server)

    assert body["state"] == "succeeded"
    assert server.steps() == [1, 2]


def test_a_changed_data_file_is_refused_before_training(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    assert server.lease
    (server.data / server.lease.training_file.path).write_text("{}")

    worker.start({"steps": 5})
    _, body = last_call(server)

    assert (body["state"], body["reason"]) == ("failed", "worker_error")
    assert "rows.jsonl" in str(body["message"])


# ---------------------------------------------------------------- starting


def test_a_foreign_data_folder_is_refused(server: "FakeServer", worker: "WorkerProcess") -> None:
    (server.data / "installation.id").write_text("another")

    worker.start({})
    assert worker.process
    code = worker.process.wait(10)

    assert code == 1
    assert "belongs to another server" in worker.log()


def test_a_worker_waits_for_its_server(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.down()
    worker.start({"steps": 1})
    server.until(lambda: "register failed" in worker.log())

    server.up()
    server.post_job()
    call, body = last_call(server)

    assert (call, body["state"]) == ("finish", "succeeded")


def _spool(worker: "WorkerProcess") -> str:
    return (worker.folder / "logs/events.jsonl").read_text()
