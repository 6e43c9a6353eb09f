"""How a worker makes itself known, what it says of its dead predecessor, and what it does when the server says no."""

import json
import signal
from typing import TYPE_CHECKING

from sftd.protocol import PROTOCOL
from sftd_worker.disk import free_bytes

if TYPE_CHECKING:
    from conftest import FakeServer, WorkerProcess

LONG = {"steps": 10**6, "step_seconds": 0.02}


def hellos(server: "FakeServer", count: int) -> list[dict]:
    """The first so many."""
    return server.until(lambda: len(found := server.bodies("register")) >= count and found)


def kill(worker: "WorkerProcess") -> None:
    assert worker.process
    worker.process.kill()
    worker.process.wait()


def test_a_worker_says_what_it_speaks_and_has(server: "FakeServer", worker: "WorkerProcess") -> None:
    worker.start({}, gpus=3, worker_name="w")
    (hello,) = hellos(server, 1)
    claim = server.until(lambda: server.bodies("claim"))[0]

    assert (hello["protocol"], hello["gpus"], hello["replaces_boot_id"]) == (PROTOCOL, 3, None)
    assert (hello["gpu_memory_gb"], hello["gpu_names"]) == (None, [])
    assert (claim["protocol"], claim["gpus"], claim["boot_id"]) == (PROTOCOL, 3, hello["boot_id"])
    assert claim["disk_free_bytes"] > 0


