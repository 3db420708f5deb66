"""Reading pictures and masks, with errors that name the file.

Pillow reads both: OpenCV decodes palette masks wrongly, and returns part of a truncated JPEG without a word.
"""

import contextlib
import io
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

from util.errors import UserError
from util.files import refuse_pipe

MAX_PIXELS = 100_000_000
"""a picture with more is refused before it is decoded; those of PASCAL and COCO have less than a hundredth of it"""

FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "BMP": (".bmp",)}
"""what is read, with the suffixes by which folders are searched; Pillow also knows formats that run programs"""

MASK_MODES = ("P", "L", "1")
"""palette or greyscale; a pixel's value is its class id"""


def read_image(path: Path) -> np.ndarray:
    """Read an RGB picture (H, W, 3), uint8. EXIF orientation is not applied: masks refer to the stored pixels."""
    with _opened("image", path, tuple(FORMATS)) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"image {path} has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits")
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
    """Open a mask, which must be a PNG: other formats blur or have no checksum."""
    with _opened("mask", path, tuple(FORMATS)) as image:
        if image.format != "PNG":
            raise UserError(f"mask {path} is a {image.format}; masks, the second path of a line, are PNGs")
        yield image


def image_size(path: Path) -> tuple[int, int]:
    """Read (height, width) of a picture from its header alone."""
    with _opened("image", path, tuple(FORMATS), decoded=False) as image:
        return image.height, image.width


def orientation(path: Path) -> int:
    """Read EXIF's orientation, 1 to 8, by which viewers turn a picture; 1, as stored, where there is none."""
    with contextlib.suppress(UserError), _opened("image", path, tuple(FORMATS), decoded=False) as image:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    return 1


def open_checked(path: Path, formats: tuple[str, ...], *, limit: int, decoded: bool = True) -> ImageFile.ImageFile:
    """Open a picture that is neither too large nor damaged as far as its header and a PNG's checksums tell.

    Pillow does not compare the checksums of a PNG's pixels, and takes a flipped bit for another class.

    Args:
        limit: most pixels.
        decoded: the pixels are wanted as well; else the checksums are not looked at.
    Raises:
        Image.DecompressionBombError: too large.
        Exception: Pillow's readers raise many kinds for damaged files.
    """
    refuse_pipe(path)
    image = Image.open(path, formats=formats)
    if image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height}, more than {limit / 1e6:.0f} megapixels")
    if image.width * image.height == 0:
        raise ValueError("it has no pixels")
    if decoded and image.format == "PNG":
        compare_checksums(path.read_bytes())
    return image


def compare_checksums(png: bytes) -> None:
    """Check a PNG's chunks, each of length, kind, data and CRC of kind and data, up to the empty one at the end."""
    place = 8  # behind the signature
    while place + 12 <= len(png) and png[place + 4 : place + 8] != b"IEND":
        end = place + 8 + int.from_bytes(png[place : place + 4])
        if zlib.crc32(png[place + 4 : end]) != int.from_bytes(png[end : end + 4]):
            raise ValueError("a checksum is wrong")
        place = end + 4


def refuse_scaled(image: ImageFile.ImageFile, name: str) -> None:
    """Raise a UserError for a mask whose values Pillow changes.

    It stretches grey of 2 or 4 bits to 0 ... 255, turns inverted grey about, and keeps half of 16 bits a channel.
    """
    if image.mode in ("L", "LA", "RGB", "RGBA") and any(";" in str(tile.args) for tile in image.tile):
        raise UserError(f"{name} is not stored with plain 8 bits a channel, so its values are no ids; save it so")


def hint_at(path: Path) -> str:
    """Say where a file that does not exist may be, by the mistakes that lists have; '' where it is not found."""
    if "\\" in str(path):
        return "; write / in place of \\ in the list"
    suffixes = [suffix for known in FORMATS.values() for suffix in known]
    renamed = [path.with_suffix(suffix) for lower in suffixes for suffix in (lower, lower.upper())]
    renamed += [path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD")]  # ü as one or as two
    if found := [other for other in renamed if other.is_file()]:
        return f", but there is {found[0].name}"
    for root in ("/", "."):  # the list's paths are absolute, or begin with data.root
        if any(Path(root, *path.parts[n:]).is_file() for n in range(1, len(path.parts))):
            return f", but would with data.root={root}"
    return ""


@contextmanager
def _opened(kind: str, path: Path, formats: tuple[str, ...], *, decoded: bool = True) -> Iterator[ImageFile.ImageFile]:
    try:
        with open_checked(path, formats, limit=MAX_PIXELS, decoded=decoded) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist{hint_at(path)}; check data.root and the list") from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError(f"{kind} {path} cannot be read ({error}); replace it or take it off the list") from error


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode a picture as the bytes of a file of a Pillow format; ``options`` are those of its ``save``.

    To be written by Python: where a disk fills up in the middle of a JPEG, Pillow's own writing ends in silence.
    """
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
