"""How much `import sftd` costs over Python itself, and what the light install brings: `make bench`.

Prints one JSON line a case. `python -c pass` and `import sftd` are started in turns, A B B A, and medians compared.
"""

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 10
CASES = {
    "import sftd": "import sftd",
    "sftd.Client": "from sftd import Client",
    "sftd.cli": "import sftd.cli",
}


def seconds(code: str) -> float:
    """Wall seconds of one Python process that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure every case against plain Python."""
    for name, code in CASES.items():
        bare, ours = [], []
        for _ in range(ROUNDS):
            bare.append(seconds("pass"))
            ours += [seconds(code), seconds(code)]
            bare.append(seconds("pass"))
        extra = statistics.median(ours) - statistics.median(bare)
        ratio = statistics.median(ours) / statistics.median(bare)
        print(
            json.dumps({"case": name, "extra_seconds": round(extra, 4), "ratio_to_python": round(ratio, 2)})
        )


if __name__ == "__main__":
    main()
