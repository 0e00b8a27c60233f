"""Iterate over values that a thread makes ahead of their use."""

import collections
import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import TypeVar

Value = TypeVar("Value")


def prefetch(values: Iterable[Value], count: int) -> Iterator[Value]:
    """Iterate over values that are not None; a thread makes up to `count` of them while the one before them is used."""
    source = iter(values)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        coming = collections.deque(thread.submit(next, source, None) for _ in range(count))
        while (value := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, source, None))
            yield value
