"""`python -m sftd.cli` is the `sftd` command."""

from sftd.cli import main

main()
