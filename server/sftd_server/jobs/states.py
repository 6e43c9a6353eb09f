"""The state machine of a job: one table, (state, trigger) → state. docs/states.md is tested against it.

Nothing here touches the database: `jobs.service.move` carries a move out as one guarded UPDATE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sftd.schemas import JobState, Want

QUEUED, CLAIMED, RUNNING, STOPPING, PAUSED, SUCCEEDED, FAILED, CANCELLED = JobState
LEASED = (CLAIMED, RUNNING, STOPPING)
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)


class Trigger(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"
    START = "start"  # the first heartbeat that says `started`
    NOT_STARTED = "not_started"  # claimed, but no such heartbeat in time
    TELL = "tell"  # a heartbeat's answer carries want=pause, want=cancel, or that the job shall make room
    RELEASE = "release"
    LEASE_EXPIRED = "lease_expired"
    FINISH_SUCCEEDED = "finish_succeeded"
    FINISH_FAILED = "finish_failed"
    FINISH_CANCELLED = "finish_cancelled"
    FINISH_PAUSED = "finish_paused"
    HOLD = "hold"  # its worker puts it aside for a reason of its own: the disk is nearly full
    DEPENDENCY_FAILED = "dependency_failed"  # a job that it waits for has ended without success
    FILE_INVALID = "file_invalid"  # the check of a file that it reads has found mistakes
    CANCEL = "cancel"  # the user's wishes; while a worker holds the job they only set `want`
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True)
class Facts:
    """What a guard may ask about."""

    want: Want = Want.RUN
    lost_too_often: bool = False
    may_retry: bool = False
    makes_room: bool = False


@dataclass(frozen=True)
class Move:
    """One row of the table: where to, and when."""

    to: JobState
    guard: str = ""  # a key of GUARDS; "" is always


GUARDS: dict[str, Callable[[Facts], bool]] = {
    "": lambda facts: True,
    "want=run": lambda facts: facts.want is Want.RUN,
    "want=pause": lambda facts: facts.want is Want.PAUSE,
    "want=cancel": lambda facts: facts.want is Want.CANCEL,
    "want≠run": lambda facts: facts.want is not Want.RUN,
    "want=run, makes room": lambda facts: facts.want is Want.RUN and facts.makes_room,
    "want=run, lost too often": lambda facts: facts.want is Want.RUN and facts.lost_too_often,
    "may retry": lambda facts: facts.want is Want.RUN and facts.may_retry,
    "want=pause, may retry": lambda facts: facts.want is Want.PAUSE and facts.may_retry,
}

_BACK = (
    Move(CANCELLED, "want=cancel"),
    Move(PAUSED, "want=pause"),
)
_LOST = (*_BACK, Move(FAILED, "want=run, lost too often"), Move(QUEUED, "want=run"))
_RELEASED = (*_BACK, Move(QUEUED, "want=run"))
_FAILED = (Move(QUEUED, "may retry"), Move(PAUSED, "want=pause, may retry"), Move(FAILED))
_TOLD = (Move(STOPPING, "want≠run"), Move(STOPPING, "want=run, makes room"))
_HELD = (*_BACK, Move(PAUSED, "want=run"))
_PAUSED = (Move(CANCELLED, "want=cancel"), Move(PAUSED, "want=pause"))

TABLE: dict[tuple[JobState, Trigger], tuple[Move, ...]] = {
    (QUEUED, Trigger.CLAIM): (Move(CLAIMED, "want=run"),),
    (QUEUED, Trigger.CANCEL): (Move(CANCELLED),),
    (QUEUED, Trigger.PAUSE): (Move(PAUSED),),
    (QUEUED, Trigger.DEPENDENCY_FAILED): (Move(FAILED),),
    (QUEUED, Trigger.FILE_INVALID): (Move(FAILED),),
    (PAUSED, Trigger.CANCEL): (Move(CANCELLED),),
    (PAUSED, Trigger.RESUME): (Move(QUEUED),),
    (CLAIMED, Trigger.START): (Move(RUNNING, "want=run"), Move(STOPPING, "want≠run")),
    (CLAIMED, Trigger.NOT_STARTED): _RELEASED,
    (CLAIMED, Trigger.TELL): _TOLD,
    (RUNNING, Trigger.TELL): _TOLD,
    **{(state, Trigger.RELEASE): _RELEASED for state in LEASED},
    **{(state, Trigger.LEASE_EXPIRED): _LOST for state in LEASED},
    **{(state, Trigger.FINISH_SUCCEEDED): (Move(SUCCEEDED),) for state in LEASED},
    **{(state, Trigger.FINISH_FAILED): _FAILED for state in LEASED},
    **{(state, Trigger.FINISH_CANCELLED): (Move(CANCELLED, "want=cancel"),) for state in LEASED},
    **{(state, Trigger.FINISH_PAUSED): _PAUSED for state in LEASED},
    **{(state, Trigger.HOLD): _HELD for state in LEASED},
}


def next_state(state: JobState, trigger: Trigger, facts: Facts) -> JobState | None:
    """Where the job goes, or None where the trigger means nothing in this state."""
    for move in TABLE.get((state, trigger), ()):
        if GUARDS[move.guard](facts):
            return move.to
    return None
