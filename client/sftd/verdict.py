"""How a job that was waited for came out, and the reports that a CI shows of it: JUnit's XML and Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from xml.etree import ElementTree

from sftd.gates import GateResult
from sftd.output import duration, number, printable, steps
from sftd.schemas import Job

_NOT_XML = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")


class Outcome(StrEnum):
    """How the waiting ended. The exit codes of `sftd wait` are in this order, from 0."""

    MET = "met"
    NOT_MET = "not_met"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"

    @property
    def code(self) -> int:
        return list(Outcome).index(self)


@dataclass(frozen=True)
class Verdict:
    """A job and its gates. `gates` holds results where the job succeeded, else `unchecked` their text."""

    job_id: str
    job: Job | None  # None where the server never answered
    url: str
    outcome: Outcome
    message: str
    gates: Sequence[GateResult]
    unchecked: Sequence[str]


def junit(verdict: Verdict) -> str:
    """One test case for the job, and one for each gate."""
    name = f"sftd.{verdict.job_id}"
    cases = [_job_case(verdict, name), *(_gate_case(gate, name) for gate in verdict.gates)]
    for text in verdict.unchecked:
        case = _case(text, name)
        _add(case, "skipped", message="not checked: the job did not succeed")
        cases.append(case)
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(len(verdict.unchecked)),
        "time": cases[0].attrib["time"],
    }
    suites = ElementTree.Element("testsuites", {"name": "sftd", **counts})
    begun = {"timestamp": _stamp(verdict.job.created_at)} if verdict.job else {}
    suite = _add(suites, "testsuite", name=name, **counts, **begun)
    facts = _add(suite, "properties")
    for key, value in _facts(verdict).items():
        _add(facts, "property", name=key, value=value)
    suite.extend(cases)
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def markdown(verdict: Verdict) -> str:
    """A summary for a page: what came out, the gates, the facts of the job."""
    mark = "✅" if verdict.outcome is Outcome.MET else "❌"
    lines = [f"### {mark} sftd: {_cell(verdict.message)}", ""]
    if verdict.gates or verdict.unchecked:
        lines += ["| gate | | numbers |", "|---|---|---|"]
        lines += [
            f"| `{gate.gate}` | {'met' if gate.met else '**not met**'} | {_cell(gate.message)} |"
            for gate in verdict.gates
        ]
        lines += [f"| `{text}` | not checked | the job did not succeed |" for text in verdict.unchecked]
        lines.append("")
    lines += ["| job | |", "|---|---|"]
    for name, value in _facts(verdict).items():
        lines.append(f"| {_cell(name)} | {f'<{value}>' if name == 'url' else _cell(value)} |")
    return "\n".join([*lines, "", ""])


def _job_case(verdict: Verdict, classname: str) -> ElementTree.Element:
    case = _case("the job succeeds", classname, seconds=verdict.job.run_seconds if verdict.job else 0)
    if verdict.outcome not in (Outcome.MET, Outcome.NOT_MET):
        failure = verdict.job.failure if verdict.job else None
        text = "\n".join([verdict.message, *(failure.log_tail if failure else ())])
        _add(case, "failure", message=verdict.message, type=str(verdict.outcome)).text = _xml(text)
    return case


def _gate_case(gate: GateResult, classname: str) -> ElementTree.Element:
    case = _case(gate.gate, classname)
    if not gate.met:
        _add(case, "failure", message=gate.message, type="gate").text = _xml(f"{gate.gate}\n{gate.message}")
    return case


def _case(name: str, classname: str, *, seconds: float = 0) -> ElementTree.Element:
    return ElementTree.Element(
        "testcase", {"name": _xml(name), "classname": _xml(classname), "time": f"{seconds:.3f}"}
    )


def _add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name: _xml(value) for name, value in attributes.items()})


def _facts(verdict: Verdict) -> dict[str, str]:
    facts = {"id": verdict.job_id, "url": f"{verdict.url}/jobs/{verdict.job_id}"}
    job = verdict.job
    if job is None:
        return facts
    facts |= {
        "name": job.name or "",
        "state": str(job.state),
        "owner": job.owner,
        "base model": f"{job.base_model} ({job.method})",
        "step": steps(job),
        "loss": number(job.loss),
        "eval loss": number(job.eval_loss),
        "tokens per second": number(job.tokens_per_second),
        "GPU time": duration(job.gpu_seconds) if job.attempt else "",
    }
    facts |= {f"metadata {name}": value for name, value in job.metadata.items()}
    if job.failure:
        facts |= {"failure": f"{job.failure.reason}: {job.failure.message}", "remedy": job.failure.remedy}
    return {name: value for name, value in facts.items() if value}


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S")


def _xml(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _cell(text: str) -> str:
    """Text in a cell of a table: nothing in it is Markdown or HTML."""
    text = printable(" ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
