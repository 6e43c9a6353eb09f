"""A23: nothing that is installed, asked for or pinned is older than the version in which a known hole was closed.

What has come to light since is asked of the network by `make audit`, which is not part of the tests.
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

# Where the hole concerns what this project does with the package.
CLOSED_IN = {
    "torch": "2.10",  # CVE-2026-24747: weights_only=True was no boundary
    "starlette": "0.49.1",  # CVE-2025-62727: a Range header kept it busy
    "h11": "0.16",  # CVE-2025-43859: chunked bodies were misread
    "jinja2": "3.1.6",  # CVE-2025-27516: a way out of the sandbox that chat templates run in
    "python-multipart": "0.0.22",
    "transformers": "5.0",
    "pyyaml": "6.0",
}


def wanted() -> dict[str, Requirement]:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return {found.name.lower(): found for found in map(Requirement, lines)}


def pinned() -> dict[str, Version]:
    lines = (Path(__file__).parents[2] / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", CLOSED_IN)
def test_a23_no_version_with_a_known_hole_is_installed_pinned_or_let_in(name: str) -> None:
    closed_in = Version(CLOSED_IN[name])

    assert Version(metadata.version(name)) >= closed_in
    assert pinned()[name] >= closed_in
    lowest = min(Version(spec.version) for spec in wanted()[name].specifier if spec.operator == ">=")
    assert lowest >= closed_in, f"pyproject.toml lets {name} {lowest} in"


def test_a23_everything_that_runs_is_pinned() -> None:
    missing = [name for name in wanted() if name != "sftd" and name.replace("_", "-") not in pinned()]

    assert missing == []


def test_a23_make_audit_asks_about_exactly_what_is_pinned(repository: Path) -> None:
    recipe = (repository / "Makefile").read_text().split("\naudit:")[1].split("\n\n")[0]

    assert "--requirement requirements.lock" in recipe
    assert "pip-audit" in recipe
    assert sys.version_info >= (3, 11)
