"""Save checkpoints while training goes on: a copy into memory, then a thread that writes, hashes and publishes it.

One save at a time. A checkpoint is announced when it is durable, by the thread that wrote it; what went wrong there
ends the run at the next step. Where there is no memory for a copy, training waits for the files instead.
"""

import copy
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from sftd.protocol import CheckpointLine
from sftd.schemas import FailureReason
from sftd.spec import JobSpec
from sftd_worker.trainer.checkpoint import (
    RunState,
    clear_unfinished,
    config_sha,
    disk_errors,
    fixed_files,
    fsync,
    publish,
    run_sha,
    write_checkpoint,
)
from sftd_worker.trainer.divergence import diverged, last_good
from sftd_worker.trainer.errors import RunFailed
from sftd_worker.trainer.events import Events
from sftd_worker.trainer.model import Model
from sftd_worker.trainer.sharding import Sharding
from sftd_worker.trainer.shares import Abandoned, share_name, write_share
from sftd_worker.trainer.signals import Signals
from sftd_worker.trainer.snapshot import HostMemory, Tensors, first_not_finite, live_tensors
from sftd_worker.trainer.world import World, any_rank

# A cancelled trainer is killed after SFTD_CANCEL_GRACE_SECONDS (3): by then it should have said that it stopped.
_CANCEL_SECONDS = 2.0
_NOTABLE_SECONDS = 1.0


