"""The files that predict.py writes for a query."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.data.images import VOC_PALETTE, encoded
from util.engine.panels import TARGET, overlay
from util.files import write_bytes
from util.photos.segmenter import Segmentation


def draw(result: Segmentation, pixels: np.ndarray, *, maps: bool, cutout: bool) -> dict[str, Image.Image]:
    """Draw one target: images by the ending of their file, 'mask.png' (0 and 255), 'overlay.jpg' and others."""
    mask = 255 * result.mask.astype(np.uint8)
    drawn = {"mask.png": mask, "overlay.jpg": overlay(pixels, result.mask, TARGET)}
    if cutout:
        drawn["cutout.png"] = np.dstack([pixels, mask])
    for name in ("probability", "prior", "bg", "distractor") if maps else ():
        if (values := getattr(result, name)) is not None:
            drawn[f"{name}.png"] = (255 * values).round().astype(np.uint8)
    return {ending: Image.fromarray(image) for ending, image in drawn.items()}


def draw_labels(results: Mapping[str, Segmentation], pixels: np.ndarray) -> dict[str, Image.Image]:
    """Draw several targets: labels.png, a palette image, and overlay.jpg with their names.

    A pixel's label is the number of its most probable target, from 1, or 0 for none.
    """
    highest = np.zeros(pixels.shape[:2], np.float32)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for number, found in enumerate(results.values(), start=1):
        higher = found.mask & (found.probability > highest)
        labels[higher], highest[higher] = number, found.probability[higher]
    image = Image.fromarray(labels)
    image.putpalette(VOC_PALETTE)
    colours = [tuple(VOC_PALETTE[3 * n : 3 * n + 3]) for n in range(len(results) + 1)]
    for number, (red, green, blue) in enumerate(colours[1:], start=1):
        pixels = overlay(pixels, labels == number, (red, green, blue))
    overlaid = Image.fromarray(pixels)
    line = max(12, max(overlaid.size) // 40)
    for number, name in enumerate(results, start=1):
        place, font = (line // 2, (number - 1) * line), ImageFont.load_default(0.9 * line)
        ImageDraw.Draw(overlaid).text(place, name, colours[number], font, stroke_width=line // 8, stroke_fill="white")
    return {"labels.png": image, "overlay.jpg": overlaid}


def write_outputs(out: Path, name: str, outputs: dict[str, Image.Image]) -> list[Path]:
    """Write the files of a query, each atomically, and return their paths."""
    paths = []
    for ending, image in outputs.items():
        path = out / f"{name}_{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, encoded(image, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90))
        paths.append(path)
    return paths
