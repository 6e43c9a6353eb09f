"""The lines of the fault harness: each is one scenario, with a checker over everything that it left behind."""

from tests.faults.line import Line
from tests.faults.lines import chaos, clocks, life, links, mutants, real_trainer, server, storage

ALL: list[Line] = [
    *chaos.LINES,
    *server.LINES,
    *links.LINES,
    *storage.LINES,
    *clocks.LINES,
    *life.LINES,
    *real_trainer.LINES,
    *mutants.LINES,
]
