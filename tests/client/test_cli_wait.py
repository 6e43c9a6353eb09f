"""`sftd wait`: its exit codes, gates and reports, against scripted answers and one real job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from conftest import Box, Outcome, ScriptedServer

Make = Callable[..., Any]
Sftd = Callable[..., "Outcome"]


def page(*items: Any) -> dict[str, Any]:
    return {"object": "list", "data": list(items), "has_more": False, "next_after": None}


def evaluation(step: int, eval_loss: float) -> dict[str, Any]:
    return {
        "job_id": "job_1",
        "step": step,
        "attempt": 1,
        "eval_loss": eval_loss,
        "perplexity": 2.0,
        "token_accuracy": 0.5,
        "num_tokens": 10,
        "created_at": "2026-01-01T00:00:00Z",
    }


@pytest.fixture
def over(at_scripted: "ScriptedServer", job_answer: Make) -> Callable[..., None]:
    """A job that is over, and what is asked of it then."""

    def script(*further: Any, **fields: Any) -> None:
        at_scripted.will_answer(job_answer(**{"state": "succeeded", **fields}), *further)

    return script


def test_gates_of_a_real_job_are_checked_against_an_earlier_one(
    box: "Box", sftd: Sftd, rows: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("base_model: org/model\ntraining_file: rows.jsonl\n")
    first = sftd("submit", spec).out.strip()
    second = sftd("submit", spec, "--set", "metadata.git_sha=0123456").out.strip()
    junit, summary = tmp_path / "out.xml", tmp_path / "summary.md"
    summary.write_text("before\n")

    waited = sftd(
        "wait", second, "--baseline", f"job:{first}", "--timeout", 30, "--junit", junit, "--summary", summary,
        "--fail-unless", "loss <= baseline", "--fail-unless", "max(loss) == 1", "--fail-unless", "nan < 1",
    )  # fmt: skip

    assert waited.code == 1
    assert "2 of 3" not in waited.err
    assert waited.err.splitlines()[-1] == f"sftd: {second} succeeded, and 1 of 3 gates are not met."
    assert [line[:7] for line in waited.out.splitlines()[-3:]] == ["met    ", "met    ", "NOT MET"]
    suite = ElementTree.parse(junit).getroot()[0]
    assert [case.get("name") for case in suite.iter("testcase")] == [
        "the job succeeds", "loss <= baseline", "max(loss) == 1", "nan < 1",
    ]  # fmt: skip
    assert [failure.get("message") for failure in suite.iter("failure")] == ["NaN meets no gate (nan = nan)"]
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    text = summary.read_text()
    assert text.startswith("before\n### ❌ sftd: ")
    assert f"<{box.url}/jobs/{second}>" in text
    assert "| metadata git\\_sha | 0123456 |" in text
    assert second in sftd("ls", "--metadata", "git_sha=0123456").out
    assert first not in sftd("ls", "--metadata", "git_sha=0123456").out


def test_gates_that_are_met_end_with_zero(sftd: Sftd, over: Make, answer: Make) -> None:
    history = answer(body=page(evaluation(0, 3.0), evaluation(10, 1.5)))
    over(history, eval_loss=1.5, gpu_seconds=60.0)

    waited = sftd(
        "wait", "job_1", "--fail-unless", "min(eval_loss) + 0.1 < 1.7", "--fail-unless", "gpu_seconds < 100"
    )

    assert (waited.code, waited.err) == (0, "")
    assert "min(eval_loss) + 0.1 < 1.7: 1.6 < 1.7 is true (min(eval_loss) = 1.5)" in waited.out


def test_a_metric_that_the_job_does_not_have_is_not_met_and_is_remarked_on_first(
    sftd: Sftd, over: Make, answer: Make
) -> None:
    over(answer(body=page()), eval_loss=None)

    waited = sftd("wait", "job_1", "--fail-unless", "eval_los < 2", "--fail-unless", "eval_loss < 2")

    assert waited.code == 1
    assert "eval_los is none of" in waited.err.splitlines()[0]
    assert "NOT MET  eval_los < 2: job_1 has no metric eval_los" in waited.out
    assert "NOT MET  eval_loss < 2: job_1 has no eval_loss: it was not evaluated" in waited.out


def test_all_of_it_is_said_in_json(sftd: Sftd, over: Make) -> None:
    over(loss=0.5, eval_loss=1.0)

    waited = sftd("wait", "job_1", "--json", "--fail-unless", "loss<1", "--fail-unless", "eval_loss<1")

    told = json.loads(waited.out)
    assert (waited.code, told["exit_code"], told["outcome"]) == (1, 1, "not_met")
    assert [(gate["gate"], gate["met"], gate["left"], gate["right"]) for gate in told["gates"]] == [
        ("loss<1", True, 0.5, 1.0),
        ("eval_loss<1", False, 1.0, 1.0),
    ]
    assert told["job"]["state"] == "succeeded"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        (
            {"state": "failed", "failure": {"reason": "diverged", "message": "NaN \x1b[31m<b>|\x00 at 3.", "remedy": "Lower it.", "log_tail": ["last \x07 line"]}},
            2,
            "failed (diverged)",
        ),
        ({"state": "cancelled"}, 3, "was cancelled"),
        ({"state": "running"}, 4, "still running"),
    ],
)  # fmt: skip
def test_a_job_that_does_not_succeed_has_its_own_code_and_its_reports(
    sftd: Sftd, over: Make, tmp_path: Path, fields: dict[str, Any], code: int, words: str
) -> None:
    over(**fields)
    junit, summary = tmp_path / "out.xml", tmp_path / "summary.md"

    waited = sftd(
        "wait", "job_1", "--timeout", 0, "--fail-unless", "eval_loss<1.9", "--junit", junit, "--summary", summary
    )  # fmt: skip

    assert (waited.code, words in waited.err) == (code, True)
    assert "\x1b" not in waited.err
    suite = ElementTree.parse(junit).getroot()[0]  # raises where it is not XML
    job, gate = suite.iter("testcase")
    assert words in (job.find("failure").get("message") or "")  # type: ignore[union-attr]  # it is there
    assert gate.find("skipped") is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "1", "1")
    text = summary.read_text()
    assert "| `eval_loss<1.9` | not checked |" in text
    assert not any(char in text for char in "\x1b\x00\x07")
    assert "<b>" not in text


def test_a_server_that_is_away_is_waited_for_within_the_timeout(
    sftd: Sftd,
    at_scripted: "ScriptedServer",
    error_answer: Make,
    job_answer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sftd.jobs.POLL_SECONDS", 0.01)
    monkeypatch.setattr("sftd.jobs.backoff_seconds", lambda *_, **__: 0)
    at_scripted.will_answer(
        *[error_answer(503)] * 4, job_answer(state="running"), job_answer(state="succeeded")
    )

    waited = sftd("wait", "job_1", "--timeout", 30)

    assert waited.code == 0
    assert [line for line in waited.out.splitlines() if line.startswith("(")] == [
        "(no Waiting for it.)",
        "(the server is there again)",
    ]


def test_a_server_that_never_answers_is_a_timeout_with_reports(
    sftd: Sftd, at_scripted: "ScriptedServer", tmp_path: Path
) -> None:
    at_scripted.close()

    waited = sftd(
        "wait", "job_1", "--timeout", 0, "--summary", tmp_path / "s.md", "--junit", tmp_path / "j.xml"
    )

    assert (waited.code, "the server does not answer" in waited.err) == (4, True)
    assert "job_1" in (tmp_path / "s.md").read_text()
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"
    assert sftd("wait", "job_1").code == 6


def test_mistakes_in_the_call_end_with_five_before_any_waiting(
    sftd: Sftd, at_scripted: "ScriptedServer", error_answer: Make, tmp_path: Path
) -> None:
    at_scripted.will_answer(error_answer(404, message="There is no job job_1."))

    assert sftd("wait").code == 5
    assert sftd("wait", "job_1", "--timeout", "soon").code == 5
    assert sftd("wait", "job_1", "--timeout", "nan").code == 5
    wrong = sftd("wait", "job_1", "--fail-unless", "eval_loss <")
    assert (wrong.code, "at character 12" in wrong.err) == (5, True)
    lacking = sftd("wait", "job_1", "--fail-unless", "eval_loss < baseline")
    assert (lacking.code, "--baseline job:ID" in lacking.err) == (5, True)
    assert sftd("wait", "job_1", "--baseline", "job:a@5").code == 5
    assert sftd("wait", "job_1", "--junit", tmp_path / "none/out.xml").code == 5
    assert sftd("wait", "job_1", "--summary", tmp_path).code == 5
    assert at_scripted.requests == []
    assert sftd("wait", "job_1").code == 5  # no such job
    assert sftd("wait", "job_2", "--baseline", "job_1", "--fail-unless", "loss<baseline").code == 5


def test_an_empty_name_of_a_report_is_none(sftd: Sftd, over: Make) -> None:
    over()

    assert sftd("wait", "job_1", "--summary", "", "--junit", "").code == 0
