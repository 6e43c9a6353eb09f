"""Lists that span pages, read as one iterator."""

from collections.abc import Iterator
from typing import TypeVar

from sftd._transport import Params, Transport
from sftd.schemas import Answer, Page

T = TypeVar("T", bound=Answer)


def pages(
    transport: Transport,
    path: str,
    kind: type[T],
    *,
    params: Params | None = None,
    after: str | int | None = None,
    limit: int | None = None,
    page_size: int | None = None,
) -> Iterator[T]:
    """The items of a list, fetching further pages as they are needed; `limit` bounds the items, not a page."""
    num_left = limit
    while num_left is None or num_left > 0:
        size = page_size if num_left is None else min(num_left, page_size or 1000)
        query = {**(params or {}), "after": after, "limit": size}
        page = transport.request("GET", path, params=query).parse(Page[kind])  # type: ignore[valid-type]  # a class made at run time
        items: list[T] = page.data
        yield from items if num_left is None else items[:num_left]
        if not page.has_more or page.next_after is None or not items:
            return
        after = page.next_after
        num_left = None if num_left is None else num_left - len(items)
