"""A child process that cannot outlive its parent, however the parent dies.

`tethered(argv)` starts argv through a few lines that ask the kernel for SIGKILL at the parent's death, then become
argv (same process id, same open files). A `preexec_fn` would do the same but may deadlock in a process with threads.
Linux only; elsewhere argv is returned as it is. The thread that spawns must live as long as the process.
"""

import os
import sys
from collections.abc import Sequence

# The parent may have died before prctl: then the child has another parent already, and must not go on.
_TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def tethered(argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` (an absolute program and its arguments), bound to this process's life."""
    if not sys.platform.startswith("linux"):
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *argv]
