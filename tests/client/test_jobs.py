"""`client.jobs` and `client.files` against scripted answers and against the real server."""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.errors import (
    ConfigurationError,
    ConnectionFailed,
    FileFailed,
    JobFailed,
    NotFound,
    SftdError,
    WaitTimeout,
)
from sftd.schemas import Job, JobState

if TYPE_CHECKING:
    from conftest import Box, ScriptedServer


def page(*items: Any, next_after: Any = None) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(items),
        "has_more": next_after is not None,
        "next_after": next_after,
    }


def line(number: int) -> dict[str, Any]:
    return {"id": number, "attempt": 1, "text": f"line {number}", "created_at": "2026-01-01T00:00:00Z"}


def sse(*numbers: int, end: bool = False) -> bytes:
    import json

    frames = [f"id: {n}\nevent: log\ndata: {json.dumps(line(n), ensure_ascii=False)}\n\n" for n in numbers]
    return (": open\n\n" + "".join(frames) + ("event: end\ndata: {}\n\n" if end else "")).encode()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return whole.getvalue()


def test_a_list_fetches_its_pages_as_they_are_needed(
    scripted: "ScriptedServer", answer: Callable[..., Any]
) -> None:
    scripted.will_answer(answer(body=page(line(1), line(2), next_after=2)), answer(body=page(line(3))))

    lines = scripted.client().jobs.logs("job_1")

    assert [next(lines).id, next(lines).id] == [1, 2]
    assert len(scripted.requests) == 1
    assert [item.id for item in lines] == [3]
    assert scripted.requests[1].path == "/jobs/job_1/logs?after=2"


