"""The route of the audit log. For admins."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from sftd.schemas import AuditEntry, Page
from sftd_server.audit import queries
from sftd_server.audit.queries import EntryFilter
from sftd_server.auth import CallerDep
from sftd_server.errors import Invalid, error_responses
from sftd_server.server import ServerDep
from sftd_server.strict_json import MAX_INTEGER

router = APIRouter(prefix="/audit", tags=["server"], responses=error_responses())


@router.get("")
async def list_entries(
    server: ServerDep,
    caller: CallerDep,
    action: Annotated[
        str | None, Query(max_length=64, description="`job.delete`; or `job`, for all that was done to jobs.")
    ] = None,
    key_name: Annotated[str | None, Query(max_length=128, description="Whose changes.")] = None,
    target: Annotated[str | None, Query(max_length=200, description="Id of what was changed.")] = None,
    since: Annotated[datetime | None, Query(description="From then on; without a zone it is UTC.")] = None,
    until: Annotated[datetime | None, Query(description="Before then; without a zone it is UTC.")] = None,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_INTEGER, description="The id of the last entry seen.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[AuditEntry]:
    """Every change that was made, newest first: who, what, when, from where. For admins. `next_after` is the `after` of the
    next page."""
    caller.require_admin()
    wanted = EntryFilter(action, key_name, target, _utc("since", since), _utc("until", until))
    return await server.db.read(lambda session: queries.entries(session, wanted, after=after, limit=limit))


def _utc(name: str, given: datetime | None) -> datetime | None:
    if given is None:
        return None
    try:
        return given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
    except OverflowError:
        raise Invalid(
            f"{name}: is before the year 1 or after 9999 in UTC; give a moment between",
            code="invalid_request",
            param=name,
        ) from None
