"""Who is calling: access keys, their roles, and what each role may do.

Every path but /healthz needs a key. Keys are compared by their sha256 and held in memory: they are few. Where servers
share a database, each reads them anew when another has changed them. Worker keys open /worker/… and nothing else; other keys open everything but that.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlmodel import Session, col, delete, select, update
from starlette.datastructures import Headers

from sftd.schemas import Key, KeyChange, KeyRequest, NewKey
from sftd_server.audit import service as audit
from sftd_server.clock import Clock
from sftd_server.db import Database, touch
from sftd_server.engines import Turn, take_turn
from sftd_server.errors import Conflict, Forbidden, Invalid, NotFound, Unauthorized
from sftd_server.ids import new_id
from sftd_server.mistakes import Mistake
from sftd_server.tables import KeyRow

OPEN_PATHS = {"/healthz"}
LIMITS = {"max_running_jobs", "max_queued_jobs", "max_gpu_hours_per_month"}
_TOPIC = "keys"
_BUILT_IN = {"admin": "key_admin", "worker": "key_worker"}

log = logging.getLogger("sftd.server")


@dataclass(frozen=True)
class Caller:
    """The key of a request."""

    key_id: str
    name: str
    role: str

    def require_admin(self) -> None:
        if self.role != "admin":
            raise Forbidden(f"This needs an admin's key; {self.name} is a {self.role}.", code="admin_only")

    def require_owner(self, owner: str) -> None:
        """Anybody on the team reads everything; only the owner or an admin changes it."""
        if self.role != "admin" and self.name != owner:
            raise Forbidden(f"This belongs to {owner}; ask them or an admin.", code="not_owner")


class Keyring:
    """All keys, by the hash of their secret."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._by_hash: dict[str, KeyRow] = {}
        self._loading = asyncio.Lock()  # one at a time: an older reading must not bring back a deleted key

    async def load(self) -> None:
        """Read the keys again."""
        async with self._loading:
            rows = await self._db.read(lambda session: session.exec(select(KeyRow)).all())
            self._by_hash = {row.secret_sha256: row for row in rows}

    async def follow(self) -> None:
        """Read the keys again whenever another server has changed them, until cancelled."""
        while True:
            changed = self._db.signal(_TOPIC)
            try:
                await self.load()
                await changed.wait()
            except Exception as error:  # once the database is back, everybody who waits is woken
                log.warning("the keys could not be read again: %s", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), 1)

    async def install(self, role: str, secret: Callable[[], str], *, replace: bool) -> bool:
        """Make `secret()` the built-in key of a role: in place of an earlier one, or only where there is none.

        False where an earlier one stays that is another. `secret` is asked for by one server at a time, among all that
        share the database, and only where the key may be installed.
        """

        def work(session: Session) -> bool:
            take_turn(session.connection(), Turn.BUILT_IN_KEY)
            earlier = session.get(KeyRow, _BUILT_IN[role])
            if earlier is not None and not replace:
                return False
            row = _row(_BUILT_IN[role], role, role, secret(), self._clock.now(), None)
            if earlier is not None:
                if earlier.secret_sha256 == row.secret_sha256:
                    return True
                session.delete(earlier)
                session.flush()
            session.add(row)
            action = "key.create" if earlier is None else "key.change"
            audit.add_own(session, row.created_at, action, row.id, name=row.name, role=row.role)
            touch(session, _TOPIC)
            return True

        installed = await self._db.write(work)
        await self.load()
        return installed

    async def create(self, request: KeyRequest) -> NewKey:
        """Make a key. Its secret is in the answer and nowhere else."""
        now = self._clock.now()
        lifetime = request.expires_in_seconds
        expires_at = None if lifetime is None else now + timedelta(seconds=lifetime)
        secret = f"sftd-{secrets.token_hex(24)}"
        limits = request.model_dump(include=LIMITS)
        _check_limits(request.role, limits)
        row = _row(new_id("key"), request.name, request.role, secret, now, expires_at, limits)

        def work(session: Session) -> None:
            if session.exec(select(KeyRow.id).where(KeyRow.name == row.name)).first():
                raise Conflict(
                    f"There is a key named {row.name!r}; names are unique.", code="name_taken", param="name"
                )
            session.add(KeyRow(**row.model_dump()))
            audit.describe(session, **_told(row.model_dump(include={"name", "role", "expires_at", *LIMITS})))
            touch(session, _TOPIC)

        await self._db.write(work)
        await self.load()
        return NewKey(**_key(row).model_dump(), secret=secret)

    async def change(self, key_id: str, change: KeyChange) -> Key:
        """Set a key's limits and its end; what is not given stays as it is."""
        values: dict[str, Any] = change.model_dump(include=change.model_fields_set & LIMITS)
        if "expires_in_seconds" in change.model_fields_set:
            seconds = change.expires_in_seconds
            values["expires_at"] = None if seconds is None else self._clock.now() + timedelta(seconds=seconds)
        if key_id in _BUILT_IN.values() and any(value is not None for value in values.values()):
            raise Conflict(
                f"{key_id} is built in: it has no limits and does not expire. Make a key of your own and limit that.",
                code="built_in_key",
            )

        def work(session: Session) -> Key:
            row = session.exec(select(KeyRow).where(KeyRow.id == key_id).with_for_update()).first()
            if row is None:
                raise NotFound(f"There is no key {key_id!r}; GET /keys lists them.", code="unknown_key")
            _check_limits(row.role, values)
            if values:
                session.exec(update(KeyRow).where(col(KeyRow.id) == key_id).values(**values))
                audit.describe(session, name=row.name, changed=_told(values))
                touch(session, _TOPIC, "queue")  # more of its jobs may start
            return Key.model_validate({**row.model_dump(), **values})

        changed = await self._db.write(work)
        await self.load()
        return changed

    def list(self) -> list[Key]:
        """All keys, oldest first."""
        return [_key(row) for row in sorted(self._by_hash.values(), key=lambda row: (row.created_at, row.id))]

    async def delete(self, key_id: str) -> None:
        """Make a key worthless at once."""
        if key_id in _BUILT_IN.values():
            raise Conflict(
                f"{key_id} is built in: change SFTD_ADMIN_KEY, or remove its file in the data folder, and restart.",
                code="built_in_key",
            )

        def work(session: Session) -> int:
            touch(session, _TOPIC, "queue")  # its jobs stay, and nothing limits them any more
            row = session.exec(select(KeyRow).where(KeyRow.id == key_id)).first()
            if row is not None:
                audit.describe(session, name=row.name, role=row.role)
            return session.exec(delete(KeyRow).where(col(KeyRow.id) == key_id)).rowcount

        if not await self._db.write(work):
            raise NotFound(f"There is no key {key_id!r}.", code="unknown_key")
        await self.load()

    def find(self, secret: str) -> Caller:
        """Whose secret this is. Raises Unauthorized."""
        digest = _hash(secret)
        row = self._by_hash.get(digest)
        # The look-up goes by the hash, which tells a guesser nothing; the comparison is constant-time all the same.
        if row is None or not secrets.compare_digest(row.secret_sha256, digest):
            raise Unauthorized("The key is not known here.", code="invalid_key")
        if row.expires_at is not None and row.expires_at <= self._clock.now():
            raise Unauthorized(
                f"The key {row.name!r} has expired; ask an admin for a new one.", code="expired_key"
            )
        return Caller(row.id, row.name, row.role)

    def admit(self, path: str, headers: Headers) -> Caller:
        """The caller of a request, if the key is good and the path is for its role."""
        caller = self.find(_secret(path, headers))
        for_workers = path == "/worker" or path.startswith("/worker/")
        if for_workers and caller.role != "worker":
            raise Forbidden("This path is for workers; it needs a worker's key.", code="worker_only")
        if not for_workers and caller.role == "worker":
            raise Forbidden("A worker's key opens /worker/ only; use a user's key.", code="not_for_workers")
        return caller


