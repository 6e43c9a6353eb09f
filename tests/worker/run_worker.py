"""A worker as its own process, with settings that no flag offers. `python run_worker.py '{"data": …}'`."""

import json
import logging
import os
import sys

from sftd_worker.agent import CannotWork, run
from sftd_worker.settings import read_settings

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        sys.exit(run(read_settings(os.environ, **json.loads(sys.argv[1]))))
    except CannotWork as error:
        sys.exit(str(error))
