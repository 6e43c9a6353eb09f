"""The state table: every pair of state and trigger, and its picture in the documentation."""

import re
from pathlib import Path

import pytest

from sftd.schemas import JobState, Want
from sftd_server.jobs.states import GUARDS, TABLE, Facts, Trigger, next_state

DOC = (Path(__file__).parents[3] / "docs" / "states.md").read_text()
LEASED = ("claimed", "running", "stopping")

# (trigger, want) → where to, by state; what is not here goes nowhere. Written apart from the table on purpose.
BACK = {"run": "queued", "pause": "paused", "cancel": "cancelled"}
EXPECTED: dict[tuple[str, str, str], str] = {
    ("queued", "claim", "run"): "claimed",
    **{("queued", "cancel", want): "cancelled" for want in BACK},
    **{("queued", "pause", want): "paused" for want in BACK},
    **{("paused", "cancel", want): "cancelled" for want in BACK},
    **{("paused", "resume", want): "queued" for want in BACK},
    ("claimed", "start", "run"): "running",
    ("claimed", "start", "pause"): "stopping",
    ("claimed", "start", "cancel"): "stopping",
    **{("claimed", "not_started", want): to for want, to in BACK.items()},
    **{(state, "tell", want): "stopping" for state in ("claimed", "running") for want in ("pause", "cancel")},
    **{(s, "release", want): to for s in LEASED for want, to in BACK.items()},
    **{(s, "lease_expired", want): to for s in LEASED for want, to in BACK.items()},
    **{(s, "finish_succeeded", want): "succeeded" for s in LEASED for want in BACK},
    **{(s, "finish_failed", want): "failed" for s in LEASED for want in BACK},
    **{(s, "finish_cancelled", "cancel"): "cancelled" for s in LEASED},
    **{("queued", "dependency_failed", want): "failed" for want in BACK},
    **{("queued", "file_invalid", want): "failed" for want in BACK},
    **{(s, "finish_paused", "pause"): "paused" for s in LEASED},
    **{(s, "hold", want): to for s in LEASED for want, to in {**BACK, "run": "paused"}.items()},
    **{(s, "finish_paused", "cancel"): "cancelled" for s in LEASED},
}


@pytest.mark.parametrize("want", list(Want))
@pytest.mark.parametrize("trigger", list(Trigger))
@pytest.mark.parametrize("state", list(JobState))
def test_every_state_and_trigger(state: JobState, trigger: Trigger, want: Want) -> None:
    assert next_state(state, trigger, Facts(want)) == EXPECTED.get((state, trigger, want))


@pytest.mark.parametrize("state", LEASED)
def test_a_job_that_loses_too_many_workers_fails_unless_its_user_wanted_an_end_anyway(state: str) -> None:
    for want, to in {**BACK, "run": "failed"}.items():
        facts = Facts(Want(want), lost_too_often=True)

        assert next_state(JobState(state), Trigger.LEASE_EXPIRED, facts) == to


@pytest.mark.parametrize("state", LEASED)
def test_a_failure_that_may_be_retried_queues_the_job_only_while_its_user_wants_it_to_run(state: str) -> None:
    for want, to in {"run": "queued", "pause": "paused", "cancel": "failed"}.items():
        facts = Facts(Want(want), may_retry=True)

        assert next_state(JobState(state), Trigger.FINISH_FAILED, facts) == to


@pytest.mark.parametrize("state", ["claimed", "running"])
def test_a_job_that_shall_make_room_is_stopping_once_its_worker_is_told(state: str) -> None:
    assert next_state(JobState(state), Trigger.TELL, Facts(makes_room=True)) == "stopping"


def test_terminal_states_never_change() -> None:
    assert not [pair for pair in TABLE if pair[0].terminal]


def test_the_documented_table_is_the_table() -> None:
    section = DOC.split("| from | trigger | guard | to |")[1].split("\n\n")[0]
    documented = set(re.findall(r"\| (\w+) \| (\w+) \| ([^|]+) \| (\w+) \|", section))

    assert documented == {
        (str(state), str(trigger), move.guard or "–", str(move.to))
        for (state, trigger), moves in TABLE.items()
        for move in moves
    }
    assert {guard for _, _, guard, _ in documented} - {"–"} <= GUARDS.keys()


def test_the_documented_diagram_has_the_moves_of_the_table() -> None:
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)", DOC, re.MULTILINE))

    assert drawn == {(str(state), str(move.to)) for (state, _), moves in TABLE.items() for move in moves}


def test_every_state_and_trigger_is_explained() -> None:
    for name in [*JobState, *Trigger]:
        assert re.search(rf"^\|[^|]*\b{name}\b", DOC, re.MULTILINE), name
