"""A child process that cannot outlive its parent, however the parent dies.

`tethered(argv)` starts argv through a few lines that ask the kernel for SIGKILL at the parent's death, then become
argv (same process id, same open files). A `preexec_fn` would do the same but may deadlock in a process with threads.
Linux only; elsewhere argv is returned as it is. The child dies with the thread that spawns it.
"""

import os
import sys
from collections.abc import Sequence

# The parent may have died before prctl: then the child has another parent already, and must not go on. As a subreaper
# it keeps below itself what its own children leave behind.
_TETHER = """
import ctypes, os, signal, sys
prctl = ctypes.CDLL(None).prctl
prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if sys.argv[2] == "adopts":
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


def tethered(argv: Sequence[str], *, adopts: bool = False) -> list[str]:
    """The command that runs `argv` (an absolute program and its arguments), bound to this thread's life.

    `adopts`: descendants of it whose parents die become its children, so that they can be told from others' orphans.
    """
    if not sys.platform.startswith("linux"):
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), "adopts" if adopts else "-", *argv]
