"""F6: bugs that are planted must be caught: each of these lines fails if the checker does not find it."""

from dataclasses import replace

from tests.faults.line import Line, Run
from tests.faults.lines.chaos import Weather, storm

_SHORT = Weather(
    seconds=9, jobs=12, pause=(0.05, 0.3), steps=(40, 120), cancels=0.1, pauses=0.1, to_the_end=False
)
MUTANTS = {
    # A stale write is what must get through: many zombies, whose last words are held up on their way.
    "fence": replace(_SHORT, zombie=6, hold=0.06, worker=1, server=0.5),
    # An answer that was lost is asked for again: the batch arrives twice.
    "sequence": replace(_SHORT, lose_answers=0.3, worker=1, server=0.3, zombie=0, cut=0),
    # A worker that is gone: the history must tell of it.
    "reaper_event": replace(_SHORT, worker=5, zombie=0, server=0.3, rest=(2.3, 4)),
    # A kill inside a save: what was announced is not whole.
    "staging": replace(_SHORT, trainer=8, worker=1, zombie=0, server=0.3, save_seconds=0.3),
}


CAUGHT_BY = {"fence": {"I3"}, "sequence": {"I4", "I5"}, "reaper_event": {"I6"}, "staging": {"I8"}}
TRIES = 4  # a short storm may pass a bug by; one that is never found is not looked for


def _of(name: str, weather: Weather) -> Line:
    def run(line: Run) -> None:
        for _ in range(TRIES):
            if name == "staging":
                world = line.world(trainer_options={"staging": False})
            else:
                world = line.world(mutant=name)
            storm(world, weather)
            line.check(world)
            world.close()
            if any(text.split(":")[0] in CAUGHT_BY[name] for text in line.violations):
                return

    return Line(f"mutant {name}", "F6", run, must_find=frozenset(CAUGHT_BY[name]))


LINES = [_of(name, weather) for name, weather in MUTANTS.items()]
