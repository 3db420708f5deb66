"""Geometry of training and evaluation, and normalisation. Images stay uint8 until they are on the device.

Shapes: image (H, W, 3) RGB uint8, mask (H, W) uint8 with 255 ignored, S the side of the network's square input.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import IGNORE
from model.ops import resize

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB (..., 3, H, W) -> float32 with ImageNet's mean and standard deviation."""
    channels = images.float().unbind(-3)
    scaled = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(channels, MEAN, STD, strict=True)]
    return torch.stack(scaled, -3)


def augment(
    image: np.ndarray,
    mask: np.ndarray,
    target: int,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    rotation: float,
    blur: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale, rotate (p 0.5), flip (p 0.5) and crop at random to (size, size), as one warp.

    A share ``blur`` of the images is then blurred with a Gaussian of 5x5 pixels. Empty pixels become the mean
    colour and 255. As in PFENet's code, a crop that keeps less than 85 % of the target is drawn again, at most 30
    times.
    """
    height, width = mask.shape
    factor = rng.uniform(*scale)
    angle = rng.uniform(-rotation, rotation) if rng.random() < 0.5 else 0.0
    flip = rng.random() < 0.5
    to_scaled = _about_centre((width, height), (width * factor, height * factor), factor, angle, flip)
    target_pixels = float((mask == target).sum()) * factor**2
    for _ in range(30):
        left = _crop_offset(width * factor, size, rng)
        top = _crop_offset(height * factor, size, rng)
        matrix = to_scaled - np.array([[0, 0, left], [0, 0, top]])
        warped = cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_NEAREST, borderValue=IGNORE)
        if (warped == target).sum() >= 0.85 * target_pixels:
            break
    warped_image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=MEAN_COLOUR)
    if blur and rng.random() < blur:
        warped_image = cv2.GaussianBlur(warped_image, (5, 5), 0)
    return warped_image, warped


def _about_centre(
    source: tuple[float, float], target: tuple[float, float], factor: float, angle: float, flip: bool
) -> np.ndarray:
    """Return the 2x3 matrix that scales and rotates about the centre of ``source``, flips, centres on ``target``."""
    cos, sin = factor * math.cos(math.radians(angle)), factor * math.sin(math.radians(angle))
    linear = np.array([[cos, sin], [-sin, cos]])
    if flip:
        linear[0] *= -1
    centre_in = (np.array(source) - 1) / 2  # pixel centres are at whole numbers
    centre_out = (np.array(target) - 1) / 2
    return np.hstack([linear, (centre_out - linear @ centre_in)[:, None]])


def _crop_offset(length: float, size: int, rng: np.random.Generator) -> float:
    """Draw the offset of a crop: anywhere it fits, or half of the missing length before an image that is too small."""
    room = length - size
    return rng.uniform(0, room) if room > 0 else room / 2


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return (height, width) of an image whose longer side is brought to ``size``, both rounded down to 8n."""
    ratio = size / max(height, width)
    return max(8, int(height * ratio) // 8 * 8), max(8, int(width * ratio) // 8 * 8)


def fit(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize by the longer side, as an evaluation does, and place top left, the image on black, the mask on 255."""
    height, width = fitted_size(mask.shape[0], mask.shape[1], size)
    fitted_image = np.zeros((size, size, 3), np.uint8)
    fitted_image[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    fitted = np.full((size, size), IGNORE, np.uint8)
    fitted[:height, :width] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return fitted_image, fitted


def squash(image: np.ndarray, mask: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize to (side, side), as Pillow's antialiased bilinear does; 0 leaves both as they are."""
    if not side:
        return image, mask
    squashed = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    return squashed, cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)


def to_original(logits: Tensor, height: int, width: int, geometry: str) -> Tensor:
    """Undo :func:`fit` for logits (1, S, S): (1, height, width).

    lineage: as in PFENet's code, the whole square is resized to the square of the original's longer side, and the
        image's part of it read; rounding to multiples of 8 leaves it 3 px off at 500x375, 8 at worst.
    exact: the valid part is cut out and resized.
    """
    if geometry == "lineage":
        side = max(height, width)
        square = resize(logits[None], (side, side))[0]
        return square[:, :height, :width]
    fitted_height, fitted_width = fitted_size(height, width, logits.shape[-1])
    valid = logits[None, :, :fitted_height, :fitted_width]
    return F.interpolate(valid, size=(height, width), mode="bilinear", align_corners=False)[0]
