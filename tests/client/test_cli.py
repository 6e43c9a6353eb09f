"""Commands as a person or a script runs them, against the real server."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from sftd import cli
from sftd.cli.app import job_ids

if TYPE_CHECKING:
    from conftest import Box, Outcome, ScriptedServer

Run = Callable[..., Any]


@pytest.fixture
def spec(rows: Path) -> Path:
    path = rows.parent / "lora.yaml"
    path.write_text("base_model: org/model\ntraining_file: rows.jsonl\nlearning_rate: 2e-5\nname: try\n")
    return path


def test_a_job_by_commands(box: "Box", sftd: Callable[..., "Outcome"], spec: Path, tmp_path: Path) -> None:
    submitted = sftd("submit", spec, "--set", "lora.rank=8", "--set", "metadata.team=cli")
    job_id = submitted.out.strip()
    assert "uploaded as file_" in submitted.err

    waited = sftd("wait", job_id)
    assert (waited.code, waited.out.splitlines()[-1]) == (0, f"{job_id} is succeeded")

    shown = json.loads(sftd("show", job_id, "--json").out)
    assert (shown["state"], shown["spec"]["learning_rate"], shown["spec"]["lora"]["rank"]) == (
        "succeeded",
        2e-5,
        8,
    )
    assert "100%" in sftd("show", job_id).out
    assert job_id in [job["id"] for job in json.loads(sftd("ls", "--json", "--state", "succeeded").out)]
    assert sftd("ls").out.splitlines()[1].startswith(f"{job_id}\ttry\tsucceeded\t5/5")
    assert sftd("logs", job_id).out.splitlines() == [f"step {n}" for n in range(1, 6)]
    assert sftd("logs", job_id, "-f").out.splitlines() == [f"step {n}" for n in range(1, 6)]
    assert "succeeded" in sftd("events", job_id).out
    assert sftd("metrics", job_id).out.splitlines()[:2] == ["STEP\tLOSS", "1\t1"]
    (first, *_) = csv.DictReader(io.StringIO(sftd("metrics", job_id, "--csv").out))
    assert first == {"step": "1", "loss": "1.0", "nan": "nan"}

    (tmp_path / "taken").touch()
    taken = sftd("get", job_id, "-o", tmp_path / "taken")
    assert (taken.code, "File exists" in taken.err) == (2, True)
    fetched = sftd("get", job_id, "-o", tmp_path / "out")
    assert fetched.err.startswith("1 files in")
    assert (tmp_path / "out/model.txt").read_text() == "trained"
    assert sftd("get", job_id, "-o", tmp_path / "ck", "--checkpoint", 2).code == 0
    assert sftd("workers").out.count("\n") == 2


def test_what_commands_print_for_programs(
    box: "Box", sftd: Callable[..., "Outcome"], spec: Path, tmp_path: Path
) -> None:
    def told(*argv: object) -> Any:
        done = sftd(*argv, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    job = told("submit", spec, "--follow")
    job_id = job["id"]
    assert job["state"] == "succeeded"
    assert told("wait", job_id)["outcome"] == "met"
    assert json.loads(sftd("logs", job_id, "--json").out.splitlines()[0])["text"] == "step 1"
    assert json.loads(sftd("events", job_id, "--json").out.splitlines()[-1])["type"] == "succeeded"
    assert told("metrics", job_id)[1] == {"step": 2, "loss": 0.5, "nan": "NaN"}
    assert told("metrics", job_id, "--names", "loss")[0] == {"step": 1, "loss": 1.0}
    assert told("pin", job_id, 2, "best")["pinned"] == "best"
    assert told("unpin", job_id, 2)["pinned"] is None
    assert told("change", job_id, "--set", "name=second")["name"] == "second"
    assert told("get", job_id, "-o", tmp_path / "out") == {
        "folder": str(tmp_path / "out"), "files": ["model.txt"],
    }  # fmt: skip
    again = told("clone", job_id, "--set", "requires.worker=nobody")["id"]
    assert told("priority", again, 2)["priority"] == 2
    assert told("move", again, "--last")["state"] == "queued"
    assert told("pause", again)["state"] == "paused"
    assert told("resume", again)["state"] == "queued"
    assert told("cancel", again)["state"] == "cancelled"
    assert told("retry", again)["retry_of"] == again
    assert told("delete", again) == {"id": again, "deleted": True}
    assert told("check", spec.parent / "rows.jsonl")["num_rows"] == 1
    (tmp_path / "bad.jsonl").write_text("{}\n")
    wrong = sftd("check", tmp_path / "bad.jsonl", "--json")
    assert (wrong.code, json.loads(wrong.out)["problems"][0]["line"]) == (2, 1)


def test_metrics_are_drawn(box: "Box", sftd: Callable[..., "Outcome"], spec: Path) -> None:
    job_id = sftd("submit", spec).out.strip()
    assert sftd("wait", job_id).code == 0

    drawn = sftd("metrics", job_id, "--plot")
    assert "loss: 1 at step 1, 0.2 at step 5, lowest 0.2 at step 5" in drawn.out
    assert "eval_loss: nothing reported" in drawn.out
    assert sftd("metrics", job_id, "--plot", "--names", "nan").out.endswith("nan: 5 not finite\n")
    assert sftd("metrics", job_id, "--plot", "--csv").code == 2


def test_submit_and_follow_shows_the_log_and_ends_with_the_job(
    box: "Box", sftd: Callable[..., "Outcome"], spec: Path
) -> None:
    followed = sftd("submit", spec, "--follow")

    lines = followed.out.splitlines()
    assert followed.code == 0
    assert [line for line in lines if line.startswith("step ")] == [f"step {n}" for n in range(1, 6)]
    assert lines[-1].endswith("is succeeded") or lines[-1] == "step 5"


def test_a_wait_for_a_failed_job_ends_with_two_and_says_why(
    box: "Box", sftd: Callable[..., "Outcome"], spec: Path
) -> None:
    box.set_script(steps=3, at=2, end="exception")
    job_id = sftd("submit", spec).out.strip()

    waited = sftd("wait", job_id)

    assert waited.code == 2
    assert "failed (diverged): The loss is NaN at step 2. Lower learning_rate" in waited.err
    assert "remedy" in sftd("show", job_id).out


def test_a_running_job_is_cancelled(box: "Box", sftd: Callable[..., "Outcome"], spec: Path) -> None:
    box.set_script(steps=10**6, step_seconds=0.02)
    job_id = sftd("submit", spec).out.strip()
    with box.client() as client:
        next(event for event in client.jobs.follow(job_id, stream="events") if event.type == "run")

    assert sftd("cancel", job_id).out.startswith(f"{job_id} is ")
    waited = sftd("wait", job_id)

    assert (waited.code, waited.err) == (3, f"sftd: {job_id} was cancelled.\n")
    assert sftd("resume", job_id).code == 2


def test_ctrl_c_leaves_the_job_running_and_says_so(box: "Box", spec: Path) -> None:
    box.set_script(steps=10**6, step_seconds=0.02)
    process = subprocess.Popen(
        [sys.executable, "-m", "sftd.cli", "submit", str(spec), "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout
    job_id = process.stdout.readline().strip()
    while not process.stdout.readline().startswith("step"):
        pass

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)

    assert process.returncode == 130
    assert f"{job_id} goes on; end it with: sftd cancel {job_id}" in err
    with box.client() as client:
        assert client.jobs.retrieve(job_id).state == "running"
        client.jobs.cancel(job_id)


def test_the_life_of_a_job_by_commands(
    box: "Box", sftd: Callable[..., "Outcome"], spec: Path, tmp_path: Path
) -> None:
    box.set_script(steps=5, checkpoint_every=2, at=5, end="exception")
    job_id = sftd("submit", spec).out.strip()
    assert sftd("wait", job_id).code == 2
    box.set_script(steps=5, checkpoint_every=2)

    listed = sftd("attempts", job_id).out.splitlines()
    assert (len(listed), "failed diverged" in listed[1]) == (2, True)
    assert sftd("logs", job_id, "--attempt", 1).out.splitlines()[0] == "step 1"
    assert sftd("logs", job_id, "--attempt", 2).out == ""
    assert sftd("pin", job_id, 2, "best").code == 0
    assert "best" in sftd("checkpoints", job_id).out
    assert sftd("unpin", job_id, 2).code == 0
    assert sftd("change", job_id, "--set", "name=second").code == 0
    assert sftd("change", job_id).code == 2

    again = sftd("retry", job_id, "--scratch").out.strip()
    assert sftd("wait", again).code == 0
    copy = sftd("clone", job_id, "--set", "lora.rank=4", "--set", "requires.worker=nobody")
    assert "no registered worker has that" in copy.err
    copy_id = copy.out.strip()
    shown = json.loads(sftd("show", copy_id, "--json").out)
    assert (shown["clone_of"], shown["name"], shown["spec"]["lora"]["rank"]) == (job_id, "second", 4)
    assert sftd("priority", copy_id, 3).code == 0
    assert json.loads(sftd("show", copy_id, "--json").out)["priority"] == 3
    assert sftd("move", copy_id, "--first").code == 0
    assert sftd("move", copy_id, "--first", "--last").code == 2
    assert "waits" in sftd("show", copy_id).out
    for each in (copy_id, again, job_id):
        assert sftd("delete", each).code == 0
    assert sftd("show", job_id).code == 2


def test_a_worker_is_drained_and_undrained(box: "Box", sftd: Callable[..., "Outcome"]) -> None:
    name = sftd("workers").out.splitlines()[1].split("\t")[0]

    assert "drains" in sftd("drain", name).err
    assert "draining" in sftd("workers").out
    assert sftd("undrain", name).code == 0
    assert "draining" not in sftd("workers").out
    assert sftd("drain", "nobody").code == 2


def test_every_mistake_of_a_spec_is_told_at_once(
    box: "Box", sftd: Callable[..., "Outcome"], spec: Path
) -> None:
    refused = sftd("submit", spec, "--set", "learning_rate=fast", "--set", "epochs=3")

    assert refused.code == 2
    assert "learning_rate" in refused.err
    assert "epochs" in refused.err


def test_keys_are_made_listed_and_withdrawn(box: "Box", sftd: Callable[..., "Outcome"]) -> None:
    made = sftd("keys", "add", "ci", "--expires-in-days", "1")
    key_id = made.err.split()[0]

    assert made.out.strip().startswith("sftd-")
    assert f"{key_id}\tci\tuser" in sftd("keys", "ls").out
    assert sftd("keys", "rm", key_id).code == 0
    assert key_id not in sftd("keys", "ls").out


def test_the_disk_is_shown_and_collected(box: "Box", sftd: Callable[..., "Outcome"]) -> None:
    shown = sftd("storage")
    assert shown.out.startswith("KIND\tSIZE\ncheckpoints\t")
    assert "are free; 64 MiB are kept in reserve\n" in shown.out
    assert json.loads(sftd("storage", "--json").out)["low"] is False
    orphan = box.data / "blobs/sha256/00" / ("0" * 64)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"x" * 3000)
    os.utime(orphan, (0, 0))

    dry = sftd("storage", "--collect", "--dry-run")
    assert dry.out.splitlines()[0] == "2.9 KiB would be deleted:"
    assert orphan.exists()
    done = sftd("storage", "--collect")
    assert done.out.splitlines()[0] == "2.9 KiB were deleted:"
    assert done.out.splitlines()[2].startswith("blob\t\tblobs/sha256/00/000")
    assert not orphan.exists()
    assert sftd("storage", "--collect").out == "0 B were deleted.\n"
    assert sftd("storage", "--dry-run").code == 2


def test_check_counts_rows_and_names_mistakes(sftd: Callable[..., "Outcome"], rows: Path) -> None:
    assert "1 rows, format prompt_completion" in sftd("check", rows).out
    rows.write_text('{"prompt": "a"}\n')
    refused = sftd("check", rows)
    assert (refused.code, "line 1" in refused.err) == (2, True)
    assert sftd("check", rows.parent / "none").code == 2


def test_no_server_ends_with_three(
    sftd: Callable[..., "Outcome"], scripted: "ScriptedServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.close()
    monkeypatch.setenv("SFTD_URL", scripted.url)
    monkeypatch.setenv("SFTD_API_KEY", "key")
    monkeypatch.setattr("sftd._transport.backoff_seconds", lambda *_, **__: 0)

    failed = sftd("ls")

    assert (failed.code, failed.err.count("\n")) == (3, 1)
    assert "Nothing listens" in failed.err


def test_mistakes_in_the_call_end_with_two(sftd: Callable[..., "Outcome"]) -> None:
    assert sftd("ls").code == 2  # no address
    assert sftd("submit").code == 2
    assert sftd("nonsense").code == 2
    assert sftd("keys", "add", "x", "--role", "king").code == 2


def test_a_log_line_cannot_steer_the_terminal(
    sftd: Callable[..., "Outcome"], scripted: "ScriptedServer", answer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_URL", scripted.url)
    monkeypatch.setenv("SFTD_API_KEY", "key")
    line = {
        "id": 1,
        "attempt": 1,
        "text": "a\x1b]0;evil\x07b\x9b31m [red]x[/red]",
        "created_at": "2026-01-01T00:00:00Z",
    }
    scripted.will_answer(answer(body={"data": [line], "has_more": False, "next_after": None}))

    out = sftd("logs", "job_1").out

    assert not any(char in out for char in "\x1b\x07\x9b")
    assert "[red]x[/red]" in out


def commands(group: Any = None, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_every_command_explains_itself_and_is_documented(sftd: Callable[..., "Outcome"]) -> None:
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for path, _ in commands():
        assert f"`sftd {' '.join(path)}" in documented, path
        assert sftd(*path, "--help").code == 0


def test_every_command_prints_json_for_programs() -> None:
    for path, command in commands():
        options = [name for param in command.params for name in param.opts]
        assert "--json" in options or path == ("admin",), path  # admin is the server's own


def test_options_that_the_help_names_are_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for path, command in commands():
        for param in command.params:
            for name in param.opts:
                assert not name.startswith("--") or name in documented, (path, name)


def test_the_shell_completes_jobs(box: "Box", sftd: Callable[..., "Outcome"], spec: Path) -> None:
    job_id = sftd("submit", spec).out.strip()

    assert job_id in [each for each, _ in job_ids("job_")]
    assert job_ids("nothing") == []


def test_completion_gives_up_at_once_without_a_server() -> None:
    assert job_ids("job_") == []
