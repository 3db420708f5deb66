"""Reading pictures and masks, with errors that name the file.

Pillow reads both: OpenCV decodes palette masks wrongly, and returns part of a truncated JPEG without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from util.errors import UserError

MASK_MODES = ("P", "L", "1")
"""palette or greyscale; a pixel's value is its class id"""


def read_image(path: Path) -> np.ndarray:
    """RGB picture (H, W, 3), uint8. EXIF orientation is not applied: masks refer to the stored pixels."""
    with _opened("image", path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"image {path} has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits")
        return np.asarray(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Mask of class ids (H, W), uint8; 0 background, 255 ignored."""
    with _opened("mask", path) as image:
        if image.mode not in MASK_MODES:
            raise UserError(
                f"mask {path} has mode {image.mode}; masks are palette or greyscale PNGs whose values are class ids"
            )
        return np.asarray(image).astype(np.uint8, copy=False)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture from its header alone."""
    with _opened("image", path) as image:
        return image.height, image.width


@contextmanager
def _opened(kind: str, path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist; check data.root and the list") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{kind} {path} cannot be read ({error}); replace it or take it off the list") from error
