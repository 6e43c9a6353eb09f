"""The frame of OpenAI's lists, and their times."""

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


class OpenAIList(BaseModel, Generic[T]):
    """A page. Its reader goes on with `after` = the id of its last item."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


def listed(data: list[T], ids: list[str], *, more: bool) -> OpenAIList[T]:
    """A page of these items, whose ids are `ids`."""
    return OpenAIList[T](
        data=data, has_more=more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None
    )


def unix(at: datetime | None) -> int | None:
    """Whole seconds since 1970, as OpenAI gives times."""
    return None if at is None else int(at.timestamp())
