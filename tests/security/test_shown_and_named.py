"""A7, A8, A12, A13, A17: what people give as names, paths and filters, and where it turns up."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.security.conftest import filled

from sftd import cli
from sftd.errors import ConnectionFailed
from sftd.files import write_file
from sftd.output import print_csv, print_json, print_table
from sftd.schemas import MetricPoint
from sftd.spec import JobSpec
from sftd.watch import Bar, PlainLines, watch
from sftd_server.datafolder import open_beneath

# What steers a terminal or a reader's eye: colours, window titles and clipboards (OSC), 8-bit controls, a wiped line,
# reversed text, invisible tags, and markup of rich and of HTML.
NASTY = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]52;c;Y3VybA==\x1b\\",
    "\x9b31m8-bit",
    "\x9d0;8-bit\x9c",
    "ok\rgone",
    "a\x08b",
    "\u202egnp.exe",
    "\u2066isolate\u2069",
    "\U000e0041tag",
    "[bold red]rich[/] [link=http://evil]x[/link]",
    "<script>alert(1)</script>",
]
NASTY_LINE = " ".join(NASTY)


def controls(text: str) -> list[str]:
    """Characters in a text that a terminal or an eye obeys."""
    return [
        hex(ord(char)) for char in text if unicodedata.category(char) in ("Cc", "Cf") and char not in "\n\t"
    ]


@pytest.fixture(scope="module")
def nasty_job(shared_box) -> str:
    """A failed job with such text wherever the server takes text."""
    box = shared_box
    labels = {"evil": NASTY_LINE, "\x1b[31m": "x"}
    hello = {"worker_id": "w1", "boot_id": "b1", "gpus": 1, "device": "cpu", "labels": labels}
    assert box.worker.post("/worker/register", json=hello).status_code == 200
    job_id = box.submit(name="a\x9b31m\u202e[bold]<script>", metadata={"k\x1b[31m": NASTY_LINE[:500]})
    lease = box.claim()
    lease.start()
    assert lease.post("logs", seq=0, lines=NASTY).status_code == 200
    assert lease.event(0, "notice").status_code == 200
    event = {"type": "notice", "message": NASTY_LINE, "data": {"x": NASTY_LINE}}
    assert lease.post("events", seq=1, events=[event]).status_code == 200
    assert lease.metrics(0, (1, {"loss": 1.0})).status_code == 200
    assert (
        lease.finish("failed", reason="trainer_error", message=NASTY_LINE, log_tail=NASTY).status_code == 200
    )
    box.admin.post("/keys", json={"name": "k\x9b31m\u202e"})
    box.upload(name="rows\x1b[31m.jsonl")
    return job_id


# ---------------------------------------------------------------- A7


@pytest.mark.parametrize(
    "command",
    [["ls"], ["ls", "--json"], ["show", "ID"], ["show", "ID", "--json"], ["logs", "ID"], ["logs", "ID", "--follow"],
     ["events", "ID"], ["events", "ID", "--follow"], ["metrics", "ID"], ["metrics", "ID", "--csv"], ["workers"],
     ["workers", "--json"], ["keys", "ls"], ["wait", "ID"], ["cancel", "ID"], ["retry", "ID"], ["attempts", "ID"],
     ["checkpoints", "ID"], ["show", "job_\x1b[31m"], ["get", "ID", "--out", "/nonexistent/\x1b[31m"]],
    ids=lambda words: "-".join(words).encode("unicode_escape").decode(),
)  # fmt: skip
def test_a7_no_command_prints_what_steers_a_terminal(
    nasty_job: str,
    shared_box,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SFTD_URL", shared_box.url)
    monkeypatch.setenv("SFTD_API_KEY", "sftd-admin-key-of-the-tests")

    with pytest.raises(SystemExit):
        cli.main([nasty_job if word == "ID" else word for word in command])

    captured = capsys.readouterr()
    assert controls((captured.out + captured.err).replace("\r\n", "\n")) == []  # CSV ends its lines so
    assert captured.out + captured.err


def test_a7_json_for_programs_keeps_the_text_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([MetricPoint(step=1, **{NASTY_LINE: 1.0})])

    out = capsys.readouterr().out
    assert controls(out) == []
    assert NASTY_LINE in json.loads(out)[0]


def test_a7_tables_and_csv_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_csv([MetricPoint(step=1, **{NASTY_LINE: 1.0})])
    assert controls(capsys.readouterr().out.replace("\r\n", "\n")) == []
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: True))
    monkeypatch.setenv("TERM", "dumb")
    print_table(("A",), [(NASTY_LINE,)])
    assert "[bold red]rich" in capsys.readouterr().out  # shown as it is, not obeyed


def test_a7_a_watched_job_on_a_terminal(nasty_job: str, shared_box, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftd import Client
    from sftd.errors import JobFailed

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=400)
    with Client(url=shared_box.url, key="sftd-admin-key-of-the-tests") as client:
        with pytest.raises(JobFailed):
            watch(client, nasty_job, console=console, logs=True)
        job = client.jobs.retrieve(nasty_job)
    own = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # rich's own: cursor up, erase line, hide the cursor

    assert controls(own.sub("", screen.getvalue())) == []
    assert "\x1b[31m" not in screen.getvalue()
    assert "title" in screen.getvalue()  # the lines were shown
    plain = io.StringIO()
    PlainLines(Console(file=plain)).show_job(job.model_copy(update={"id": NASTY_LINE}))
    assert controls(plain.getvalue()) == []
    assert Bar  # the terminal's display was used above


def test_a7_the_server_shows_markup_as_text_and_downloads_are_inert(nasty_job: str, shared_box) -> None:
    for path in (
        f"/jobs/{nasty_job}",
        "/jobs",
        f"/jobs/{nasty_job}/logs",
        f"/jobs/{nasty_job}/events",
        "/workers",
    ):
        answer = shared_box.admin.get(path)
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
    unknown = shared_box.admin.get("/jobs/<script>alert(1)</script>")
    assert unknown.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "name",
    [
        "x.html",
        "x.svg",
        'a"; filename="evil.html',
        "a\r\nset-cookie: x=1",
        "ünï.jsonl",
        "..\\..\\x",
        "\x1b[31m",
    ],
)
def test_a7_downloads_are_attachments(shared_box, name: str) -> None:
    file_id = shared_box.admin.post("/files", files={"file": (name, b'{"text": "<script>"}')}).json()["id"]

    answer = shared_box.admin.get(f"/files/{file_id}/content")

    assert answer.headers["content-disposition"].startswith("attachment; ")
    assert re.fullmatch(
        r"attachment; filename=\"[A-Za-z0-9._-]+\"; filename\*=UTF-8''[A-Za-z0-9._~%-]+",
        answer.headers["content-disposition"],
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert "set-cookie" not in answer.headers


def test_a7_the_pages_scripts_are_files_and_nothing_inline(shared_box) -> None:
    page = shared_box.admin.get("/docs")

    script = re.search(r"script-src ([^;]+)", page.headers["content-security-policy"])
    assert script
    assert script[1].strip() == "'self'"
    assert re.findall(r"<script(?![^>]*src=)[^>]*>|on\w+=", page.text) == []


# ---------------------------------------------------------------- A8

TRAVERSALS = [
    "..", ".", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "%2e%2e%2f", "%252e%252e%252f", "..;/x", "..\\x",
    "..%5cx", "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "file:///etc/passwd", "a%00b", "a\u0000b", "CON", "NUL",
    "\u2024\u2024/x", "%c0%ae%c0%ae/", "x" * 300, "~", "~root", "$HOME", "-rf", "*", "{a,b}", ".manifest.json",
    "manifest.json/../../../../sftd.db", "results_evil", "./manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: ascii(name)[:40])
def test_a8_no_path_leads_out(shared_box, every_route, name: str) -> None:
    """As an id, a file's name, a step: in every parameter of every route that reads."""
    (shared_box.server.folder.path / "jobs" / "secret.txt").write_text("SECRET")
    job_id = shared_box.submit()
    sent = name.replace("\x00", "%00")
    for method, path in every_route(shared_box):
        if method != "GET" or "{" not in path or path.startswith("/worker/"):
            continue
        for parameter in re.findall(r"{(\w+)", path):
            there = filled(path, {"job_id": job_id, parameter: sent})
            answer = shared_box.admin.get(there)
            if answer.status_code == 200:  # the path was tidied up on its way to another route
                assert answer.headers["content-type"].startswith(("application/json", "text/"))
            else:
                assert answer.status_code in (400, 403, 404, 405, 409, 422), (there, answer.text)
            assert b"SECRET" not in answer.content
            assert b"root:" not in answer.content


