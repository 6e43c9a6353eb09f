"""Settings: flags before environment before defaults, and every mistake named."""

from pathlib import Path

import pytest

from sftd_worker.agent import main
from sftd_worker.settings import SettingsError, WorkerSettings, read_settings, settable_fields, variable

ROOT = Path(__file__).parents[2]


def test_flags_come_before_the_environment() -> None:
    environment = {
        "SFTD_SERVER_URL": "http://a:1",
        "SFTD_GPUS": "2",
        "HF_HUB_OFFLINE": "1",
        "SFTD_LABELS": "a=b, c=d",
    }

    settings = read_settings(environment, server_url="http://b:2", gpus=None)

    assert (settings.server_url, settings.gpus, settings.offline) == ("http://b:2", 2, True)
    assert settings.labels == {"a": "b", "c": "d"}


def test_every_mistake_is_named_by_its_variable() -> None:
    with pytest.raises(SettingsError) as error:
        read_settings({"SFTD_GPUS": "many", "SFTD_DEVICE": "tpu", "SFTD_WORKER_NAME": "a b"})

    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "SFTD_WORKER_NAME",
        "SFTD_DEVICE",
        "SFTD_GPUS",
    ]


def test_models_lie_in_the_data_folder_unless_said_otherwise(tmp_path: Path) -> None:
    assert read_settings({}, data=tmp_path).model_roots == (tmp_path / "models",)
    assert read_settings({"SFTD_MODEL_ROOTS": "/a:/b"}).model_roots == (Path("/a"), Path("/b"))


def test_the_key_comes_from_the_data_folder_and_is_never_printed(tmp_path: Path) -> None:
    (tmp_path / "worker.key").write_text("sftd-secret\n")

    assert read_settings({}, data=tmp_path).read_key() == "sftd-secret"
    assert "sftd-secret" not in repr(read_settings({"SFTD_WORKER_KEY": "sftd-secret"}))


def test_without_a_key_the_worker_says_what_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--data", str(tmp_path), "--device", "cpu"])

    assert exit_.value.code == 2
    assert "SFTD_WORKER_KEY" in capsys.readouterr().err


def test_every_setting_is_described() -> None:
    for name in settable_fields():
        assert WorkerSettings.model_fields[name].description, name
        assert variable(name).isupper()


def test_every_setting_stands_in_the_docs() -> None:
    listed = (ROOT / "docs/operations.md").read_text()

    for name in settable_fields():
        row = f"| `{name}` | `{variable(name)}` |"
        assert row in listed, name
        assert f"| {WorkerSettings.model_fields[name].description} |" in listed, name
