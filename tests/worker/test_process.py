"""The trainer as a process, beside another one."""

import subprocess
import sys
from pathlib import Path

SCRIPT = '''
import os, sys, time
from pathlib import Path

from sftd_worker import family
from sftd_worker.process import Trainer

SLEEPS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(60)
"""


def start(name):
    folder = Path(sys.argv[1]) / name
    (folder / "logs").mkdir(parents=True)
    return Trainer(
        [sys.executable, "-c", SLEEPS],
        folder=folder,
        attempt=1,
        environment=os.environ,
        lock_fds=[],
        save_grace_seconds=1,
        stop_grace_seconds=1,
        on_exit=lambda: None,
    )


def below(trainer):
    return family.descendants(trainer._process.pid)


family.adopt_orphans()
late, next_one = start("late"), start("next")
while not (below(late) and below(next_one)):
    time.sleep(0.01)
left_behind = below(late)
late.kill()
while late.running:
    time.sleep(0.01)
print("next lives:", next_one.running and len(below(next_one)) == 1)
print("left behind:", [pid for pid in left_behind if Path(f"/proc/{pid}").exists()])
next_one.kill()
while next_one.running:
    time.sleep(0.01)
print("at the end:", family.descendants(os.getpid()))
'''


def test_a_trainer_that_dies_late_takes_its_own_with_it_and_nothing_of_the_next_one(tmp_path: Path) -> None:
    """One that hung in the kernel, say: the agent had gone on to another job."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60
    )

    assert done.stdout.splitlines() == ["next lives: True", "left behind: []", "at the end: []"], done.stderr


FAILS_AT_BIRTH = """
import os, sys, time
from pathlib import Path

from sftd_worker import family
from sftd_worker.process import Trainer

folder = Path(sys.argv[1])
(folder / "logs").mkdir()
born = []


def started(trainer):
    born.append(trainer.pid)
    raise OSError(122, "Disk quota exceeded")  # as where the file of its output is closed on NFS


family.adopt_orphans()
try:
    Trainer(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        folder=folder,
        attempt=1,
        environment=os.environ,
        lock_fds=[],
        save_grace_seconds=1,
        stop_grace_seconds=1,
        on_exit=lambda: None,
        on_started=started,
    )
except OSError as error:
    print("raised:", error.errno, "lives:", Path(f"/proc/{born[0]}").exists(), "known:", sorted(family.living))
"""


def test_a_trainer_is_ended_where_what_follows_its_birth_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS_AT_BIRTH, str(tmp_path)], capture_output=True, text=True, timeout=60
    )

    assert done.stdout == "raised: 122 lives: False known: []\n", done.stderr
