"""What is looked at again and again besides leases: room for waiting jobs, workers that are long gone."""

from datetime import datetime

from sqlmodel import Session

from sftd_server.settings import Settings
from sftd_server.workers import registry
from sftd_server.workers.preemption import make_room


def upkeep(session: Session, *, settings: Settings, now: datetime) -> None:
    """One look, in the reaper's tick."""
    make_room(session, settings, now)
    registry.forget(session, now)
