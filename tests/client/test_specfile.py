"""Specs as YAML: what people write is what the server gets."""

from pathlib import Path
from typing import Any

import pytest

from sftd.errors import ConfigurationError
from sftd.specfile import read_spec, read_yaml, set_field, upload_files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("2.0e-5", 2e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-7", -7),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", 10),
        ("2026-11-22", "2026-11-22"),
        ("null", None),
        ("", None),
        ("'2e-5'", "2e-5"),
        ("e5", "e5"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &x [1]\nb: *x", r"line 2, column 4: aliases"),
        ("a: !!python/object/apply:os.system ['true']", "line 1"),
        ("a: 1\na: 2", "a stands here twice"),
        ("[" * 5000, "nested too deeply"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "line 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)

    with pytest.raises(ConfigurationError, match=complaint):
        read_spec(path)


def test_set_changes_fields_and_fields_in_fields() -> None:
    spec: dict[str, Any] = {"learning_rate": 1.0, "lora": None}

    for assignment in (
        "learning_rate=2e-5",
        "lora.rank=8",
        "metadata.team=q",
        "name=a=b",
        "lora.target_modules=[a, b]",
    ):
        set_field(spec, assignment)

    assert spec == {
        "learning_rate": 2e-5,
        "lora": {"rank": 8, "target_modules": ["a", "b"]},
        "metadata": {"team": "q"},
        "name": "a=b",
    }


@pytest.mark.parametrize("assignment", ["x", "=1", "a..b=1", "x.y=1", "y=[1"])
def test_a_set_that_is_none(assignment: str) -> None:
    with pytest.raises(ConfigurationError, match="--set"):
        set_field({"x": 1}, assignment)


def test_local_files_are_uploaded_and_ids_are_left(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    spec = {"training_file": "rows.jsonl", "validation_file": "file_1"}

    upload_files(spec, folder=tmp_path, upload=lambda path: f"uploaded {path.name}")

    assert spec == {"training_file": "uploaded rows.jsonl", "validation_file": "file_1"}


def test_a_file_that_is_not_there_is_said_before_anything_is_posted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl is neither"):
        upload_files({"training_file": "rows.jsonl"}, folder=tmp_path, upload=lambda path: "")


@pytest.mark.parametrize("text", ["0012345", "1e5", "true", "2026-11-22"])
def test_what_the_spec_holds_as_text_stays_text(text: str) -> None:
    spec: dict[str, Any] = {}

    for name in ("metadata.commit", "name", "wandb.project"):
        set_field(spec, f"{name}={text}")

    assert spec == {"metadata": {"commit": text}, "name": text, "wandb": {"project": text}}
