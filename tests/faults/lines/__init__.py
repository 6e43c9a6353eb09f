"""The lines of the fault harness: each is one scenario, with a checker over everything that it left behind."""

from tests.faults.line import Line
from tests.faults.lines import chaos, mutants, server

ALL: list[Line] = [*chaos.LINES, *server.LINES, *mutants.LINES]
