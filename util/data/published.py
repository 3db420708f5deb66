"""The published lists of PASCAL-5i, recognised by the hash of their ids.

Papers that follow PFENet's code train on VOC 2012 ``train`` united with SBD ``train_noval``; another list changes
results by points. VOC's own masks have an ignored border, SBD's have none: their number shows if the border was lost.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from util.data.class_index import Item
from util.errors import first_of

LISTS = Path(__file__).resolve().parents[2] / "lists"


class Published(NamedTuple):
    """A published list."""

    title: str
    split: str  # 'train' or 'val'
    ignored: int  # number of masks that hold 255


PUBLISHED = {
    "a9bc0a1466deee7a9d4923ae677ec6098f090110a60cb769052a4abad586746c": Published(
        "PASCAL-5i train, 5953, as published", "train", 1464
    ),
    "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d": Published(
        "PASCAL-5i val, 1449, as published", "val", 1449
    ),
    "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24": Published("the 10582 list", "train", 1464),
}
"""by the SHA-256 of the sorted ids, one a line"""


def published(items: Iterable[Item]) -> Published | None:
    """Return the published list with these images, whatever their order and folders; None if there is none."""
    ids = sorted({item.image.stem for item in items})
    return PUBLISHED.get(hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest())


def title_of(items: Iterable[Item]) -> str:
    """Return the name of a list on screen."""
    found = published(items)
    return found.title if found else "not a published list of PASCAL-5i"


def is_benchmark(dataset: str) -> bool:
    """Tell whether results on a data set of this name are compared with published ones."""
    return dataset.upper().startswith(("PASCAL", "COCO"))


def overlap(train: Iterable[Item], val: Iterable[Item]) -> str | None:
    """Return what is wrong if the training and the validation list share images; None if they do not."""
    shared = sorted({str(item.image) for item in train} & {str(item.image) for item in val})
    if not shared:
        return None
    return (
        f"{len(shared)} images are in both the training and the validation list ({first_of(shared, separator=', ')});"
        " results on training images say nothing about new ones: remove them from one of the lists"
    )
