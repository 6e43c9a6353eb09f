"""A line of the harness: a scenario, what it is given, and the one JSON line that it comes to."""

import contextlib
import json
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import invariants
from tests.faults.nursery import Nursery
from tests.faults.world import World

INVARIANTS = [f"I{number}" for number in range(1, 13)]


class NotPossible(Exception):
    """This machine can not do what a line needs: no root, no faketime. The line is skipped, and says why."""


@dataclass(frozen=True)
class Line:
    """A scenario by name."""

    name: str
    faults: str  # of the list F1-F25 that it stands for
    run: Callable[["Run"], None]
    must_fence: bool = False  # it proves nothing where no call was fenced
    alone: bool = True  # it needs the machine for itself; others run beside each other
    must_find: frozenset[str] = (
        frozenset()
    )  # a bug is planted: violations of one of these invariants must be found


@dataclass
class Run:
    """What a line is given, and where it puts its figures."""

    nursery: Nursery
    folder: Path
    seed: int
    long: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # bounds on speed
    worlds: list[World] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"line {self.seed}")

    @property
    def patience(self) -> float:
        """By how much bounds in seconds are stretched: 1 on two idle cores, more on slow ones or where others compute."""
        begun = time.process_time()
        sum(i * i for i in range(2_000_000))
        slow = (time.process_time() - begun) / 0.15
        busy = os.getloadavg()[0] / (os.cpu_count() or 1)
        return max(1.0, slow) * max(1.0, busy)

    def world(self, **options: Any) -> World:
        """A new installation; it is closed when the line is over."""
        number = len(self.worlds) + 1
        folder = self.folder / f"world-{number}"
        self.worlds.append(World(folder, self.nursery, seed=self.seed * 100 + number, **options))
        return self.worlds[-1]

    def times(self, short: int, long: int) -> int:
        """How often something is done, here and in the long version."""
        return long if self.long else short

    def check(self, world: World, **options: Any) -> None:
        """Ask the checker; the world's server runs."""
        self.violations += invariants.check(world, **options)

    def require(self, holds: bool, what: str) -> None:
        """Note a violation of the line's own promise where something does not hold."""
        if not holds:
            self.violations.append(what)

    def within(self, seconds: float, bound: float, what: str) -> None:
        """Note where something was slower than the machine would allow: said, and a violation only of a strict run."""
        bound *= self.patience
        if seconds > bound:
            self.missed.append(f"{what} took {seconds:.3g} s, {bound:.3g} s are the bound")

    def settle(self, world: World, **options: Any) -> None:
        """Stop the workers, kill the server once more, and check what is found after its start."""
        world.stop_workers()
        world.kill_servers()
        world.start_servers()
        self.check(world, **options)


def play(
    line: Line, nursery: Nursery, folder: Path, *, seed: int, long: bool, strict: bool
) -> dict[str, Any]:
    """Run a line; the figures that it prints. `ok` says whether it is as it should be."""
    run = Run(nursery, folder, seed, long)
    begun = time.monotonic()
    skipped = ""
    try:
        line.run(run)
    except NotPossible as reason:
        skipped = str(reason)
    except Exception as error:  # the edge of a line: what could not be checked does not hold
        run.violations.append(f"the line broke off: {error!r}")
        (folder / "traceback.txt").write_text(traceback.format_exc())
    for world in run.worlds:
        with contextlib.suppress(Exception):  # what it left running dies with the nursery
            world.close()
    told: dict[str, Any] = {"line": line.name, "faults": line.faults, "seed": seed}
    if skipped:
        return {**told, "ok": True, "skipped": skipped}
    kills: Counter[str] = sum((world.kills for world in run.worlds), Counter())
    fenced = sum(world.num_fenced for world in run.worlds)
    if strict:
        run.violations += run.missed
    if line.must_fence and not fenced:
        run.violations.append("no call was fenced: this run has proved nothing")
    told |= {
        "jobs": sum(len(world.plans) for world in run.worlds),
        "kills": dict(kills),
        "zombies": sum(world.num_zombies for world in run.worlds),
        "acknowledged": sum(world.num_acknowledged for world in run.worlds),
        "fenced": fenced,
        "lost_answers": sum(world.network.num_lost_answers for world in run.worlds),
        **run.figures,
        **({"missed": run.missed} if run.missed else {}),
        "violations": len(run.violations),
        "seconds": round(time.monotonic() - begun, 1),
    }
    told["ok"] = not run.violations
    if line.must_find:
        told["caught_by"] = sorted(
            {name for name in INVARIANTS for text in run.violations if text.startswith(f"{name}:")}
        )
        told["ok"] = bool(line.must_find & set(told["caught_by"]))
    if not told["ok"]:
        told["first_violations"] = run.violations[:10]
    (folder / "violations.json").write_text(json.dumps(run.violations, indent=1))
    return told
