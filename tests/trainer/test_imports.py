"""What a run imports: bitsandbytes where a run may need it, and nowhere else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftd.protocol import TrainerJob
from sftd_worker.trainer.imports import needs_bitsandbytes

SEEN = """
import gc, sys
from pathlib import Path
from sftd.protocol import TrainerJob
from sftd_worker.trainer.imports import import_run
import_run(TrainerJob.model_validate_json(Path(sys.argv[1]).read_text()))
print(sys.modules.get("bitsandbytes") is not None, gc.isenabled(), "sftd_worker.trainer.run" in sys.modules)
"""


@pytest.mark.parametrize(
    ("spec", "job", "needed"),
    [
        ({}, {}, False),
        ({"method": "full"}, {}, False),
        ({"method": "qlora", "precision": "auto"}, {}, True),
        ({"optimizer": "adamw_8bit"}, {}, True),
        ({}, {"trust_remote_code": True}, True),  # what it imports is not known
        ({}, {"model_path": "org/not-on-this-machine"}, True),
    ],
)
def test_who_needs_bitsandbytes(
    make_job: Callable[..., TrainerJob], spec: dict[str, Any], job: dict[str, Any], needed: bool
) -> None:
    made = make_job(**spec)

    assert needs_bitsandbytes(made.model_copy(update=job)) is needed


def test_a_base_that_is_stored_quantised_needs_it(
    make_job: Callable[..., TrainerJob], tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))

    assert needs_bitsandbytes(make_job(base_model=str(folder)))


@pytest.mark.parametrize(("method", "imported"), [("lora", "False"), ("qlora", "True")])
def test_only_what_a_job_needs_is_imported(
    make_job: Callable[..., TrainerJob], tmp_path: Path, method: str, imported: str
) -> None:
    path = tmp_path / "job.json"
    path.write_text(make_job(method=method, precision="auto").model_dump_json())

    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(path)], capture_output=True, text=True, check=True, timeout=120
    )

    assert done.stdout.split() == [imported, "True", "True"]
