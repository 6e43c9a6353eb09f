"""One attempt at one job, from the lease to the last call.

A thread of its own runs it, beside those of other attempts. What the user wants (`keeper.want`), what the server asks for
(`keeper.make_room`, `keeper.draining`), whether the lease is held (`keeper.still_held()`), whether the worker is being
stopped (`stops`) and how the trainer stands are plain states; whoever changes one rings the attempt's bell, and the
attempt looks at all of them again.
"""

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from sftd.errors import SequenceGap
from sftd.protocol import (
    MAX_LINE_CHARS,
    TRAINER_LINES_FILE,
    EndLine,
    EventLine,
    Finish,
    Lease,
    LogTextLine,
    Release,
)
from sftd.schemas import FailureReason, Want
from sftd_worker.disk import Hold, after_full, is_full
from sftd_worker.files import Prepared, PrepareFailed, job_folder, prepare, write_job
from sftd_worker.gpus import Gpu, Locks, find_lost
from sftd_worker.lease import LeaseKeeper, Outdated
from sftd_worker.outbox import Fenced, Outbox, Refused
from sftd_worker.process import (
    HUB_SECRETS,
    WANDB_SECRETS,
    Order,
    Trainer,
    secrets_of,
    trainer_environment,
)
from sftd_worker.shipper import TAIL_LINES, Shipper, cut, scrubbed
from sftd_worker.spool import Spool
from sftd_worker.tidy import TRAINER_LOCK, mark_delivered, unmark
from sftd_worker.transfer import transfer_of
from sftd_worker.watch import Failed, Watch
from sftd_worker.worker import Bell, Worker

log = logging.getLogger("sftd.worker")

TAIL_LINE_CHARS = 2000
MAX_MESSAGE_CHARS = 8000
HURRIED_SECONDS = 3.0  # for the last calls of a worker that was told to hurry
ABOUT_GPUS = re.compile(r"cuda|nccl|nvml|cublas|cudnn", re.IGNORECASE)

ReleaseReason = Literal["stopping", "preempted", "gpu_lost", "busy", "wanted_again"]


class _Interrupted(Exception):
    """The attempt ends before its trainer runs: cancelled, paused, lease lost, or the worker is being stopped."""


def run_attempt(worker: Worker, lease: Lease, bell: Bell, *, on_draining: Callable[[], None]) -> None:
    """Claimed → prepare → spawn → stream → clean up → finish. The last call is the last thing that happens.

    The trainer is bound to the calling thread's life. `on_draining` is called when the server wants no jobs on this
    worker. Raises Outdated where it does not serve this version any more.
    """
    attempt = _Attempt(worker, lease, bell, on_draining)
    attempt.keeper.start()
    try:
        last_call = attempt.run()
        lost = (
            not attempt.keeper.still_held()
        )  # asked before the last call: behind it the lease is gone as it should
        if last_call is not None and not lost:
            attempt.say_last(last_call)
    finally:
        attempt.keeper.close()
    if lost:
        log.warning("%s, attempt %d: lease lost (%s)", lease.job_id, lease.attempt, attempt.keeper.lost)
    attempt.await_device()
    if attempt.keeper.outdated is not None:
        raise Outdated(attempt.keeper.outdated)