def test_a8_a_link_in_the_jobs_folder_is_not_followed(box, assert_error) -> None:
    lease = box.running()
    folder = box.server.folder.path / "jobs" / lease.job_id / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (box.server.folder.path / "outside.bin").write_bytes(b"12345678")
    (folder / "adapter.safetensors").symlink_to(box.server.folder.path / "outside.bin")
    (folder / "fifo").mkdir()
    files = {name: {"bytes": 8, "sha256": "ab" * 32} for name in ("adapter.safetensors", "fifo")}
    assert lease.checkpoint(1, files=files).status_code == 200

    for name in files:
        answer = box.admin.get(f"/jobs/{lease.job_id}/checkpoints/1/files/{name}")
        assert not answer.is_success
        assert b"12345678" not in answer.content


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a/./b", "a//b", "a\x00b"])
def test_a8_files_are_opened_beneath_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "x").write_text("SECRET")
    (tmp_path / "in" / "a").symlink_to(tmp_path)

    with pytest.raises((OSError, ValueError)):
        open_beneath(tmp_path / "in", name)
    with pytest.raises(NotADirectoryError):
        open_beneath(tmp_path / "in", "a/x")


@pytest.mark.parametrize("kind", ["checkpoints", "finish"])
@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "a\\b", ".hidden", "a b", "", "x" * 300, "a/b/c/d", "ü", "a\n"]
)
def test_a8_a_worker_names_no_file_outside(shared_box, kind: str, name: str) -> None:
    lease = shared_box.running()
    files = {name: {"bytes": 1, "sha256": "ab" * 32}}
    if kind == "finish":
        assert lease.finish(files=files).status_code == 422
    else:
        assert lease.checkpoint(1, files=files).status_code == 422
        assert lease.checkpoint(1, name=name).status_code == 422
    assert lease.finish("failed").status_code == 200


