"""The frame of these tests: the packages are the versions that they are said to be, and reach the server."""

from pathlib import Path


def test_the_package_reaches_the_server_and_names_its_errors(box, run_script, openai_python: Path) -> None:
    said = run_script(box, "frame.py")

    assert said.split(".")[0] == openai_python.parents[1].name.rsplit("-", 1)[-1]
