"""What the audit log holds, and how an entry comes to be: with nothing for a route to remember.

The gate lets a `Recorder` witness whatever a changing request writes to the database. A piece of work that has changed a
row gets an entry beside it, in its own transaction: there is no change without one, and no entry of a change that did not
happen. What was done is read off the route (`POST /jobs/{job_id}/cancel` is `job.cancel`), to what off the row that was
made, else off the path. Services add what is worth knowing besides with `describe`. The worker protocol is left out, as
the events of a job tell it, and so are refused calls.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, event
from sqlmodel import Session
from starlette.types import Scope

from sftd_server.clock import Clock
from sftd_server.tables import AuditRow

if TYPE_CHECKING:
    from sftd_server.auth import Caller

T = TypeVar("T")
_READING = {"GET", "HEAD", "OPTIONS", "TRACE"}
_UNTOLD = {"analysis", "audit", "gone"}  # tables that are about no change which anybody can see
_PREFIXES = {"v1", "fine_tuning"}  # of a path, which say nothing of what is done
_BY_METHOD = {"DELETE": "delete", "PATCH": "change", "PUT": "change", "POST": "change"}
_PARAMETER = re.compile(r"^{(\w+)(?::\w+)?}$")
_CHANGES, _TOLD = "audit_changes", "audit_told"
_MOST_CHARS = 200  # of a target and of a detail


@dataclass
class _Changes:
    """Rows that a piece of work has written."""

    num: int = 0
    made: str | None = None  # the id of the first row that was made


@dataclass
class _Told:
    """What a service says of its own work."""

    happened: bool = False  # whatever the rows say
    target: str | None = None
    details: dict[str, Any] = field(default_factory=dict)  # differs by action


def describe(
    session: Session, *, target: str | None = None, **details: Any
) -> None:  # JSON: differs by action
    """Add to the entry of this transaction; there is one then, even if no row changes. No secrets, nothing long.

    Where no request is behind the transaction nothing is written.
    """
    told = session.info.get(_TOLD)
    if told is not None:
        told.happened = True
        told.target = target or told.target
        told.details |= details


def mention(session: Session, **details: Any) -> None:  # JSON: differs by action
    """The same, if there is an entry: who mentions something need not know yet whether anything changes."""
    told = session.info.get(_TOLD)
    if told is not None:
        told.details |= details


def add_own(
    session: Session, now: datetime, action: str, target: str, **details: Any
) -> None:  # JSON: differs by action
    """An entry of what the server does by itself."""
    session.add(
        AuditRow(
            created_at=now,
            key_id=None,
            key_name=None,
            role=None,
            action=action,
            target=target,
            address=None,
            request_id=None,
            details=_shortened(details),
        )
    )


def is_audited(method: str, path: str) -> bool:
    """Whether what a request changes belongs in the log."""
    return method not in _READING and not path.startswith("/worker/")


def watch(engine: Engine) -> None:
    """Have the rows counted that are written on an engine's connections while a `Recorder` asks for it."""

    @event.listens_for(engine, "after_cursor_execute")
    def on_execute(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:  # SQLAlchemy's own
        changes = connection.info.get(_CHANGES)
        if changes is None or not (context.isinsert or context.isupdate or context.isdelete):
            return
        table = context.compiled.statement.table.name
        if table in _UNTOLD or (cursor.rowcount == 0 and not context.isinsert):
            return
        changes.num += 1
        made = context.compiled_parameters[0].get("id") if context.isinsert else None
        if isinstance(made, str) and changes.made is None:
            changes.made = made


class Recorder:
    """Writes the entries of one request. A witness, in the sense of `db`."""

    def __init__(
        self, scope: Scope, caller: "Caller", *, address: str, request_id: str, clock: Clock
    ) -> None:
        self._scope = scope  # the route is not known yet
        self._caller = caller
        self._address = address
        self._request_id = request_id
        self._clock = clock
        self._written: set[str | None] = set()  # targets that have an entry

    def attend(self, work: Callable[[Session], T]) -> tuple[Callable[[Session], T], Callable[[], None]]:
        """The work with its entry, and what to call once that is committed."""
        targets: set[str | None] = set()

        def work_and_tell(session: Session) -> T:
            targets.clear()
            changes, told = _Changes(), _Told()
            info = session.connection().info
            info[_CHANGES], session.info[_TOLD] = changes, told
            try:
                result = work(session)
                session.flush()
            finally:
                info.pop(_CHANGES, None)  # a connection that broke has forgotten it
                session.info.pop(_TOLD, None)
            if changes.num or told.happened:
                targets.add(self._add(session, changes, told))
            return result

        return work_and_tell, lambda: self._written.update(targets)

    def _add(self, session: Session, changes: _Changes, told: _Told) -> str | None:
        """Add the entry, unless this request has one of the same target. Returns the target."""
        named = {name: str(value) for name, value in self._scope.get("path_params", {}).items()}
        target = told.target or changes.made or next(iter(named.values()), None)
        if target in self._written:
            return target
        others = {name: value for name, value in named.items() if value != target}
        template = str(getattr(self._scope.get("route"), "path", self._scope["path"]))
        session.add(
            AuditRow(
                created_at=self._clock.now(),
                key_id=self._caller.key_id,
                key_name=self._caller.name,
                role=self._caller.role,
                action=action_of(self._scope["method"], template),
                target=target and target[:_MOST_CHARS],
                address=self._address,
                request_id=self._request_id,
                details=_shortened({**others, **told.details}),
            )
        )
        return target


def action_of(method: str, template: str) -> str:
    """What a route does, in two words: `POST /jobs` is `job.create`, `DELETE /v1/models/{model}` is `model.delete`,
    `POST /uploads/{upload_id}/parts` is `upload.add_part`."""
    parts = [part for part in template.split("/") if part and part not in _PREFIXES]
    names = [part for part in parts if not _PARAMETER.match(part)]
    if not names:
        return f"server.{method.lower()}"
    noun = _singular(names[0])
    if _PARAMETER.match(parts[-1]):
        return f"{_singular(names[-1])}.{_BY_METHOD.get(method, method.lower())}"
    if len(parts) == 1:
        return f"{noun}.{'create' if method == 'POST' else _BY_METHOD.get(method, method.lower())}"
    if len(names) > 1:
        noun = _singular(names[-2])
    last = names[-1].replace("-", "_")
    is_collection = last.endswith("s") and method == "POST" and _PARAMETER.match(parts[-2])
    return f"{noun}.add_{_singular(last)}" if is_collection else f"{noun}.{last}"


def _singular(name: str) -> str:
    return name.removesuffix("s").replace("-", "_")


def _shortened(details: Mapping[str, Any]) -> dict[str, Any]:  # JSON: differs by action
    return {
        name: f"{value[: _MOST_CHARS - 1]}…" if isinstance(value, str) and len(value) > _MOST_CHARS else value
        for name, value in details.items()
        if value is not None
    }
