"""Counting for plans on the worker, against a scripted server: leases that break, servers that are away or refuse."""

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sftd._transport import Transport
from sftd.protocol import (
    ANALYSIS_RESULT_FILE,
    Analysis,
    AnalysisReport,
    AnalysisRequest,
    AnalysisTask,
    InputFile,
)
from sftd.spec import JobSpec
from sftd_worker.analyst import Analyst
from sftd_worker.gpus import Devices
from sftd_worker.settings import WorkerSettings
from sftd_worker.worker import Worker

COUNTED = AnalysisReport(analysis=Analysis(problems=[], num_problems=0, largest_tokens=7))
# Counts for a second, as the trainer is started: its folder is its last argument.
SCRIPT = f"""
import pathlib, sys, time
time.sleep(1)
(pathlib.Path(sys.argv[-1]) / {ANALYSIS_RESULT_FILE!r}).write_text({COUNTED.model_dump_json()!r})
"""


ROWS = b'{"prompt": "a", "completion": "b"}\n'
FILE = InputFile(
    file_id="f", filename="rows", sha256=hashlib.sha256(ROWS).hexdigest(), bytes=len(ROWS), path="blobs/x"
)


class Scripted:
    """A server that hands out one count, and answers renewals and endings as it is told."""

    def __init__(self, *, renewals: list[int], endings: list[int]) -> None:
        self.renewals, self.endings = renewals, endings
        self.reports: list[dict[str, Any]] = []
        self.renewed = 0
        self.given = False
        self.over = threading.Event()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        call = request.url.path.rsplit("/", 1)[1]
        if call == "claim":
            if self.given:
                self.over.set()  # it asks for more: the first one is done with
                return httpx.Response(204)
            self.given = True
            spec = JobSpec(base_model="org/m", training_file="f")
            asked = AnalysisRequest(spec=spec, training_file=FILE)
            task = AnalysisTask(id="count_1", token="t", lease_seconds=0.3, request=asked)
            return httpx.Response(200, text=task.model_dump_json())
        if call == FILE.sha256:
            return httpx.Response(200, content=ROWS)
        if call == "renew":
            self.renewed += 1
            return self._answer(self.renewals.pop(0) if self.renewals else 200)
        self.reports.append(json.loads(request.content))
        return self._answer(self.endings.pop(0) if self.endings else 200)

    def _answer(self, status: int) -> httpx.Response:
        if status == 200:
            return httpx.Response(200, json={"ok": True})
        error = {"message": "no", "type": "test", "param": None, "code": "scripted"}
        return httpx.Response(status, json={"error": error})


@pytest.fixture
def count(tmp_path: Path) -> Callable[..., Scripted]:
    """Let a worker count once; what it said."""

    def go(
        script: str = SCRIPT,
        *,
        renewals: list[int] | None = None,
        endings: list[int] | None = None,
        **settings: Any,
    ) -> Scripted:
        server = Scripted(renewals=renewals or [], endings=endings or [])
        transport = Transport(
            "http://127.0.0.1:1", "k", pause=lambda _: None, wire=httpx.MockTransport(server)
        )
        whole = WorkerSettings(
            data=tmp_path,
            claim_wait_seconds=0,
            trainer_argv=(sys.executable, "-c", script),
            key="k",
            **settings,
        )
        analyst = Analyst(Worker(whole, Devices("cpu", (), 1), transport, "boot"))
        analyst.start()
        assert server.over.wait(30)
        analyst.stop()
        return server

    return go


def test_what_was_counted_is_reported(count: Callable[..., Scripted]) -> None:
    server = count()

    assert [report["analysis"]["largest_tokens"] for report in server.reports] == [7]
    assert server.renewed >= 3


def test_a_server_that_is_away_for_a_moment_costs_no_count(count: Callable[..., Scripted]) -> None:
    server = count(renewals=[503] * 6)

    assert [report["analysis"]["largest_tokens"] for report in server.reports] == [7]


def test_a_lost_lease_ends_the_count_without_a_word(count: Callable[..., Scripted]) -> None:
    assert count(renewals=[409]).reports == []


def test_a_count_that_the_server_refuses_is_told_as_a_failure(count: Callable[..., Scripted]) -> None:
    first, second = count(endings=[422]).reports

    assert first["analysis"] is not None
    assert second["analysis"] is None
    assert "refused" in second["error"]


def test_a_process_that_dies_is_told_with_its_last_words(count: Callable[..., Scripted]) -> None:
    (report,) = count("import sys; print('no room left'); sys.exit(3)").reports

    assert "exit code 3" in report["error"]
    assert "no room left" in report["error"]


def test_a_worker_with_a_folder_of_its_own_fetches_what_it_counts(
    count: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = count(own_data=True)

    assert [report["analysis"]["largest_tokens"] for report in server.reports] == [7]
    assert (tmp_path / "blobs/x").read_bytes() == ROWS
