"""Reading images and masks, with errors that name the file.

Pillow reads both: OpenCV decodes palette masks wrongly, and silently returns part of a truncated JPEG.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from util.errors import UserError

MAX_PIXELS = 100_000_000
"""larger images are refused before they are decoded; those of PASCAL and COCO have less than a hundredth of it"""

FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "BMP": (".bmp",)}
"""formats that are read, with their suffixes; Pillow also knows formats that run programs"""

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)  # suffixes of images, in lower case

MASK_MODES = ("P", "L", "1")  # palette or greyscale; a pixel's value is its class id

VOC_PALETTE = bytes(
    sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for i in range(256) for channel in range(3)
)
"""PASCAL VOC's colour map, 768 values r, g, b, r, ..."""


def read_image(path: Path) -> np.ndarray:
    """Read an RGB image (H, W, 3), uint8. EXIF orientation is not applied: masks refer to the stored pixels."""
    with opened(path, f"image {path}") as image:
        refuse_deep(image, f"image {path}")
        return np.asarray(image.convert("RGB"))


def read_class_ids(path: Path) -> np.ndarray:
    """Read a mask of class ids, (H, W) uint8; 0 is background, 255 ignored."""
    with open_mask(path) as image:
        if image.mode not in MASK_MODES:
            raise UserError(
                f"mask {path} has mode {image.mode}; masks, the second path of a line, are palette or greyscale PNGs"
                " whose values are class ids"
            )
        refuse_scaled(image, f"mask {path}")
        return np.asarray(image).astype(np.uint8, copy=False)


@contextmanager
def open_mask(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open a mask, which must be a PNG: lossy formats change ids."""
    with opened(path, f"mask {path}") as image:
        if image.format != "PNG":
            raise UserError(f"mask {path} is a {image.format}; masks, the second path of a line, are PNGs")
        yield image


def image_size(path: Path) -> tuple[int, int]:
    """Read (height, width) of an image from its header alone."""
    with opened(path, f"image {path}") as image:
        return image.height, image.width


def refuse_scaled(image: Image.Image, name: str) -> None:
    """Raise a UserError for a mask whose values Pillow changes."""
    # Pillow stretches grey of 2 or 4 bits to 0 ... 255, inverts inverted grey, and keeps half of 16 bits a channel
    tiles = getattr(image, "tile", ())
    if image.mode in ("L", "LA", "RGB", "RGBA") and any(";" in str(tile.args) for tile in tiles):
        raise UserError(f"{name} does not have plain 8 bits a channel, so its values are no class ids; convert it")


def refuse_deep(image: Image.Image, name: str) -> None:
    """Raise a UserError for an image of more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{name} has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits")


@contextmanager
def opened(
    file: Path | io.BytesIO,
    name: str,
    *,
    missing: str = "; check data.root and the list",
    damaged: str = "replace it or take it off the list",
) -> Iterator[ImageFile.ImageFile]:
    """Open an image; errors begin with ``name`` and end with the remedy for a missing or a damaged file."""
    try:
        with Image.open(file, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}, more than {MAX_PIXELS / 1e6:.0f} megapixels")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist{missing}") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{name} cannot be read ({error}); {damaged}") from error


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as the bytes of a file of a Pillow format; ``options`` are those of Pillow's ``save``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded_mask(mask: np.ndarray) -> bytes:
    """Encode a mask of class ids (H, W), uint8, as a PNG in the colours of PASCAL VOC."""
    image = Image.fromarray(mask)
    image.putpalette(VOC_PALETTE)
    return encoded(image, "PNG")
