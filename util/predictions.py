"""What predict.py writes for a query."""

import colorsys
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.ntrenet import Target
from util.errors import UserError
from util.files import write_bytes
from util.images import encoded
from util.record import read_json, write_json
from util.segmenter import NTRESegmenter
from util.visualize import TARGET, overlay

MAPS = ("probability", "prior", "bg", "distractor")

Outputs = dict[str, Image.Image]
"""by the ending of their names, such as 'mask.png'"""


def endings(segmenter: NTRESegmenter, *, labelled: bool, maps: bool) -> list[str]:
    """What there is to be written for each query; an ablation lacks some maps."""
    if labelled:
        return ["labels.png", "overlay.jpg"]
    lacking = {"bg": not segmenter.config.model.bgem, "distractor": not segmenter.config.model.doem}
    return ["mask.png", "overlay.jpg", *(f"{name}.png" for name in MAPS if maps and not lacking.get(name))]


def draw_one(segmenter: NTRESegmenter, target: Target, pixels: np.ndarray, threshold: float, maps: bool) -> Outputs:
    """Mask of 0 and 255, the picture with the target tinted, and with ``maps`` the network's maps in 8-bit grey."""
    result = segmenter.segment_encoded(target, pixels)
    mask = result.probability > threshold
    outputs = {"mask.png": _grey(mask), "overlay.jpg": Image.fromarray(overlay(pixels, mask, TARGET))}
    values = {name: getattr(result, name) for name in MAPS} if maps else {}
    return outputs | {f"{name}.png": _grey(value) for name, value in values.items() if value is not None}


def draw_labels(
    segmenter: NTRESegmenter, targets: Mapping[str, Target], pixels: np.ndarray, threshold: float
) -> Outputs:
    """Palette picture of the most probable target at each pixel, 1 the first of them, 0 where none is probable."""
    query = segmenter.encode_query(pixels)
    highest = np.full(pixels.shape[:2], threshold, np.float32)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for number, target in enumerate(targets.values(), start=1):
        probability = segmenter.segment_encoded(target, query).probability
        higher = probability > highest
        labels[higher], highest[higher] = number, probability[higher]
    picture = Image.fromarray(labels)
    picture.putpalette([channel for number in range(256) for channel in colour_of(number)])
    for number in range(1, len(targets) + 1):
        pixels = overlay(pixels, labels == number, colour_of(number))
    return {"labels.png": picture, "overlay.jpg": with_legend(pixels, list(targets))}


def colour_of(number: int) -> tuple[int, int, int]:
    """RGB of a label: black for 0, then hues a golden section apart, so that neighbours differ."""
    if number == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb((number - 1) * 0.618034 % 1, 0.8, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_legend(pixels: np.ndarray, names: list[str]) -> Image.Image:
    """The picture with the names of its labels below, each in a line beside its colour."""
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
    return all(output_path(out, name, ending).exists() for ending in wanted)


def remove(out: Path, names: Iterable[str], wanted: Iterable[str]) -> None:
    """Before other settings replace them: an interruption must not leave old predictions that look finished."""
    for name, ending in itertools.product(names, wanted):
        output_path(out, name, ending).unlink(missing_ok=True)


def settle(path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Record in ``path`` what the predictions beside it depend on.

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
