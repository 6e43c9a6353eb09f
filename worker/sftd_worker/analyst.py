"""Counts data for plans and previews, beside the jobs: a thread that asks the server for something to count, and a process
off the warm parent that counts it. It needs no device, and gives way to training.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sftd._transport import backoff_seconds
from sftd.errors import Conflict, ConnectionFailed, Invalid, NotFound, SftdError, TooLarge
from sftd.files import write_file
from sftd.protocol import (
    ANALYSIS_FILE,
    ANALYSIS_RESULT_FILE,
    TOKEN_HEADER,
    AnalysisClaim,
    AnalysisJob,
    AnalysisReport,
    AnalysisTask,
    InputFile,
    Ok,
)
from sftd_worker.files import PrepareFailed, base_paths, below
from sftd_worker.process import HUB_SECRETS, Trainer, secrets_of, trainer_environment
from sftd_worker.registration import CALL_SECONDS, MOST_BACKOFF_SECONDS
from sftd_worker.shipper import scrubbed
from sftd_worker.tidy import touch
from sftd_worker.worker import Worker

log = logging.getLogger("sftd.worker")

MOST_SECONDS = 3600.0  # of counting; then it hangs
GRACE_SECONDS = 1.0
TAIL_LINES = 5


class _Lost(Exception):
    """It is not this worker's any more."""


