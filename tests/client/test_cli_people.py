"""Commands for who one is and who may: login, keys, audit; and for files and lists, where answers are scripted."""

import hashlib
import io
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sftd.cli.data import BAR_BYTES
from sftd.config import config_path, read_config

if TYPE_CHECKING:
    from conftest import Box, Outcome, ScriptedServer

Make = Callable[..., Any]
Sftd = Callable[..., "Outcome"]

OWN_KEY = {
    "id": "key_1", "name": "anna", "role": "user", "created_at": "2026-01-01T00:00:00Z", "expires_at": None,
    "max_running_jobs": 2, "running_jobs": 1, "queued_jobs": 0, "gpu_hours_this_month": 0.5, "month_ends_at": "2026-02-01T00:00:00Z",
}  # fmt: skip


def page(*items: Any) -> dict[str, Any]:
    return {"object": "list", "data": list(items), "has_more": False, "next_after": None}


def key(**fields: Any) -> dict[str, Any]:
    return {
        "id": "key_1",
        "name": "ci",
        "role": "user",
        "created_at": "2026-01-01T00:00:00Z",
        "expires_at": None,
        **fields,
    }


# ---------------------------------------------------------------- login


def test_login_keeps_what_the_server_takes_and_logout_forgets_it(
    box: "Box", sftd: Sftd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SFTD_URL", "SFTD_API_KEY"):
        monkeypatch.delenv(name)
    assert "sftd login" in sftd("ls").err

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{box.key}\n"))
    entered = sftd("login", "--url", f"{box.url}/", "--key-stdin")

    assert (entered.code, entered.out) == (0, "")
    assert f"signed in at {box.url}" in entered.err
    assert box.key not in entered.err
    assert (read_config().url, read_config().key) == (box.url, box.key)
    assert stat.S_IMODE(config_path().stat().st_mode) == 0o600
    assert sftd("ls").code == 0
    assert json.loads(sftd("logout", "--json").out) == {"config": str(config_path()), "deleted": True}
    assert sftd("ls").code == 2
    assert sftd("logout").err == "nothing was kept here\n"


def test_a_wrong_key_is_not_kept(box: "Box", sftd: Sftd, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, words in (("sftd-wrong\n", "key"), ("\n", "empty")):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        refused = sftd("login", "--url", box.url, "--key-stdin")
        assert (refused.code, words in refused.err) == (2, True)
    assert sftd("login", "--key-stdin").code == 2
    assert not config_path().exists()


def test_login_asks_and_names_the_owner(
    sftd: Sftd, scripted: "ScriptedServer", answer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.will_answer(answer(body=OWN_KEY))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{scripted.url}\n"))
    monkeypatch.setattr("getpass.getpass", lambda *_, **__: "secret")

    entered = sftd("login")

    assert (entered.code, "as anna, role user; kept in" in entered.err) == (0, True)
    assert scripted.requests[0].headers["authorization"] == "Bearer secret"
    shown = sftd("whoami").out
    assert [line.split(maxsplit=1)[1] for line in shown.splitlines()[1:]] == [
        "anna (user)",
        "1 of 2",
        "0",
        "0.5 this month",
    ]
    assert json.loads(sftd("whoami", "--json").out)["url"] == scripted.url


# ---------------------------------------------------------------- keys and the audit log


def test_keys_carry_limits(sftd: Sftd, at_scripted: "ScriptedServer", answer: Make) -> None:
    limited = key(max_running_jobs=2, max_gpu_hours_per_month=40.5)
    at_scripted.will_answer(
        answer(body={**limited, "secret": "sftd-s"}), answer(body=limited), answer(body=page(limited))
    )

    made = sftd(
        "keys", "add", "ci", "--max-running-jobs", 2, "--max-queued-jobs", 9, "--max-gpu-hours-per-month", 40.5
    )  # fmt: skip
    changed = sftd(
        "keys",
        "change",
        "key_1",
        "--max-running-jobs",
        3,
        "--without",
        "max-queued-jobs",
        "--without",
        "expiry",
    )
    listed = sftd("keys", "ls")

    assert made.out == "sftd-s\n"
    sent = at_scripted.requests[0].json
    assert (sent["max_running_jobs"], sent["max_queued_jobs"], sent["max_gpu_hours_per_month"]) == (
        2,
        9,
        40.5,
    )
    assert (at_scripted.requests[1].method, at_scripted.requests[1].path) == ("PATCH", "/keys/key_1")
    assert at_scripted.requests[1].json == {
        "max_running_jobs": 3, "max_queued_jobs": None, "expires_in_seconds": None,
    }  # fmt: skip
    assert "2 running, 40.5 GPU-hours a month; never" in changed.err
    assert listed.out.splitlines()[1].endswith("never\t2 running, 40.5 GPU-hours a month")


def test_mistakes_about_keys_are_told_before_any_call(sftd: Sftd, at_scripted: "ScriptedServer") -> None:
    for words in (
        ["change", "key_1"],
        ["change", "key_1", "--without", "role"],
        ["change", "key_1", "--max-queued-jobs", 1, "--without", "max-queued-jobs"],
        ["add", "ci", "--max-running-jobs", 0],
        ["add", ""],
        ["add", "ci", "--expires-in-days", "inf"],
        ["add", "ci", "--max-gpu-hours-per-month", "nan"],
    ):
        refused = sftd("keys", *words)
        assert (refused.code, refused.err.count("Traceback")) == (2, 0), words
    assert at_scripted.requests == []


def test_the_audit_log_is_listed_with_its_filters(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make
) -> None:
    entry = {
        "id": 1, "created_at": "2026-01-01T00:00:00Z", "key_id": None, "key_name": None, "role": None,
        "action": "job.cancel", "target": "job_1", "address": "127.0.0.1", "request_id": "req_1", "details": {"was": "queued"},
    }  # fmt: skip
    at_scripted.will_answer(answer(body=page(entry)))

    listed = sftd("audit", "--action", "job.cancel", "--target", "job_1", "--since", "2026-01-01T01:00+01:00")

    assert listed.out.splitlines()[1].split("\t")[1:] == [
        "the server",
        "job.cancel",
        "job_1",
        "127.0.0.1",
        "was=queued",
    ]
    path = at_scripted.requests[0].path
    assert path == "/audit?action=job.cancel&target=job_1&since=2026-01-01T00%3A00%3A00%2B00%3A00&limit=50"
    assert json.loads(sftd("audit", "--json").out)[0]["request_id"] == "req_1"
    assert sftd("audit", "--until", "tomorrow").code == 2


# ---------------------------------------------------------------- lists and files


def test_jobs_are_filtered_by_owner_and_metadata(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make
) -> None:
    at_scripted.will_answer(answer(body=OWN_KEY), answer(body=page()))

    sftd(
        "ls",
        "--mine",
        "--state",
        "failed",
        "--state",
        "paused",
        "--metadata",
        "git_sha=01",
        "--metadata",
        "team=q=1",
    )

    assert at_scripted.requests[1].path == (
        "/jobs?state=failed&state=paused&owner=anna&metadata%5Bgit_sha%5D=01&metadata%5Bteam%5D=q%3D1&limit=20"
    )
    assert sftd("ls", "--mine", "--owner", "bert").code == 2
    assert sftd("ls", "--metadata", "team").code == 2


def test_files_are_listed_shown_fetched_and_deleted(
    box: "Box", sftd: Sftd, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = json.loads(sftd("files", "upload", rows, "--json").out)

    assert f"{sent['id']}\trows.jsonl\tprocessed\t1\t" in sftd("files", "ls").out
    assert sent["sha256"] in sftd("files", "show", sent["id"]).out
    assert json.loads(sftd("files", "show", sent["id"], "--json").out) == sent
    monkeypatch.chdir(tmp_path)
    here = sftd("files", "get", sent["id"])
    assert (here.code, "is here already" in here.err) == (2, True)
    assert sftd("files", "get", sent["id"], "-o", tmp_path / "out.jsonl").code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == rows.read_bytes()
    assert json.loads(sftd("files", "rm", sent["id"], "--json").out) == {"id": sent["id"], "deleted": True}
    assert sftd("files", "show", sent["id"]).code == 2


def test_a_large_upload_to_a_terminal_has_a_bar(
    box: "Box", sftd: Sftd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.jsonl"
    row = json.dumps({"prompt": "q" * 4000, "completion": "a"}) + "\n"
    large.write_text(row * (BAR_BYTES // len(row) + 1))
    quiet = sftd("upload", large)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich

    barred = sftd("upload", large)

    assert (quiet.code, barred.code) == (0, 0)
    assert "8.4/8.4 MB" not in quiet.err
    assert "8.4/8.4 MB" in barred.err
    shown = json.loads(sftd("files", "show", barred.out.strip(), "--json").out)
    assert shown["sha256"] == hashlib.sha256(large.read_bytes()).hexdigest()


def test_a_file_is_fetched_to_a_name_in_this_folder(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = {
        "id": "file_1", "filename": "../up\\..\\.rows\x1b.jsonl", "purpose": "fine-tune", "bytes": 4, "status": "processed",
        "sha256": hashlib.sha256(b"rows").hexdigest(), "format": "text", "num_rows": 1, "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    at_scripted.will_answer(answer(body=file), answer(body=file), answer(body=b"rows"))

    assert sftd("files", "get", "file_1").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows\N{REPLACEMENT CHARACTER}.jsonl"]


def test_rows_are_shown_as_they_were_understood(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make
) -> None:
    row = {
        "line": 3, "format": "messages", "weights": [0, 1], "tools": None, "text": None,
        "messages": [{"role": "user", "content": "a\nb\x1b"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}],
        "problem": None,
    }  # fmt: skip
    text = {**row, "line": 4, "format": "text", "messages": None, "weights": [], "text": "plain"}
    at_scripted.will_answer(answer(body=page(row, text)))

    shown = sftd("files", "rows", "file_1", "--after", 2)

    assert shown.out.splitlines() == [
        "line 3",
        "  user: a\\nb\N{REPLACEMENT CHARACTER}",
        '* assistant: [{"name": "f"}]',
        "line 4",
        "* plain",
    ]
    assert at_scripted.requests[0].path == "/files/file_1/rows?after=2&limit=5"
    assert [
        json.loads(line)["line"] for line in sftd("files", "rows", "file_1", "--json").out.splitlines()
    ] == [3, 4]


def test_a_fault_of_the_server_is_told_with_its_request(
    sftd: Sftd, at_scripted: "ScriptedServer", error_answer: Make
) -> None:
    at_scripted.will_answer(error_answer(500, message="Something broke.", headers={"x-request-id": "req_9"}))

    failed = sftd("show", "job_1")

    assert (failed.code, failed.err) == (3, "sftd: Something broke. (request req_9)\n")