def test_a_busy_worker_says_what_room_it_has_by_its_heartbeats(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    """It does not claim then, which would say it."""
    server.post_job()
    worker.start({"steps": 10**6, "step_seconds": 0.02}, heartbeat_wait_seconds=0.2)

    told = server.until(
        lambda: [free for beat in server.bodies("heartbeat") if (free := beat["disk_free_bytes"])]
    )

    assert abs(told[-1] - (free_bytes(server.data) or 0)) < 2**30  # others use this disk too


def test_a_worker_that_died_is_named_by_its_next_process(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    worker.start({}, worker_name="w")
    server.until(lambda: server.bodies("claim"))
    kill(worker)

    worker.start({}, worker_name="w")
    first, second = hellos(server, 2)
    server.until(lambda: len(server.bodies("claim")) > 1)
    kill(worker)
    worker.start({}, worker_name="w")
    third = hellos(server, 3)[2]

    assert second["replaces_boot_id"] == first["boot_id"]
    assert third["replaces_boot_id"] == second["boot_id"]


def test_a_dead_process_is_named_until_the_server_knows(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    worker.start({}, worker_name="w")
    server.until(lambda: server.bodies("claim"))
    kill(worker)
    server.add_fault("register", times=1, status=500)
    server.add_fault("register", times=1, serve_first=True)  # it knows, but its answer is lost

    worker.start({}, worker_name="w", claim_wait_seconds=0.3)
    first, *others = hellos(server, 4)
    server.until(lambda: len(server.bodies("claim")) > 1)
    server.add_fault("claim", times=1, status=404)  # it has new records
    last = hellos(server, 5)[4]

    assert {hello["replaces_boot_id"] for hello in others[:3]} == {first["boot_id"]}
    assert (last["boot_id"], last["replaces_boot_id"]) == (others[0]["boot_id"], None)


def test_a_name_that_is_in_use_is_used_all_the_same(
    server: "FakeServer", worker: "WorkerProcess", second_worker: "WorkerProcess"
) -> None:
    worker.start({}, worker_name="w")
    server.until(lambda: server.bodies("claim"))
    noted = (server.data / "locks/worker-w.json").read_text()

    second_worker.start({"steps": 1}, worker_name="w")
    first, second = hellos(server, 2)
    server.until(
        lambda: (
            {claim["boot_id"] for claim in server.bodies("claim")} == {first["boot_id"], second["boot_id"]}
        )
    )

    assert (second["worker_id"], second["replaces_boot_id"]) == ("w", None)
    assert "another worker called w runs" in second_worker.log()
    assert (server.data / "locks/worker-w.json").read_text() == noted


def test_what_another_run_of_the_kernel_left_says_nothing(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    (server.data / "locks").mkdir()
    earlier = {"boot_id": "earlier", "kernel_boot_id": "another"}
    (server.data / "locks/worker-w.json").write_text(json.dumps(earlier))

    worker.start({}, worker_name="w")

    assert hellos(server, 1)[0]["replaces_boot_id"] is None


def test_a_note_that_cannot_be_read_says_nothing(server: "FakeServer", worker: "WorkerProcess") -> None:
    (server.data / "locks").mkdir()
    (server.data / "locks/worker-w.json").write_text('{"boot_id": "half')

    worker.start({}, worker_name="w")

    assert hellos(server, 1)[0]["replaces_boot_id"] is None


def test_a_trainer_that_lives_on_does_not_hold_the_name(
    server: "FakeServer", worker: "WorkerProcess", second_worker: "WorkerProcess"
) -> None:
    """The lock is the agent's alone: else a trainer that hangs in the kernel would keep its name from being free."""
    server.post_job()
    worker.warm = True
    worker.start(LONG, worker_name="w")
    server.until(lambda: len(server.steps()) > 3)

    (pid,) = worker.trainer_pids()
    held = [entry.readlink().name for entry in (server.data / f"/proc/{pid}/fd").iterdir()]

    assert "worker-w.lock" not in held
    assert "cpu-0.lock" in held


# ---------------------------------------------------------------- the server says no


def test_a_worker_that_is_too_old_ends_and_says_what_to_do(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.add_fault("register", times=9, status=426)

    worker.start({})
    assert worker.process
    code = worker.process.wait(10)

    assert code == 1
    assert "Upgrade it to the server's version" in worker.log()
    assert "Traceback" not in worker.log()


def test_a_server_that_was_upgraded_meanwhile_ends_the_worker_and_its_job_is_saved(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start(LONG, gpus=2, claim_wait_seconds=0.3)
    server.until(lambda: len(server.steps()) > 3)

    server.add_fault("claim", times=10**6, status=426)
    assert worker.process
    code = worker.process.wait(15)

    assert code == 1
    assert "Upgrade it to the server's version" in worker.log()
    assert [call for call, _ in server.last_calls] == ["release"]
    assert server.checkpoints[-1]["step"] == server.steps()[-1]
    assert worker.trainer_gone()


def test_a_heartbeat_that_is_not_served_any_more_ends_job_and_worker(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({**LONG, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)

    server.add_fault("", times=10**6, status=426)
    assert worker.process
    code = worker.process.wait(15)

    assert code == 1
    assert "Upgrade it to the server's version" in worker.log()
    assert worker.trainer_gone()


def test_a_key_that_is_refused_lets_what_runs_come_to_its_end(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({"steps": 80, "step_seconds": 0.02}, gpus=2, claim_wait_seconds=0.3)
    server.until(lambda: len(server.steps()) > 3)

    server.add_fault("claim", times=10**6, status=403)
    assert worker.process
    code = worker.process.wait(15)

    assert code == 1
    assert [body["state"] for _, body in server.last_calls] == ["succeeded"]
    assert "does not give out jobs to this worker" in worker.log()


# ---------------------------------------------------------------- what the server asks for


def test_a_job_that_shall_make_room_is_saved_and_given_back(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start(LONG)
    server.until(lambda: len(server.steps()) > 3)

    server.direct(make_room=True)
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["reason"]) == ("release", "preempted")
    assert (worker.folder / "signals.txt").read_text() == "SIGUSR1\n"
    assert server.checkpoints[-1]["step"] == server.steps()[-1]
    assert server.bodies("heartbeat")[-1]["seen_make_room"]


def test_a_wish_of_the_user_goes_before_making_room(server: "FakeServer", worker: "WorkerProcess") -> None:
    server.post_job()
    worker.start({**LONG, "save_seconds": 1})
    server.until(lambda: len(server.steps()) > 3)

    server.direct(make_room=True)
    server.until(lambda: (worker.folder / "signals.txt").exists())
    server.wish("pause")
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["state"]) == ("finish", "paused")


def test_a_job_that_shall_make_room_before_it_trains_is_given_back(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.direct(make_room=True)
    server.post_job()
    worker.start(LONG)
    ((call, body),) = server.until(lambda: server.last_calls)

    assert (call, body["reason"]) == ("release", "preempted")
    assert worker.trainer_pids() == []


def test_a_worker_that_is_drained_by_the_server_gives_its_job_back_and_asks_for_none_meanwhile(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.post_job()
    worker.start({**LONG, "save_seconds": 1.5}, gpus=2, claim_wait_seconds=0.3)
    server.until(lambda: len(server.steps()) > 3)

    server.direct(draining=True)
    server.until(lambda: (worker.folder / "signals.txt").exists())
    begun = len(server.bodies("claim"))
    ((call, body),) = server.until(lambda: server.last_calls)
    asked = len(server.bodies("claim"))
    server.until(
        lambda: len(server.bodies("claim")) > asked + 1
    )  # now the server answers that there is nothing

    assert (call, body["reason"]) == ("release", "stopping")
    assert "drained" in body["message"]
    assert asked <= begun + 1
    assert server.bodies("heartbeat")[-1]["seen_draining"]
    assert worker.process
    assert worker.process.poll() is None


def test_reports_come_no_more_often_than_the_server_asks(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.direct(next_upload_seconds=2.0)
    server.post_job()
    worker.start({"steps": 150, "step_seconds": 0.02})  # three seconds and more
    server.until(lambda: server.last_calls)

    assert server.steps() == list(range(1, 151))
    assert len(server.bodies("metrics")) <= 4  # one at the start, every two seconds, one at the end


def test_a_refused_connection_counts_for_nothing_where_there_are_several_servers(
    server: "FakeServer", worker: "WorkerProcess"
) -> None:
    server.lease_seconds = 2.0
    server.welcome = server.directive = {"refused_means_down": False}
    server.post_job()
    worker.start({**LONG, "ignore_signals": True})
    server.until(lambda: len(server.steps()) > 3)

    server.down()

    server.until(worker.trainer_gone, 5)
    server.up()
    assert worker.process
    worker.process.send_signal(signal.SIGTERM)
