"""For the scripts, which have no pytest: `with raises(openai.NotFoundError, code="unknown_job"):`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai


@contextmanager
def raises(kind: type[openai.APIStatusError], **fields: Any) -> Iterator[None]:
    """The block must raise exactly this class, with these fields (code, param, type), and name its request."""
    caught: openai.APIStatusError | None = None
    try:
        yield
    except openai.APIStatusError as error:
        caught = error
    assert caught is not None, f"{kind.__name__} was expected, and nothing was raised"
    found = {name: getattr(caught, name) for name in fields}
    assert type(caught) is kind, f"{kind.__name__} was expected, not {caught!r}"
    assert found == fields, f"{fields} were expected, not {found}: {caught}"
    assert str(caught.request_id).startswith("req_"), caught.request_id
