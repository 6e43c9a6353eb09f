"""A warm parent of scripted trainers: `python scripted_warm.py SCRIPT.json FD`. It imports nothing, and forks as the real
one does.
"""

import os
import runpy
import socket
import sys
from pathlib import Path

from sftd_worker.trainer.warm import serve

if __name__ == "__main__":
    script = sys.argv[1]
    trainer = serve(socket.socket(fileno=int(sys.argv[2])), dict(os.environ), begin=lambda: None)
    if trainer is not None:
        program = str(Path(__file__).with_name("scripted_trainer.py"))
        sys.argv[:] = [program, script, str(trainer[0])]
        runpy.run_path(program, run_name="__main__")
