"""The artifact store: blobs under their hash at a URL, `s3://bucket/prefix` or `file:///folder`, through fsspec.

A blob is there whole or not at all: it is hashed while it is sent, and becomes visible only if the hash is right. All
calls block; run them in a thread. `mirror` decides what goes there, `shelf` what is read from there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from sftd_server.disk import fsync
from sftd_server.settings import Settings, SettingsError

PIECE = 1024 * 1024
PART_BYTES = 16 * 1024 * 1024  # of a multi-part upload; a smaller blob is one call
MOST_PARTS = 9_000  # S3 takes 10,000
MARKER = "installation.id"


class StoreError(Exception):
    """The store did not do what was asked; worth another try."""


class WrongContent(Exception):
    """What was read is not what is on record; trying again would not help."""


class Readable(Protocol):
    """What a blob is read from."""

    def read(self, size: int, /) -> bytes: ...


class Store:
    """Blobs and small objects below one prefix."""

    def __init__(
        self, filesystem: Any, root: str, *, is_local: bool
    ) -> None:  # filesystem: fsspec's, untyped
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._is_local = is_local

    def claim(self, installation_id: str) -> None:
        """Make sure that no other installation keeps its blobs here: it would remove ours. Raises WrongContent."""
        with _store_errors():
            key = f"{self._root}/{MARKER}"
            if self._fs.exists(key):
                found = self._fs.cat_file(key).decode("utf-8", "replace").strip()
                if found != installation_id:
                    raise WrongContent(
                        f"{self._root} belongs to installation {found}, this is {installation_id}; set"
                        " SFTD_ARTIFACTS_URL to a prefix of its own."
                    )
                return
        self.put_object(MARKER, installation_id.encode())

    def put_blob(self, content: Readable, *, sha256: str, size: int) -> None:
        """Send a blob; it is read once. Raises WrongContent if it is not what its name says: then nothing is kept."""
        with _store_errors():
            if size <= PART_BYTES or self._is_local:
                self._put_at_once(content, sha256, size)
            else:
                self._put_in_parts(content, sha256, size)

    def put_object(self, name: str, content: bytes) -> None:
        """Write something small under a name of its own."""
        with _store_errors():
            self._write(f"{self._root}/{name}", iter([content]))

    def size(self, sha256: str) -> int | None:
        """How large a blob is there; None if it is not there."""
        with _store_errors():
            try:
                self._fs.invalidate_cache()
                return int(self._fs.info(self._key(sha256))["size"])
            except FileNotFoundError:
                return None

    def pieces(self, sha256: str, *, start: int = 0, size: int) -> Iterator[bytes]:
        """A blob from a byte on. Read from its beginning it is hashed, and the last piece held back until that is right.

        Raises WrongContent, StoreError.
        """
        digest = hashlib.sha256()
        at, held = start, b""
        while at < size:
            with _store_errors():
                piece = self._fs.cat_file(self._key(sha256), start=at, end=min(size, at + PIECE * 8))
            if not piece:
                raise StoreError(f"blob {sha256} ends at byte {at:,} of {size:,} in the store")
            digest.update(piece)
            at += len(piece)
            if held:
                yield held
            held = piece
        if start == 0 and digest.hexdigest() != sha256:
            raise WrongContent(f"blob {sha256} has another hash in the store")
        if held:
            yield held

    def remove_blob(self, sha256: str) -> None:
        """Remove a blob. One that is gone already is no error."""
        self._remove(self._key(sha256), recursive=False)

    def remove_objects(self, name: str) -> None:
        """Remove an object, or everything below a name."""
        self._remove(f"{self._root}/{name}", recursive=True)

    def names_below(self, name: str) -> list[str]:
        """The last parts of what lies directly below a name."""
        with _store_errors():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(f"{self._root}/{name}", detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def abort_old_uploads(self, *, older_than: timedelta) -> int:
        """Give up multi-part uploads that a killed server left: their parts take room that no listing shows."""
        if self._is_local or not hasattr(self._fs, "call_s3"):
            return 0
        bucket, _, prefix = self._root.partition("/")
        num_aborted = 0
        with _store_errors():
            answer = self._fs.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/blobs/".lstrip("/")
            )
            for upload in answer.get("Uploads", []):
                if datetime.now(UTC) - upload["Initiated"] > older_than:
                    key, number = upload["Key"], upload["UploadId"]
                    self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=number)
                    num_aborted += 1
        return num_aborted

    # ---------------------------------------------------------------- how

    def _key(self, sha256: str) -> str:
        return f"{self._root}/blobs/sha256/{sha256[:2]}/{sha256}"

    def _put_at_once(self, content: Readable, sha256: str, size: int) -> None:
        if self._is_local:
            self._write(self._key(sha256), _checked(content, sha256, size))
        else:
            self._fs.pipe_file(self._key(sha256), b"".join(_checked(content, sha256, size)))

    def _put_in_parts(self, content: Readable, sha256: str, size: int) -> None:
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        # Without `autocommit` nothing is visible before commit(), whatever goes wrong on the way.
        upload = self._fs.open(self._key(sha256), "wb", block_size=part_bytes, autocommit=False)
        try:
            for piece in _checked(content, sha256, size):
                upload.write(piece)
            upload.close()
            upload.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # what is left is given up by age
                upload.discard()
            upload.closed = True  # else its finaliser would send what is left
            raise

    def _write(self, key: str, pieces: Iterator[bytes]) -> None:
        if not self._is_local:
            self._fs.pipe_file(key, b"".join(pieces))
            return
        path = Path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)

    def _remove(self, key: str, *, recursive: bool) -> None:
        with _store_errors():
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(key, recursive=recursive)


def open_store(settings: Settings) -> Store | None:
    """The store that the settings name; None where there is none. Nothing is sent. Raises SettingsError."""
    url = settings.artifacts_url
    if not url:
        return None
    options = json.loads(settings.artifacts_options.get_secret_value() or "{}")
    protocol = url.split("://", 1)[0]
    try:
        import fsspec  # an installation without a store need not have it
    except ImportError:
        raise SettingsError("SFTD_ARTIFACTS_URL: fsspec is not installed; pip install 'sftd[s3]'") from None
    try:
        filesystem = fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except ImportError as error:
        raise SettingsError(f"SFTD_ARTIFACTS_URL: {error}; pip install 'sftd[s3]'") from None
    except (TypeError, ValueError) as error:
        raise SettingsError(f"SFTD_ARTIFACTS_OPTIONS: {error}") from None
    return Store(filesystem, filesystem._strip_protocol(url), is_local=protocol == "file")


def _checked(content: Readable, sha256: str, size: int) -> Iterator[bytes]:
    """The content in pieces. Raises WrongContent at its end, before it could be taken for whole."""
    digest = hashlib.sha256()
    num_bytes = 0
    while piece := content.read(PIECE):
        digest.update(piece)
        num_bytes += len(piece)
        yield piece
    if num_bytes != size or digest.hexdigest() != sha256:
        raise WrongContent(f"what should be blob {sha256} of {size:,} bytes has another hash or size")


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Whatever fsspec and the libraries below it raise, as one class: they have many."""
    try:
        yield
    except (WrongContent, StoreError):
        raise
    except Exception as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error
