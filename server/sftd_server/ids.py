"""Ids: text with a readable prefix, short enough to type, too many to guess."""

import secrets

JOB, RESULT_FILE = "job_", "file_result_"  # so begin the ids of jobs, and of their result files
_ALPHABET = "0123456789abcdefghijkmnpqrstuvwxyz"  # without l and o, which look like 1 and 0


def new_id(prefix: str) -> str:
    """`job_7k2m…`: 12 characters, 61 bits."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(12))


def result_file_id(job_id: str) -> str:
    """The id of a job's result file: always the same, so that making it twice makes one."""
    return RESULT_FILE + job_id.removeprefix(JOB)
