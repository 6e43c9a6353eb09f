"""Address and key: arguments, then the environment, then what login kept, then the last server started here."""

import json
import stat
from pathlib import Path

import pytest

from sftd.config import Config, config_path, forget_config, read_config, write_config
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


def test_what_login_kept_comes_between_the_environment_and_the_note(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(Config(url="https://box.example", key="kept"))
    address = find_address()
    assert (address.url, address.key) == ("https://box.example", "kept")
    # Its key goes to its own server only; the note's still to the note's.
    assert find_address("https://box.example/").key == "kept"
    assert find_address("http://127.0.0.1:8000").key == "key-of-the-server"
    with pytest.raises(ConfigurationError, match="No key"):
        find_address("http://evil.example:8000")

    monkeypatch.setenv("SFTD_API_KEY", "api")
    assert (find_address().url, find_address().key) == ("https://box.example", "api")


def test_the_config_is_private_and_reads_back(tmp_path: Path) -> None:
    kept = Config(url='https://b"ö\\x.example', key="k")
    path = write_config(kept)

    assert (path, stat.S_IMODE(path.stat().st_mode)) == (tmp_path / "config/sftd/config.toml", 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_config() == kept
    assert (forget_config(), forget_config(), read_config()) == (True, False, Config())


def test_a_config_that_others_may_read_is_refused() -> None:
    path = write_config(Config(url="https://box.example", key="k"))
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        find_address()
    assert find_address("http://x:1", "given").key == "given"  # it is not needed

    path.write_text('url = "https://box.example"\n')
    assert read_config().url == "https://box.example"  # no secret in it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"url = ", "not TOML"),
        (b"\xff", "not TOML"),
        (b"adress = 'x'", "'adress' is wrong"),
        (b"url = 3", "'url' is wrong"),
        (b"key = 'k'", "without the url"),
        (b"#" * 70_000, "larger"),
    ],
)
def test_a_config_that_is_wrong_says_so(content: bytes, words: str) -> None:
    path = config_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(ConfigurationError, match=words) as raised:
        find_address()

    assert str(path) in str(raised.value)


def test_a_relative_config_folder_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in ("relative", ""):
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
        assert config_path() == tmp_path / ".config/sftd/config.toml"
