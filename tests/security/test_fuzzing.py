"""F23: every route with whatever its OpenAPI description allows and does not allow: no answer of 5xx, none undocumented.

Schemathesis reads the description from the running server, so a route that is added is fuzzed from then on. What it
finds it prints with a curl command; run it longer by hand with SFTD_FUZZ_EXAMPLES=500.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = os.environ.get("SFTD_FUZZ_EXAMPLES", "6")
# All checks but two: what a spec refers to can be wrong in ways that no schema can say (a file that is not there), and
# the keys are another test's business, which knows the roles.
LEFT_OUT = "positive_data_acceptance,ignored_auth"


@pytest.mark.parametrize("who", ["user", "worker"])
def test_f23_no_request_breaks_the_server_or_gets_an_undocumented_answer(
    make_box, tmp_path: Path, who: str
) -> None:
    box = make_box(max_upload_bytes=100_000)
    leases = [box.running() for _ in range(3)]
    job_id, token = leases[0].job_id, leases[0].token
    assert leases[0].metrics(0, (1, {"loss": 1.0})).status_code == 200
    assert leases[0].checkpoint(1).status_code == 200
    schema = box.admin.get("/openapi.json").json()
    schema["paths"] = {
        path: methods
        for path, methods in schema["paths"].items()
        if path.startswith("/worker/") == (who == "worker")
    }
    assert len(schema["paths"]) >= 8
    _shorten_waits(schema)
    (tmp_path / "openapi.json").write_text(json.dumps(schema))
    # Ids that exist, half of the time, so that more than 404 is met.
    file_id = box.upload()
    (tmp_path / "schemathesis.toml").write_text(
        f'[parameters]\n"path.job_id" = "{job_id}"\n"path.file_id" = "{file_id}"\n' if who == "worker" else ""
    )
    key = (box.worker if who == "worker" else box.admin).headers["authorization"]
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml"), "run",
        str(tmp_path / "openapi.json"), "--url", box.url, "-H", f"Authorization: {key}", "-H", f"X-Lease-Token: {token}",
        "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "7", "--continue-on-failure",
        "--checks", "all", "--exclude-checks", LEFT_OUT, "--warnings", "off", "--no-color", "--request-timeout", "20",
    ]  # fmt: skip

    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)

    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert box.admin.get("/healthz").status_code == 200


def _shorten_waits(schema: dict) -> None:
    """A long poll is waited for: leave the fuzzer no long ones."""
    for model in schema["components"]["schemas"].values():
        wait = model.get("properties", {}).get("wait_seconds")
        if wait:
            wait["maximum"] = 0.05