class _Attempt:
    def __init__(self, worker: Worker, lease: Lease, bell: Bell, on_draining: Callable[[], None]) -> None:
        self.worker = worker
        self.lease = lease
        self.bell = bell
        self.on_draining = on_draining
        self.settings = worker.settings
        self.keeper = LeaseKeeper(
            lease,
            worker.transport,
            wait_seconds=worker.settings.heartbeat_wait_seconds,
            refused_means_down=worker.refused_means_down,
            on_news=self._on_news,
        )
        self.outbox = Outbox(worker.transport, self.keeper)
        self.transfer = transfer_of(self.settings, worker.transport, self.outbox, self.keeper)
        self.locks = Locks()
        self.gpus: tuple[Gpu, ...] = ()  # that the trainer was given
        self.trainer: Trainer | None = None
        self.complete = False  # the server has all that its trainer has said
        environment = dict(os.environ)
        self.secrets = secrets_of({**environment, "SFTD_WORKER_KEY": worker.settings.read_key()})

    def run(self) -> Finish | Release | None:
        """The attempt itself. Returns the last call to make, or None if the lease is lost: then nothing is published."""
        try:
            self._await_first_answer()
            prepared = prepare(self.lease, self.settings, check=self._check, transfer=self.transfer)
            self.keeper.base_sha256 = prepared.base_sha256
            folder = job_folder(self.settings.data, self.lease)
            if not self._take_locks(folder):
                return self._release("An earlier trainer still holds the device or the job's folder.", "busy")
            self._await_warm()
            self._check()
            return self._train(prepared, folder)
        except _Interrupted:
            return self._verdict_before_training()
        except PrepareFailed as failed:
            return self._failed(failed.reason, str(failed))
        except Exception as error:  # the edge of the attempt: the job must hear of it
            log.exception("%s: the attempt could not be run", self.lease.job_id)
            if isinstance(error, OSError) and is_full(error):
                return self._after_full(error)
            return self._failed(FailureReason.WORKER_ERROR, f"On the worker: {error!r}")
        finally:
            self.locks.let_go()

    def say_last(self, call: Finish | Release) -> None:
        """Send the last call until it is answered, the lease is lost, or a stopped worker has to go."""
        since = time.monotonic()
        what = call.state if isinstance(call, Finish) else "released"
        where = f"{self.lease.job_id}, attempt {self.lease.attempt}"
        try:
            send = functools.partial(
                self.outbox.send,
                pause=self.bell.wait,
                given_up=lambda: self._out_of_patience(since),
            )
            self.transfer.say_last(call, send)
            if self.complete and self.settings.own_data:
                mark_delivered(job_folder(self.settings.data, self.lease))
            log.info("%s: %s", where, what)
        except Fenced as fenced:
            log.warning("%s: %s was not heard (%s)", where, what, fenced)
        except (Refused, SequenceGap) as refused:
            log.error("%s: the server refused %s: %s", where, what, refused)
            self._say_instead(call, str(refused))

    def _say_instead(self, refused: Finish | Release, why: str) -> None:
        """The server does not take the last call: say what it will take, so that the job does not hang in the lease."""
        self.complete = False  # what was refused is nowhere else
        if isinstance(refused, Finish) and refused.state in ("cancelled", "paused"):
            # The wish was taken back meanwhile.
            self.say_last(self._release("The job is wanted again.", "wanted_again"))
        elif isinstance(refused, Finish) and refused.reason is not FailureReason.WORKER_ERROR:
            self.say_last(self._failed(FailureReason.WORKER_ERROR, f"The server refused the result: {why}"))

    def await_device(self) -> None:
        """A killed trainer that hangs in the kernel keeps its GPU: until it goes, no other job is taken for that one."""
        while self.trainer is not None and self.trainer.running and self._still_ours():
            self.bell.wait(1.0)

    def _still_ours(self) -> bool:
        """Is there a GPU that this attempt keeps from others? One that is lost is counted nowhere any more."""
        stops, lost = self.worker.stops, self.worker.lost_gpus
        return any(gpu not in lost for gpu in self.gpus) and not (stops.asked or stops.saves)

    def _on_news(self) -> None:
        self.bell.ring()
        if self.keeper.draining:
            self.on_draining()

    # ------------------------------------------------------------ before training

    def _await_first_answer(self) -> None:
        """Nothing is begun before the server has confirmed the lease: the job may be cancelled already."""
        while not self.keeper.heard:
            self._check()
            self.bell.wait(0.1)
        self._check()

    def _check(self) -> None:
        """Raise _Interrupted if the attempt should not go on. Called between pieces of preparation."""
        if not self.keeper.still_held() or self.keeper.want is not Want.RUN or self._must_yield:
            raise _Interrupted

    @property
    def _must_yield(self) -> bool:
        """The job is wanted, but not here and now."""
        return self.worker.stops.saves or self.keeper.draining or self.keeper.make_room

    def _take_locks(self, folder: Path) -> bool:
        """Wait for earlier trainers on these devices and in this folder to be gone. False: they did not go in time."""
        deadline = time.monotonic() + self.settings.lock_wait_seconds
        while time.monotonic() <= deadline:
            if self.locks.take(folder, [TRAINER_LOCK], 1):
                names = self.worker.devices.lock_names()  # asked again: a GPU may be lost or back
                if self.locks.take(self.settings.data / "locks", names, self.lease.spec.gpus):
                    return True
                self.locks.let_go()
            self._check()
            self.bell.wait(0.1)
        return False

    def _await_warm(self) -> None:
        """A warm parent at its imports is waited for: they would take no less time in a trainer of its own."""
        while not self._cold and self.worker.warm is not None and self.worker.warm.starting:
            self._check()
            self.bell.wait(0.05)

    @property
    def _cold(self) -> bool:
        """Ranks are started by torchrun, which imports for itself."""
        return self.lease.spec.gpus > 1

    def _verdict_before_training(self) -> Finish | Release | None:
        if not self.keeper.still_held():
            return None
        if self.keeper.want is Want.CANCEL:
            return Finish(attempt=self.lease.attempt, state="cancelled")
        if self.keeper.want is Want.PAUSE:
            return Finish(attempt=self.lease.attempt, state="paused")
        return self._release_as_things_stand()

    # ------------------------------------------------------------ training

    def _train(self, prepared: Prepared, folder: Path) -> Finish | Release | None:
        unmark(folder)
        spool = Spool(folder / TRAINER_LINES_FILE, attempt=self.lease.attempt)
        for notice in prepared.notices:
            now = time.time()
            spool.append(LogTextLine(attempt=self.lease.attempt, at=now, text=notice[:MAX_LINE_CHARS]))
            spool.append(EventLine(type="notice", attempt=self.lease.attempt, at=now, message=notice))
        # What this worker has, not what the trainer finds: a GPU that is lost must not make a CPU run of it.
        write_job(prepared.job.model_copy(update={"device": self.worker.devices.kind}))
        trainer_start = spool.size()
        self._check()  # files were touched meanwhile, which may have taken its time
        self.gpus = self.worker.devices.behind(self.locks.names)
        if self.worker.devices.kind == "cuda" and len(self.gpus) != self.lease.spec.gpus:
            return self._release("A GPU was lost before training began.", "gpu_lost")
        self.trainer = trainer = self._spawn(folder)
        self.locks.let_go()  # the trainer holds them now, and only it
        shipper: Shipper | None = None
        try:
            watch = Watch(trainer, spool, job=prepared.job, settings=self.settings)
            shipper = Shipper(
                spool,
                self.outbox,
                self.keeper,
                folder=folder,
                secrets=self.secrets,
                first=prepared.corrupt,
                on_done=self.bell.ring,
                transfer=self.transfer,
            )
            shipper.start()
            self._follow(trainer, shipper, watch, lambda: spool.has_whole_line_after(trainer_start))
            watch.leave_word()
        finally:
            # Of use only if the lines above raised: no word of the attempt's end goes out while its trainer lives.
            trainer.kill()
            while trainer.running and not trainer.hangs:
                self.bell.wait(0.1)
            if shipper is not None:
                shipper.finish()
        self._await_shipper(shipper)
        self.complete = shipper.complete and not shipper.num_refused
        return self._verdict(trainer, shipper, watch)

    def _follow(
        self, trainer: Trainer, shipper: Shipper, watch: Watch, has_spoken: Callable[[], bool]
    ) -> None:
        """Look after the trainer until it is gone, or hangs though it was killed."""
        ended_at: float | None = None  # when its last word came by
        may_save = False  # before the trainer's first word there is nothing to save
        while trainer.running and not trainer.hangs:
            may_save = may_save or has_spoken()
            if shipper.end is not None and ended_at is None:
                ended_at = time.monotonic()
            over = ended_at is not None and time.monotonic() - ended_at > self.settings.last_word_seconds
            order = self._order(may_save=may_save, broken=over or shipper.error is not None)
            trainer.obey(max(order, watch.look(may_save=may_save)))
            self.keeper.disk_free_bytes = watch.disk_free_bytes
            self.bell.wait(self._seconds_until_next_look(trainer))

    def _spawn(self, folder: Path) -> Trainer:
        environment = trainer_environment(
            os.environ,
            cuda_visible_devices=",".join(gpu.uuid for gpu in self.gpus),
            offline=self.settings.offline,
            threads=self.worker.threads,
            secrets=HUB_SECRETS + (WANDB_SECRETS if self.lease.spec.wandb else ()),
        )
        return Trainer(
            self.settings.trainer_argv,
            folder=folder,
            attempt=self.lease.attempt,
            environment=environment,
            lock_fds=self.locks.fds,
            save_grace_seconds=self.settings.checkpoint_grace_seconds,
            stop_grace_seconds=self.settings.cancel_grace_seconds,
            on_exit=self.bell.ring,
            on_started=lambda trainer: self.keeper.ends(trainer.kill),
            warm=self.worker.warm,
            cold=self._cold,
        )

    def _order(self, *, may_save: bool, broken: bool) -> Order:
        """What the trainer is to do, as things stand."""
        if not self.keeper.still_held() or broken or self.worker.stops.hurries:
            return Order.KILL
        if self.keeper.want is Want.CANCEL:
            return Order.STOP
        if self.keeper.want is Want.PAUSE or self._must_yield:
            return Order.SAVE_AND_STOP if may_save else Order.STOP
        return Order.RUN

    def _seconds_until_next_look(self, trainer: Trainer) -> float:
        next_look = min(self.keeper.fence_at, trainer.deadline or self.keeper.fence_at)
        return min(1.0, max(0.01, next_look - time.monotonic()))

    def _await_shipper(self, shipper: Shipper) -> None:
        """Everything is sent before the last call; a worker that is being stopped waits only so long."""
        since = time.monotonic()
        while not shipper.done.is_set() and self.keeper.still_held():
            if self._out_of_patience(since):
                self.outbox.call_off()
            self.bell.wait(0.5)

    def _out_of_patience(self, since: float) -> bool:
        if not self.worker.stops.saves:
            return False
        allowed = HURRIED_SECONDS if self.worker.stops.hurries else self.settings.checkpoint_grace_seconds
        return time.monotonic() - since > allowed

    # ------------------------------------------------------------ the last call

    def _verdict(self, trainer: Trainer, shipper: Shipper, watch: Watch) -> Finish | Release | None:
        """How the attempt ended. The trainer's own last word comes before what it was told."""
        if not self.keeper.still_held():
            return None
        end = shipper.end
        tail = _tail(shipper, trainer)
        if shipper.error is not None:
            return self._failed(FailureReason.WORKER_ERROR, f"Reporting failed: {shipper.error}", tail)
        if not shipper.complete and self.keeper.want is not Want.CANCEL:
            # The worker has to go before the server has all of it: another attempt tells it again.
            return self._release_as_things_stand()
        if end is not None and end.outcome == "succeeded":
            return self._succeeded(end)
        if self.keeper.want is Want.CANCEL:
            return Finish(attempt=self.lease.attempt, state="cancelled")
        found = watch.verdict(end)
        if lost := self._lost_gpus(trainer, end, tail, stalled=isinstance(found, Failed)):
            return self._gpus_lost(lost)
        if isinstance(found, Hold):
            return self._held(found)
        if found is not None:
            return self._failed(found.reason, found.message, tail)
        if end is not None and end.outcome == "failed":
            reason = end.reason or FailureReason.TRAINER_ERROR
            return self._failed(reason, end.message or trainer.describe_exit(), tail)
        if end is None and trainer.order is Order.RUN:  # nobody told it to stop
            return self._failed(FailureReason.TRAINER_DIED, trainer.describe_exit(), tail)
        if self.keeper.want is Want.PAUSE:
            return Finish(attempt=self.lease.attempt, state="paused")
        return self._release_as_things_stand()

    def _succeeded(self, end: EndLine) -> Finish:
        message = self._clean(end.message) if end.message else None
        return Finish(attempt=self.lease.attempt, state="succeeded", message=message, files=end.files)

    def _failed(self, reason: FailureReason, message: str, tail: Sequence[str] = ()) -> Finish:
        lines = [cut(scrubbed(line, self.secrets), TAIL_LINE_CHARS) for line in tail]
        return Finish(
            attempt=self.lease.attempt,
            state="failed",
            reason=reason,
            message=self._clean(message),
            log_tail=lines,
        )

    def _lost_gpus(
        self, trainer: Trainer, end: EndLine | None, tail: Sequence[str], *, stalled: bool
    ) -> tuple[Gpu, ...]:
        """Asked where the trainer died by itself or hung, or failed with an error that may come of it."""
        if end is None:
            may_be = trainer.order is Order.RUN or stalled
        else:
            may_be = end.outcome == "failed" and any(map(ABOUT_GPUS.search, [end.message or "", *tail]))
        return find_lost(self.gpus) if may_be else ()

    def _held(self, hold: Hold) -> Finish:
        """Put aside for want of disk space, until the server sees some."""
        return Finish(
            attempt=self.lease.attempt,
            state="paused",
            message=self._clean(hold.message),
            pause_reason="disk_low",
            needs_disk_bytes=hold.needs_disk_bytes,
        )

    def _after_full(self, error: OSError) -> Finish:
        folder, reserve = self.settings.data / self.lease.folder, self.settings.disk_reserve_bytes
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        found = after_full(folder, what=f"{error}.", path=path, needed=0, reserve=reserve)
        return self._failed(FailureReason.DISK_FULL, found) if isinstance(found, str) else self._held(found)

    def _gpus_lost(self, gpus: Sequence[Gpu]) -> Release:
        # Before the job is given back: else this worker might take it again for the same GPU.
        self.worker.lose(gpus)
        names = ", ".join(gpu.uuid for gpu in gpus)
        return self._release(f"The driver has lost {names}; the job goes on on another GPU.", "gpu_lost")

    def _release_as_things_stand(self) -> Release:
        if self.worker.stops.saves:
            return self._release("The worker is being stopped.", "stopping")
        if self.keeper.draining:
            return self._release("The worker is being drained.", "stopping")
        if self.keeper.make_room:
            return self._release("Another job needs its place.", "preempted")
        return self._release("The trainer was stopped, but is wanted again.", "wanted_again")

    def _release(self, message: str, reason: ReleaseReason) -> Release:
        return Release(attempt=self.lease.attempt, message=message, reason=reason)

    def _clean(self, text: str) -> str:
        return cut(scrubbed(text, self.secrets), MAX_MESSAGE_CHARS)


def _tail(shipper: Shipper, trainer: Trainer) -> list[str]:
    """The end of the log and of what was printed. The trainer prints its log too: what stands in both comes once."""
    printed = trainer.output_tail(TAIL_LINES)
    logged = [line for line in shipper.log_tail if line not in printed]
    return (logged + printed)[-TAIL_LINES:]
