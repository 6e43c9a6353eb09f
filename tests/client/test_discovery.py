"""Address and key: arguments, then the environment, then the last server started here."""

import json
import stat
from pathlib import Path

import pytest

from sftd.discovery import find_address, find_server, remember_server
from sftd.errors import ConfigurationError


@pytest.fixture
def note(tmp_path: Path) -> Path:
    (tmp_path / "admin.key").write_text("key-of-the-server\n")
    remember_server(url="http://127.0.0.1:8000", key_file=tmp_path / "admin.key")
    return tmp_path / "state/sftd/server.json"


def test_the_last_server_here_is_found_with_its_key(note: Path) -> None:
    address = find_address()

    assert (address.url, address.key) == ("http://127.0.0.1:8000", "key-of-the-server")


def test_the_note_is_private_and_holds_no_key(note: Path) -> None:
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert "key-of-the-server" not in note.read_text()
    assert set(json.loads(note.read_text())) == {"url", "key_file"}


def test_the_environment_comes_before_the_note(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_ADMIN_KEY", "admin")
    assert find_address().key == "admin"
    monkeypatch.setenv("SFTD_API_KEY", "api")
    monkeypatch.setenv("SFTD_URL", "http://other:1")
    assert find_address().key == "api"
    assert find_address("http://third:1", "given").url == "http://third:1"


def test_the_key_of_the_server_here_goes_nowhere_else(note: Path) -> None:
    assert find_address("http://localhost:8000").key == "key-of-the-server"
    with pytest.raises(ConfigurationError, match="SFTD_API_KEY"):
        find_address("http://evil.example:8000")


def test_without_anything_it_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="SFTD_URL"):
        find_address()


def test_a_spoilt_note_counts_as_none(note: Path) -> None:
    for text in ("", "[]", '{"url": 1}', "\x00"):
        note.write_text(text)
        assert find_server() is None


def test_a_folder_that_cannot_be_written_does_not_stop_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    remember_server(url="http://x", key_file=tmp_path / "k")

    assert "could not note" in caplog.text