class Saver:
    """The checkpoints of one attempt. All ranks call everything; only rank 0 writes, where nothing is sharded.

    Where it is, each rank writes its share of the optimizer's state, and rank 0 the rest, when all shares are there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: Model,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        spec: JobSpec,
        attempt: int,
        world: World,
        sharding: Sharding,
        events: Events,
        signals: Signals,
    ) -> None:
        self._folder = folder
        self._model = model
        self._tokenizer = tokenizer
        self._optimizer = optimizer
        self._attempt = attempt
        self._world = world
        self._writes = world.is_main or model.shards is not None
        self._num_shares = 1 if model.shards is None else world.size
        self._events = events
        self._signals = signals
        self._facts = {
            "attempt": attempt,
            "config_sha": config_sha(spec),
            "run_sha": run_sha(spec),
            "world_size": world.size,
            "sharding": sharding.name,
        }
        self._memory = HostMemory(model.device, model.shards)
        self._fixed: dict[str, bytes] | None = None
        self._thread: threading.Thread | None = None
        self._step = -1  # of the save in flight
        self._error: BaseException | None = None
        self._gate = threading.Lock()  # held to publish, and to abandon: what is abandoned is never published
        self._abandoned = False
        self._short_of_memory = False

    def prepare(self) -> None:
        """Take the memory for copies, beside training. Call it once the optimizer has its state."""
        if self._writes and self._fixed is None:
            self._fixed = fixed_files(model=self._model, tokenizer=self._tokenizer)
            if not self._memory.reserve(live_tensors(self._model, self._optimizer)):
                self._say_short_of_memory()

    def save(self, state: RunState, *, goes_on: bool) -> None:
        """Begin to save what training has come to. Raises what an earlier save ended with.

        With `goes_on` training changes weights meanwhile, so that a copy is taken. Without, `finish` comes next.
        """
        if not self._writes:
            return
        begun = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - begun
        if waited > _NOTABLE_SECONDS:
            self._events.log(
                f"step {state.step}: waited {waited:.1f} s for the checkpoint before; save_steps is short for this disk"
            )
        if not self._all_go_on():
            return
        begun = time.perf_counter()
        if self._fixed is None:
            self._fixed = fixed_files(model=self._model, tokenizer=self._tokenizer)
        tensors = live_tensors(self._model, self._optimizer)
        self._require_space(tensors, state.step)
        sharded = self._model.shards is not None
        copied = self._memory.copy(tensors) if goes_on or sharded else None
        if sharded and copied is None:
            raise RunFailed(
                FailureReason.OUT_OF_MEMORY,
                "this machine has no memory for the copy that a checkpoint of sharded weights is written from; free "
                "some, or set sharding to ddp",
            )
        self._step = state.step
        self._thread = threading.Thread(
            target=self._run, args=(copied or tensors, copy.deepcopy(state), begun), name="save", daemon=True
        )
        self._stood_still = time.perf_counter() - begun
        self._thread.start()
        if goes_on and copied is None:
            self._say_short_of_memory()
            self.finish()

    def check(self) -> None:
        """Raise what a save in flight has ended with, if it failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> bool:
        """Wait for the save in flight, and raise what it ended with.

        A cancel does not wait long: then the save is given up, and this returns False.
        """
        deadline = None
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)
            if self._signals.stop:
                deadline = deadline or time.monotonic() + _CANCEL_SECONDS
                if time.monotonic() > deadline:
                    self._abandon()
                    return False
        self._thread = None
        self.check()
        return not self._abandoned

    def settle(self, *, good_through: int) -> None:
        """The run has diverged: finish a save of good weights, give up one of weights after step `good_through`."""
        if self._thread is None:
            return
        if self._step > good_through:
            self._abandon()
        else:
            self.close()

    def close(self) -> None:
        """Finish when the run has failed already: what goes wrong here is said, and changes nothing."""
        try:
            self.finish()
        except Exception as error:  # the edge of the run: its own failure counts
            self._events.log(f"the checkpoint of step {self._step} was not written: {error}")

    # ---------------------------------------------------------------- in the thread

    def _run(self, tensors: Tensors, state: RunState, begun: float) -> None:
        try:
            self._write(tensors, state, begun)
        except Abandoned:
            pass
        except BaseException as error:  # an edge: the loop raises it again at its next step
            self._error = error

    def _write(self, tensors: Tensors, state: RunState, begun: float) -> None:
        torch.set_grad_enabled(False)  # of this thread
        name = f"checkpoint-{state.step}"
        stage = self._stage
        assert self._fixed is not None
        if not self._world.is_main:
            share = share_name(self._world.rank, self._num_shares)
            with disk_errors(f"checkpoint of step {state.step}", leaving=stage / share):
                write_share(stage, share, tensors.optimizer, proceed=self._next_piece)
            return
        with disk_errors(f"checkpoint of step {state.step}", leaving=stage):
            if (broken := first_not_finite(tensors.weights)) is not None:
                raise diverged(
                    f"after step {state.step} the weights are not finite ({broken}); they are not saved",
                    self._folder,
                    good_through=last_good(state, state.step - 1),
                )
            files, digest = write_checkpoint(
                stage,
                tensors=tensors,
                model=self._model,
                fixed=self._fixed,
                state=state,
                facts=self._facts,
                num_shares=self._num_shares,
                proceed=self._proceed,
                next_piece=self._next_piece,
            )
            with self._gate:
                self._proceed()
                publish(stage, self._folder / name)
                self._events.log(
                    f"step {state.step}: checkpoint {name} ({sum(file.bytes for file in files.values()) / 2**20:,.0f} MiB "
                    f"in {time.perf_counter() - begun:.1f} s; training stood still for {self._stood_still:.2f} s)"
                )
                self._events.checkpoint(
                    CheckpointLine(
                        attempt=self._attempt,
                        at=time.time(),
                        step=state.step,
                        name=name,
                        manifest_sha256=digest,
                        files=files,
                        metrics=state.metrics,
                    )
                )

    def _proceed(self) -> None:
        if self._abandoned:
            raise Abandoned

    def _next_piece(self) -> None:
        """Between pieces of a file. Not where another rank is waited for: that one has to show life itself."""
        self._events.alive()
        self._proceed()

    # ---------------------------------------------------------------- helpers

    @property
    def _stage(self) -> Path:
        return self._folder / f".stage-{self._attempt}"

    def _all_go_on(self) -> bool:
        """Make an empty folder to write in. False: a rank does not write any more, and so none does."""
        if self._world.is_main and not self._abandoned:
            with disk_errors("checkpoint", leaving=self._stage):
                clear_unfinished(self._folder)
                self._stage.mkdir(parents=True)
                fsync(self._folder.parent)  # the first time its entry is new
        if self._model.shards is None:
            return not self._abandoned
        return not any_rank(self._world, self._abandoned)[0]

    def _require_space(self, tensors: Tensors, step: int) -> None:
        """Refuse a checkpoint that will not fit, before the last free byte is written to. Raises RunFailed(disk_full)."""
        if not self._world.is_main:
            return
        needed = sum(tensor.nbytes for tensor in tensors.weights.values())
        needed += self._num_shares * sum(tensor.nbytes for tensor in tensors.optimizer.values())
        needed += sum(len(content) for content in (self._fixed or {}).values())
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            shutil.rmtree(self._stage, ignore_errors=True)
            raise RunFailed(
                FailureReason.DISK_FULL,
                f"checkpoint of step {step}: it needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free in "
                f"{self._folder}; nothing of it was written",
                full_path=str(self._folder),
            )

    def _abandon(self) -> None:
        with self._gate:
            self._abandoned = True
        if self._thread is not None:
            self._thread.join(_CANCEL_SECONDS / 4)
            self._thread = None

    def _say_short_of_memory(self) -> None:
        if not self._short_of_memory:
            self._short_of_memory = True
            if self._model.shards is not None:
                self._events.notice(
                    "this machine has little memory left for the copy that checkpoints are made of"
                )
                return
            self._events.notice(
                "there is no memory on this machine for a second set of weights and optimizer state: training waits "
                "while a checkpoint is written"
            )
