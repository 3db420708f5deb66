"""Small images with a known target, and a small checkpoint of the real network, for the tests of predictions."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.harness import SYNTHETIC
from util.config import load_config
from util.data.transforms import normalize
from util.engine.build import build_model, select_hardware
from util.engine.checkpoint import save_checkpoint
from util.photos.segmenter import NTRESegmenter

SIDE = 65
"""of the network's input"""

SMALL = [
    f"data.image_size={SIDE}",
    "model.fem_scales=[1, 0.5]",
    "model.prototype_channels=16",
    "precision=fp32",
    "device=cpu",
]


def scene(seed: int, height: int = 48, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A striped disc on a noisy slope, RGB uint8, and its mask, boolean."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    radius = rng.uniform(0.2, 0.3) * min(height, width)
    centre_y, centre_x = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
    disc = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
    image = rng.integers(0, 60, (height, width, 3)) + (100 * y / height + 40 * x / width)[..., None]
    image[disc] = np.where((x[disc] // 4 % 2)[:, None], (230, 40, 60), (250, 240, 90))
    return image.astype(np.uint8), disc


def write_pair(folder: Path, stem: str, *classes: int, side: int = 64) -> None:
    """A noisy image with a square of its own colour for each class, and its mask."""
    rng = np.random.default_rng(sum(stem.encode()))
    image = rng.integers(60, 130, (side, side + 8, 3)).astype(np.uint8)
    mask = np.zeros(image.shape[:2], np.uint8)
    for n, value in enumerate(classes):
        place = np.s_[4 + 30 * (n // 2) :, 4 + 34 * (n % 2) :]
        image[place][:26, :28] = 40 * value, 255 - 40 * value, 90
        mask[place][:26, :28] = value
    for name, pixels, suffix in (("images", image, "jpg"), ("masks", mask, "png")):
        path = folder / name / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_checkpoint(path: Path, *overrides: str) -> Path:
    """An untrained network, but with half of a scene's pixels predicted instead of nearly none.

    The head has random weights; the backbone's come with the pip package.
    """
    config = load_config(SYNTHETIC, [*SMALL, *overrides])
    torch.manual_seed(config.seed)
    model, weights = build_model(config)
    model.measure_scale(normalize(torch.from_numpy(scene(0)[0]).permute(2, 0, 1)[None]))
    segmenter = NTRESegmenter(model, config, select_hardware(config))
    probability = np.median(segmenter.segment(*scene(0), scene(1)[0]).probability)
    state = model.state_dict()
    state["fem.classifier.3.bias"] -= float(np.log(probability / (1 - probability)))
    run = {"list_sha256": {}, "step": 0, "best_miou": -1.0, "seconds": 0.0}
    save_checkpoint(path, {"config": config.model_dump(), "weights": weights._asdict(), "model": state, **run})
    return path


def spread(values: np.ndarray) -> float:
    """Largest difference within a map: a constant one would agree with anything."""
    return float(values.max() - values.min())


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())
