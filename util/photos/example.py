"""Drawn example images, so that predict.py and demo.py have something to show on a fresh clone."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.config import DataConfig
from util.data import synthetic
from util.data.folds import base_classes
from util.photos.outputs import write_outputs

SEED = 2  # scripts/make_synthetic.py has another
SHOWN = {16: (42, 19, 33), 6: (26, 19, 55), 1: (21, 25, 34), 11: (2, 20, 57)}
"""of a class in each fold, the best first: the numbers of a support and two queries in which it is found"""


class Example(NamedTuple):
    """A support, its mask (boolean), and two images that show the same class, RGB (H, W, 3) uint8."""

    support: np.ndarray
    mask: np.ndarray
    queries: list[np.ndarray]


def draw_example(data: DataConfig | None = None) -> Example:
    """Draw an example of a class that a network on ``data`` was not trained on."""
    trained = set() if data is None else {data.classes[number - 1] for number in base_classes(data)}
    class_id = next(n for n in SHOWN if synthetic.CLASS_NAMES[n - 1] not in trained)
    numbers = SHOWN[class_id]
    (support, labels), *others = (synthetic.make_image(SEED, "val", n, synthetic.EXAMPLE) for n in numbers)
    return Example(support, labels == class_id, [image for image, _ in others])


def write_example(folder: Path) -> tuple[Path, Path, list[Path]]:
    """Write an example below ``folder``: the paths of the support, its mask and the queries."""
    example = draw_example()
    images = {"support.jpg": example.support, "mask.png": example.mask}
    images |= {f"query{n}.jpg": image for n, image in enumerate(example.queries, 1)}
    files = {ending: Image.fromarray(image) for ending, image in images.items()}
    support, mask, *queries = write_outputs(folder, "example", files)
    return support, mask, queries