def caller_of(request: Request) -> Caller:
    """The key of this request, found by the gate before routing."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


CallerDep = Annotated[Caller, Depends(caller_of)]


def is_docs(path: str) -> bool:
    """Pages for a browser, which may ask for the key itself."""
    return path == "/openapi.json" or path == "/docs" or path.startswith("/docs/")


def _secret(path: str, headers: Headers) -> str:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        return given.strip()
    if is_docs(path):
        if scheme.lower() == "basic":
            return _basic_password(given)
        raise _no_key('Basic realm="sftd: any name, your key as the password", charset="UTF-8"')
    raise _no_key("Bearer")


def _no_key(challenge: str) -> Unauthorized:
    return Unauthorized(
        "A key is needed: send it as `Authorization: Bearer <key>`.",
        code="missing_key",
        headers={"www-authenticate": challenge},
    )


def _basic_password(given: str) -> str:
    try:
        return base64.b64decode(given.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _row(
    key_id: str,
    name: str,
    role: str,
    secret: str,
    now: datetime,
    expires_at: datetime | None,
    limits: Mapping[str, Any] = MappingProxyType({}),  # columns of several types
) -> KeyRow:
    return KeyRow(
        id=key_id,
        name=name,
        role=role,
        secret_sha256=_hash(secret),
        created_at=now,
        expires_at=expires_at,
        **limits,
    )


def _told(values: Mapping[str, Any]) -> dict[str, Any]:  # columns, as JSON
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()
    }


def _check_limits(role: str, limits: Mapping[str, Any]) -> None:  # columns of several types
    given = [name for name, value in limits.items() if name in LIMITS and value is not None]
    if role == "worker" and given:
        mistakes = [
            Mistake(name, "a worker's key posts no jobs and takes no limit; leave it out")
            for name in sorted(given)
        ]
        raise Invalid.of(mistakes)


def _key(row: KeyRow) -> Key:
    return Key.model_validate(row.model_dump())
