"""sftd: a fine-tuning service for a team's own GPU box. This package is the client and the contract.

`from sftd import Client, JobSpec`. Names are imported on first use, so that `import sftd` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftd.client import Client as Client
    from sftd.errors import SftdError as SftdError
    from sftd.schemas import Job as Job
    from sftd.spec import JobSpec as JobSpec

__version__ = "0.1.0"
__all__ = ["Client", "Job", "JobSpec", "SftdError", "__version__"]

_HOME = {"Client": "sftd.client", "Job": "sftd.schemas", "JobSpec": "sftd.spec", "SftdError": "sftd.errors"}


def __getattr__(name: str) -> Any:  # PEP 562: the type depends on the name
    if name not in _HOME:
        raise AttributeError(f"module 'sftd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
