"""Episodes: drawn as a pure function of (seed, number), or read from a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.data.class_index import ClassIndex, line_of
from util.errors import UserError
from util.files import write_text

FEW = 5  # images of a class below which its IoU is mostly noise


class EpisodeFiles(NamedTuple):
    """One episode as indices into the list, of lines with different images."""

    query: int
    supports: tuple[int, ...]
    class_id: int


def find_supports(
    index: ClassIndex, classes: Sequence[int], min_area: int, avoid: Sequence[int] = ()
) -> dict[int, np.ndarray]:
    """Return for each class the lines with ``min_area`` pixels of it whose images show none of ``avoid``."""
    avoided = index.photos[index.pixels[:, list(avoid)].any(1)]
    allowed = ~np.isin(index.photos, avoided)
    return {c: np.flatnonzero(allowed & (index.pixels[:, c] >= min_area)) for c in classes}


def photos_of(index: ClassIndex, supports: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the different images of the lines of each class; a class with more than K gives K-shot episodes."""
    return {c: np.unique(index.photos[lines]) for c, lines in supports.items()}


def too_few(images: Mapping[str, int]) -> str:
    """Return a warning if the rarest class has too few validation images; ``images`` counts those of each class."""
    name, count = min(images.items(), key=lambda pair: pair[1])
    if count >= FEW:
        return ""
    distinct = f"{count} images of '{name}' in the validation list give {count * (count - 1)} distinct 1-shot episodes"
    return f"{distinct}, and its IoU is mostly noise; add images there"


class EpisodeSampler:
    """Draws episode number n, the same for any number of workers, any batch size, any machine.

    The lines of the fold are those in which one of ``classes`` qualifies (has ``min_area`` pixels). They serve as
    queries in turn: every ``len(self)`` numbers are one pass over all of them in a new random order. The query's
    class is drawn from all of ``classes`` present in it, whatever their area (as in PFENet's code); the K supports
    are drawn from the images in which that class qualifies, without repetition and never the query's. An image with
    several lines is a query with each of its masks, and a support with one of those that qualify. Images that show a
    class of ``avoid`` are left out altogether (``data.novel_in_train: drop``). ``queries`` is ``eval.queries``: with
    'pair' the turns are of lines and classes that qualify in them, with 'class' of classes, whose query is drawn.
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
        queries: str = "image",
    ) -> None:
        self.index, self.classes, self.shots, self.seed = index, classes, shots, seed
        self.supports_of = find_supports(index, classes, min_area, avoid)
        self.photos_of = photos_of(index, self.supports_of)
        self.left_out = {c: len(index.qualifying(c, min_area)) - len(self.supports_of[c]) for c in classes}
        for c, photos in self.photos_of.items():
            if len(photos) < shots + 1:
                raise UserError(
                    f"class '{class_names[c - 1]}' has {len(photos)} images with at least {min_area} pixels of it in"
                    f" {index.list_path}, but {shots}-shot episodes need {shots + 1}: lower data.shots or"
                    " data.min_area, add images, or name the class in data.left_out"
                )
        if queries == "image":
            turns = [(line, -1) for line in np.unique(np.concatenate(list(self.supports_of.values())))]
        elif queries == "pair":
            turns = [(line, c) for c in classes for line in self.supports_of[c]]
        else:
            turns = [(-1, c) for c in classes]
        self.turns = np.array(turns)  # line and class; -1 is drawn
        self._pass, self._order = -1, self.turns

    def __len__(self) -> int:
        return len(self.turns)

    def __call__(self, number: int) -> EpisodeFiles:
        """Return episode number ``number``."""
        passes, position = divmod(number, len(self))
        if passes != self._pass:
            order = np.random.default_rng([self.seed, 0, passes]).permutation(len(self))
            self._pass, self._order = passes, self.turns[order]
        query, class_id = self._order[position].tolist()
        rng = np.random.default_rng([self.seed, 1, number])
        if query < 0:
            query = int(rng.choice(self.supports_of[class_id]))
        if class_id < 0:
            present = [c for c in self.classes if self.index.pixels[query, c]]
            class_id = present[rng.integers(len(present))]
        lines, photos = self.supports_of[class_id], self.photos_of[class_id]
        chosen = rng.choice(photos[photos != self.index.photos[query]], self.shots, replace=False)
        supports = [rng.choice(lines[self.index.photos[lines] == photo]) for photo in chosen]
        return EpisodeFiles(query, tuple(int(line) for line in supports), class_id)


class EpisodeList:
    """Given episodes, used like a sampler."""

    seed = 0  # seeds the augmentation; evaluation uses none

    def __init__(self, index: ClassIndex, episodes: Sequence[EpisodeFiles]) -> None:
        self.index, self.episodes = index, episodes

    def __call__(self, number: int) -> EpisodeFiles:
        """Return episode number ``number``."""
        return self.episodes[number]


Episodes = EpisodeSampler | EpisodeList  # called with a number, it returns the episode of this number


def read_episodes(
    path: Path, index: ClassIndex, *, root: Path, classes: Sequence[int], shots: int
) -> list[EpisodeFiles]:
    """Read the episodes of a file that :func:`write_episodes` made, in its order."""
    lines = {line_of(item, root): line for line, item in enumerate(index.items)}
    try:
        rows = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"episodes file {path} cannot be read ({error}); test.py --write-episodes makes one") from None
    episodes: list[EpisodeFiles] = []
    for number, row in enumerate(rows, 1):
        try:
            record = json.loads(row)
            if record["list_sha256"] != index.list_sha256:
                raise ValueError(f"made for another list than {index.list_path}")
            query, *supports = (lines[name] for name in (record["query"], *record["supports"]))
            if len(supports) != shots:
                raise ValueError(f"{len(supports)} supports, but data.shots is {shots}")
            if len({index.photos[line] for line in (query, *supports)}) <= len(supports):
                raise ValueError("an image occurs twice in the episode")
            if record["class_id"] not in classes:
                raise ValueError(f"class {record['class_id']} is not novel in this fold")
            if absent := [line for line in (query, *supports) if not index.pixels[line, record["class_id"]]]:
                raise ValueError(f"{index.items[absent[0]].mask} holds no pixel of class {record['class_id']}")
            episodes.append(EpisodeFiles(query, tuple(supports), record["class_id"]))
        except (ValueError, KeyError, TypeError) as error:
            reason = error if type(error) is ValueError else "not an episode of this list"
            raise UserError(
                f"episodes file {path} line {number}: {reason}; use the list, fold and shots it was made for"
            ) from None
    if not episodes:
        raise UserError(f"episodes file {path} holds no episodes")
    return episodes


def episode_lines(
    episodes: Sequence[EpisodeFiles], index: ClassIndex, *, root: Path, class_names: list[str]
) -> list[str]:
    """Return episodes as lines of JSON: query, supports (each 'image mask'), class, the list's SHA-256."""
    lines = [line_of(item, root) for item in index.items]
    rows = []
    for episode in episodes:
        record = {
            "query": lines[episode.query],
            "supports": [lines[line] for line in episode.supports],
            "class_id": episode.class_id,
            "class": class_names[episode.class_id - 1],
            "list_sha256": index.list_sha256,
        }
        rows.append(json.dumps(record) + "\n")
    return rows


def write_episodes(path: Path, sampler: EpisodeSampler, count: int, *, root: Path, class_names: list[str]) -> None:
    """Write episodes 0 ... count - 1 of a sampler, for :func:`read_episodes`."""
    episodes = [sampler(number) for number in range(count)]
    write_text(path, "".join(episode_lines(episodes, sampler.index, root=root, class_names=class_names)))
