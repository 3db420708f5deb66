"""Which images make an episode: a pure function of (seed, number)."""

from typing import NamedTuple

import numpy as np

from util.class_index import ClassIndex
from util.errors import UserError


class EpisodeFiles(NamedTuple):
    """One episode as places in the list."""

    query: int
    supports: tuple[int, ...]
    class_id: int


class EpisodeSampler:
    """Draws episode number n, the same for any number of workers, any batch size, any machine.

    The images of the fold are those in which one of ``classes`` qualifies (has ``min_area`` pixels). They serve
    as queries in turn: every run of ``len(self)`` numbers is one pass over all of them in its own random order. The
    query's class is drawn from all of ``classes`` present in it, whatever their area (as in the lineage); the K
    supports are drawn from the images in which that class qualifies, without repetition and never the query.

    Args:
        index: of the list.
        classes: ids of the classes an episode can be about.
        avoid: ids of classes whose images are left out altogether (``data.novel_in_train: drop``).
        class_names: for error messages.
    Raises:
        UserError: a class cannot give a query and K supports.
    """

    def __init__(
        self,
        index: ClassIndex,
        *,
        classes: tuple[int, ...],
        shots: int,
        min_area: int,
        seed: int,
        class_names: list[str],
        avoid: tuple[int, ...] = (),
    ) -> None:
        self.index, self.classes, self.shots, self.seed = index, classes, shots, seed
        avoided = np.flatnonzero(index.pixels[:, list(avoid)].sum(1) > 0)
        self.supports_of = {c: np.setdiff1d(index.qualifying(c, min_area), avoided) for c in classes}
        for c, images in self.supports_of.items():
            if len(images) < shots + 1:
                raise UserError(
                    f"class '{class_names[c - 1]}' has {len(images)} images with at least {min_area} pixels of it in"
                    f" {index.list_path}, but {shots}-shot episodes need {shots + 1}: lower data.shots or"
                    " data.min_area, or add images"
                )
        self.queries = np.unique(np.concatenate(list(self.supports_of.values())))

    def __len__(self) -> int:
        """Images of the fold."""
        return len(self.queries)

    def __call__(self, number: int) -> EpisodeFiles:
        passes, position = divmod(number, len(self))
        order = np.random.default_rng([self.seed, 0, passes]).permutation(len(self))
        query = int(self.queries[order[position]])
        rng = np.random.default_rng([self.seed, 1, number])
        present = [c for c in self.classes if self.index.pixels[query, c] > 0]
        class_id = present[rng.integers(len(present))]
        others = self.supports_of[class_id]
        supports = rng.choice(others[others != query], self.shots, replace=False)
        return EpisodeFiles(query, tuple(int(i) for i in supports), class_id)
