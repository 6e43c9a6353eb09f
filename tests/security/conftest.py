"""The attacks of docs/security.md, one named test each (`test_a7_…`), against the real server, worker and trainer."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
