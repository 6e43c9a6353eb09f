"""The way of a posted job from any surface to the queue: found again where the same call was made before, else checked
and queued."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session

from sftd.spec import JobSpec
from sftd_server.auth import Caller
from sftd_server.jobs import service, submission
from sftd_server.server import Server

Checked = tuple[JobSpec, service.JobInputs, service.Origin | None]


@dataclass(frozen=True)
class Post:
    """A call that makes a job."""

    asked: object  # JSON: what makes it the same call
    idempotency_key: str | None = None
    one_of_tries: service.Try | None = None  # where its client tries again without a key
    suffix: str | None = None


def sources(server: Server) -> submission.Sources:
    """Where the inputs of a job may lie."""
    return submission.Sources(server.folder, server.settings.model_roots, has_store=server.store is not None)


async def post(server: Server, caller: Caller, call: Post, check: Callable[[], Awaitable[Checked]]) -> str:
    """Make a job of what was asked, once per idempotency key or call. Returns its id. What was made before is not checked
    again."""
    now, body_sha256 = server.clock.now(), service.body_hash(call.asked)
    earlier = await server.db.read(lambda session: _find(session, caller, call, body_sha256, now))
    if earlier is not None:
        return earlier
    spec, inputs, origin = await check()
    submitted = service.Submission(
        spec,
        inputs,
        caller.name,
        call.idempotency_key,
        body_sha256,
        origin,
        suffix=call.suffix,
        one_of_tries=call.one_of_tries,
    )
    return await server.db.write(lambda session: service.submit(session, submitted, now))


def _find(session: Session, caller: Caller, call: Post, body_sha256: str, now: datetime) -> str | None:
    """A job that was made before, whatever has become of its files and its model since."""
    owner, key = caller.name, call.idempotency_key
    if key is not None:
        return service.find_submitted(
            session, owner=owner, idempotency_key=key, body_sha256=body_sha256, now=now
        )
    if call.one_of_tries is None:
        return None
    return service.find_tried(session, call.one_of_tries, owner=owner, body_sha256=body_sha256, now=now)
