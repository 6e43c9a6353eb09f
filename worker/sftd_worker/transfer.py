"""How files come to a worker and leave it: through the data folder that it shares with the server, or through the server.

`SharedFolder` asks the server for nothing but what the folder has lost. `ThroughServer` fetches what a job reads into a
data folder of the worker's own, under the same names, and sends what it makes in pieces: both go on where they broke
off. An attempt has one of the two; every file is verified by its hash.
"""

import contextlib
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from weakref import WeakValueDictionary

from pydantic import BaseModel

from sftd._transport import Reply, Transport
from sftd.errors import ApiError, ConnectionFailed, SequenceGap
from sftd.protocol import (
    PIECE_BYTES,
    TOKEN_HEADER,
    CheckpointRef,
    CheckpointReport,
    Finish,
    FolderFiles,
    InputFile,
    Release,
    Restore,
    Restored,
)
from sftd.schemas import FailureReason, Want
from sftd_worker.disk import is_full, naming
from sftd_worker.files import MANIFEST, Check, PrepareFailed
from sftd_worker.lease import LeaseKeeper
from sftd_worker.outbox import Fenced, Outbox, Refused
from sftd_worker.settings import WorkerSettings
from sftd_worker.tidy import touch

log = logging.getLogger("sftd.worker")

SILENCE_SECONDS = 60.0
SLOWEST_HASH = 50e6  # bytes a second: the last piece is answered when the server has hashed the whole
MOST_TRIES = 5  # of what should have worked at once: a wrong hash, a blob that was swept
KEPT_CHECKPOINTS = 2  # of those that the server has, on this machine
_FOLDER = re.compile(r"jobs/([A-Za-z0-9._:-]+)/(?:checkpoints/)?([A-Za-z0-9._-]+)")

OnRefused = Callable[[str], None]
Send = Callable[[str, BaseModel], bytes]


class Transfer(Protocol):
    """What an attempt asks for. `check` is called between pieces and raises when the attempt should not go on."""

    def bring_input(self, file: InputFile, check: Check) -> None:
        """Have a data file at its path below the data folder. Raises PrepareFailed, OSError where there is no room."""

    def bring_base(self, path: str, check: Check) -> None:
        """Have another job's result or checkpoint at its path below the data folder. Raises PrepareFailed."""

    def bring_checkpoint(self, ref: CheckpointRef, check: Check) -> bool:
        """Have a checkpoint in its place again, which is missing or damaged. False: there is none to be had."""

    def report(self, report: CheckpointReport, *, on_refused: OnRefused) -> None:
        """Put a checkpoint on record, now or soon."""

    def drain(self) -> None:
        """Wait until all reported checkpoints are on record. Raises Fenced, and what else went wrong."""

    def say_last(self, call: Finish | Release, send: Send) -> None:
        """Make the attempt's last call. Raises what `send` raises."""


def transfer_of(
    settings: WorkerSettings, transport: Transport, outbox: Outbox, keeper: LeaseKeeper
) -> Transfer:
    """The way that this worker has registered with."""
    if settings.own_data:
        return ThroughServer(settings.data, transport, outbox, keeper)
    return SharedFolder(outbox, transport, data=settings.data, keeper=keeper)


