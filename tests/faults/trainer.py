"""A trainer of the fault harness: fast, deterministic, and true to the real one's files. `python -S trainer.py OPTIONS WORKDIR`.

It reads `job.json`, resumes from the checkpoint that it names, and writes events.jsonl, checkpoints (staged, fsynced,
manifest last, renamed, then announced) and a result whose weights are a hash chain over all steps (law.py).
How fast it goes stands in the spec's metadata: step_seconds, save_seconds (spread over the files of a checkpoint),
ignore_signals. OPTIONS is a JSON file: `watch`, a folder in which all trainers of a harness watch each other's locks, and
`staging`: false plants the bug that checkpoints are written in place and announced before they are whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import law  # type: ignore[import-not-found]  # lies beside this file

options = json.loads(Path(sys.argv[1]).read_text())
workdir = Path(sys.argv[2])
watch = Path(options["watch"])
job = json.loads((workdir / "job.json").read_text())
spec = job["spec"]
told = spec["metadata"]
seed = int(spec["seed"])
spool = (workdir / "logs" / "events.jsonl").open("ab")
asked: list[int] = []


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    locks = held_locks()
    take_watch(locks)
    step, weights = resumed()
    steps = int(spec["max_steps"])
    begun = {"start_step": step if job["resume_from"] else -1, "total_steps": steps, "resumed_from": step}
    say(type="run", message="training begins", data=begun)
    while step < steps:
        time.sleep(float(told.get("step_seconds", "0.01")))
        step += 1
        weights = law.advance(weights, seed, step)
        say(type="step", step=step, values=law.metrics(seed, step))
        say(type="log", text=law.log_line(seed, step))
        check_watch(locks)
        stops = bool(asked) and "ignore_signals" not in told
        if step % int(spec["save_steps"]) == 0 or step == steps or (stops and signal.SIGTERM not in asked):
            say(type="evaluation", message="evaluated", data=law.evaluation(seed, step))
            save(step, weights)
        if stops and step < steps:
            say(type="end", outcome="stopped")
            return
    say(type="end", outcome="succeeded", files=export(weights))


def resumed() -> tuple[int, bytes]:
    """The step and the weights to go on from."""
    if not job["resume_from"]:
        return 0, law.start(seed)
    folder = Path(job["resume_from"])
    weights = (folder / "adapter_model.safetensors").read_bytes()[:32]
    return int(json.loads((folder / "manifest.json").read_text())["step"]), weights


def save(step: int, weights: bytes) -> None:
    """Write a checkpoint as the real trainer does, and announce it."""
    folder = workdir / "checkpoints"
    folder.mkdir(exist_ok=True)
    for left in [*folder.glob(".stage-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(left, ignore_errors=True)
    staged = bool(options.get("staging", True))
    target = folder / f"checkpoint-{step}"
    stage = folder / f".stage-{job['attempt']}" if staged else target
    stage.mkdir(exist_ok=not staged)
    contents = {
        "adapter_model.safetensors": law.file_of(weights, "weights"),
        "optimizer.safetensors": law.file_of(weights, "optimizer"),
        "trainer_state.json": json.dumps({"step": step}).encode(),
    }
    files = described(contents)
    manifest = json.dumps(
        {"step": step, "attempt": job["attempt"], "config_sha": "", "world_size": 1, "files": files}
    ).encode()
    if not staged:
        write(stage / "manifest.json", manifest)
        announce(step, target.name, manifest, files)
    for name, content in contents.items():
        time.sleep(float(told.get("save_seconds", "0")) / len(contents))
        write(stage / name, content)
    if not staged:
        return
    write(stage / "manifest.json", manifest)
    fsync(stage)
    if target.exists():  # not announced, or damaged
        target.rename(folder / f".trash-{target.name}")
    stage.rename(target)
    fsync(folder)
    announce(step, target.name, manifest, files)


def announce(step: int, name: str, manifest: bytes, files: dict[str, dict[str, object]]) -> None:
    digest = hashlib.sha256(manifest).hexdigest()
    told_metrics = {"loss": law.metrics(seed, step)["loss"]}
    say(type="checkpoint", step=step, name=name, manifest_sha256=digest, files=files, metrics=told_metrics)


def export(weights: bytes) -> dict[str, dict[str, object]]:
    """Put the result into its place, whole."""
    stage, results = workdir / ".stage-results", workdir / "results"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    contents = {"adapter_model.safetensors": law.file_of(weights, "weights")}
    for name, content in contents.items():
        write(stage / name, content)
    shutil.rmtree(results, ignore_errors=True)
    stage.rename(results)
    fsync(workdir)
    return described(contents)


def described(contents: dict[str, bytes]) -> dict[str, dict[str, object]]:
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def say(**line: object) -> None:
    """Append a line to the spool, whole: what a full disk leaves over of it stays in the buffer, before the next one."""
    spool.write((json.dumps({"attempt": job["attempt"], "at": time.time(), **line}) + "\n").encode())
    spool.flush()


# ---------------------------------------------------------------- no two trainers on one lock


def held_locks() -> list[str]:
    """Names of the locks that this process has inherited: its devices', and its job's."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = Path(os.readlink(entry))
            if path.name == ".trainer.lock":
                names.append(f"{path.parent.name}.lock")
            elif path.suffix == ".lock" and path.parent.name == "locks":
                names.append(path.name)
    return sorted(names)


def take_watch(locks: list[str]) -> None:
    """Write down that this process holds its locks; complain if one who wrote so before is alive."""
    for name in locks:
        path = watch / name
        before = path.read_text() if path.exists() else ""
        if before and before != mine() and is_alive(before):
            complain(f"{name} is taken while {before} lives")
        fresh = watch / f".{name}-{os.getpid()}"
        fresh.write_text(mine())
        fresh.rename(path)
    if f"{job['job_id']}.lock" not in locks or len(locks) < 1 + int(spec["gpus"]):
        complain(f"it holds only these locks: {locks}")
    with (watch / "trainers.jsonl").open("a") as file:
        file.write(
            json.dumps({"who": mine(), "job": job["job_id"], "attempt": job["attempt"], "locks": locks})
            + "\n"
        )


def check_watch(locks: list[str]) -> None:
    """Complain if somebody else has taken a lock while this process lives."""
    for name in locks:
        now = (watch / name).read_text()
        if now != mine():
            complain(f"{name} was taken by {now} while this one lives")


def complain(what: str) -> None:
    with (watch / "violations.jsonl").open("a") as file:
        line = {"who": mine(), "job": job["job_id"], "attempt": job["attempt"], "what": what}
        file.write(json.dumps(line) + "\n")


def mine() -> str:
    return f"{os.getpid()} {born(os.getpid())}"


def is_alive(who: str) -> bool:
    pid, _, birth = who.partition(" ")
    return born(int(pid)) == birth


def born(pid: int) -> str:
    """When a process began, in ticks; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        with contextlib.suppress(OSError):
            say(type="end", outcome="failed", reason="disk_full", message=str(error))
        sys.exit(1)
