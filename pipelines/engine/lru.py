"""A cache of the values that were used last."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Remembers up to `limit` values; with 0 every value is made anew."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.hits = self.misses = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        if key in self._values:
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]
        self.misses += 1
        value = make()
        if self.limit:
            self._values[key] = value
            if len(self._values) > self.limit:
                self._values.popitem(last=False)
        return value
