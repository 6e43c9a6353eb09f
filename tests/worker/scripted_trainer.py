"""A trainer that does what a script says. `python scripted_trainer.py SCRIPT.json WORKDIR`. It writes the real protocol.

Keys of the script: steps, step_seconds, checkpoint_every, ignore_signals, silent_seconds (before the first line), end
(succeeded | exception | full | full_words | exit | kill | torn), at (the step of the end), log (a line for each step), save_seconds,
linger_seconds (behind the last word), launcher (the work is done by a child in a session of its own, as under torchrun),
daemon (leave a process behind), orphan (start a process that is nobody's child), by_name (other keys for the job of that
name), leave (a change of the environment, made after it was written to environment.json),
hang_at (at this step, the first time it comes there: nothing more is said), hang_seconds (then it goes on), hang (sleep |
pulse | stop: by SIGSTOP | deaf: no stacks on SIGUSR2), eat_at (take memory without end at this step, the first time),
checkpoint_bytes (of each, random; announced before the first step).
"""

import errno
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

script = json.loads(Path(sys.argv[1]).read_text())
workdir = Path(sys.argv[2])
job = json.loads((workdir / "job.json").read_text())
script |= script.get("by_name", {}).get(job["spec"]["name"], {})
asked: list[int] = []


def main() -> None:
    if script.get("launcher") and "RANK" not in os.environ:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        rank = subprocess.Popen(
            [sys.executable, *sys.argv], env={**os.environ, "RANK": "0"}, start_new_session=True
        )
        sys.exit(rank.wait())
    if script.get("daemon"):
        left = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (workdir / "pids.txt").open("a").write(f"{left.pid}\n")
    if script.get("orphan"):
        command = ["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"]
        found = subprocess.run(command, start_new_session=True, stdout=subprocess.PIPE, check=True)
        (workdir / "orphan.txt").write_bytes(found.stdout)
    (workdir / "environment.json").write_text(json.dumps(dict(os.environ)))
    if "leave" in script:
        os.environ["LEFT_BEHIND"] = script["leave"]
    (workdir / "pids.txt").open("a").write(f"{os.getpid()}\n")
    if script.get("hang") != "deaf":
        faulthandler.register(signal.SIGUSR2, file=(workdir / "logs/stacks.txt").open("a"))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_signal)
    time.sleep(script.get("silent_seconds", 0))
    start = int(job["resume_from"].rsplit("-", 1)[1]) if job["resume_from"] else 0
    steps = script.get("steps", 3)
    say(
        type="event-run",
        message="starting",
        data={"start_step": start, "total_steps": steps, "resumed_from": start}
        | {key: script[key] for key in ("checkpoint_bytes",) if key in script},
    )
    for step in range(start + 1, steps + 1):
        time.sleep(script.get("step_seconds", 0))
        if step == script.get("hang_at") and first_time("hang"):
            hang_without_a_word()
        if step == script.get("eat_at") and first_time("eat"):
            eat_memory()
        say(type="step", step=step, values={"loss": 1 / step, "nan": "NaN"})
        say(type="log", text=script.get("log", f"step {step}"))
        if step == script.get("at"):
            end_badly()
        if step % script.get("checkpoint_every", 10**9) == 0:
            save(step)
        if asked and not script.get("ignore_signals"):
            if signal.SIGTERM not in asked:
                time.sleep(script.get("save_seconds", 0))
                save(step)
            say(type="end", outcome="stopped")
            return
    results = workdir / "results"
    results.mkdir(exist_ok=True)
    (results / "model.txt").write_text("trained")
    files = {"model.txt": {"bytes": 7, "sha256": hashlib.sha256(b"trained").hexdigest()}}
    say(type="end", outcome="succeeded", files=files)
    time.sleep(script.get("linger_seconds", 0))


def end_badly() -> None:
    how = script["end"]
    if how == "exception":
        say(type="end", outcome="failed", reason="diverged", message="The loss is NaN at step 2.")
        sys.exit(1)
    if how == "full":  # somewhere, at `full_path` if it says so
        more = {key: script[key] for key in ("full_path",) if key in script}
        say(type="end", outcome="failed", reason="disk_full", message="step 2: the disk is full", **more)
        sys.exit(1)
    if how == "full_words":
        print("OSError: [Errno 28] No space left on device", file=sys.stderr, flush=True)
        os._exit(1)
    if how == "exit":
        print("RuntimeError: something broke", file=sys.stderr, flush=True)
        os._exit(3)
    if how == "torn":
        with (workdir / "logs/events.jsonl").open("a") as file:
            file.write('{"type": "step", "attempt": 1, "at": 0, "st')
    os.kill(os.getpid(), signal.SIGKILL)


def first_time(what: str) -> bool:
    try:
        (workdir / f"did_{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hang_without_a_word() -> None:
    if script.get("hang") == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    until = time.monotonic() + script.get("hang_seconds", 1000)
    while time.monotonic() < until:
        time.sleep(0.1)
        if script.get("hang") == "pulse":
            (workdir / "logs/.pulse").touch()


def eat_memory() -> None:
    held = []
    while True:
        held.append(bytearray(os.urandom(1024 * 1024)) * 4)


def save(step: int) -> None:
    folder = workdir / "checkpoints" / f"checkpoint-{step}"
    stage = folder.with_name(f".stage-{job['attempt']}")
    shutil.rmtree(stage, ignore_errors=True)
    content = f"weights of step {step}".encode()
    if "checkpoint_bytes" in script:
        content = hashlib.shake_256(content).digest(script["checkpoint_bytes"])
    try:
        stage.mkdir(parents=True)
        (stage / "adapter.safetensors").write_bytes(content)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # The stage stays: what the real one leaves where it is killed meanwhile.
        say(
            type="end",
            outcome="failed",
            reason="disk_full",
            message=f"checkpoint of step {step}: the disk is full",
        )
        os._exit(1)
    shutil.rmtree(folder, ignore_errors=True)
    stage.rename(folder)
    files = {"adapter.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = json.dumps(
        {"step": step, "attempt": job["attempt"], "config_sha256": "", "world_size": 1, "files": files}
    )
    (folder / "manifest.json").write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    say(
        type="checkpoint",
        step=step,
        name=folder.name,
        manifest_sha256=digest,
        files=files,
        metrics={"loss": 0.5},
    )


def say(**line: object) -> None:
    line = {"attempt": job["attempt"], "at": time.time(), **line}
    line["type"] = str(line["type"]).removeprefix("event-")
    with (workdir / "logs/events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def on_signal(number: int, frame: object) -> None:
    asked.append(number)
    (workdir / "signals.txt").open("a").write(f"{signal.Signals(number).name}\n")


main()
