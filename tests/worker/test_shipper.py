"""Shipping against a scripted server that rejects, hangs up, loses answers and forgets."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd._transport import Transport
from sftd.errors import Conflict, ConnectionFailed, error_class
from sftd.protocol import TRAINER_LINE, TRAINER_LINES_FILE
from sftd_worker.lease import LeaseKeeper
from sftd_worker.outbox import Outbox, Verdict, decide
from sftd_worker.shipper import Shipper
from sftd_worker.spool import Spool
from sftd_worker.transfer import SharedFolder

if TYPE_CHECKING:
    from conftest import FakeServer

KEY = "worker-key-of-the-tests"


class Shipping:
    """A shipper over a spool that a test writes."""

    def __init__(self, server: "FakeServer") -> None:
        server.post_job()
        server.claimed = True
        assert server.lease
        folder = server.data / "jobs" / "job_1"
        self.folder = folder
        self.transport = Transport(f"http://127.0.0.1:{server.port}", KEY)
        self.spool = Spool(folder / TRAINER_LINES_FILE, attempt=1)
        self.keeper = LeaseKeeper(server.lease, self.transport, wait_seconds=1, on_news=lambda: None)
        outbox = Outbox(self.transport, self.keeper)
        self.shipper = Shipper(
            self.spool,
            outbox,
            self.keeper,
            folder=folder,
            secrets=[],
            first=[],
            on_done=lambda: None,
            transfer=SharedFolder(outbox, self.transport, data=server.data, keeper=self.keeper),
        )

    def say(self, **line: Any) -> None:
        self.spool.append(TRAINER_LINE.validate_python({"attempt": 1, "at": 0, **line}))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.say(type="step", step=step, values={"loss": float(step)})

    def checkpoint(self, step: int) -> None:
        self.say(type="checkpoint", step=step, name=f"checkpoint-{step}", manifest_sha256="0" * 64, files={})

    def ship(self, seconds: float = 10) -> None:
        self.shipper.start()
        self.shipper.finish()
        assert self.shipper.done.wait(seconds)
        assert self.shipper.error is None


@pytest.fixture
def shipping(server: "FakeServer") -> Iterator[Shipping]:
    shipping = Shipping(server)
    yield shipping
    shipping.keeper.lose("the test is over")
    shipping.transport.close()


@pytest.fixture
def fault(server: "FakeServer") -> Callable[..., None]:
    return server.add_fault


def test_a_batch_whose_answer_was_lost_lands_once(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    shipping.steps(1, 50)
    fault("metrics", serve_first=True, times=2)

    shipping.ship()

    assert server.steps() == list(range(1, 51))
    assert sum(path.endswith("metrics") for path, _ in server.calls) == 3


def test_a_server_that_forgot_points_gets_them_again(server: "FakeServer", shipping: Shipping) -> None:
    shipping.steps(1, 5)
    shipping.shipper.start()
    server.until(lambda: len(server.steps()) == 5)

    with server.lock:
        del server.streams["metrics"][2:]  # as after a restored backup
    shipping.steps(6, 8)
    shipping.shipper.finish()

    assert shipping.shipper.done.wait(10)
    assert server.steps() == list(range(1, 9))


def test_a_checkpoint_is_reported_after_all_that_stands_before_it(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    for step in (10, 20):
        shipping.steps(step - 9, step)
        shipping.checkpoint(step)
    fault("metrics", times=2, status=503, headers={"Retry-After": "0.2"})

    shipping.ship()

    assert [report["steps_before"] for report in server.checkpoints] == [
        list(range(1, 11)),
        list(range(1, 21)),
    ]


def test_one_refused_line_does_not_hold_up_the_others(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    shipping.steps(1, 20)
    bad = lambda body: any(point["step"] == 7 for point in body["points"])  # noqa: E731
    fault("metrics", times=100, status=422, when=bad)

    shipping.ship()

    assert server.steps() == [step for step in range(1, 21) if step != 7]
    (rejected,) = (shipping.folder / "logs/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["item"]["step"] == 7


def test_what_the_server_has_otherwise_takes_its_number_and_no_other_line(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    shipping.steps(1, 6)
    shipping.shipper.start()
    server.until(lambda: server.steps() == list(range(1, 7)))
    fault("metrics", status=409, code="batch_differs", when=lambda body: body["seq"] == 6)
    with server.lock:
        server.streams["metrics"].append({"step": 666, "values": {}})

    shipping.steps(7, 7)
    server.until(lambda: (shipping.folder / "logs/rejected.jsonl").exists())
    shipping.steps(8, 9)
    shipping.shipper.finish()

    assert shipping.shipper.done.wait(10)
    assert shipping.shipper.error is None
    assert server.steps() == [*range(1, 7), 666, 8, 9]


def test_the_numbers_stay_right_when_a_line_was_refused_and_the_server_forgets(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    shipping.steps(1, 6)
    fault("metrics", times=100, status=413, when=lambda body: any(p["step"] == 2 for p in body["points"]))
    shipping.shipper.start()
    server.until(lambda: server.steps() == [1, 3, 4, 5, 6])

    with server.lock:
        del server.streams["metrics"][3:]
    shipping.steps(7, 7)
    shipping.shipper.finish()

    assert shipping.shipper.done.wait(10)
    assert server.steps() == [1, 3, 4, 5, 6, 7]


def test_lines_of_other_attempts_and_unreadable_ones_are_not_sent(
    server: "FakeServer", shipping: Shipping
) -> None:
    shipping.steps(1, 2)
    with shipping.spool.path.open("a") as file:
        file.write('{"type": "step", "attempt": 7, "at": 0, "step": 99, "values": {}}\nnot json\n')
    shipping.steps(3, 3)

    shipping.ship()

    assert server.steps() == [1, 2, 3]


def test_a_large_log_is_cut_into_batches_that_fit(server: "FakeServer", shipping: Shipping) -> None:
    for i in range(200):
        shipping.say(type="log", text=f"{i} " + "é" * 5000)

    shipping.ship()

    sizes = [len(json.dumps(body).encode()) for path, body in server.calls if path.endswith("logs")]
    assert len(sizes) > 1
    assert max(sizes) <= 256 * 1024
    assert [line.split()[0] for line in server.streams["logs"]] == [str(i) for i in range(200)]


def test_nan_reaches_the_server(server: "FakeServer", shipping: Shipping) -> None:
    shipping.say(type="step", step=1, values={"loss": float("nan"), "grad_norm": float("inf")})

    shipping.ship()

    assert server.streams["metrics"] == [{"step": 1, "values": {"loss": "NaN", "grad_norm": "Infinity"}}]


def test_a_conflict_ends_the_lease_and_nothing_more_is_sent(
    server: "FakeServer", shipping: Shipping, fault: Callable[..., None]
) -> None:
    shipping.steps(1, 3)
    fault("metrics", status=409)

    shipping.ship()

    assert shipping.keeper.lost
    assert server.steps() == []


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (409, Verdict.FENCED),
        (404, Verdict.FENCED),
        (416, Verdict.REWIND),
        (413, Verdict.DROP),
        (422, Verdict.DROP),
        (429, Verdict.RETRY),
        (500, Verdict.RETRY),
        (503, Verdict.RETRY),
        (507, Verdict.RETRY),
        (401, Verdict.RETRY),
    ],
)
def test_the_error_rule(status: int, verdict: Verdict) -> None:
    assert decide(error_class(status)("", status=status, code="")) is verdict


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 426])
def test_what_is_not_the_servers_word_is_an_outage(status: int) -> None:
    assert decide(error_class(status)("", status=status, code="unknown")) is Verdict.RETRY


def test_the_error_rule_for_no_answer() -> None:
    assert decide(ConnectionFailed("")) is Verdict.RETRY
    assert decide(Conflict("", status=409, code="checkpoint_backwards")) is Verdict.DROP


def test_a_line_that_can_not_be_read_is_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "events.jsonl", attempt=1)
    with spool.path.open("ab") as file:
        file.write(b"not a line\n")

    for _ in range(5):
        assert list(spool.lines(spool.start)) == []

    assert caplog.text.count("cannot be read") == 1
