"""What an administrator does beside a running server: move, back up, restore and check an installation.

`sftd admin …`, or `python -m sftd_server.admin …`.
"""


class AdminError(Exception):
    """A command cannot be carried out. The message says why and what to do."""
