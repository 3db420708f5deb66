"""Features of images that several episodes of an evaluation share, and that the next validation finds again."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Key = tuple[int, str | int]
"""line of an image in the list, and the kind of entry or a class's value in the mask"""


class Step(NamedTuple):
    """Changes of the cache for one request."""

    missing: list[Key]
    """to be computed and put in before the request is served"""
    evicted: list[Key]
    """to be dropped after it"""


class FeatureCache:
    """A dictionary bounded in bytes. An evaluation knows all its requests, so it plans them before it starts.

    Entries that it will not need again are dropped first, then the least recently used.

    Args:
        gib: bound of the memory, without the entries of the request that is being served.
        keep: keep entries for a next evaluation, as long as there is room for them.
    """

    def __init__(self, gib: float, *, keep: bool = True) -> None:
        self.limit, self.keep = gib * 2**30, keep
        self.entries: dict[Key, Any] = {}
        self._owner: tuple[object, ...] | None = None

    def plan(
        self, requests: Sequence[Sequence[Key]], nbytes: Callable[[Key], int], owner: tuple[object, ...]
    ) -> list[Step]:
        """Plan a step for each request, in order.

        Args:
            nbytes: memory of an entry.
            owner: everything that entries depend on: the backbone, the image size, the list ...
        """
        if self._owner not in (None, owner):
            raise ValueError(f"the cache holds features of {self._owner}, not of {owner}; use a new one")
        self._owner = owner
        uses = Counter(key for keys in requests for key in set(keys))
        held = OrderedDict((key, nbytes(key)) for key in self.entries)
        used = sum(held.values())
        steps = []
        for keys in map(dict.fromkeys, requests):
            missing = [key for key in keys if key not in held]
            held.update((key, nbytes(key)) for key in missing)
            used += sum(held[key] for key in missing)
            for key in keys:
                uses[key] -= 1
                held.move_to_end(key, last=uses[key] > 0)
            evicted = []
            while held and (used > self.limit or not (self.keep or uses[next(iter(held))])):
                key, size = held.popitem(last=False)
                used -= size
                evicted.append(key)
            steps.append(Step(missing, evicted))
        return steps
