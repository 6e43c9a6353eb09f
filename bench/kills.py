"""Kill training runs at random points, resume them, and count the runs that did not end bit-identically: it must be none.

    python bench/kills.py [--kills 500] [--seed 1] [--seconds N] >> bench/results/kills.jsonl

Every variant of tests/trainer/kill_runs.py in turn. Prints one JSON line: kills by what they hit, and mismatches; exits
with 1 if there is one, and leaves its folder behind.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the program of the tests for as many kills, and sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.trainer.kill_runs", str(folder), "--kills", str(flags.kills)]
    command += ["--seed", str(flags.seed), "--seconds", str(flags.seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    outcomes = []
    for line in process.stdout:
        if line.startswith("{"):
            outcomes.append(json.loads(line))
            if outcomes[-1]["mismatch"]:
                print(f"mismatch, see {folder}: {line}", file=sys.stderr)
    if process.wait() != 0:
        sys.exit(f"the runs ended early with {process.returncode}; their folder is {folder}")
    by_variant: Counter[str] = Counter()
    for outcome in outcomes:
        by_variant[outcome["variant"]] += len(outcome["deaths"])
    mismatches = sum(bool(outcome["mismatch"]) for outcome in outcomes)
    print(
        json.dumps(
            {
                "kills": sum(by_variant.values()),
                "runs": len(outcomes),
                "mismatches": mismatches,
                "by_phase": Counter(hit for outcome in outcomes for hit in outcome["hits"]),
                "by_variant": by_variant,
                "seed": flags.seed,
                "seconds": round(time.monotonic() - started),
            }
        )
    )
    sys.exit(1 if mismatches else 0)


if __name__ == "__main__":
    main()
