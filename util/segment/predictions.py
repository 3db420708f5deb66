"""What predict.py writes for a query."""

import colorsys
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.data.images import encoded
from util.errors import UserError
from util.files import read_json, write_bytes, write_json
from util.segment.segmenter import Q, Segmenter, T
from util.segment.visualize import TARGET, overlay

Outputs = dict[str, Image.Image]
"""by the ending of their names, such as 'mask.png'"""


def endings(segmenter: Segmenter[Any, Any], *, labelled: bool, maps: bool, cutout: bool) -> list[str]:
    """Name what is written for each query; not every segmenter has every map."""
    if labelled:
        return ["labels.png", "overlay.jpg"]
    names = (*(("probability", *segmenter.maps) if maps else ()), *(("cutout",) if cutout else ()))
    return ["mask.png", "overlay.jpg", *(f"{name}.png" for name in names)]


def draw_one(
    segmenter: Segmenter[Q, T],
    target: T,
    pixels: np.ndarray,
    *,
    threshold: float,
    edges: bool,
    maps: bool,
    cutout: bool,
) -> Outputs:
    """Draw the mask, 0 and 255, and the picture with the target tinted.

    With ``maps`` come the segmenter's maps in 8-bit grey, with ``cutout`` the picture on transparent ground.
    """
    result = segmenter.segment_encoded(target, pixels, threshold=threshold, edges=edges)
    outputs = {"mask.png": _grey(result.mask), "overlay.jpg": Image.fromarray(overlay(pixels, result.mask, TARGET))}
    names = ("probability", *segmenter.maps) if maps else ()
    if cutout:
        outputs["cutout.png"] = Image.fromarray(np.dstack([pixels, 255 * result.mask.astype(np.uint8)]))
    return outputs | {f"{name}.png": _grey(getattr(result, name)) for name in names}


def draw_labels(
    segmenter: Segmenter[Q, T], targets: Mapping[str, T], pixels: np.ndarray, *, threshold: float, edges: bool
) -> Outputs:
    """Draw a palette picture of the most probable target at each pixel, 1 the first of them, 0 where none is."""
    query = segmenter.encode_query(pixels)
    highest = np.zeros(pixels.shape[:2], np.float32)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for number, target in enumerate(targets.values(), start=1):
        found = segmenter.segment_encoded(target, query, threshold=threshold, edges=edges)
        higher = found.mask & (found.probability > highest)
        labels[higher], highest[higher] = number, found.probability[higher]
    picture = Image.fromarray(labels)
    picture.putpalette([channel for number in range(256) for channel in colour_of(number)])
    for number in range(1, len(targets) + 1):
        pixels = overlay(pixels, labels == number, colour_of(number))
    return {"labels.png": picture, "overlay.jpg": with_legend(pixels, list(targets))}


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the RGB colour of a label: black for 0, then hues a golden section apart, so that neighbours differ."""
    if number == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb((number - 1) * 0.618034 % 1, 0.8, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_legend(pixels: np.ndarray, names: list[str]) -> Image.Image:
    """Add the names of the labels below the picture, each in a line beside its colour."""
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


def shows_nothing(outputs: Outputs) -> bool:
    """Tell whether no pixel is target."""
    mask = outputs.get("mask.png", outputs.get("labels.png"))
    return mask is not None and not np.asarray(mask).any()


def output_path(out: Path, name: str, ending: str) -> Path:
    """Return where a query's file of this ending is written."""
    return out / f"{name}_{ending}"


def write_outputs(out: Path, name: str, outputs: Outputs) -> None:
    """Write each file whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    for ending, picture in outputs.items():
        path = output_path(out, name, ending)
        data = encoded(picture, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}); free some space or choose another --out") from error


def is_finished(out: Path, name: str, wanted: Iterable[str]) -> bool:
    """Tell whether all files that are wanted of a query are there."""
    return all(output_path(out, name, ending).exists() for ending in wanted)


def remove(out: Path, names: Iterable[str], wanted: Iterable[str]) -> None:
    """Remove outputs before others replace them: an interruption must not leave old ones that look finished."""
    for name, ending in itertools.product(names, wanted):
        output_path(out, name, ending).unlink(missing_ok=True)


def require_same_settings(path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write the settings that the predictions beside ``path`` depend on into it.

    Raises:
        UserError: other predictions are there already, and they are not to be overwritten.
    """
    if path.exists() and not overwrite:
        there = read_json(path)
        different = [key for key in settings if there.get(key) != settings[key]]
        if different:
            raise UserError(
                f"{path.parent} holds predictions of another {', another '.join(different)}; give another --out, or"
                " --overwrite"
            )
    write_json(path, settings)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * values.astype(np.float32)).round().astype(np.uint8))
