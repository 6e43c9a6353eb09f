"""Settings: flags before environment before defaults; every mistake named; all of them documented."""

import re
from pathlib import Path

import pytest

from sftd_server.settings import Settings, SettingsError, read_settings, variable

DOC = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_every_setting_is_documented_with_its_variable_and_meaning() -> None:
    section = DOC.split("## The server")[1].split("\n## ")[0]
    documented = {
        name: (env, meaning)
        for name, env, meaning in re.findall(
            r"^\| `(\w+)` \| `(\w+)` \| [^|]+ \| (.+) \|$", section, re.MULTILINE
        )
    }

    assert documented == {
        name: (variable(name), field.description) for name, field in Settings.model_fields.items()
    }


def test_flags_come_before_environment_before_defaults(tmp_path: Path) -> None:
    environment = {
        "SFTD_PORT": "9000",
        "SFTD_HOST": "::1",
        "SFTD_MODEL_ROOTS": "/a:/b",
        "SFTD_LEASE_SECONDS": "",
    }

    settings = read_settings(environment, data=tmp_path, port=9001, host=None)

    assert (settings.port, settings.host, settings.lease_seconds) == (9001, "::1", 30)
    assert settings.model_roots == (Path("/a"), Path("/b"))
    assert settings.database_url == f"sqlite:///{tmp_path}/sftd.db"
    assert read_settings({}, data=tmp_path).model_roots == (tmp_path / "models",)


def test_every_mistake_is_named_by_its_variable_and_no_secret_is_shown() -> None:
    environment = {"SFTD_PORT": "x", "SFTD_DATABASE_URL": "mysql://u:secret@h/d", "SFTD_ADMIN_KEY": "short 1"}

    with pytest.raises(SettingsError) as caught:
        read_settings(environment)

    lines = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["SFTD_PORT", "SFTD_DATABASE_URL", "SFTD_ADMIN_KEY"]
    assert "only SQLite" in lines[1]
    assert "short 1" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["sqlite:///", "sqlite://host/x", "postgresql://h", "nonsense", "postgresql://h:x/d"]
)
def test_an_address_that_is_no_database_is_refused_with_what_to_give(url: str) -> None:
    with pytest.raises(SettingsError, match=r"give (sqlite|postgresql)://"):
        read_settings({"SFTD_DATABASE_URL": url})
