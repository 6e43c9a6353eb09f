"""Ids: text with a readable prefix, short enough to type, too many to guess."""

import secrets

_ALPHABET = "0123456789abcdefghijkmnpqrstuvwxyz"  # without l and o, which look like 1 and 0


def new_id(prefix: str) -> str:
    """`job_7k2m…`: 12 characters, 61 bits."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(12))
