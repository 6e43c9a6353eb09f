"""F23: every route with whatever its OpenAPI description allows and does not allow: no answer of 5xx, none undocumented.

As an admin who names what there is, as a user who is a stranger to every id, and as a worker.

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
# All checks but these. What a spec refers to can be wrong in ways that no schema can say (a file that is not there); the
# keys are another test's business, which knows the roles. An id that is given takes the place of a wrong one, so that the
# request is right after all; and what workers send is read leniently (false for 0), since metrics come as numbers and as
# the strings NaN and Infinity.
LEFT_OUT = {
    "user": "positive_data_acceptance,ignored_auth",
    "admin": "positive_data_acceptance,ignored_auth,negative_data_rejection",
    "worker": "positive_data_acceptance,ignored_auth,negative_data_rejection",
}


@pytest.mark.parametrize("who", LEFT_OUT)
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
    wait_for = box.server.wait_for  # a long poll is waited for: there is no time for 25 s each
    box.server.wait_for = lambda topic, ask, *, seconds: wait_for(topic, ask, seconds=min(seconds, 0.02))
    (tmp_path / "openapi.json").write_text(json.dumps(schema))
    # Ids that exist, so that more than 404 is met.
    user = box.key("fuzz")
    key_id = box.admin.post("/keys", json={"name": "spare"}).json()["id"]
    known = {"job_id": job_id, "file_id": box.upload(), "worker_id": "w1", "key_id": key_id}
    announced = {"filename": "f", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    known["upload_id"] = box.admin.post("/v1/uploads", json=announced).json()["id"]
    lines = ["[parameters]", *(f'"path.{name}" = "{value}"' for name, value in known.items())]
    config = tmp_path / "schemathesis.toml"
    config.write_text("" if who == "user" else "\n".join(lines) + "\n")
    # What is met without ids that exist is met in the other runs as well: here chance alone.
    phases = "examples,fuzzing" if who == "user" else "examples,coverage,fuzzing"
    key = {"admin": box.admin, "user": user, "worker": box.worker}[who].headers["authorization"]
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run",
        str(tmp_path / "openapi.json"), "--url", box.url, "-H", f"Authorization: {key}", "-H", f"X-Lease-Token: {token}",
        "--phases", phases, "--max-examples", EXAMPLES, "--seed", "7", "--continue-on-failure",
        "--checks", "all", "--exclude-checks", LEFT_OUT[who], "--warnings", "off", "--no-color", "--request-timeout", "20",
    ]  # fmt: skip

    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)

    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
    num_routes = sum(len(methods) for methods in schema["paths"].values())
    assert f"Tested: {num_routes}" in run.stdout, run.stdout[-3000:]
    assert box.admin.get("/healthz").status_code == 200
