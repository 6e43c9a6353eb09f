"""The light install: the client and the command line in an empty environment, without torch and without a server."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.conftest import ROOT


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip install .` in an empty environment; its bin folder. Needs the package index."""
    folder = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [str(folder / "bin" / "pip"), "install", "-q", str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_the_light_install_brings_no_torch_and_no_fastapi(light: Path) -> None:
    listed = subprocess.run(
        [str(light / "pip"), "list", "--format=freeze"], capture_output=True, text=True, check=True
    )

    names = {line.split("==")[0].lower() for line in listed.stdout.splitlines()}
    assert names.isdisjoint({"torch", "fastapi", "sqlalchemy", "transformers", "uvicorn"})
    assert "sftd" in names


def test_the_light_install_checks_a_file_and_explains_what_up_needs(light: Path, tmp_path: Path) -> None:
    checked = subprocess.run(
        [str(light / "sftd"), "check", str(ROOT / "examples" / "q_basics.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    up = subprocess.run(
        [str(light / "sftd"), "up", "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert checked.returncode == 0, checked.stderr
    assert "256" in checked.stdout
    assert up.returncode != 0
    assert "sftd[all]" in up.stderr
    assert "Traceback" not in up.stderr
