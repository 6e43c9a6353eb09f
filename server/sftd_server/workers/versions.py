"""Answers to workers of an earlier version: their models forbid fields that they do not know, so those are left out."""

from typing import Any

from fastapi import Response
from pydantic import BaseModel

from sftd.protocol import Directive, Lease, Welcome
from sftd.spec import SCHEDULING_FIELDS

_NEW_IN_2: dict[type[BaseModel], dict[str, Any]] = {  # as model_dump's `exclude`, which nests
    Welcome: {"protocol": True, "refused_means_down": True},
    Lease: {
        "base_sha256": True,
        "spec": dict.fromkeys(SCHEDULING_FIELDS - {"priority"}, True),
        "checkpoints": {"__all__": {"folder": True, "files": True}},
    },
    Directive: {"make_room": True, "draining": True, "refused_means_down": True, "next_upload_seconds": True},
}


def answer(message: Welcome | Lease | Directive, *, protocol: int) -> Response:
    """The message as a worker of that version reads it."""
    left_out = _NEW_IN_2[type(message)] if protocol < 2 else None
    return Response(message.model_dump_json(exclude=left_out), media_type="application/json")
