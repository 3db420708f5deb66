"""A user's own images and masks, from files, numpy or Pillow; util/data/images.py, for data sets, is stricter."""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from model import IGNORE
from util.data.images import class_ids_of, described, opened, rgb_of, seen_target, white_on_black
from util.errors import UserError

_opened = partial(opened, missing="", damaged="convert it to JPEG or PNG, or leave it out")


class Upright(NamedTuple):
    """An image as a person sees it, RGB (H, W, 3) uint8, and its file's EXIF orientation, 1 to 8; 1 is as stored."""

    pixels: np.ndarray
    orientation: int


def read_upright(file: Path | BytesIO, name: str | None = None) -> Upright:
    """Read an image and apply its EXIF orientation; messages call it ``name``, or its path."""
    with _opened(file, name or str(file)) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Upright(as_rgb(ImageOps.exif_transpose(image), name or str(file)), orientation)


def read_mask_on(image: Upright, path: Path, class_id: int | None, *, may_be_empty: bool = False) -> np.ndarray:
    """Read a mask as :func:`target_mask` does, and rotate it to lie on ``image``.

    A mask with an EXIF orientation of its own is rotated by that. A mask without one lies on the image if it has the
    displayed size; it is rotated like the image if it has the stored size only.
    """
    height, width = image.pixels.shape[:2]
    with _opened(path, str(path)) as mask:
        orientation = mask.getexif().get(ExifTags.Base.Orientation, 1)
        labels = Image.fromarray(target_mask(mask, class_id, str(path), may_be_empty=may_be_empty))
    if orientation == 1 and image.orientation != 1:
        if labels.size == (height, width) != (width, height):
            orientation = image.orientation
        elif height == width or image.orientation < 5:
            print(
                f"note: EXIF turns the image of mask {path}, whose size does not tell if it was drawn on the image as"
                " seen (this is assumed) or as stored (then rotate the mask likewise)"
            )
    labels.getexif()[ExifTags.Base.Orientation] = orientation
    turned = np.array(ImageOps.exif_transpose(labels))
    require_same_size(turned, image.pixels, f"mask {path}")
    return turned


def require_same_size(mask: np.ndarray, image: np.ndarray, name: str) -> None:
    """Raise UserError if a mask and its image differ in height or width."""
    (h, w), (height, width) = mask.shape[:2], image.shape[:2]
    if (h, w) != (height, width):
        raise UserError(f"{name} is {w} x {h} and its image {width} x {height}; make them the same size")


def as_rgb(image: np.ndarray | Image.Image, name: str) -> np.ndarray:
    """Convert a Pillow image of any 8-bit mode to RGB (H, W, 3) uint8; numpy arrays must be that already.

    Transparent pixels become white. EXIF orientation is ignored. Messages begin with ``name``.
    """
    if isinstance(image, Image.Image):
        image = rgb_of(image, name)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{name} must be a Pillow image, or numpy RGB (H, W, 3) of uint8")
    return image


def target_mask(
    mask: np.ndarray | Image.Image, class_id: int | None, name: str, *, may_be_empty: bool = False
) -> np.ndarray:
    """Turn a mask into uint8 (H, W): 1 target, 0 other, 255 ignored.

    ``class_id`` is the target's value in a mask of class ids. Without it what is seen decides, and a palette is only a
    way to store colours: the image's alpha, else white on black.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.dtype == np.uint8:
        mask = Image.fromarray(mask)
    if not isinstance(mask, Image.Image) and np.ndim(mask) != 2:
        raise UserError(f"{name} must be a Pillow image, or numpy (H, W)")
    if class_id is not None:
        ids = class_ids_of(mask, name) if isinstance(mask, Image.Image) else mask
        labels = np.where(ids == IGNORE, IGNORE, ids == class_id).astype(np.uint8)
    else:
        target = seen_target(mask) if isinstance(mask, Image.Image) else white_on_black(mask)
        if target is None:
            grey = isinstance(mask, np.ndarray) or mask.mode in ("L", "P")
            ids = np.unique(np.asarray(mask)).tolist() if grey else []
            offered = [f"--class-id {value}" for value in ids if 0 < value < IGNORE][:3]
            raise UserError(
                f"{name} {described(mask)}; a mask of one object is white on black, or an image's alpha; in a mask of"
                f" class ids --class-id (class_id in Python) says which is the target: {' or '.join(offered) or 'none'}"
            )
        labels = target.astype(np.uint8)
    if not (may_be_empty or (labels == 1).any()):
        which = "target" if class_id is None else f"class {class_id}"
        raise UserError(f"{name} shows no {which} (it {described(mask)}); leave that support out")
    return labels
