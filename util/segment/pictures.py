"""A user's own pictures and masks, from files, numpy or Pillow, as the network takes them.

Data sets are read by util/data/images.py, which is stricter: there a mask refers to the stored pixels and holds
class ids.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from model import IGNORE
from util.data.images import FORMATS, MAX_PIXELS, open_checked, refuse_scaled
from util.errors import UserError

LOSSY = ("JPEG", "WEBP")
"""formats that are no good for masks, but for the alpha of a picture"""

UNREAD = (".heic", ".heif", ".avif", ".gif")
"""suffixes of pictures that are not read, and are named where a folder holds them"""

SOFT_BORDER = 0.25
"""share of a mask's pixels up to which values between 0 and 255 are a border"""

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)


class Picture(NamedTuple):
    """A picture as a person sees it, and how its file had to be turned for that."""

    pixels: np.ndarray
    """RGB (H, W, 3) uint8, turned as EXIF says"""
    orientation: int
    """EXIF's, 1 to 8; 1 is as stored"""


def read_picture(path: Path) -> Picture:
    """Read a picture as a person sees it.

    Raises:
        UserError: it is missing, damaged, truncated or too large, or has more than 8 bits a channel.
    """
    with _opened(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Picture(as_rgb(ImageOps.exif_transpose(image), str(path)), orientation)


def read_mask_on(picture: Picture, path: Path) -> np.ndarray:
    """Read the values of a mask file (H, W), turned to lie on ``picture``; see :func:`target_mask` for what they mean.

    A mask with an EXIF orientation of its own is turned by that. Any other of the picture's stored size was made from
    the stored pixels and is turned with them; one of the displayed size lies on it already.

    Raises:
        UserError: it cannot be read, or its size is not the picture's.
    """
    height, width = picture.pixels.shape[:2]
    stored = (width, height) if picture.orientation >= 5 else (height, width)
    with _opened(path) as image:
        refuse_scaled(image, f"mask {path}")
        exif = image.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) == 1 and (image.height, image.width) == stored:
            exif[ExifTags.Base.Orientation] = picture.orientation
        values = mask_values(ImageOps.exif_transpose(image), str(path))
        if image.format in LOSSY and values.dtype != np.bool_:
            raise UserError(f"mask {path} is {image.format}, which blurs values; save it as PNG")
    if values.shape != (height, width):
        raise UserError(f"mask {path} is {_size(values)} and its picture {_size(picture.pixels)}; make them the same")
    return values


def as_rgb(picture: np.ndarray | Image.Image, name: str) -> np.ndarray:
    """Return RGB (H, W, 3) uint8 of a numpy array that is that already, or of a Pillow picture in any 8-bit mode.

    What is transparent becomes white. EXIF is not looked at.

    Raises:
        UserError: naming ``name``; another shape or type, or more than 8 bits a channel.
    """
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):
            raise UserError(f"{name} has mode {picture.mode}, more than 8 bits a channel; convert it to 8 bits")
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{name} must be a numpy array or a Pillow picture, not {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise UserError(f"{name} must be RGB, (H, W, 3) of uint8, not {picture.shape} of {picture.dtype}")
    return picture


def mask_values(mask: np.ndarray | Image.Image, name: str) -> np.ndarray:
    """Return the values (H, W) of a mask.

    A picture with transparency is a mask by its alpha: boolean, 128 and above is target.

    Palette pictures give their indices. Where the alpha says nothing, and in RGB, all channels must be the same.

    Raises:
        UserError: naming ``name``; colours, or another shape.
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
        if mask.ndim == 3:
            raise UserError(f"{name} is coloured; a mask is a greyscale or palette picture, or has it as its alpha")
    if not isinstance(mask, np.ndarray):
        raise UserError(f"{name} must be a numpy array or a Pillow picture, not {type(mask).__name__}")
    if mask.ndim != 2 or mask.size == 0:
        raise UserError(f"{name} must be (H, W), not {mask.shape}")
    return mask


def target_mask(values: np.ndarray, class_id: int | None, name: str) -> np.ndarray:
    """Return a mask (H, W) of uint8 as the network takes it: 1 target, 0 other, 255 ignored.

    A mask of 0 and 255 with a soft border, as painting programs save it, is cut at 128, with a warning.

    Args:
        values: boolean, 0 and 1, or 0 and 255; with ``class_id`` the ids of classes, 255 ignored.
    Raises:
        UserError: naming ``name``; other values without a class_id, or a class_id that cannot be one.
    """
    if class_id is not None and (class_id < 1 or class_id == IGNORE):
        raise UserError(f"class_id must be 1 or more, and not {IGNORE}, which is 'ignored'; got {class_id}")
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if class_id is not None:
        return np.where(values == IGNORE, IGNORE, values == class_id).astype(np.uint8)
    found = np.unique(values).tolist()
    if _has_soft_border(values):
        warnings.warn(f"{name} has a soft border: from 128 on it counts as target", stacklevel=2)
        return (values >= 128).astype(np.uint8)
    if not (set(found) <= {0, 1} or set(found) <= {0, 255}):
        shown = ", ".join(f"{value:g}" for value in found[:6]) + (", ..." if len(found) > 6 else "")
        raise UserError(
            f"{name} holds {shown}; a mask is 0 and 1, or 0 and 255, or of class ids; then say which is meant"
            " (--class-id, in Python class_id)"
        )
    return (values != 0).astype(np.uint8)


def _has_soft_border(values: np.ndarray) -> bool:
    """Tell whether a mask of 0 and 255 has few pixels between; class ids are few, or many pixels have them."""
    between = (values > 0) & (values < 255)
    ends = values.dtype == np.uint8 and (values == 0).any() and (values == 255).any()
    return bool(ends and (values[between] >= 128).any() and between.mean() < SOFT_BORDER)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    try:
        with open_checked(path, tuple(FORMATS), limit=MAX_PIXELS) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture in {', '.join(FORMATS)}; convert it") from error
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError(f"{path} cannot be read ({error}); replace it or leave it out") from error
