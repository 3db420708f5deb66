"""A user's own images and masks, from files, numpy or Pillow; util/data/images.py, for data sets, is stricter."""

import warnings
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from model import IGNORE
from util.data.images import opened, refuse_deep, refuse_scaled
from util.errors import UserError

SOFT_BORDER = 0.25
"""up to this share of a mask's pixels, values between 0 and 255 are taken for a soft border"""


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


def read_mask_on(image: Upright, path: Path) -> np.ndarray:
    """Read the values (H, W) of a mask file, rotated to lie on ``image``; :func:`target_mask` interprets them.

    A mask with an EXIF orientation of its own is rotated by that. A mask without one is rotated like the image if it
    has the image's stored size; if it has the displayed size, it lies on the image already.
    """
    height, width = image.pixels.shape[:2]
    stored = (width, height) if image.orientation >= 5 else (height, width)
    with _opened(path, str(path)) as mask:
        refuse_scaled(mask, f"mask {path}")
        exif = mask.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) == 1 and (mask.height, mask.width) == stored:
            exif[ExifTags.Base.Orientation] = image.orientation
        values = mask_values(ImageOps.exif_transpose(mask), str(path))
        if mask.format in ("JPEG", "WEBP") and values.dtype != np.bool_:
            raise UserError(f"mask {path} is {mask.format}, which blurs values; save it as PNG")
    require_same_size(values, image.pixels, f"mask {path}")
    return values


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
        refuse_deep(image, name)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{name} must be a Pillow image, or numpy RGB (H, W, 3) of uint8")
    return image


def mask_values(mask: np.ndarray | Image.Image, name: str) -> np.ndarray:
    """Return the values (H, W) of a mask: the alpha channel, a palette's indices, or grey.

    An alpha channel is a mask if it is not opaque everywhere: boolean, 128 and above is target.
    """
    if isinstance(mask, Image.Image):
        if mask.mode in ("RGBA", "LA", "PA"):
            alpha = np.asarray(mask.getchannel("A"))
            if alpha.min() < 255:
                return alpha >= 128
            mask = mask.convert("RGB")
        mask = np.asarray(mask)
        if mask.ndim == 3 and (mask == mask[:, :, :1]).all():
            mask = mask[:, :, 0]
    if np.ndim(mask) != 2:
        raise UserError(f"{name} is coloured or no image; a mask is greyscale, a palette image, or an image's alpha")
    return mask


def target_mask(values: np.ndarray, class_id: int | None, name: str) -> np.ndarray:
    """Turn the values of a mask (H, W) into uint8: 1 target, 0 other, 255 ignored.

    A mask of 0 and 255 with a soft border, as painting programs save it, is cut at 128, with a warning. Masks of class
    ids rarely have few values between 0 and 255, and some of them above 128.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if class_id is not None:
        return np.where(values == IGNORE, IGNORE, values == class_id).astype(np.uint8)
    found = np.unique(values).tolist()
    if set(found) <= {0, 1} or set(found) <= {0, 255}:
        return (values != 0).astype(np.uint8)
    between = (values > 0) & (values < 255)
    if not ({0, 255} <= set(found) and (values[between] >= 128).any() and between.mean() < SOFT_BORDER):
        shown = ", ".join(f"{value:g}" for value in found[:6]) + (", ..." if len(found) > 6 else "")
        raise UserError(
            f"{name} holds {shown}; a mask holds 0 and 1, 0 and 255, or class ids; for class ids say which is the"
            " target (--class-id, in Python class_id)"
        )
    warnings.warn(f"{name} has a soft border; values from 128 on are target", stacklevel=2)
    return (values >= 128).astype(np.uint8)