@pytest.mark.parametrize(
    "path", ["", "/.", "_evil/m", "/../models_evil/m", "/link", "/..", "//", "/./../outside"]
)
def test_a8_a_base_model_lies_under_an_allowed_root(shared_box, assert_error, path: str) -> None:
    root = shared_box.server.folder.path / "models"
    for folder in (root.parent / "models_evil" / "m", root.parent / "outside"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    if not (root / "link").is_symlink():
        (root / "link").symlink_to(root.parent / "outside")

    answer = shared_box.admin.post("/jobs", json=shared_box.spec(base_model=f"{root}{path}"))

    assert assert_error(answer, 422, "invalid_spec")["param"] == "base_model"


def test_a8_an_uploads_name_is_a_label_and_no_path(shared_box) -> None:
    for name in ("../../x.jsonl", "/etc/passwd", "C:\\x.jsonl", "a\x00b.jsonl", "..", "x" * 2000):
        answer = shared_box.admin.post("/files", files={"file": (name, b'{"text": "a"}')})
        label = answer.json()["filename"]
        assert "/" not in label
        assert "\\" not in label
        assert len(label) <= 255
        assert label not in ("", ".", "..")
    assert not (shared_box.server.folder.path.parent / "x.jsonl").exists()


def test_a8_the_client_writes_nothing_outside_its_folder(tmp_path: Path) -> None:
    for name in ("../x", "/x", "a/../../x", "..\\x", "", "a\x00"):
        with pytest.raises(ConnectionFailed):
            write_file(tmp_path / "in", name, iter([b"x"]))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- A12, A13


@pytest.mark.parametrize(
    "field",
    [{"output_dir": "x; touch pwned"}, {"config": "x"}, {"env": {"LD_PRELOAD": "/tmp/x.so"}}, {"argv": ["x"]},
     {"trust_remote_code": True}, {"trainer_argv": ["sh"]}, {"callbacks": ["os.system"]}, {"_target_": "os.system"},
     {"chat_template": "{{ x }}"}, {"dataset_script": "x.py"}, {"base_model_url": "http://x"}, {"webhook": "http://x"},
     {"lora": {"target_modules": ["a; b"]}}, {"lora": {"init": "x"}}, {"wandb": {"project": "p", "key": "x"}},
     {"wandb": {"project": "p", "host": "http://x"}}, {"requires": {"command": "x"}}, {"optimizer": "torch.load"}],
    ids=lambda field: json.dumps(field)[:40],
)  # fmt: skip
def test_a12_a_spec_names_no_code_no_command_and_no_environment(
    shared_box, assert_error, field: dict[str, Any]
) -> None:
    answer = shared_box.admin.post("/jobs", json=shared_box.spec(**field))

    error = assert_error(answer, 422, "invalid_spec")
    assert error["param"].split(".")[0].split("[")[0] in field


def test_a12_nothing_in_the_code_goes_through_a_shell_or_runs_text(repository: Path) -> None:
    found = []
    for folder in ("client", "server", "worker"):
        for path in (repository / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(r"shell=True|os\.system\(|os\.popen\(|\beval\(|(?<![.\w])exec\(|\bpickle\b\.|yaml\.load\((?!text, Loader=_SpecLoader)", line):  # fmt: skip
                    found.append(f"{path.name}:{number}: {line.strip()}")
    assert [line for line in found if ".eval(" not in line] == []


@pytest.mark.parametrize(
    "value",
    ["http://127.0.0.1:8000/x", "http://169.254.169.254/latest", "http://[::]/", "http://2130706433/", "https://evil/x",
     "gopher://x", "file:///etc/passwd", "ftp://x/y", "s3://bucket/x", "//evil/x", "hf://x/y", "a/b/c", "org/model@http://x",
     "org/model?x", "job:../../x", "job:x@-1", "\\\\evil\\x", "org/..", "../x", "a b", "org/model\n"],
)  # fmt: skip
def test_a13_no_field_of_a_job_takes_a_url(shared_box, assert_error, value: str) -> None:
    for name in ("base_model", "training_file", "validation_file"):
        answer = shared_box.admin.post("/jobs", json=shared_box.spec(**{name: value}))
        assert assert_error(answer, 422, "invalid_spec")["param"] == name


def test_a13_the_server_opens_no_connection_of_its_own(repository: Path) -> None:
    """No client for HTTP is imported by it: what is not there cannot be pointed at anything."""
    command = "import sys, sftd_server.app; print(sorted({'httpx', 'requests', 'aiohttp', 'urllib3'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, env={**os.environ}
    )

    assert run.stdout.strip() == "[]"


def test_a13_every_text_field_of_a_spec_is_accounted_for() -> None:
    """A new one has to be looked at: can it be made to name a place out there?"""
    texts = {name for name, field in JobSpec.model_fields.items() if "str" in str(field.annotation)}

    assert texts <= {"base_model", "training_file", "validation_file", "name", "metadata", "after", "requires",
                     "lora", "wandb", "evaluation"}  # fmt: skip


# ---------------------------------------------------------------- A17

INJECTIONS = [
    "%", "_", "%%", "a%", "' OR 1=1 --", "'; DROP TABLE job; --", '" OR ""="', "1) OR (1=1", "\\", "*", "(a+)+$",
    "a" * 500, "\u0000", "${jndi:x}", "NULL", "id; SELECT", "[", "ID=1/**/", "\ud7ff",
]  # fmt: skip


def test_a17_filters_take_text_as_text(shared_box, every_route) -> None:
    """Every parameter of every list: nothing breaks, and nothing matches that is not the very text."""
    shared_box.submit(name="a17", metadata={"team": "q"})
    total = len(shared_box.admin.get("/jobs", params={"limit": 1000}).json()["data"])
    assert total
    paths = shared_box.app.openapi()["paths"]
    num_tried = 0
    for path, methods in paths.items():
        names = [p["name"] for p in methods.get("get", {}).get("parameters", []) if p["in"] == "query"]
        for name in [*names, "order_by", "sort", "q", "metadata[team]", "metadata[%]", "metadata[te_m]"]:
            for text in INJECTIONS:
                answer = shared_box.admin.get(filled(path), params={name: text})
                num_tried += 1
                assert answer.status_code < 500, (path, name, text)
                filters = name == "owner" or (name.startswith("metadata[") and path == "/jobs")
                if answer.status_code == 200 and filters and path == "/jobs":
                    assert answer.json()["data"] == [], (path, name, text)
    assert num_tried > 200
    assert len(shared_box.admin.get("/jobs", params={"limit": 1000}).json()["data"]) == total


def test_a17_ids_and_names_are_bound(shared_box) -> None:
    for text in INJECTIONS:
        made = shared_box.admin.post("/keys", json={"name": text})
        assert made.status_code in (200, 409, 422), text
        assert shared_box.admin.delete(
            f"/keys/{text.replace(chr(0), '%00')}".replace("#", "")
        ).status_code in (404, 405, 422)
        who = {"worker_id": text, "boot_id": "b", "gpus": 1}
        registered = shared_box.worker.post("/worker/register", json={**who, "device": "cpu"}).status_code
        claim = {**who, "request_id": "r", "wait_seconds": 0}
        claimed = shared_box.worker.post("/worker/claim", json=claim).status_code
        assert (registered == 200 and claimed in (200, 204)) or (registered, claimed) == (422, 422), text
    assert shared_box.admin.get("/keys").status_code == 200