class Analyst:
    """Asks, counts and reports until it is stopped."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="analyst", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more; what is being counted is given back. Safe to call twice."""
        self._stopped.set()

    def _run(self) -> None:
        num_failures = 0
        while not self._stopped.is_set():
            try:
                task = self._claim()
                num_failures = 0
            except NotFound:
                return  # the server is of a version that plans nothing
            except SftdError as error:
                log.debug("nothing to count could be asked for: %s", error)
                self._stopped.wait(backoff_seconds(num_failures, first=1.0, most=MOST_BACKOFF_SECONDS))
                num_failures += 1
                continue
            if task is not None:
                self._count(task)

    def _claim(self) -> AnalysisTask | None:
        settings = self._worker.settings
        claim = AnalysisClaim(
            worker_id=settings.worker_name,
            boot_id=self._worker.boot_id,
            wait_seconds=settings.claim_wait_seconds,
        )
        reply = self._worker.transport.request(
            "POST",
            "/worker/analyses/claim",
            body=claim,
            timeout_seconds=settings.claim_wait_seconds + CALL_SECONDS,
            max_retries=0,
        )
        return None if reply.status == 204 else reply.parse(AnalysisTask)

    def _count(self, task: AnalysisTask) -> None:
        try:
            report = self._report_of(task)
        except _Lost as lost:
            log.warning("%s: another worker counts it now: %s", task.id, lost)
            return
        except Exception as error:  # the edge of a thread: whoever waits for the plan must hear of it
            log.exception("%s: could not be counted", task.id)
            report = AnalysisReport(error=f"On the worker: {error!r}"[:4000])
        try:
            try:
                self._say(task, "finish", report)
            except (Invalid, TooLarge) as error:  # else two more workers would count it, to the same end
                self._say(
                    task, "finish", AnalysisReport(error=f"The server refused the count: {error}"[:4000])
                )
        except SftdError as error:
            log.warning("%s: what was counted was not heard: %s", task.id, error)

    def _renew(self, task: AnalysisTask) -> None:
        """Raises _Lost. A server that is away is no reason to give up: it may have given it to nobody else yet."""
        try:
            self._say(task, "renew", None)
        except (Conflict, NotFound) as error:
            raise _Lost(str(error)) from error
        except SftdError as error:
            log.debug("%s: the lease could not be renewed: %s", task.id, error)

    def _say(self, task: AnalysisTask, call: str, body: AnalysisReport | None) -> None:
        self._worker.transport.request(
            "POST",
            f"/worker/analyses/{task.id}/{call}",
            body=body,
            headers={TOKEN_HEADER: task.token},
            timeout_seconds=CALL_SECONDS,
        ).parse(Ok)

    def _report_of(self, task: AnalysisTask) -> AnalysisReport:
        settings, request = self._worker.settings, task.request
        try:
            model, adapter = base_paths(request.spec.base_model, request.base, settings)
            training, validation = request.training_file, request.validation_file
            job = AnalysisJob(
                request=request,
                model_path=model,
                adapter_path=adapter,
                training_path=self._path_of(task, training),
                validation_path=self._path_of(task, validation) if validation else None,
                cache_dir=str(settings.data / "cache"),
                trust_remote_code=settings.trust_remote_code,
                local_files_only=settings.offline,
            )
        except (PrepareFailed, ConnectionFailed) as failed:
            return AnalysisReport(error=str(failed)[:4000])
        with tempfile.TemporaryDirectory(prefix="sftd-plan-") as name:
            folder = Path(name)
            (folder / "logs").mkdir()
            (folder / ANALYSIS_FILE).write_text(job.model_dump_json(), encoding="utf-8")
            return self._run_process(task, folder)

    def _path_of(self, task: AnalysisTask, file: InputFile) -> str:
        """Where a file lies here; where the data folder is this worker's own, it is fetched first. Raises SftdError."""
        path = below(self._worker.settings.data, file.path)
        if self._worker.settings.own_data:
            if not path.exists() or path.stat().st_size != file.bytes:
                self._fetch(task, file, path)
            touch(path)
        return str(path)

    def _fetch(self, task: AnalysisTask, file: InputFile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"/worker/analyses/{task.id}/inputs/{file.sha256}"
        with self._worker.transport.stream(url, headers={TOKEN_HEADER: task.token}) as pieces:
            write_file(path.parent, path.name, self._renewing(task, pieces), sha256=file.sha256)

    def _renewing(self, task: AnalysisTask, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces of a download, which may take longer than the lease lasts."""
        renew_at = time.monotonic() + task.lease_seconds / 3
        for piece in pieces:
            if time.monotonic() > renew_at:
                self._renew(task)
                renew_at = time.monotonic() + task.lease_seconds / 3
            yield piece

    def _await_warm(self) -> None:
        """A warm parent at its imports is waited for: they would take no less time in a process of its own."""
        while self._worker.warm is not None and self._worker.warm.starting:
            if self._stopped.wait(0.1):
                return

    def _run_process(self, task: AnalysisTask, folder: Path) -> AnalysisReport:
        self._await_warm()
        worker, over = self._worker, threading.Event()
        environment = trainer_environment(
            os.environ,
            cuda_visible_devices="",
            offline=worker.settings.offline,
            threads=1,
            secrets=HUB_SECRETS,
        )
        process = Trainer(
            worker.settings.trainer_argv,
            folder=folder,
            attempt=0,
            environment=environment,
            lock_fds=(),
            save_grace_seconds=GRACE_SECONDS,
            stop_grace_seconds=GRACE_SECONDS,
            on_exit=over.set,
            warm=worker.warm,
        )
        try:
            until = time.monotonic() + MOST_SECONDS
            renew_at = time.monotonic() + task.lease_seconds / 3
            while not over.wait(0.05):
                now = time.monotonic()
                if self._stopped.is_set():
                    return AnalysisReport(error="The worker is being stopped.", may_retry=True)
                if now > until:
                    return AnalysisReport(error=f"It took more than {MOST_SECONDS:.0f} s.")
                if now > renew_at:
                    renew_at = now + task.lease_seconds / 3
                    self._renew(task)
        finally:
            process.kill()
            over.wait(GRACE_SECONDS)
        result = folder / ANALYSIS_RESULT_FILE
        if result.exists():
            return AnalysisReport.model_validate_json(result.read_bytes())
        tail = " ".join(process.output_tail(TAIL_LINES))
        hidden = secrets_of({**os.environ, "SFTD_WORKER_KEY": worker.settings.read_key()})
        return AnalysisReport(error=scrubbed(f"{process.describe_exit()} {tail}", hidden)[:4000])
