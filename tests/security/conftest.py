"""The attacks of docs/security.md, one named test each (`test_a7_…`), against the real server, worker and trainer."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import (  # noqa: F401  # fixtures
    ADMIN,
    Box,
    assert_error,
    box,
    database,
    make_box,
    postgres,
    shared_box,
    start_box,
    stopping,
)

FILLED = {
    "job_id": "job_nope",
    "file_id": "file_nope",
    "upload_id": "upload_nope",
    "key_id": "key_nope",
    "step": "1",
    "name": "x",
}


def flat_routes(routes: Any, prefix: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    """(path, methods) of every route, through included routers and mounts: what is added later is there by itself."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from flat_routes(router.routes, prefix)
        elif getattr(route, "routes", None):  # a mount of routes, or of another app
            yield f"{prefix}{route.path}/x", frozenset({"GET"})
            yield from flat_routes(route.routes, prefix + route.path)
        else:
            yield prefix + route.path, frozenset(getattr(route, "methods", None) or {"GET"})


def filled(path: str, values: dict[str, str] | None = None) -> str:
    """A path with its parameters filled in; `1` where a parameter has no value of its own."""
    known = {**FILLED, **(values or {})}
    return re.sub(r"{(\w+)(?::\w+)?}", lambda found: known.get(found[1], "1"), path)


@pytest.fixture
def every_route() -> Callable[[Box], list[tuple[str, str]]]:
    """(method, path pattern) of every route of an app."""

    def walk(at: Box) -> list[tuple[str, str]]:
        found = [(method, path) for path, methods in flat_routes(at.app.routes) for method in sorted(methods)]
        assert len(found) > 30
        return found

    return walk


class Things:
    """Makes what the paths of routes name: `{job_id}` behind `jobs` is a job, and so it is behind `/v1/fine_tuning/jobs`.

    A route that names something new fails the tests that walk the routes until this class can make it.
    """

    def __init__(self, at: Box) -> None:
        self._box = at
        self.num = 0
        self.part_ids: list[str] = []  # of the newest upload

    def fill(self, path: str, owner: httpx.Client, *, verb: str = "") -> str:
        """The path with objects of this owner in it, in a state in which the verb means something."""
        parts = path.split("/")
        for i, part in enumerate(parts):
            if part.startswith("{"):
                parts[i] = self._make(parts[i - 1], owner, verb)
        return "/".join(parts)

    def job(self, owner: httpx.Client, verb: str = "") -> str:
        self.num += 1
        job_id = str(owner.post("/jobs", json=self.spec(owner)).json()["id"])
        if verb in ("pin", "unpin", "models"):
            owner.post(f"/jobs/{job_id}/move", json={"position": "first"})
            lease = self._box.claim(f"of-{self.num}")
            lease.start()
            lease.checkpoint(1)
            lease.finish()
            return lease.job_id
        for word in {"resume": ["pause"], "retry": ["cancel"]}.get(verb, ()):
            owner.post(f"/jobs/{job_id}/{word}")
        return job_id

    def file(self, owner: httpx.Client) -> str:
        return str(owner.post("/files", files={"file": b'{"text": "a"}'}).json()["id"])

    def spec(self, owner: httpx.Client) -> dict[str, Any]:
        if "_of" not in self.__dict__:
            self._of = self.file(owner)
        return {"base_model": "org/m", "training_file": self._of}

    def _make(self, kind: str, owner: httpx.Client, verb: str) -> str:
        if kind == "jobs":
            return self.job(owner, verb)
        if kind == "files":
            return self.file(owner)
        if kind == "keys":
            self.num += 1
            return str(self._box.admin.post("/keys", json={"name": f"thing {self.num}"}).json()["id"])
        if kind == "workers":
            self._box.register("w-thing")
            return "w-thing"
        if kind == "checkpoints":
            return "1"
        if kind == "uploads":
            asked = {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": 13, "mime_type": "text/jsonl"}
            upload_id = str(owner.post("/v1/uploads", json=asked).json()["id"])
            part = owner.post(f"/v1/uploads/{upload_id}/parts", files={"data": b'{"text": "a"}'})
            self.part_ids[:] = [part.json()["id"]] if verb == "complete" else []
            return upload_id
        if kind == "models":
            job_id = self.job(owner, "models")
            return str(owner.get(f"/v1/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"])
        pytest.fail(f"a route names one of {kind}: let Things make one")


@pytest.fixture
def changing_routes(
    every_route: Callable[[Box], list[tuple[str, str]]],
) -> Callable[[Box], list[tuple[str, str]]]:
    """(method, path pattern) of every route of users that can change something."""

    def walk(at: Box) -> list[tuple[str, str]]:
        return [
            (method, path)
            for method, path in every_route(at)
            if method not in ("GET", "HEAD", "OPTIONS") and not path.startswith("/worker/")
        ]

    return walk


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
