"""The fault harness: real servers and workers, killed, stopped, cut off, starved and misled, and a checker over all they did.

    python -m tests.faults [--long] [--seed N] [--only LINE …] [--record] [--strict]      # also: make faults, make faults-long

Prints one JSON line a scenario and a summary; exits with 1 on any violation, where a line that must fence has fenced no
call, and where a planted bug was not caught. A bound on speed that was missed is said, and fails only a --strict run:
machines share their cores. What a failed line has left stays in its folder. docs/reliability.md says what
the lines stand for.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.line import Line, play  # noqa: E402
from tests.faults.lines import ALL  # noqa: E402
from tests.faults.nursery import Nursery  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "faults.jsonl"
SIDE_BY_SIDE = 3  # lines that mostly wait


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--long", action="store_true", help="the same, more of it (hours)")
    parser.add_argument("--seed", type=int, default=1, help="of all random choices; timing is the machine's")
    parser.add_argument("--only", nargs="*", metavar="LINE", help="only lines whose name begins so")
    parser.add_argument("--strict", action="store_true", help="a missed bound on speed is a violation too")
    parser.add_argument("--record", action="store_true", help=f"add the lines to {RESULTS.relative_to(ROOT)}")
    parser.add_argument(
        "--folder", type=Path, help="where to work; default: a new one in the temporary folder"
    )
    flags = parser.parse_args()
    chosen = [
        line for line in ALL if not flags.only or any(line.name.startswith(name) for name in flags.only)
    ]
    if not chosen:
        sys.exit(f"no such line; there are: {', '.join(line.name for line in ALL)}")
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="sftd-faults-"))
    sys.exit(run(chosen, folder, seed=flags.seed, long=flags.long, strict=flags.strict, record=flags.record))


def run(lines: list[Line], folder: Path, *, seed: int, long: bool, strict: bool, record: bool) -> int:
    """Play the lines, those that mostly wait beside each other. Returns the exit code."""
    begun = time.monotonic()
    nursery = Nursery()
    printing = threading.Lock()
    told: list[dict[str, Any]] = []

    def one(line: Line) -> None:
        place = folder / line.name.replace(" ", "-")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        result = play(line, nursery, place, seed=seed, long=long, strict=strict)
        with printing:
            told.append(result)
            print(json.dumps(result), flush=True)
        if result["ok"]:
            shutil.rmtree(place, ignore_errors=True)

    try:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as beside:
            list(beside.map(one, [line for line in lines if not line.alone]))
        for line in lines:
            if line.alone:
                one(line)
    finally:
        nursery.close()
    failed = [result["line"] for result in told if not result["ok"]]
    summary = {
        "summary": "long" if long else "short",
        "seed": seed,
        "lines": len(told),
        "skipped": [result["line"] for result in told if "skipped" in result],
        "jobs": _sum(told, "jobs"),
        "kills": sum(sum(result.get("kills", {}).values()) for result in told),
        "zombies": _sum(told, "zombies"),
        "acknowledged": _sum(told, "acknowledged"),
        "fenced": _sum(told, "fenced"),
        "violations": sum(result.get("violations", 0) for result in told if not _is_mutant(result)),
        "mutants_caught": sum(_is_mutant(result) and result["ok"] for result in told),
        "missed": [result["line"] for result in told if "missed" in result],
        "failed": failed,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(summary), flush=True)
    if record:
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in [*told, summary])
    if failed:
        print(f"failed: {', '.join(failed)}; what they left lies in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _sum(told: list[dict[str, Any]], name: str) -> int:
    return sum(result.get(name, 0) for result in told if not _is_mutant(result))


def _is_mutant(result: dict[str, Any]) -> bool:
    return str(result["line"]).startswith("mutant")


if __name__ == "__main__":
    main()
