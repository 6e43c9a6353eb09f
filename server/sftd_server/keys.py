"""Routes of access keys. For admins."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from sftd.schemas import Key, KeyRequest, NewKey, Page
from sftd_server.auth import Caller, caller_of
from sftd_server.errors import error_responses
from sftd_server.server import Server, server_of
from sftd_server.strict_json import StrictRoute

ServerDep = Annotated[Server, Depends(server_of)]


def require_admin(caller: Annotated[Caller, Depends(caller_of)]) -> None:
    """Refuse anybody but an admin."""
    caller.require_admin()


router = APIRouter(
    prefix="/keys",
    tags=["keys"],
    route_class=StrictRoute,
    dependencies=[Depends(require_admin)],
    responses=error_responses(),
)


@router.post("", responses=error_responses(409, 413))
async def create(request: KeyRequest, server: ServerDep) -> NewKey:
    """Make a key. Its secret is in this answer and is never shown again."""
    return await server.keyring.create(request)


@router.get("")
async def list_keys(server: ServerDep) -> Page[Key]:
    """All keys, oldest first, without their secrets."""
    return Page[Key](data=server.keyring.list(), has_more=False, next_after=None)


@router.delete("/{key_id}", status_code=204, responses=error_responses(404, 409))
async def delete(key_id: Annotated[str, Path(max_length=64)], server: ServerDep) -> None:
    """Make a key worthless at once."""
    await server.keyring.delete(key_id)
