"""Routes of access keys. For admins, but for `/keys/me`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from sqlmodel import Session, select

from sftd.schemas import Key, KeyChange, KeyRequest, NewKey, OwnKey, Page
from sftd_server.auth import CallerDep
from sftd_server.errors import Unauthorized, error_responses
from sftd_server.jobs import limits
from sftd_server.server import ServerDep
from sftd_server.strict_json import StrictRoute
from sftd_server.tables import KeyRow

KeyId = Annotated[str, Path(max_length=64, examples=["key_7k2mq9x4w3pz"])]


def require_admin(caller: CallerDep) -> None:
    """Refuse anybody but an admin."""
    caller.require_admin()


FOR_ADMINS = [Depends(require_admin)]
router = APIRouter(prefix="/keys", tags=["keys"], route_class=StrictRoute, responses=error_responses())


@router.post("", dependencies=FOR_ADMINS, responses=error_responses(409, 413))
async def create(request: KeyRequest, server: ServerDep) -> NewKey:
    """Make a key. Its secret is in this answer and is never shown again.

    `max_running_jobs`, `max_queued_jobs` and `max_gpu_hours_per_month` limit the jobs of the key, which are those of its
    name; without them there is no limit.
    """
    return await server.keyring.create(request)


@router.get("", dependencies=FOR_ADMINS)
async def list_keys(server: ServerDep) -> Page[Key]:
    """All keys, oldest first, without their secrets."""
    return Page[Key](data=server.keyring.list(), has_more=False, next_after=None)


@router.get("/me")
async def me(server: ServerDep, caller: CallerDep) -> OwnKey:
    """The key that this call is made with: its name, role and limits, and what is used of them."""
    now = server.clock.now()

    def look(session: Session) -> OwnKey:
        row = session.exec(select(KeyRow).where(KeyRow.id == caller.key_id)).first()
        if row is None:
            raise Unauthorized("The key has just been withdrawn.", code="invalid_key")
        used = limits.standing(session, row, now)
        return OwnKey(
            **row.model_dump(exclude={"secret_sha256"}),
            running_jobs=used.num_running,
            queued_jobs=limits.num_queued(session, row.name),
            gpu_hours_this_month=used.gpu_hours,
            month_ends_at=limits.next_month(now),
        )

    return await server.db.read(look)


@router.patch("/{key_id}", dependencies=FOR_ADMINS, responses=error_responses(404, 409, 413))
async def change(message: KeyChange, key_id: KeyId, server: ServerDep) -> Key:
    """Change a key's limits, or when it expires: what is left out stays, null takes it away. Name and role stay for good."""
    return await server.keyring.change(key_id, message)


@router.delete("/{key_id}", status_code=204, dependencies=FOR_ADMINS, responses=error_responses(404, 409))
async def delete(key_id: KeyId, server: ServerDep) -> None:
    """Make a key worthless at once. Its jobs and files stay, under its name."""
    await server.keyring.delete(key_id)
