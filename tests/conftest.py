"""Shared by all suites: where the real data lies, and no network but loopback."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # several trainers share few cores; spinning threads would starve them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# There is no network: a name that is not in /etc/hosts is not to be waited for. torch looks up where its ranks are.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# Behind `nohup` and `&` these are ignored, and so they would be by all that the tests start.
for _number, _handler in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}.items():
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="module")
def _heap_that_is_not_searched() -> Iterator[None]:
    """What thousands of tests leave behind is not searched for garbage again and again, as the trainer does when memory
    runs out: in the last of them that took half a minute where it takes a second alone."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a real data file; skips where the folder is not there."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/data/{name}, which is not here")
        return path

    return find
