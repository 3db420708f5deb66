"""Reading images and masks, with errors that name the file.

Pillow reads both: OpenCV decodes palette masks wrongly, and silently returns part of a truncated JPEG.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFile

from util.errors import UserError, first_of

MAX_PIXELS = 100_000_000
"""larger images are refused before they are decoded; those of PASCAL and COCO have less than a hundredth of it"""

FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "BMP": (".bmp",)}
"""formats that are read, with their suffixes; Pillow also knows formats that run programs"""

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)  # suffixes of images, in lower case

HIDDEN = (".", "__MACOSX", "@eaDir")  # how the names begin that Jupyter, macOS and network drives leave in folders

TINT = 8  # up to this difference between its channels a colour counts as grey, since JPEG tints
SOFT_BORDER = 0.25  # up to this share of a mask's pixels, values between black and white are taken for a soft border

VOC_PALETTE = bytes(
    sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for i in range(256) for channel in range(3)
)
"""PASCAL VOC's colour map, 768 values r, g, b, r, ..."""


def image_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """List the images below a folder, sorted, without hidden files and folders."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes)
    return [path for path in files if not any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)]


def read_image(path: Path) -> np.ndarray:
    """Read an RGB image (H, W, 3), uint8. EXIF orientation is not applied: masks refer to the stored pixels."""
    with opened(path, f"image {path}") as image:
        return rgb_of(image, f"image {path}")


def rgb_of(image: Image.Image, name: str) -> np.ndarray:
    """Convert an image of any 8-bit mode to RGB (H, W, 3) uint8; transparent pixels become white."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{name} has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def read_class_ids(path: Path) -> np.ndarray:
    """Read a mask of class ids, (H, W) uint8; 0 is background, 255 ignored."""
    with opened(path, f"mask {path}") as image:
        return class_ids_of(image, f"mask {path}")


def class_ids_of(image: Image.Image, name: str) -> np.ndarray:
    """Return the ids of a mask of class ids, (H, W) uint8: palette indices, grey, or the same value in R, G and B."""
    if image.format in ("JPEG", "WEBP"):
        raise UserError(f"{name} is a {image.format}, which blurs class ids; save masks as PNG")
    raw = " ".join(str(tile.args) for tile in getattr(image, "tile", ()) if image.mode in ("L", "LA", "RGB", "RGBA"))
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[:, :, :-1] if image.mode in ("LA", "PA", "RGBA") else values
        if (colours != colours[:, :, :1]).any():
            raise UserError(
                f"{name} {described(image)}; class ids are grey values or palette indices. To convert a data set:"
                " scripts/make_lists.py --colours FILE, with a line 'name:r,g,b' for each class"
            )
        values = colours[:, :, 0]
    # Pillow stretches grey of 2 or 4 bits to 0 ... 255, inverts inverted grey, and keeps half of 16 bits a channel
    if "L;2" in raw or "L;4" in raw:
        values = values // (85 if "L;2" in raw else 17)
    elif ";" in raw:
        raise UserError(f"{name} does not have plain 8 bits a channel, so its values are no class ids; convert it")
    if values.min() < 0 or values.max() > 255:
        raise UserError(f"{name} {described(image)}; class ids lie between 0 and 255")
    return values.astype(np.uint8, copy=False)


def seen_target(image: Image.Image, *, single: bool = False) -> np.ndarray | None:
    """Return the target (H, W), bool, of a mask without class ids as it is seen; None if that is unclear.

    That is the image's alpha, if there is any, else white on black, or the only colour on black; with ``single``, which
    says that the mask shows one class, also the only grey on black.
    """
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        if alpha.min() < alpha.max() or not alpha.any():
            return alpha > alpha.max() / 2
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
        return white_on_black(np.asarray(image), single=single)
    red, green, blue = (np.asarray(band) for band in image.convert("RGB").split())
    light = np.maximum(np.maximum(red, green), blue)
    if (light - np.minimum(np.minimum(red, green), blue)).max() <= TINT * (light.max() >= 240):
        return white_on_black(light, single=single)
    lit = light > 0
    return lit if not lit.all() and all(np.ptp(band[lit]) == 0 for band in (red, green, blue)) else None


def white_on_black(values: np.ndarray, *, single: bool = False) -> np.ndarray | None:
    """Return where values (H, W) are white, bool; None if other values are more than a soft border between the two.

    Values that fill areas of their own are things, as class ids are: nobody knows which is the target. See
    :func:`seen_target` for ``single``.
    """
    found = np.unique(values)
    black, white = float(found[0]), float(found[-1])
    if len(found) <= 2 and black in (0, white):
        return values > 0 if single or white in (0, 1, 255, 65535) else None
    if not 0 <= black <= white / 16 or (white < 240 and not single):
        return None
    between = (values > white / 16) & (values < white * 15 / 16)
    soft = between.mean()
    if not soft and not single:
        between = (values > black) & (values < white)
    square, plain = np.ones((3, 3), np.uint8), values.astype(np.float32)
    flat = cv2.erode(plain, square) == cv2.dilate(plain, square)
    things = (between & flat)[1:-1, 1:-1].any()
    return None if things or (soft > SOFT_BORDER and not single) else values > white / 2


def described(image: Image.Image | np.ndarray) -> str:
    """Say what a mask holds: its values, or its colours."""
    values = np.asarray(image)
    if isinstance(image, np.ndarray) or values.ndim == 2:
        return f"holds {first_of([f'{value:g}' for value in np.unique(values)], 6, ', ')}"
    colours = sorted(colour for _, colour in image.convert("RGB").getcolors(1000) or [])
    shown = first_of([str(colour) for colour in colours], 4, ", ")
    return f"is coloured: {shown or 'more than 1000 colours, like an image and not its mask'}"


def image_size(path: Path) -> tuple[int, int]:
    """Read (height, width) of an image from its header alone."""
    with opened(path, f"image {path}") as image:
        return image.height, image.width


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
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give an image file") from None
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
