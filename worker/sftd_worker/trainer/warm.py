"""The warm parent: it has imported what a trainer imports, and forks trainers off itself when the agent asks.

    python -P -m sftd_worker.trainer.warm FD ROOM   # FD: one end of a socket; `sftd_worker/warm.py` holds the other

It imports and waits, nothing else. No tensor is computed here: threads are not inherited, so a trainer whose parent has
used torch's thread pool would wait for it for ever; and where the parent has asked CUDA for anything, its children cannot
use it. A trainer is forked twice, so that the agent adopts it: the agent waits for it and kills it as if it had started
it, and the death of the warm parent harms no run.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from sftd.protocol import TRAINER_GO, WARM_READY, TrainerStart
from sftd_worker.trainer.imports import hide_bitsandbytes, quick_imports, show_bitsandbytes
from sftd_worker.trainer.signals import OBEYED, Signals, adopt_orphans, die_with

MAX_REQUEST_BYTES = 1024 * 1024
MAX_FDS = 250  # the kernel takes 253 in one message
# What a run imports once it knows its base: the usual architectures.
_ARCHITECTURES = ("gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")


def main() -> None:
    """Import, say so, and fork on request. Comes back in each trainer, and is a trainer from there on."""
    environment = dict(os.environ)
    agent = socket.socket(fileno=int(sys.argv[1]))
    preload()
    trainer = serve(agent, environment, begin=_begin_anew)
    if trainer is None:
        return
    folder, signals = trainer

    from sftd_worker.trainer.__main__ import work

    work(folder, signals)


def preload() -> None:
    """Import what most runs import, without bitsandbytes: its import asks CUDA for its devices."""
    hide_bitsandbytes()
    with quick_imports():
        # tqdm's own lock is a semaphore that all forks share, and every progress bar takes it, shown or not: a trainer
        # killed at that moment would leave all later ones waiting for it.
        importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())
        importlib.import_module("sftd_worker.trainer.run")
        importlib.import_module("peft.utils.transformers_weight_conversion")  # by peft at its first adapter
        for name in _ARCHITECTURES:
            importlib.import_module(f"transformers.models.{name}.configuration_{name}")
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        with contextlib.suppress(ImportError):  # where transformers keeps it at present
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            get_checkpoint_conversion_mapping(
                "llama"
            )  # the renamed weights of all architectures, made at the first call
    show_bitsandbytes()


def serve(
    agent: socket.socket, environment: dict[str, str], *, begin: Callable[[], None]
) -> tuple[Path, Signals] | None:
    """Fork a trainer for each request, until the agent is gone: then it returns None.

    In each trainer it returns too, with its folder and its signals, after `begin`. `environment` is the one that this
    process was started with: what differs from it in a request is changed, and what libraries have set since stays.
    """
    agent_pid = os.getppid()
    agent.send(WARM_READY)
    while True:
        message, fds, *_ = socket.recv_fds(agent, MAX_REQUEST_BYTES, MAX_FDS)
        if not message:
            return None
        adopted, told = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, OBEYED)  # until the trainer has handlers for them
        if _fork_twice():
            try:
                os.close(told)
                agent.close()
                return _become_trainer(message, fds, adopted, agent_pid, environment, begin)
            except BaseException:  # nothing has been trained yet; the agent starts the job the cold way
                traceback.print_exc()
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OBEYED)
        for fd in (*fds, adopted):  # the locks among them are the trainer's alone
            os.close(fd)
        with contextlib.suppress(BrokenPipeError):  # there is no trainer
            os.write(told, b"1")
        os.close(told)


def _fork_twice() -> bool:
    """True in the grandchild, False in this process. What is between them is gone: the agent is next of kin."""
    try:
        between = os.fork()
    except OSError:
        traceback.print_exc()
        return False
    if between:
        os.waitpid(between, 0)
        return False
    try:
        grandchild = os.fork()
    except OSError:
        traceback.print_exc()
        os._exit(1)
    if grandchild:
        os._exit(0)
    return True


def _become_trainer(
    message: bytes,
    fds: list[int],
    adopted: int,
    agent_pid: int,
    environment: dict[str, str],
    begin: Callable[[], None],
) -> tuple[Path, Signals]:
    """Be what `python -m sftd_worker.trainer` would be by now, and wait for the agent's word to go on."""
    os.setsid()
    if os.read(adopted, 1) != b"1":
        raise RuntimeError("the warm parent died while it forked")
    os.close(adopted)
    die_with(agent_pid)
    adopt_orphans()
    start = TrainerStart.model_validate_json(message)
    channel, output, *locks = fds
    for target in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(output, target)
    os.close(output)
    os.set_inheritable(channel, False)
    for lock in locks:
        os.set_inheritable(lock, True)
    os.chdir(start.folder)
    _change_environment(environment, start.environment)
    sys.argv[:] = [str(Path(__file__).with_name("__main__.py")), start.folder]
    _be_shown_as([sys.executable, "-m", "sftd_worker.trainer", start.folder])
    begin()
    signals = Signals().install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OBEYED)
    with socket.socket(fileno=channel) as agent:
        agent.send(str(os.getpid()).encode())
        if agent.recv(len(TRAINER_GO)) != TRAINER_GO:
            raise RuntimeError("the agent did not wait for this trainer")
    return Path(start.folder), signals


def _change_environment(was: dict[str, str], wanted: dict[str, str]) -> None:
    for name in was.keys() - wanted.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in wanted.items() if was.get(name) != value})


def _begin_anew() -> None:
    """Where libraries keep something that each process should have of its own."""
    import numpy
    import torch

    numpy.random.seed()  # from the system; Python's own generator does this by itself
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "something that was imported has asked CUDA for its devices; this process cannot use them"
        )


def _be_shown_as(command: list[str]) -> None:
    """Let ps show this process as the trainer of its folder. It reads a process's arguments from where they lie in its
    memory; the agent gives the warm parent an empty one behind the others, so that there is room."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    begin, end = (
        int(fields[45]),
        int(fields[46]),
    )  # arg_start and arg_end: proc(5) counts from 1, and two come before
    if begin:  # else the kernel does not tell
        text = b"\0".join(os.fsencode(word) for word in command)[: end - begin - 1]
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, text, len(text))


if __name__ == "__main__":
    main()