class _Target:
    """A file or folder that attempts of this process fetch, one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class SharedFolder:
    """Worker and server see the same files."""

    def __init__(self, outbox: Outbox, transport: Transport, *, data: Path, keeper: LeaseKeeper) -> None:
        self._outbox = outbox
        self._transport = transport
        self._data = data
        self._keeper = keeper

    def bring_input(self, file: InputFile, check: Check) -> None:
        if not (self._data / file.path).exists():
            self._restore(check, kind="inputs", name=file.sha256)

    def bring_base(self, path: str, check: Check) -> None:
        found = _FOLDER.fullmatch(path)
        if found is None:  # a model of this machine, or of the hub
            return
        try:
            _, hashes = _ask_files(
                self._outbox, self._transport, self._keeper, _kind(path), found[2], found[1], check
            )
        except Refused as refused:
            if (self._data / path).is_dir():  # one that was made before results were recorded file by file
                return
            raise PrepareFailed(
                FailureReason.MODEL_NOT_FOUND,
                f"{path} is gone: {refused} Train it again or name another model.",
            ) from refused

        def is_whole() -> bool:
            return all(_is(self._data / path / name, sha256, check) for name, sha256 in hashes.items())

        if not is_whole():
            self._restore(check, kind=_kind(path), name=found[2], of=found[1])
            if not is_whole():
                raise PrepareFailed(
                    FailureReason.WORKER_ERROR,
                    f"{path} is not what job {found[1]} made: files are missing or changed. Bring them back, or train it again.",
                )

    def bring_checkpoint(self, ref: CheckpointRef, check: Check) -> bool:
        return self._restore(check, kind="checkpoints", name=ref.name, of=_writer(ref))

    def report(self, report: CheckpointReport, *, on_refused: OnRefused) -> None:
        try:
            self._outbox.send("checkpoints", report)
        except Refused as refused:
            on_refused(str(refused))

    def drain(self) -> None:
        return

    def say_last(self, call: Finish | Release, send: Send) -> None:
        send("finish" if isinstance(call, Finish) else "release", call)

    def _restore(self, check: Check, **what: Any) -> bool:  # the fields of Restore
        """Ask until the server has brought it back. False: it has no copy; the caller says what is missing."""
        message = Restore(attempt=self._keeper.lease.attempt, **what)
        while True:
            try:
                answer = self._outbox.send("restore", message, given_up=_checking(check))
            except Refused:
                return False
            except Fenced:
                check()
                raise
            if Restored.model_validate_json(answer).ready:
                return True
            check()


_targets: WeakValueDictionary[Path, _Target] = WeakValueDictionary()
_targets_lock = threading.Lock()


@contextlib.contextmanager
def _alone(target: Path, check: Check) -> Iterator[None]:
    """Attempts side by side that want the same file or folder: one fetches it, the others find it there."""
    with _targets_lock:
        mine = _targets.setdefault(target.absolute(), _Target())
    while not mine.lock.acquire(timeout=0.2):
        check()
    try:
        yield
    finally:
        mine.lock.release()


class ThroughServer:
    """The worker's data folder is its own. Checkpoints are sent from a thread, so that metrics do not wait for them."""

    def __init__(self, data: Path, transport: Transport, outbox: Outbox, keeper: LeaseKeeper) -> None:
        self._data = data
        self._transport = transport
        self._outbox = outbox
        self._keeper = keeper
        self._lease = keeper.lease
        self._headers = {TOKEN_HEADER: keeper.lease.token}
        self._on_record = [ref.name for ref in reversed(keeper.lease.checkpoints) if ref.folder is None]
        self._queue: queue.SimpleQueue[tuple[CheckpointReport, OnRefused] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # ------------------------------------------------------------ fetching

    def bring_input(self, file: InputFile, check: Check) -> None:
        path = f"/worker/jobs/{self._lease.job_id}/inputs/{file.sha256}"
        with self._preparing(file.filename, check):
            self._bring(path, {}, self._below(file.path), file.sha256, check)
        touch(self._below(file.path))

    def bring_base(self, path: str, check: Check) -> None:
        found = _FOLDER.fullmatch(path)
        if found is None:  # a model of this machine, or of the hub
            return
        with self._preparing(path, check):
            self._bring_folder(_kind(path), found[2], found[1], self._below(path), check)
        touch(self._below(f"jobs/{found[1]}"))

    def bring_checkpoint(self, ref: CheckpointRef, check: Check) -> bool:
        folder = self._below(f"{ref.folder or self._lease.folder}/checkpoints/{ref.name}")
        try:
            with self._preparing(ref.name, check):
                self._bring_folder("checkpoints", ref.name, _writer(ref), folder, check)
        except PrepareFailed as failed:
            if not isinstance(failed.__cause__, Refused):
                raise  # of this machine's own: it says nothing about the checkpoint
            log.warning("%s: %s", self._lease.job_id, failed)
            return False
        return True

    def _bring_folder(self, kind: str, name: str, of: str | None, folder: Path, check: Check) -> None:
        """Fetch what is not there yet beside the folder, then put it in its place by one rename."""
        url, hashes = _ask_files(self._outbox, self._transport, self._keeper, kind, name, of, check)
        with _alone(folder, check):
            if not all(_is(folder / path, sha256, check) for path, sha256 in hashes.items()):
                self._fill(folder, hashes, url, {"of": of}, check)

    def _fill(
        self, folder: Path, hashes: dict[str, str], url: str, params: Mapping[str, str | None], check: Check
    ) -> None:
        stage = folder.with_name(f".fetch-{folder.name}")
        for path, sha256 in hashes.items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            if not (stage / path).exists() and _is(folder / path, sha256, check):
                os.link(folder / path, stage / path)
            self._bring(f"{url}/{quote(path)}", params, stage / path, sha256, check)
        trash = folder.with_name(f".trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        if folder.exists():
            folder.rename(trash)
        stage.rename(folder)
        shutil.rmtree(trash, ignore_errors=True)

    def _bring(
        self, url: str, params: Mapping[str, str | None], target: Path, sha256: str, check: Check
    ) -> None:
        """Have a file of this hash at its place. Raises Refused, Fenced, OSError, and what `check` raises."""
        with _alone(target, check):
            if not _is(target, sha256, check):
                self._bring_anew(url, params, target, sha256, check)

    def _bring_anew(
        self, url: str, params: Mapping[str, str | None], target: Path, sha256: str, check: Check
    ) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".part-{sha256}")
        for _ in range(MOST_TRIES):
            with contextlib.suppress(SequenceGap):  # the part is as long as the file, or longer
                self._outbox.keep_trying(
                    "file", lambda: self._fetch(url, params, part, check), given_up=_checking(check)
                )
            if _is(part, sha256, check):
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.rename(target)
                return
            part.unlink(missing_ok=True)
        raise Refused(f"the server sent other bytes than those of hash {sha256}, {MOST_TRIES} times")

    def _fetch(self, url: str, params: Mapping[str, str | None], part: Path, check: Check) -> None:
        """Fetch the rest of a file. What has come stays when the connection breaks."""
        with naming(part), part.open("ab") as file:
            headers = dict(self._headers)
            if start := file.tell():
                headers["Range"] = f"bytes={start}-"
            with self._transport.stream(
                url,
                params={"attempt": self._lease.attempt, **params},
                headers=headers,
                silence_seconds=SILENCE_SECONDS,
            ) as pieces:
                for piece in pieces:
                    file.write(piece)
                    check()

    @contextlib.contextmanager
    def _preparing(self, what: str, check: Check) -> Any:  # a generator, for the decorator
        try:
            yield
        except Fenced:
            check()  # says why, as everywhere
            raise
        except Refused as refused:
            raise PrepareFailed(
                FailureReason.WORKER_ERROR, f"{what} cannot be fetched from the server: {refused}"
            ) from refused
        except OSError as error:
            if is_full(error):
                raise  # the attempt puts the job aside until there is room
            raise PrepareFailed(
                FailureReason.WORKER_ERROR, f"{what} cannot be kept on the worker: {error}"
            ) from error

    def _below(self, relative: str) -> Path:
        path = (self._data / relative).resolve()
        if not path.is_relative_to(self._data.resolve()):
            raise PrepareFailed(
                FailureReason.WORKER_ERROR, f"{relative!r} lies outside the data folder; refused."
            )
        return path

    # ------------------------------------------------------------ sending

    def report(self, report: CheckpointReport, *, on_refused: OnRefused) -> None:
        if report.corrupt:
            try:
                self._outbox.send("checkpoints", report)
            except Refused as refused:
                on_refused(str(refused))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_queued, name="uploads", daemon=True)
            self._thread.start()
        self._queue.put((report, on_refused))

    def drain(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def say_last(self, call: Finish | Release, send: Send) -> None:
        if isinstance(call, Release):
            send("release", call)
            return
        if call.state != "succeeded":
            send("finish", call)
            return
        hashes = {name: file.sha256 for name, file in call.files.items()}
        folder = self._below(self._lease.folder) / "results"
        told = call.model_copy(update={"uploaded": True})
        try:
            delivered = self._deliver("finish", told, folder, hashes, send)
        except OSError as error:
            raise Refused(f"the result cannot be read on the worker: {error}") from error
        if not delivered:
            send("finish", Finish(attempt=call.attempt, state="cancelled"))

    def _send_queued(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                if self._error is None:
                    self._send_checkpoint(*entry)
        except BaseException as error:  # the edge of a thread: `drain` raises it again
            self._error = error

    def _send_checkpoint(self, report: CheckpointReport, on_refused: OnRefused) -> None:
        folder = self._below(self._lease.folder) / "checkpoints" / report.name
        hashes = {name: file.sha256 for name, file in report.files.items()}
        hashes[MANIFEST] = report.manifest_sha256
        told = report.model_copy(update={"uploaded": True})
        try:
            if self._deliver("checkpoints", told, folder, hashes, self._outbox.send):
                self._on_record.append(report.name)
                self._trim()
        except (Refused, OSError) as error:
            on_refused(str(error))

    def _deliver(self, call: str, body: BaseModel, folder: Path, hashes: dict[str, str], send: Send) -> bool:
        """Send files, then the call that puts them in their place. False: the user cancels, and it was given up."""
        for tries in range(MOST_TRIES):
            for name, sha256 in hashes.items():
                if not self._upload(folder / name, sha256):
                    return False
            try:
                send(call, body)
                return True
            except Refused as refused:
                if not _is_missing_blob(refused) or tries == MOST_TRIES - 1:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    def _upload(self, path: Path, sha256: str) -> bool:
        """Send what the server does not have of a file. False: given up. Raises Refused, Fenced, OSError."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reply = self._put(sha256, b"", f"bytes */{size}", size)
            at, num_stuck = 0, 0
            while reply.status == 308:
                if self._keeper.want is Want.CANCEL:
                    return False
                before, at = at, _end_of_range(reply)
                num_stuck = num_stuck + 1 if at <= before and at else 0
                if num_stuck > MOST_TRIES:
                    raise Refused(f"the server does not take more than {at:,} bytes of {path.name}")
                file.seek(at)
                piece = file.read(PIECE_BYTES)
                if not piece:
                    raise Refused(f"{path.name} has become shorter than the {at:,} bytes that were sent")
                reply = self._put(sha256, piece, f"bytes {at}-{at + len(piece) - 1}/{size}", size)
        return True

    def _put(self, sha256: str, piece: bytes, content_range: str, size: int) -> Reply:
        def once() -> Reply:
            reply = self._transport.put_piece(
                f"/worker/blobs/{sha256}",
                piece,
                params={"job_id": self._lease.job_id, "attempt": self._lease.attempt},
                headers={**self._headers, "Content-Range": content_range},
                timeout_seconds=SILENCE_SECONDS + size / SLOWEST_HASH,
            )
            if reply.status not in (201, 308):
                raise ConnectionFailed(
                    f"An sftd server does not answer {reply.status} to a piece; check the address."
                )
            return reply

        return self._outbox.keep_trying("blobs", once)

    def _trim(self) -> None:
        """The server has these: the newest are kept, for an attempt that goes on here."""
        folder = self._below(self._lease.folder) / "checkpoints"
        while len(self._on_record) > KEPT_CHECKPOINTS:
            name = self._on_record.pop(0)
            if name in self._on_record or not (folder / name).is_dir():
                continue
            trash = folder / f".trash-{name}"
            with contextlib.suppress(OSError):  # it is tried again never, and costs only room
                (folder / name).rename(trash)
                shutil.rmtree(trash)


def _checking(check: Check) -> Callable[[], bool]:
    """A reason to give up that raises by itself."""

    def asked() -> bool:
        check()
        return False

    return asked


def _kind(path: str) -> str:
    return "checkpoints" if "/checkpoints/" in path else "results"


def _writer(ref: CheckpointRef) -> str | None:
    """The job that wrote a checkpoint; None: the lease's own."""
    return None if ref.folder is None else ref.folder.rsplit("/", 1)[-1]


def _ask_files(
    outbox: Outbox,
    transport: Transport,
    keeper: LeaseKeeper,
    kind: str,
    name: str,
    of: str | None,
    check: Check,
) -> tuple[str, dict[str, str]]:
    """Where the files of a checkpoint or result are to be had, and the hash of each as recorded. Raises Refused, Fenced."""
    lease = keeper.lease
    url = f"/worker/jobs/{lease.job_id}/files/{kind}/{quote(name, safe='')}"

    def ask() -> FolderFiles:
        return transport.request(
            "GET",
            url,
            params={"attempt": lease.attempt, "of": of},
            headers={TOKEN_HEADER: lease.token},
            timeout_seconds=SILENCE_SECONDS,
            max_retries=0,
        ).parse(FolderFiles)

    found = outbox.keep_trying("files", ask, given_up=_checking(check))
    hashes = {path: file.sha256 for path, file in found.files.items()}
    if found.manifest_sha256 is not None:
        hashes[MANIFEST] = found.manifest_sha256
    return url, hashes


def _is(path: Path, sha256: str, check: Check) -> bool:
    """Whether a file is there and has this hash."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                check()
    except OSError:
        return False
    return digest.hexdigest() == sha256


def _is_missing_blob(refused: Refused) -> bool:
    cause = refused.__cause__
    return isinstance(cause, ApiError) and cause.code == "blob_missing"


def _end_of_range(reply: Reply) -> int:
    """How many bytes the server has, by the Range of its answer."""
    found = re.fullmatch(r"bytes=0-(\d{1,18})", reply.headers.get("range", ""))
    return int(found[1]) + 1 if found else 0
