"""Kill trainers at random points, resume them until they are done, and compare with runs that nobody killed.

    python -m tests.trainer.kill_runs FOLDER --kills 70 --seed 1      # prints one JSON line a run that was killed

A program of its own: it imports the trainer once and forks a process for each attempt, which runs the real
`python -m sftd_worker.trainer` from its `main()` on. It never computes anything itself. The killing is real (SIGKILL), and
what it hit is told afterwards: from what the killed process was at (a note in shared memory) and what lies on disk.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from examples import tiny_model
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from tqdm import tqdm
from transformers import Qwen2ForCausalLM  # noqa: F401  # imported here, it is there after each fork

from sftd.protocol import TRAINER_JOB_FILE, TRAINER_LINE, TrainerJob
from sftd.spec import JobSpec
from sftd_worker.trainer import __main__ as entry
from sftd_worker.trainer import saving
from sftd_worker.trainer import train as train_module
from sftd_worker.trainer.checkpoint import find_checkpoint, verify

Q_BASICS = Path(__file__).resolve().parents[2] / "examples" / "q_basics.jsonl"
COMMON: dict[str, Any] = {
    "training_file": "file_1",
    "max_steps": 10,
    "save_steps": 2,
    "eval_steps": 3,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_seq_length": 512,
    "validation_split": 0.05,
    "warmup_steps": 2,
    "precision": "fp32",
}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3}
LORA: dict[str, Any] = {"method": "lora", "learning_rate": 1e-2, "lora": {"rank": 4, "dropout": 0.2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "lora with dropout": LORA,
    "qlora": {**LORA, "method": "qlora", "precision": "auto"},
    "8-bit adam": {**FULL, "optimizer": "adamw_8bit"},
    "padded": {**FULL, "packing": False},
    "epochs": {**LORA, "num_epochs": 3, "max_steps": None, "batch_size": 16},
    "two ranks": {**LORA, "gpus": 2, "batch_size": 2},
    "two ranks, sharded": {**FULL, "gpus": 2, "batch_size": 2, "sharding": "fsdp"},
}
# What its environment should have: threads that libraries start are not inherited by forks, and torch looks up where
# its ranks are, with a name server that may be slow.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "RES_OPTIONS": "timeout:1 attempts:1",
}
MOST_KILLS_OF_A_RUN = 3
ATTEMPT_SECONDS = 120

# What the main thread of a process is at, as it notes in shared memory.
START, BETWEEN, STEP, EVALUATION, EXPORT = "start", "between", "step", "evaluation", "export"
PHASES = [START, BETWEEN, STEP, EVALUATION, EXPORT]
# What a kill is aimed at: the n-th event of a kind, or a moment by the clock.
FILES, PUBLISHING, MODULES, SCORING, UPDATES, EXPORTING, CLOCK = (
    "files",
    "publishing",
    "modules",
    "scoring",
    "updates",
    "exporting",
    "clock",
)
AIMS = [FILES, PUBLISHING, MODULES, SCORING, UPDATES, EXPORTING]
TURNS = [*AIMS, FILES, CLOCK, CLOCK]  # taken in turns, so that no kind is left to luck
DISK_SECONDS = [0.0, 0.003]
LONGEST_DELAY_SECONDS = (
    0.01  # after the event: lands in what comes next, also in the middle of a file or an operation
)


@dataclass(frozen=True)
class Aim:
    """A kill: at the `count`-th event of a kind (CLOCK: none), `delay` seconds later, in rank `rank`."""

    kind: str
    count: int
    delay: float
    rank: int = 0


@dataclass
class Death:
    """Where a kill hit."""

    aim: Aim
    phase: str
    saving: str  # "", "writing" (a stage is left on disk), "unannounced" (published, and not yet told)
    num_files: int = 0  # in the stage

    def hits(self) -> list[str]:
        """Every phase that this kill counts for."""
        between_files = ["between files"] if self.saving == "writing" and self.num_files else []
        return [self.phase, *([self.saving] if self.saving else []), *between_files]


@dataclass
class Outcome:
    """A run that was killed, resumed and compared."""

    variant: str
    deaths: list[Death] = field(default_factory=list)
    mismatch: str = ""  # empty: identical to the run that nobody killed


class Notes:
    """What a child tells its parent while it lives: shared memory survives SIGKILL."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self._words = memoryview(self._memory).cast("q")

    def at(self, phase: str) -> None:
        self._words[0] = PHASES.index(phase)

    @property
    def phase(self) -> str:
        return PHASES[self._words[0]]

    def count(self, kind: str) -> int:
        """One more event of a kind; returns how many there were."""
        place = 1 + AIMS.index(kind)
        self._words[place] += 1
        return self._words[place]

    def counts(self) -> dict[str, int]:
        return {kind: self._words[1 + place] for place, kind in enumerate(AIMS)}


