"""What the steps of the demo's page do, as plain functions on plain values; util/demo/page.py lays them out."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from util.config import DataConfig
from util.data import synthetic
from util.data.folds import base_classes
from util.data.images import encoded
from util.errors import UserError
from util.segment.edges import mask_of_paint, sharp_mask
from util.segment.pictures import read_picture
from util.segment.segmenter import Segmentation, Segmenter
from util.segment.visualize import DISTRACTOR, TARGET, heat, overlay

LONGEST = 1024
"""Larger pictures are shrunk to this side for painting and viewing; the network itself sees fewer pixels."""

THUMBNAIL = 144

MOST = 8
"""photos, and supports, at a time: bounds the memory that a visitor takes"""

LARGE = Lock()
"""is held while a picture is in memory at the full size of its file: there is one at a time"""

PAINT = (0, 215, 255)
"""of the brush: no mask has it, and it is seen on red"""

EXAMPLE_SEED = 2  # no data set of scripts/make_synthetic.py has these pictures unless its --seed says so
EXAMPLE_ZOOM = 4  # the drawn pictures are about 150 pixels wide, hard to paint in

Editor = Mapping[str, Any]
"""what gr.ImageEditor gives and takes: 'background' (H, W, 3 or 4), 'layers' [(H, W, 4)], 'composite'; or None"""


class Support(NamedTuple):
    """A picture and the mask that was painted on it."""

    pixels: np.ndarray
    mask: np.ndarray
    """boolean (H, W)"""


class Photo(NamedTuple):
    """A picture to search."""

    name: str
    """of its file, without the ending"""
    pixels: np.ndarray
    """RGB, no side longer than LONGEST"""
    size: tuple[int, int]
    """(H, W) of the file, turned as EXIF says"""

    @property
    def key(self) -> str:
        """The same for the same pixels, and for no others."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


class Findings(NamedTuple):
    """What was found, and what it was found with and in; meanwhile other photos may be on the page, or supports."""

    supports: int = 0
    """number of the supports on the page, which rises with each change"""
    by_photo: Mapping[str, Segmentation] = {}
    """by :attr:`Photo.key`"""
    sentence: str = ""
    """on what it took"""

    def of(self, photo: Photo, supports: int) -> Segmentation | None:
        """Return the result of a photo, or None where it was segmented with another number of supports."""
        return self.by_photo.get(photo.key) if supports == self.supports else None


class View(NamedTuple):
    """One photo with what the network thinks of it; None what there is not, or not yet."""

    photo: np.ndarray | None = None
    prior: np.ndarray | None = None
    bg: np.ndarray | None = None
    distractor: np.ndarray | None = None
    mask: np.ndarray | None = None
    """boolean, of the photo's pixels"""


def example(data: DataConfig | None) -> tuple[Support, list[Photo]]:
    """Draw a support and two photos of a class that a network of this data set was not trained on, always the same."""
    trained = set() if data is None else {data.classes[number - 1] for number in base_classes(data)}
    novel = [number for number, name in enumerate(synthetic.CLASS_NAMES, start=1) if name not in trained]
    class_id = (novel or [1])[0]
    indices = [index for index in range(32) if class_id in synthetic.classes_of(EXAMPLE_SEED, "val", index)][:3]
    (pixels, labels), *others = (synthetic.make_image(EXAMPLE_SEED, "val", index) for index in indices)
    photos = [Photo(f"example_{n}", _zoomed(image), _size(_zoomed(image))) for n, (image, _) in enumerate(others, 1)]
    smooth = _zoomed(255 * (labels == class_id).astype(np.uint8))
    return Support(_zoomed(pixels), smooth > 127), photos


def open_support(path: str) -> Editor:
    """Read a photo for painting."""
    return {"background": read_photo(path).pixels, "layers": [], "composite": None}


def editor_of(support: Support) -> Editor:
    """Return a support as the editor would have it, painted."""
    paint = np.zeros((*support.mask.shape, 4), np.uint8)
    paint[support.mask] = (*PAINT, 140)
    return {"background": support.pixels, "layers": [paint], "composite": None}


def sharpen(editor: Editor | None) -> Editor:
    """Move the paint to the edges of the object under it.

    Raises:
        UserError: nothing is painted.
    """
    (support,) = _required(painted(editor))
    return editor_of(Support(support.pixels, mask_of_paint(support.pixels, support.mask)))


def painted(editor: Editor | None) -> list[Support]:
    """Return the support in the editor; none where nothing is painted."""
    if editor is None or editor["background"] is None:
        return []
    pixels = np.ascontiguousarray(editor["background"][..., :3])
    mask = np.zeros(_size(pixels), bool)
    for layer in editor["layers"]:
        mask |= layer[..., 3] > 60  # the brush is half transparent, and fainter at its rim
    return [Support(pixels, mask)] if mask.any() else []


