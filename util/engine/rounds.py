"""The order in which an evaluation reads its images, so that each is encoded as seldom as memory allows.

Images are resized the same way every time and the backbone is frozen: what is read from an image serves every
episode in which it is a query or a support. Episodes are therefore sorted by class (an episode's images all show
its class) and cut into rounds whose images fit into memory together. Each round reads its images once, then runs
its episodes. The counts are sums, so the order does not change a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from util.data.class_index import ClassIndex
from util.data.episodes import EpisodeFiles

T = TypeVar("T")


@dataclass
class Round:
    """Episodes of one class that are evaluated together, and the images that they need."""

    class_id: int
    episodes: list[int] = field(default_factory=list)
    """numbers of its episodes"""
    images: dict[int, set[str]] = field(default_factory=dict)
    """place in the list -> what the image serves as in this round: 'query', 'support' or both"""

    def bytes(self, size: "EncodingSize", index: ClassIndex) -> float:
        """An estimate of what its encodings take."""
        return sum(size.of(index, image, self.class_id, role) for image, roles in self.images.items() for role in roles)


@dataclass(frozen=True)
class EncodingSize:
    """Bytes that are kept of an image."""

    query: int
    """as a query"""
    whole: int
    """as a support that the target fills"""

    def of(self, index: ClassIndex, image: int, class_id: int, role: str) -> float:
        """An estimate: a support keeps the positions that its target covers, and some at its border."""
        if role == "query":
            return self.query
        areas = index.areas(image)
        return self.whole * min(1.0, 1.2 * (areas.get(class_id, 0) / sum(areas.values())) + 0.02)


def plan_rounds(episodes: Sequence[EpisodeFiles], index: ClassIndex, size: EncodingSize, limit: float) -> list[Round]:
    """Rounds of at most ``limit`` bytes of encodings each; an episode whose own images are more gets its own round."""
    rounds: list[Round] = []
    used = 0.0
    for number in sorted(range(len(episodes)), key=lambda n: (episodes[n].class_id, episodes[n].query)):
        episode = episodes[number]
        needed = [(episode.query, "query"), *((image, "support") for image in episode.supports)]

        def missing(held: dict[int, set[str]], needed: Sequence[tuple[int, str]] = needed) -> list[tuple[int, str]]:
            return [(image, role) for image, role in needed if role not in held.get(image, ())]

        current = rounds[-1] if rounds and rounds[-1].class_id == episode.class_id else None
        cost = sum(size.of(index, i, episode.class_id, role) for i, role in missing(current.images if current else {}))
        if current is None or used + cost > limit:
            current, used = Round(episode.class_id), 0.0
            rounds.append(current)
            cost = sum(size.of(index, image, episode.class_id, role) for image, role in needed)
        used += cost
        current.episodes.append(number)
        for image, role in needed:
            current.images.setdefault(image, set()).add(role)
    return rounds


def batched(things: Sequence[T], size: int) -> list[Sequence[T]]:
    """Runs of ``size`` things; the last may be shorter."""
    return [things[start : start + size] for start in range(0, len(things), size)]
