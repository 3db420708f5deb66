"""What the steps of the demo's page do, as plain functions on plain values; util/demo/page.py lays them out."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from util.config import DataConfig
from util.data import synthetic
from util.data.folds import base_classes
from util.errors import UserError
from util.segment.edges import sharp_mask
from util.segment.pictures import read_picture
from util.segment.segmenter import Segmentation, Segmenter
from util.segment.visualize import DISTRACTOR, TARGET, heat, overlay

LONGEST = 1024
"""Larger pictures are shrunk to this side for painting and viewing; the network itself sees fewer pixels."""

MOST = 8
"""photos, and supports, at a time: bounds the memory that a visitor takes"""

EXAMPLE_SEED = 2  # no data set of scripts/make_synthetic.py has these pictures unless its --seed says so
EXAMPLE_ZOOM = 4  # the drawn pictures are about 150 pixels wide, hard to paint in

Editor = Mapping[str, Any]
"""what gr.ImageEditor gives and takes: 'background' (H, W, 3 or 4), 'layers' [(H, W, 4)], 'composite'; or None"""


class Support(NamedTuple):
    pixels: np.ndarray
    mask: np.ndarray
    """boolean (H, W)"""


class Photo(NamedTuple):
    name: str
    """of its file, without the ending"""
    pixels: np.ndarray
    """RGB, no side longer than LONGEST"""
    size: tuple[int, int]
    """(H, W) of the file, turned as EXIF says"""


class View(NamedTuple):
    """One photo with what the network thinks of it; None what there is not, or not yet."""

    photo: np.ndarray | None = None
    prior: np.ndarray | None = None
    bg: np.ndarray | None = None
    distractor: np.ndarray | None = None
    mask_file: str | None = None


def example(data: DataConfig | None) -> tuple[Support, list[Photo]]:
    """A support and two photos of a class that a network of this data set was not trained on, always the same."""
    trained = set() if data is None else {data.classes[number - 1] for number in base_classes(data)}
    novel = [number for number, name in enumerate(synthetic.CLASS_NAMES, start=1) if name not in trained]
    class_id = (novel or [1])[0]
    indices = [index for index in range(32) if class_id in synthetic.classes_of(EXAMPLE_SEED, "val", index)][:3]
    (pixels, labels), *others = (synthetic.make_image(EXAMPLE_SEED, "val", index) for index in indices)
    photos = [Photo(f"example_{n}", _zoomed(image), _size(_zoomed(image))) for n, (image, _) in enumerate(others, 1)]
    smooth = _zoomed(255 * (labels == class_id).astype(np.uint8))
    return Support(_zoomed(pixels), smooth > 127), photos


def open_support(path: str) -> Editor:
    """A photo, ready for painting."""
    return {"background": read_photo(path).pixels, "layers": [], "composite": None}


def editor_of(support: Support) -> Editor:
    """A support as if it had been painted."""
    paint = np.zeros((*support.mask.shape, 4), np.uint8)
    paint[support.mask] = (*TARGET, 140)
    return {"background": support.pixels, "layers": [paint], "composite": None}


def painted(editor: Editor | None) -> list[Support]:
    """The support in the editor; none where nothing is painted."""
    if editor is None or editor["background"] is None:
        return []
    pixels = np.ascontiguousarray(editor["background"][..., :3])
    mask = np.zeros(_size(pixels), bool)
    for layer in editor["layers"]:
        mask |= layer[..., 3] > 60  # the brush is half transparent, and fainter at its rim
    return [Support(pixels, mask)] if mask.any() else []


def add_support(editor: Editor | None, supports: Sequence[Support]) -> list[Support]:
    """Raises UserError: nothing is painted, or there are enough."""
    new = painted(editor)
    if not new:
        raise UserError("paint the object first: brush over it in the photo of step 1")
    if len(supports) >= MOST:
        raise UserError(f"{MOST} supports are the most; remove one")
    return [*supports, *new]


def read_photo(path: str) -> Photo:
    """Raises UserError: what util/segment/pictures.py refuses, naming the file as its owner does."""
    file = Path(path)
    try:
        pixels = read_picture(file).pixels
    except UserError as error:
        raise UserError(str(error).replace(str(file), file.name)) from error
    height, width = _size(pixels)
    if (scale := LONGEST / max(height, width)) < 1:
        shrunk = (max(1, round(width * scale)), max(1, round(height * scale)))
        return Photo(file.stem, cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA), (height, width))
    return Photo(file.stem, pixels, (height, width))


def read_photos(paths: Sequence[str]) -> tuple[list[Photo], list[str]]:
    """The photos that can be read, and what is wrong with the others."""
    photos, complaints = list[Photo](), list[str]()
    for path in paths[:MOST]:
        try:
            photos.append(read_photo(path))
        except UserError as error:
            complaints.append(str(error))
    if len(paths) > MOST:
        complaints.append(f"{MOST} photos are the most at a time; the other {len(paths) - MOST} are left out")
    return photos, complaints


def segment(
    segmenter: Segmenter[Any, Any], editor: Editor | None, supports: Sequence[Support], photos: Sequence[Photo]
) -> tuple[list[Segmentation], str]:
    """Find what is painted, in the editor and in the supports, in every photo; and a sentence on what it took.

    Raises:
        UserError: nothing is painted, no photo, or a support in which the network sees nothing.
    """
    shown = [*supports, *painted(editor)]
    if not shown:
        raise UserError("paint the object first: brush over it in the photo of step 1")
    if not photos:
        raise UserError("drop a photo to search in first, in step 2")
    start = perf_counter()
    target = segmenter.encode([support.pixels for support in shown], [support.mask for support in shown])
    results = [segmenter.segment_encoded(target, photo.pixels) for photo in photos]
    cost = 1000 * (perf_counter() - start)
    return results, f"{_count(len(photos), 'photo')} from {_count(len(shown), 'support')} in {cost:.0f} ms"


def view(
    photos: Sequence[Photo],
    results: Sequence[Segmentation],
    chosen: int,
    threshold: float,
    folder: Path,
    *,
    edges: bool = False,
) -> View:
    """Draw a photo and its maps; its mask is written below ``folder`` at the size of the photo's file."""
    if not photos:
        return View()
    photo = photos[chosen]
    if not results:
        return View(photo.pixels)
    result = results[chosen]
    mask = sharp_mask(result.probability, photo.pixels, threshold) if edges else result.probability > threshold
    return View(
        photo=overlay(photo.pixels, mask, TARGET),
        prior=None if result.prior is None else heat(result.prior),
        bg=None if result.bg is None else heat(result.bg),
        distractor=None if result.distractor is None else overlay(photo.pixels, result.distractor > 0.5, DISTRACTOR),
        mask_file=str(write_mask(photo, mask if edges else result.probability, 0.5 if edges else threshold, folder)),
    )


def write_mask(photo: Photo, values: np.ndarray, threshold: float, folder: Path) -> Path:
    """PNG of 255 where a mask or a probability is above the threshold, and 0, at the size of the photo's file.

    It lies in a folder named by its content, so that none is mixed up.
    """
    height, width = photo.size
    at_size = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    mask = Image.fromarray((at_size > threshold).astype(np.uint8) * 255)
    path = folder / hashlib.sha256(mask.tobytes()).hexdigest()[:16] / f"{photo.name}_mask.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
    return path


def thumbnail(support: Support) -> np.ndarray:
    return overlay(*support, TARGET)


def _zoomed(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, None, fx=EXAMPLE_ZOOM, fy=EXAMPLE_ZOOM, interpolation=cv2.INTER_CUBIC)


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