def add_support(editor: Editor | None, supports: Sequence[Support]) -> list[Support]:
    """Add the support in the editor to those that are kept.

    Raises:
        UserError: nothing is painted, or there are enough.
    """
    new = _required(painted(editor))
    if len(supports) >= MOST:
        raise UserError(f"{MOST} supports are the most; remove one")
    return [*supports, *new]


def read_photo(path: str) -> Photo:
    """Read a photo.

    Raises:
        UserError: util/segment/pictures.py refuses it; the file is named as its owner names it.
    """
    file = Path(path)
    with LARGE:
        try:
            pixels = read_picture(file).pixels
        except UserError as error:
            raise UserError(str(error).replace(str(file), file.name)) from error
        return Photo(file.stem, shrunk(pixels, LONGEST), _size(pixels))


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """Shrink a picture or a map so that its longer side is at most ``side``."""
    height, width = _size(pixels)
    if (scale := side / max(height, width)) >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def read_photos(paths: Sequence[str]) -> tuple[list[Photo], list[str]]:
    """Read the photos that can be read, ``MOST`` of them; and say what is wrong with the others."""
    photos, complaints = list[Photo](), list[str]()
    for number, path in enumerate(paths):
        if len(photos) == MOST:
            complaints.append(f"{MOST} photos are the most at a time; {len(paths) - number} are left out")
            break
        try:
            photos.append(read_photo(path))
        except UserError as error:
            complaints.append(str(error))
    return photos, complaints


def segment(
    segmenter: Segmenter[Any, Any],
    editor: Editor | None,
    supports: Sequence[Support],
    photos: Sequence[Photo],
    number: int = 0,
) -> Findings:
    """Find what is painted, in the editor and in the supports, in every photo.

    Args:
        number: of the supports, see :class:`Findings`.
    Raises:
        UserError: nothing is painted, no photo, or a support in which the network sees nothing.
    """
    shown = _required([*supports, *painted(editor)])
    if not photos:
        raise UserError("drop a photo to search in first, in step 2")
    start = perf_counter()
    target = segmenter.encode([support.pixels for support in shown], [support.mask for support in shown])
    found = {photo.key: segmenter.segment_encoded(target, photo.pixels) for photo in photos}
    cost = perf_counter() - start
    sentence = f"{_count(len(photos), 'photo')} from {_count(len(shown), 'support')} in {cost:.1f} s"
    return Findings(number, found, sentence)


def view(photo: Photo, found: Segmentation | None, threshold: float, edges: bool) -> View:
    """Draw a photo, and its mask and maps where it has been searched."""
    if found is None:
        return View(photo.pixels)
    mask = _mask(photo.pixels, found.probability, threshold, edges)
    return View(
        photo=overlay(photo.pixels, mask, TARGET),
        prior=None if found.prior is None else heat(found.prior),
        bg=None if found.bg is None else heat(found.bg),
        distractor=None if found.distractor is None else overlay(photo.pixels, found.distractor > 0.5, DISTRACTOR),
        mask=mask,
    )


def thumbnail(photo: Photo, found: Segmentation | None, threshold: float, edges: bool) -> np.ndarray:
    """Draw a photo with its mask, small."""
    pixels = shrunk(photo.pixels, THUMBNAIL)
    if found is None:
        return pixels
    return overlay(pixels, _mask(pixels, shrunk(found.probability, THUMBNAIL), threshold, edges), TARGET)


def support_thumbnail(support: Support) -> np.ndarray:
    """Draw a support with its paint, small."""
    return shrunk(overlay(*support, PAINT), THUMBNAIL)


def mask_png(photo: Photo, mask: np.ndarray) -> bytes:
    """Write a mask as the bytes of a PNG, 255 target and 0 other, at the size of the photo's file."""
    height, width = photo.size
    with LARGE:
        values = cv2.resize(255 * mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
        return encoded(Image.fromarray(np.where(values > 127, np.uint8(255), np.uint8(0))), "PNG")


def _required(supports: list[Support]) -> list[Support]:
    if not supports:
        raise UserError("paint the object first: brush over it in the photo of step 1")
    return supports


def _mask(pixels: np.ndarray, probability: np.ndarray, threshold: float, edges: bool) -> np.ndarray:
    return sharp_mask(probability, pixels, threshold) if edges else probability > threshold


def _zoomed(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, None, fx=EXAMPLE_ZOOM, fy=EXAMPLE_ZOOM, interpolation=cv2.INTER_CUBIC)


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