def test_a_limit_bounds_the_items(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    scripted.will_answer(answer(body=page(line(1), line(2), next_after=2)))

    assert [item.id for item in scripted.client().jobs.logs("job_1", limit=1)] == [1]


def test_filters_reach_the_server(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    scripted.will_answer(answer(body=page()))

    list(scripted.client().jobs.list(state=JobState.RUNNING, owner="me", metadata={"team": "q"}))

    list(scripted.client().jobs.list(state=["running", JobState.PAUSED]))

    assert "state=running&owner=me&metadata%5Bteam%5D=q" in scripted.requests[0].path
    assert "state=running&state=paused" in scripted.requests[1].path


def test_nan_in_metrics_is_a_number(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    scripted.will_answer(answer(body=page({"step": 1, "loss": "NaN", "grad_norm": "Infinity"})))

    (point,) = scripted.client().jobs.metrics("job_1")

    assert point.loss != point.loss  # type: ignore[attr-defined]  # metrics are fields that the server names
    assert point.grad_norm == float("inf")  # type: ignore[attr-defined]  # as above


# ---------------------------------------------------------------- wait and follow


def test_wait_goes_on_while_the_server_is_away(
    scripted: "ScriptedServer", answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(
        job_answer(state="running"), answer(cut=0), answer(cut=0), job_answer(state="succeeded")
    )
    seen: list[Job] = []

    job = scripted.client(max_retries=0).jobs.wait("job_1", on_progress=seen.append)

    assert job.state is JobState.SUCCEEDED
    assert [job.state for job in seen] == ["running", "succeeded"]


def test_wait_raises_when_the_job_fails(scripted: "ScriptedServer", job_answer: Callable[..., Any]) -> None:
    failure = {"reason": "diverged", "message": "NaN at step 3.", "remedy": "Lower it.", "log_tail": []}
    scripted.will_answer(job_answer(state="failed", failure=failure))

    with pytest.raises(JobFailed, match=r"diverged.*NaN at step 3. Lower it.") as raised:
        scripted.client().jobs.wait("job_1")

    assert raised.value.job.failure


def test_wait_gives_up_when_its_time_is_over(
    scripted: "ScriptedServer", job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(job_answer(state="running"))

    with pytest.raises(WaitTimeout, match="still running"):
        scripted.client().jobs.wait("job_1", timeout_seconds=0)


def test_wait_with_a_limit_also_waits_for_a_server_that_is_away_at_first(
    scripted: "ScriptedServer", answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(answer(cut=0), answer(cut=0), job_answer(state="succeeded"))
    client = scripted.client(max_retries=0)
    troubles: list[SftdError] = []

    with pytest.raises(ConnectionFailed):
        client.jobs.wait("job_1")
    job = client.jobs.wait("job_1", timeout_seconds=30, on_trouble=troubles.append)

    assert (job.state, len(troubles)) == ("succeeded", 1)


def test_a_wait_that_gives_up_tells_what_it_saw(
    scripted: "ScriptedServer", job_answer: Callable[..., Any], error_answer: Callable[..., Any]
) -> None:
    scripted.will_answer(job_answer(state="running", step=3))
    with pytest.raises(WaitTimeout, match="still running") as raised:
        scripted.client().jobs.wait("job_1", timeout_seconds=0)
    assert raised.value.job
    assert raised.value.job.step == 3

    scripted.will_answer(error_answer(503))
    with pytest.raises(WaitTimeout, match="does not answer"):
        scripted.client(max_retries=0).jobs.wait("job_1", timeout_seconds=0)


def test_a_plan_takes_what_create_takes(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    nothing = "incomplete spec training validation overlap packing steps parameters disk time"  # not known
    body = {"ok": False, "complete": True, "problems": [], "memory": [], **dict.fromkeys(nothing.split())}
    scripted.will_answer(answer(body=body))

    plan = scripted.client().jobs.plan(spec={"base_model": "org/model"}, training_file="f", wait_seconds=2)
    scripted.client().jobs.plan(base_model="org/model")

    assert (plan.ok, plan.training) == (False, None)
    assert [request.path for request in scripted.requests] == ["/jobs/plan?wait=2", "/jobs/plan"]
    assert scripted.requests[0].json == {"base_model": "org/model", "training_file": "f"}


def test_follow_takes_up_a_lost_stream_where_it_broke(
    scripted: "ScriptedServer",
    answer: Callable[..., Any],
    job_answer: Callable[..., Any],
    error_answer: Callable[..., Any],
) -> None:
    first = sse(1, 2, 3)
    scripted.will_answer(
        job_answer(),
        answer(body=first, cut=len(first) - 30),  # the third event is torn
        answer(cut=0),
        error_answer(503),
        answer(body=sse(3, 4)),  # ends without a word: the server was stopped
        answer(body=sse(4, 5, end=True)),
    )

    lines = list(scripted.client().jobs.follow("job_1"))

    assert [item.id for item in lines] == [1, 2, 3, 4, 5]
    assert [r.headers.get("last-event-id") for r in scripted.requests[1:]] == ["0", "2", "2", "2", "4"]


def test_a_line_separator_inside_a_log_line_is_part_of_it(
    scripted: "ScriptedServer", answer: Callable[..., Any], job_answer: Callable[..., Any]
) -> None:
    body = sse(1, end=True).replace(b"line 1", "a\u2028b\u0085c".encode())
    scripted.will_answer(job_answer(), answer(body=body))

    (found,) = scripted.client().jobs.follow("job_1")

    assert found.text == "a\u2028b\u0085c"


# ---------------------------------------------------------------- downloads


def test_an_archive_is_unpacked_without_its_top_folder(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path
) -> None:
    content = tar_of((tarfile.TarInfo("job_1/a.txt"), b"a"), (tarfile.TarInfo("job_1/sub/b.txt"), b"b"))
    scripted.will_answer(answer(body=content))

    files = scripted.client().jobs.download("job_1", tmp_path / "out")

    assert files == [tmp_path / "out/a.txt", tmp_path / "out/sub/b.txt"]
    assert (tmp_path / "out/sub/b.txt").read_text() == "b"


def bad_member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


@pytest.mark.parametrize(
    "member",
    [
        bad_member("../evil"),
        bad_member("job_1/../../evil"),
        bad_member("/tmp/evil-of-the-tests"),
        bad_member("job_1/a\\..\\b"),
        bad_member("job_1/link", tarfile.SYMTYPE, "/etc/passwd"),
        bad_member("job_1/link", tarfile.LNKTYPE, "/etc/passwd"),
        bad_member("job_1/fifo", tarfile.FIFOTYPE),
        bad_member("job_1/dev", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_a_dangerous_archive_is_refused(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path, member: tarfile.TarInfo
) -> None:
    scripted.will_answer(answer(body=tar_of((member, b""))))

    with pytest.raises(ConnectionFailed, match="refused"):
        scripted.client().jobs.download("job_1", tmp_path / "out")

    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == []


def test_a_link_in_the_folder_is_not_written_through(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    scripted.will_answer(answer(body=tar_of((tarfile.TarInfo("job_1/sub/a"), b"a"))))

    with pytest.raises(ConfigurationError, match="by a link"):
        scripted.client().jobs.download("job_1", tmp_path / "out")

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("cut", [100, 700, 1600])
def test_an_archive_that_breaks_off_is_an_error(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path, cut: int
) -> None:
    content = tar_of((tarfile.TarInfo("job_1/a.txt"), b"a" * 600))
    scripted.will_answer(answer(body=content, cut=cut))

    with pytest.raises(ConnectionFailed):
        scripted.client().jobs.download("job_1", tmp_path / "out")

    assert list(tmp_path.rglob(".part-*")) == []


def test_a_checkpoint_file_with_another_hash_is_refused(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path
) -> None:
    good = hashlib.sha256(b"good").hexdigest()
    checkpoint = {"job_id": "job_1", "step": 5, "attempt": 1, "bytes": 4, "metrics": {}}
    checkpoint |= {"files": {"a": {"bytes": 4, "sha256": good}}, "created_at": "2026-01-01T00:00:00Z"}
    scripted.will_answer(answer(body=page(checkpoint)), answer(body=b"evil"))

    with pytest.raises(ConnectionFailed, match="hash differs"):
        scripted.client().jobs.download_checkpoint("job_1", tmp_path / "out")

    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- files


def file_body(**fields: Any) -> dict[str, Any]:
    return {
        "id": "file_1",
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": 4,
        "sha256": hashlib.sha256(b"rows").hexdigest(),
        "status": "processed",
        "format": "text",
        "num_rows": 1,
        "created_at": "2026-01-01T00:00:00Z",
        **fields,
    }


def test_a_file_is_waited_for_until_its_rows_are_checked(
    scripted: "ScriptedServer", answer: Callable[..., Any]
) -> None:
    client = scripted.client()
    client.files._pause = scripted.pauses.append
    scripted.will_answer(answer(body=file_body(status="uploaded")), answer(body=file_body()))
    assert client.files.wait("file_1").status == "processed"

    wrong = file_body(status="error", status_details="line 3, text: is missing")
    scripted.will_answer(answer(body=wrong))
    with pytest.raises(FileFailed, match="line 3") as raised:
        client.files.wait("file_1")
    assert raised.value.file.status == "error"

    scripted.will_answer(answer(body=file_body(status="uploaded")))
    with pytest.raises(WaitTimeout, match="still being checked"):
        client.files.wait("file_1", timeout_seconds=0)


def test_a_file_is_written_only_if_it_is_the_one_on_record(
    scripted: "ScriptedServer", answer: Callable[..., Any], tmp_path: Path
) -> None:
    scripted.will_answer(answer(body=file_body()), answer(body=b"rows"))
    path = scripted.client().files.download("file_1", tmp_path / "new/rows.jsonl")
    assert path.read_bytes() == b"rows"

    scripted.will_answer(answer(body=file_body()), answer(body=b"evil"))
    with pytest.raises(ConnectionFailed, match="hash differs"):
        scripted.client().files.download("file_1", tmp_path / "evil")
    with pytest.raises(ConfigurationError, match="is a folder"):
        scripted.client().files.download("file_1", tmp_path)
    assert not (tmp_path / "evil").exists()


def test_rows_come_page_by_page(scripted: "ScriptedServer", answer: Callable[..., Any]) -> None:
    row = {"format": "text", "messages": None, "weights": [], "tools": None, "problem": None}
    scripted.will_answer(
        answer(body=page({**row, "line": 7, "text": "a"}, next_after=7)),
        answer(body=page({**row, "line": 8, "text": "b"})),
    )

    rows = list(scripted.client().files.rows("file_1", after=6))

    assert [(row.line, row.text) for row in rows] == [(7, "a"), (8, "b")]
    assert [request.path for request in scripted.requests] == [
        "/files/file_1/rows?after=6",
        "/files/file_1/rows?after=7",
    ]


def test_an_open_file_is_uploaded_too(box: "Box", rows: Path) -> None:
    with box.client() as client:
        made = client.files.create(file=io.BytesIO(rows.read_bytes()), filename="memory.jsonl")
        with rows.open("rb") as file:
            assert client.files.create(file=file).filename == "rows.jsonl"

        assert (made.filename, made.num_rows) == ("memory.jsonl", 1)
        assert client.files.content(made.id) == rows.read_bytes()


# ---------------------------------------------------------------- the real server


def test_a_job_from_upload_to_download(box: "Box", rows: Path, tmp_path: Path) -> None:
    with box.client() as client:
        data = client.files.upload(rows)
        job = client.jobs.create(base_model="org/model", training_file=data.id, metadata={"team": "q"})
        done = client.jobs.wait(job.id, timeout_seconds=30)

        assert done.progress == 1
        assert [point.step for point in client.jobs.metrics(job.id)] == [1, 2, 3, 4, 5]
        assert [line.text for line in client.jobs.follow(job.id)] == [f"step {n}" for n in range(1, 6)]
        assert [event.type for event in client.jobs.follow(job.id, stream="events")][-1] == "succeeded"
        assert [found.step for found in client.jobs.checkpoints(job.id)] == [2, 4]
        assert [path.name for path in client.jobs.download(job.id, tmp_path / "out")] == ["model.txt"]
        assert (
            client.jobs.download_checkpoint(job.id, tmp_path / "ck", step=2)[0].read_text()
            == "weights of step 2"
        )
        assert [found.id for found in client.jobs.list(metadata={"team": "q"})] == [job.id]
        with pytest.raises(NotFound):
            client.jobs.download_checkpoint(job.id, tmp_path / "ck", step=3)


def test_pause_and_resume_go_on_from_the_checkpoint(box: "Box", rows: Path) -> None:
    box.set_script(steps=10**6, step_seconds=0.02)
    with box.client() as client:
        job = client.jobs.create(base_model="org/model", training_file=client.files.upload(rows).id)
        events = client.jobs.follow(job.id, stream="events")
        next(event for event in events if event.type == "run")
        client.jobs.pause(job.id)
        next(event for event in events if event.type == "paused")
        (saved,) = client.jobs.checkpoints(job.id)

        box.set_script(steps=saved.step + 3)
        client.jobs.resume(job.id)
        client.jobs.wait(job.id, timeout_seconds=30)

        assert [point.step for point in client.jobs.metrics(job.id)] == list(range(1, saved.step + 4))


def test_importing_sftd_is_light() -> None:
    code = "import sys, sftd; print([name for name in ('httpx', 'typer', 'rich', 'pydantic') if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
