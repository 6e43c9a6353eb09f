"""Every route that changes something leaves an entry in the audit log: also one that is added tomorrow."""

from typing import Any

import httpx
import pytest
from tests.security.conftest import Things

# Routes whose success changes nothing that anybody else can see, and which leave no entry.
CHANGES_NOTHING: set[str] = {"POST /jobs/plan"}
ROWS = ("rows.jsonl", b'{"text": "a"}')


def calls(things: Things, owner: httpx.Client) -> list[dict[str, Any]]:
    """What a route may take; the first that it takes is what changes something."""
    things.num += 1
    spec = things.spec(owner)
    bodies = [
        {}, {"name": f"n{things.num}"}, {"position": "last"}, spec, {"max_queued_jobs": things.num},
        {"model": "org/m", "training_file": spec["training_file"]},
        {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": 13, "mime_type": "text/jsonl"},
        {"part_ids": things.part_ids},
    ]  # fmt: skip
    forms = [{"files": {"file": ROWS}, "data": {"purpose": "fine-tune"}}, {"files": {"data": ROWS}}]
    return [{}, *({"json": body} for body in bodies), *forms]


def test_every_route_that_changes_something_leaves_one_entry(box, changing_routes) -> None:
    things = Things(box)
    left_none, never_taken = set(), set()
    for method, path in changing_routes(box):
        verb = path.rsplit("/", 1)[1]
        for call in calls(things, box.admin):
            made = things.fill(path, box.admin, verb=verb)
            answer = box.admin.request(method, made, **call)
            entries = box.admin.get("/audit", params={"limit": 1}).json()["data"]
            has_entry = bool(entries) and entries[0]["request_id"] == answer.headers["x-request-id"]
            assert answer.is_success or not has_entry, (method, path, answer.text)
            if has_entry:
                assert entries[0]["key_name"] == "admin"
                break
            if answer.is_success:
                left_none.add(f"{method} {path}")
            elif answer.status_code >= 500:
                pytest.fail(f"{method} {path} {call}: {answer.text}")
        else:
            never_taken.add(f"{method} {path}")

    assert never_taken <= CHANGES_NOTHING, f"without an entry, of {left_none}"
