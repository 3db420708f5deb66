"""The files that predict.py writes for a query."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.data.images import encoded
from util.engine.panels import TARGET, overlay
from util.errors import UserError
from util.files import read_json, write_bytes, write_json
from util.photos.segmenter import Segmenter

Outputs = dict[str, Image.Image]
"""images by the ending of their file names, such as 'mask.png'"""


def draw(
    segmenter: Segmenter,
    targets: Mapping[str, Any],
    pixels: np.ndarray,
    endings: Sequence[str],
    threshold: float,
    edges: bool,
) -> Outputs:
    """Segment an image and draw the files that ``endings`` name.

    Of several targets these are labels.png and overlay.jpg. Of one target they are mask.png (0 and 255), overlay.jpg,
    cutout.png (transparent but for the target), and grey maps by name.
    """
    if "labels.png" in endings:
        return draw_labels(segmenter, targets, pixels, threshold=threshold, edges=edges)
    (target,) = targets.values()
    result = segmenter.segment_encoded(target, pixels, threshold=threshold, edges=edges)
    maps = {f"{name}.png": _grey(values) for name, values in result._asdict().items() if values is not None}
    overlaid, cutout = overlay(pixels, result.mask, TARGET), np.dstack([pixels, 255 * result.mask.astype(np.uint8)])
    drawn = {"overlay.jpg": Image.fromarray(overlaid), "cutout.png": Image.fromarray(cutout), **maps}
    return {ending: drawn[ending] for ending in endings}


def draw_labels(
    segmenter: Segmenter, targets: Mapping[str, Any], pixels: np.ndarray, *, threshold: float, edges: bool
) -> Outputs:
    """Draw a palette image of the most probable target of each pixel: 1 is the first target, 0 is none."""
    query = segmenter.encode_query(pixels)
    highest = np.zeros(pixels.shape[:2], np.float32)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for number, target in enumerate(targets.values(), start=1):
        found = segmenter.segment_encoded(target, query, threshold=threshold, edges=edges)
        higher = found.mask & (found.probability > highest)
        labels[higher], highest[higher] = number, found.probability[higher]
    image = Image.fromarray(labels)
    image.putpalette([channel for number in range(256) for channel in colour_of(number)])
    for number in range(1, len(targets) + 1):
        pixels = overlay(pixels, labels == number, colour_of(number))
    return {"labels.png": image, "overlay.jpg": with_legend(pixels, list(targets))}


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the RGB colour of a label: black for 0, then hues a golden section apart, so that neighbours differ."""
    if number == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb((number - 1) * 0.618034 % 1, 0.8, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_legend(pixels: np.ndarray, names: list[str]) -> Image.Image:
    """Add the names of the labels below the image, each in a line with its colour."""
    height, width = pixels.shape[:2]
    line = max(16, max(height, width) // 40)
    font = ImageFont.load_default(0.75 * line)
    needed = round(max(font.getlength(name) for name in names)) + 2 * line
    sheet = Image.new("RGB", (max(width, needed), height + line * len(names)), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        top = height + row * line
        draw.rectangle((3, top + 3, line - 3, top + line - 3), fill=colour_of(row + 1))
        draw.text((line + 4, top), name, fill="black", font=font)
    return sheet


def output_path(out: Path, name: str, ending: str) -> Path:
    """Return the path of a query's file with this ending."""
    return out / f"{name}_{ending}"


def write_outputs(out: Path, name: str, outputs: Outputs) -> None:
    """Write a query's files, each atomically."""
    for ending, image in outputs.items():
        path = output_path(out, name, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, encoded(image, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90))


def require_same_settings(path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write the settings that the predictions in the folder of ``path`` depend on.

    Raises:
        UserError: the folder holds predictions of other settings, and they are not to be overwritten.
    """
    there = read_json(path)
    different = [key for key in settings if there and there.get(key) != settings[key]]
    if different and not overwrite:
        raise UserError(
            f"{path.parent} holds predictions of another {', another '.join(different)}; give another --out, or"
            " --overwrite"
        )
    write_json(path, settings)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * values.astype(np.float32)).round().astype(np.uint8))
