"""Readers: a reader turns one line of a list into an Item and decides how its mask is decoded.

``data.reader`` names one of :data:`READERS`. A data set with masks of another kind needs a function here that makes an
:class:`~util.data.class_index.Item` of a line's two paths, and a line in the table.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model import IGNORE
from util.config import DataConfig
from util.data.class_index import Item, MakeItem
from util.data.images import described, opened, seen_target
from util.errors import UserError


def class_ids(image: Path, mask: Path, ids: Mapping[str, int]) -> Item:
    """Make an item whose mask holds class ids: PASCAL, COCO, and your own data in their layout."""
    return Item(image, mask)


def class_folders(image: Path, mask: Path, ids: Mapping[str, int]) -> Item:
    """Make an item of the class that its folder is named after, with a black and white mask: FSS-1000 and the like."""
    name = image.parent.name
    if name not in ids:
        raise UserError(f"{image} is in folder '{name}', which is not among data.classes")
    return Item(image, mask, ids[name], read_binary_mask)


def deepglobe(image: Path, mask: Path, ids: Mapping[str, int]) -> Item:
    """Make an item of Deepglobe as prepared by PATNet's authors: N/test/origin/x.jpg is of class number N."""
    folder = image.parents[2].name
    if not folder.isdecimal() or not 1 <= int(folder) <= len(ids):
        raise UserError(f"{image} is in folder '{folder}', which is not 1 to {len(ids)}, the number of a class")
    return Item(image, mask, int(folder), read_binary_mask)


def one_class(image: Path, mask: Path, ids: Mapping[str, int]) -> Item:
    """Make an item of the first class, with a black and white mask: chest X-rays and other data of one class."""
    return Item(image, mask, 1, read_binary_mask)


READERS = {
    "class_ids": class_ids,
    "class_folders": class_folders,
    "deepglobe": deepglobe,
    "one_class": one_class,
}


def reader_of(data: DataConfig) -> MakeItem:
    """Return the reader that a config names, with the ids of its classes."""
    if data.reader not in READERS:
        raise UserError(f"data.reader must be one of {', '.join(READERS)}, got '{data.reader}'")
    read, ids = READERS[data.reader], {name: number for number, name in enumerate(data.classes, 1)}
    return lambda image, mask: read(image, mask, ids)


def read_binary_mask(path: Path) -> np.ndarray:
    """Read a mask of one class, (H, W) uint8: 1 target, 0 other, 255 ignored.

    Values 0, 1 and 255 are taken as they are. In any other mask :func:`~util.data.images.seen_target` decides.
    """
    with opened(path, f"mask {path}") as image:
        if image.mode in ("L", "P") and {1, IGNORE} <= set(np.unique(np.asarray(image)).tolist()) <= {0, 1, IGNORE}:
            return np.asarray(image)
        target = seen_target(image, single=True)
        if target is None:
            raise UserError(
                f"mask {path} {described(image)}; a mask of one class is white on black or an image's alpha"
            )
        return target.astype(np.uint8)
