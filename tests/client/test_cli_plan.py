"""`sftd plan`: what is asked, what is printed, and what it ends with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Outcome, ScriptedServer

Make = Callable[..., Any]
Sftd = Callable[..., "Outcome"]
PARTS = ("weights", "adapter", "optimizer", "gradients", "activations", "head", "other")
NONE = {"count": 0, "lines": []}
SPREAD = {"total": 300, "min": 1, "mean": 10.0, "median": 9.0, "p95": 20.0, "max": 30}
HISTOGRAM = {**SPREAD, "edges": [0, 16, 32], "counts": [24, 6]}


def plan_body(**fields: Any) -> dict[str, Any]:
    """A plan of which nothing is known."""
    parts = "incomplete spec training validation overlap packing steps parameters disk time"
    return {
        "object": "plan",
        "ok": True,
        "complete": True,
        "problems": [],
        "memory": [],
        **dict.fromkeys(parts.split()),
        **fields,
    }


def data_plan(**fields: Any) -> dict[str, Any]:
    segments = [("<|user|>\n1+1?", False), ("2\x1b[31m", True), ("<|end|>", False)]
    return {
        "file_id": "file_1",
        "filename": "rows.jsonl",
        "num_rows": 32,
        "formats": {"messages": 32},
        "num_used": 30,
        "dropped": {"count": 2, "lines": [3, 9]},
        "truncated": NONE,
        "fully_masked": NONE,
        "overlong": {"count": 40, "lines": list(range(1, 41))},
        "exact_duplicates": {
            "count": 1,
            "examples": [{"lines": [4, 8], "similarity": 1.0, "text": "what is\nq?"}],
        },
        "near_duplicates": {
            "count": 1,
            "examples": [{"lines": [5, 7], "similarity": 0.93, "text": "x" * 200}],
        },
        "tokens": HISTOGRAM,
        "supervised_tokens": HISTOGRAM,
        "examples": [
            {
                "line": 1,
                "num_tokens": 9,
                "num_supervised": 1,
                "segments": [{"text": text, "supervised": on} for text, on in segments],
                "shortened": True,
            }
        ],
        **fields,
    }


WHOLE = plan_body(
    training=data_plan(),
    validation=data_plan(filename="validation.jsonl"),
    overlap={"exact": {"count": 1, "examples": []}, "near": None},
    packing={
        "enabled": True, "micro_batches_per_step": 1.5, "mean_tokens": 100.0, "max_tokens": 128, "fill": 0.9, "efficiency": 0.97,
        "padded_efficiency": 0.4,
    },
    steps={
        "total_steps": 100, "num_epochs": 3.0, "steps_per_epoch": 33.3, "rows_per_step": 8, "tokens_per_step": 800.0,
        "supervised_tokens_per_step": 90.0, "total_tokens": 80000.0, "warmup_steps": 10, "num_evaluations": 6,
        "num_checkpoints": 2,
    },
    parameters={"total": 7_000_000_000, "trainable": 70_000_000},
    memory=[
        {
            "device": "NVIDIA H100 80GB HBM3", "present": False, "total_bytes": 90 * 2**30,
            "parts": dict.fromkeys(PARTS, 2**30),
            "available_bytes": 79 * 2**30, "fits": False, "advice": ["max_seq_length: 1024"],
        },
        {
            "device": "cpu", "present": True, "total_bytes": 2**30,
            "parts": dict.fromkeys(PARTS, 0),
            "available_bytes": None, "fits": None, "advice": [],
        },
    ],
    disk={
        "checkpoint_bytes": 2**20, "num_kept": 2, "result_bytes": 2**20, "total_bytes": 3 * 2**20, "free_bytes": 2**40,
        "fits": True,
    },
    time={
        "seconds": 3600.0, "tokens_per_second": 22.0, "basis": "measured on 3 runs", "starts_in_seconds": 60.0,
        "starts_at": "2030-01-01T00:00:00Z", "finishes_at": "2030-01-01T01:00:00Z", "why_waiting": None, "gpu_hours": 1.0,
    },
)  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("base_model: org/model\ntraining_file: file_1\n")
    return path


def test_a_plan_is_printed_problems_first(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make, spec: Path
) -> None:
    problem = {
        "severity": "error", "field": "training_file", "file": "file_1", "line": 3, "row_field": "messages[0].role",
        "message": "is 'king'.", "remedy": "Write user.",
    }  # fmt: skip
    warning = {**dict.fromkeys(problem), "severity": "warning", "message": "It is long.\x1b[2J"}
    at_scripted.will_answer(answer(body={**WHOLE, "ok": False, "problems": [warning, problem]}))

    planned = sftd("plan", spec, "--set", "learning_rate=1e-4", "--wait", 0)

    lines = planned.out.splitlines()
    assert planned.code == 1
    assert lines[:3] == [
        "error: training_file, file_1 line 3 messages[0].role: is 'king'.",
        "  Write user.",
        "warning: It is long.\N{REPLACEMENT CHARACTER}[2J",
    ]
    assert "in the way" in planned.err
    for words in (
        "rows          30 of 32 used  (messages 32)",
        "dropped       2  (lines 3, 9)",
        "overlong      40  (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and more)",
        "lines 4, 8: what is q?",
        "lines 5, 7 (93% alike): xxx",
        f"0–16  {'█' * 40} 24",
        f"16–32  {'█' * 10} 6",
        "steps         100 (10 of warm-up), 3 epochs of 33.3",
        "parameters    7,000,000,000, trained 70,000,000 (1.00%)",
        "memory on NVIDIA H100 80GB HBM3, which no worker here has: 90 GiB of 79 GiB, DOES NOT FIT",
        "advice        max_seq_length: 1024",
        "memory on cpu: 1.0 GiB, not known whether it fits",
        "disk: 3.0 MiB of 1.0 TiB free, fits",
        "time: 1 h 0 min",
        "costs         1 GPU-hours",
        "⟦2\N{REPLACEMENT CHARACTER}[31m⟧<|end|> …",
    ):
        assert words in planned.out, words
    assert at_scripted.requests[0].path == "/jobs/plan?wait=0"
    assert at_scripted.requests[0].json == {
        "base_model": "org/model", "training_file": "file_1", "learning_rate": 1e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, 0),
        ({"complete": False, "incomplete": "No worker has counted the rows."}, 4),
        ({"ok": False}, 1),
        ({"ok": False, "complete": False}, 1),
    ],
)
def test_a_plan_of_which_nothing_is_known_is_printed_too(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make, spec: Path, fields: dict[str, Any], code: int
) -> None:
    at_scripted.will_answer(answer(body=plan_body(**fields)))

    planned = sftd("plan", spec)

    assert planned.code == code
    assert len(at_scripted.requests) == 1  # the server did not wait: it has nothing to wait for
    assert json.loads(sftd("plan", spec, "--json").out)["complete"] is fields.get("complete", True)


def test_the_plan_of_local_files_uploads_them_first(
    sftd: Sftd, at_scripted: "ScriptedServer", answer: Make, spec: Path
) -> None:
    (spec.parent / "rows.jsonl").write_text('{"text": "a"}\n')
    file = {
        "id": "file_2", "filename": "rows.jsonl", "purpose": "fine-tune", "bytes": 14, "sha256": "0" * 64,
        "status": "processed", "format": "text", "num_rows": 1, "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    at_scripted.will_answer(answer(body=file), answer(body=plan_body()))

    planned = sftd("plan", spec, "--set", "training_file=rows.jsonl")

    assert (planned.code, "uploaded as file_2, 1 rows" in planned.err) == (0, True)
    assert at_scripted.requests[1].json["training_file"] == "file_2"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PYTHONIOENCODING": "ascii"}, [f"0-16  {'#' * 40} 24", "[[2"]),
        ({"FORCE_COLOR": "1", "TERM": "xterm"}, ["\x1b[32m2"]),
        ({"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"}, ["⟦2"]),
    ],
    ids=["ascii", "colors", "terminal without colors"],
)
def test_supervised_text_stands_out_wherever_it_is_printed(
    at_scripted: "ScriptedServer", answer: Make, spec: Path, environment: dict[str, str], words: list[str]
) -> None:
    at_scripted.will_answer(answer(body=WHOLE))

    done = subprocess.run(
        [sys.executable, "-m", "sftd.cli", "plan", str(spec)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, b"nothing stands in the way of this job\n")
    for each in words:
        assert each in done.stdout.decode()
    assert ("⟦" in done.stdout.decode()) == ("⟦2" in words)