# ---------------------------------------------------------------- in the child


def aim_at(aim: Aim | None, notes: Notes, checkpoints: Path, disk_seconds: float) -> None:
    """Hook into this process so that it notes where it is, and dies where it should.

    Each piece of a checkpoint takes `disk_seconds` longer: a slow disk, on which training goes on for steps meanwhile.
    """
    lock = threading.Lock()  # a checkpoint is written by a thread

    def happened(kind: str) -> None:
        with lock:
            count = notes.count(kind)
        if aim is not None and aim.kind == kind and aim.count == count:
            if aim.delay:
                threading.Timer(aim.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "shutil.rmtree"):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(str(checkpoints.parent)):
            return
        if notes.phase == EXPORT:
            happened(EXPORTING)
        if str(path).startswith(str(checkpoints)):
            happened(FILES)
        # Before the rename that publishes a checkpoint, and after it: then the folder itself is opened to be fsynced.
        if Path(path) == checkpoints or (event == "os.rename" and Path(path).parent == checkpoints):
            happened(PUBLISHING)

    def module(net: torch.nn.Module, _: Any) -> None:
        if notes.phase == EVALUATION:
            happened(SCORING)
        elif net.training and torch.is_grad_enabled():  # with gradient checkpointing also in the backward
            notes.at(STEP)
            happened(MODULES)

    def before_update(*_: Any) -> None:
        happened(UPDATES)

    def after_update(*_: Any) -> None:
        happened(UPDATES)
        notes.at(BETWEEN)

    def noted(real: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            notes.at(phase)
            try:
                return real(*args, **options)
            finally:
                notes.at(BETWEEN)

        return call

    real_proceed = saving.Saver._proceed

    def proceed(saver: saving.Saver) -> None:  # between the pieces of a file
        happened(FILES)
        time.sleep(disk_seconds)
        real_proceed(saver)

    sys.addaudithook(audit)
    register_module_forward_pre_hook(module)
    register_optimizer_step_pre_hook(before_update)
    register_optimizer_step_post_hook(after_update)
    # Looked at, not replaced: each calls the real one.
    saving.Saver._proceed = proceed  # type: ignore[method-assign]
    train_module.evaluate = noted(train_module.evaluate, EVALUATION)  # type: ignore[attr-defined]
    train_module.export = noted(train_module.export, EXPORT)  # type: ignore[attr-defined]


def be_trainer(
    job: TrainerJob, *, aim: Aim | None, notes: Notes, env: dict[str, str], disk_seconds: float
) -> None:
    """Become a trainer, as `python -m sftd_worker.trainer FOLDER` does. Never returns."""
    code = 1
    try:
        output = os.open(Path(job.output_dir) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()  # one that hangs is asked where, by SIGABRT
        os.environ.update(env)
        aim_at(aim, notes, Path(job.output_dir) / "checkpoints", disk_seconds)
        sys.argv = ["trainer", job.output_dir]
        entry.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


# ---------------------------------------------------------------- in the parent


def attempt(
    job: TrainerJob, aim: Aim | None, *, clock: float | None = None, disk_seconds: float = 0
) -> tuple[bool, list[Notes]]:
    """Run one attempt, with a process a rank. Returns (was it killed?, what each rank noted).

    As under torchrun, the death of one rank ends all.
    """
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_JOB_FILE).write_text(job.model_dump_json())
    size = job.spec.gpus
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    notes, pids = [Notes() for _ in range(size)], []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            env = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            mine = aim if aim is not None and aim.rank == rank else None
            be_trainer(job, aim=mine, notes=notes[rank], env=env, disk_seconds=disk_seconds)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    try:
        codes = _wait_for(pids, clock)
    except TimeoutError as error:
        _kill_group(pids[0], signal.SIGABRT)
        time.sleep(1)  # for the stacks
        raise RuntimeError(f"{error}: {(folder / 'output.txt').read_text()[-6000:]}") from error
    finally:
        _kill_group(pids[0])
    killed = any(os.WIFSIGNALED(code) for code in codes)
    if not killed and any(codes):
        raise RuntimeError(f"an attempt failed by itself: {(folder / 'output.txt').read_text()[-3000:]}")
    return killed, notes


def _wait_for(pids: list[int], clock: float | None) -> list[int]:
    """Wait for all; kill them after `clock` seconds, and the rest when one died by a signal."""
    left, codes = dict.fromkeys(pids), {}
    started = time.monotonic()
    while left:
        for pid in list(left):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                del left[pid]
                codes[pid] = code
        now = time.monotonic() - started
        if left and (any(codes.values()) or (clock is not None and now > clock)):
            _kill_group(pids[0])
        if now > ATTEMPT_SECONDS:
            raise TimeoutError(f"an attempt did not end within {ATTEMPT_SECONDS} s")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def _kill_group(leader: int, by: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(OSError):
        os.killpg(leader, by)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def announced(folder: Path) -> list[str]:
    """Names of the checkpoints that a run has told of, oldest first."""
    path = folder / "logs" / "events.jsonl"
    names = []
    for raw in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # torn by a kill
            line = TRAINER_LINE.validate_json(raw)
            if line.type == "checkpoint":
                names.append(line.name)
    return names


def resumed(job: TrainerJob, random_: random.Random) -> TrainerJob:
    """The next attempt: from the newest announced checkpoint, as a worker, or the newest on disk, as `sftd-run-sft`."""
    folder = Path(job.output_dir)
    told = announced(folder)
    for name in told:
        if verify(folder / "checkpoints" / name) is None:
            raise RuntimeError(f"{name} was announced, but is not whole")
    newest = find_checkpoint(folder / "checkpoints", job.spec).newest
    if told and random_.random() < 0.5:
        newest = folder / "checkpoints" / told[-1]
    return job.model_copy(
        update={"attempt": job.attempt + 1, "resume_from": str(newest) if newest is not None else None}
    )


def unannounced(folder: Path) -> set[str]:
    """Names of checkpoints that lie there and were not told of."""
    return {path.name for path in (folder / "checkpoints").glob("checkpoint-*")} - set(announced(folder))


def death(job: TrainerJob, aim: Aim, notes: list[Notes], untold_before: set[str]) -> Death:
    """What a kill hit, from the notes of the rank that it was aimed at and from the disk."""
    folder = Path(job.output_dir)
    phase = notes[aim.rank].phase
    stage = folder / "checkpoints" / f".stage-{job.attempt}"
    if stage.exists():
        return Death(aim, phase, "writing", sum(1 for path in stage.rglob("*") if path.is_file()))
    return Death(aim, phase, "unannounced" if unannounced(folder) - untold_before else "")


def record(folder: Path) -> dict[str, Any]:
    """All of a finished run that must be the same however often it was killed."""
    values: dict[str, dict[int, float]] = {}
    for raw in (folder / "logs" / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = TRAINER_LINE.validate_json(raw)
            if line.type == "step":  # a step done again by a later attempt replaces the one before
                for name, value in line.values.items():
                    if name not in ("seconds", "tokens_per_second"):
                        values.setdefault(name, {})[line.step] = value
    last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*sorted((folder / "results").glob("*.safetensors")), *sorted(last.glob("*.safetensors"))]
    return {
        "values": values,
        "evaluations": json.loads((folder / "logs" / "eval_results.json").read_text()),
        "state": json.loads((last / "trainer_state.json").read_text()),
        "files": {f"{path.parent.name}/{path.name}": _sha256(path) for path in files},
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Places where two records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other}, key=str)
        return [
            text for name in names for text in differences(one.get(name), other.get(name), f"{at}/{name}")
        ]
    return [] if one == other else [f"{at}: {str(one)[:100]} against {str(other)[:100]}"]


def make_job(variant: str, model: Path, folder: Path) -> TrainerJob:
    fields = {**COMMON, **VARIANTS[variant], "base_model": str(model)}
    return TrainerJob(
        job_id="job_1",
        attempt=1,
        spec=JobSpec.model_validate({name: value for name, value in fields.items() if value is not None}),
        model_path=str(model),
        training_path=str(folder.parent / "rows.jsonl"),
        training_name="rows.jsonl",
        output_dir=str(folder),
        cache_dir=str(folder.parent / "cache"),
        device="cpu",
        local_files_only=True,
    )


def choose_aim(
    kind: str, random_: random.Random, counts: list[dict[str, int]], span: float, share_left: float
) -> Aim:
    """A random kill within what is left of a run: `counts` of events and `span` seconds are of a whole one."""
    if kind == CLOCK:
        rank = random_.randrange(len(counts))
        return Aim(CLOCK, 0, random_.uniform(0, span * max(share_left, 0.2)), rank)
    ranks = [rank for rank, events in enumerate(counts) if events[kind]]
    assert ranks, f"no rank of the whole run came to {kind}"
    rank = random_.choice(ranks)
    count = random_.randint(1, max(1, round(counts[rank][kind] * share_left)))
    at_once = kind == PUBLISHING or random_.random() < 0.5
    return Aim(kind, count, 0.0 if at_once else random_.uniform(0, LONGEST_DELAY_SECONDS), rank)


def kill_runs(
    folder: Path, *, variants: list[str], kills: int, seed: int, seconds: float = float("inf")
) -> Iterator[Outcome]:
    """Run every variant once in peace, then again and again under fire until `kills` (or the time) are reached."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model.build(
        folder / "model", Q_BASICS, hidden_size=32, vocab_size=400, initializer_range=0.1
    )
    shortest = sorted(Q_BASICS.read_text().splitlines(), key=len)[:72]
    (folder / "rows.jsonl").write_text("\n".join(shortest) + "\n")
    deadline = time.monotonic() + seconds
    peaceful: dict[str, tuple[dict[str, Any], list[dict[str, int]], float]] = {}
    done = dict.fromkeys(variants, 0)
    kinds = itertools.cycle(TURNS)
    number = 0
    while sum(done.values()) < kills and time.monotonic() < deadline:
        variant = min(variants, key=lambda name: done[name])
        if variant not in peaceful:
            started = time.monotonic()
            _, notes = attempt(make_job(variant, model, folder / "whole"), None)
            span = time.monotonic() - started
            peaceful[variant] = record(folder / "whole"), [note.counts() for note in notes], span
            shutil.rmtree(folder / "whole")
        number += 1
        outcome = one_run(
            make_job(variant, model, folder / "killed"),
            variant,
            *peaceful[variant],
            kinds=kinds,
            random_=random.Random(f"{seed}/{number}"),
        )
        done[variant] += max(1, len(outcome.deaths))
        yield outcome
        if not outcome.mismatch:
            shutil.rmtree(folder / "killed")
        else:
            (folder / "killed").rename(folder / f"mismatch-{number}")


def one_run(
    job: TrainerJob,
    variant: str,
    whole: dict[str, Any],
    counts: list[dict[str, int]],
    span: float,
    *,
    kinds: Iterator[str],
    random_: random.Random,
) -> Outcome:
    """Kill a run up to three times, let it end, and compare it with the whole one."""
    outcome = Outcome(variant)
    share_left = 1.0
    for _ in range(random_.randint(1, MOST_KILLS_OF_A_RUN)):
        aim = choose_aim(next(kinds), random_, counts, span, share_left)
        by_clock = aim.kind == CLOCK
        untold = unannounced(Path(job.output_dir))
        killed, notes = attempt(
            job,
            None if by_clock else aim,
            clock=aim.delay if by_clock else None,
            disk_seconds=random_.choice(DISK_SECONDS),
        )
        if not killed:
            break  # it ended before the event came
        outcome.deaths.append(death(job, aim, notes, untold))
        job = resumed(job, random_)
        at = int(job.resume_from.rsplit("-", 1)[1]) if job.resume_from else 0
        share_left = 1 - at / whole["state"]["run"]["step"]
    else:
        attempt(job, None, disk_seconds=random_.choice(DISK_SECONDS))
    outcome.mismatch = "; ".join(differences(whole, record(Path(job.output_dir)))[:5])
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=70)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    flags = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        again = [sys.executable, "-m", "tests.trainer.kill_runs", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **ENVIRONMENT})
    torch.set_num_threads(1)  # a child of a process that computed with several would hang
    # And so would one whose sister was killed in a progress bar: tqdm's own lock is a semaphore that forks share.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    for outcome in kill_runs(
        flags.folder, variants=flags.variants, kills=flags.kills, seed=flags.seed, seconds=flags.seconds
    ):
        body = {**asdict(outcome), "hits": [hit for one in outcome.deaths for hit in one.hits()]}
        print(json.dumps(body), flush=True)


if __name__ == "__main__":
    main()
