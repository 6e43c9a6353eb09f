"""The real, unmodified openai packages against a real server on loopback: the oldest one that is promised, and the newest.

Each version lives in an environment of its own, which `make setup` makes. A test runs a script of `scripts/` with that
interpreter; the script asserts, sync and async alike, and its exit is the test's. To import openai takes a second, so
there is one script a surface.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server.conftest import (  # noqa: F401  # fixtures
    ADMIN,
    Box,
    box,
    database,
    make_box,
    postgres,
    stopping,
)

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"

# Runs a script against a server, with more arguments and another key where they are given; its standard output.
RunScript = Callable[..., str]


@pytest.fixture(params=["1", "3"], ids=["openai1", "openai3"])
def openai_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter that has this major version of the openai package."""
    python = ROOT / f".venv-openai-{request.param}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {python.parent.parent.name}, which `make setup` makes")
    return python


@pytest.fixture
def run_script(openai_python: Path) -> RunScript:
    """`run_script(box, "files.py", *arguments)`: run a script of scripts/ with the openai package; it must exit with 0."""

    def run(at: Box | str, script: str, *arguments: str, key: str = ADMIN) -> str:
        url = at if isinstance(at, str) else at.url
        done = subprocess.run(
            [openai_python, SCRIPTS / script, *arguments],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")},
                "OPENAI_BASE_URL": f"{url}/v1",
                "OPENAI_API_KEY": key,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout

    return run
