"""Sharp edges for a map of the target: OpenCV's GrabCut (Rother et al., SIGGRAPH 2004), seeded by the map."""

import cv2
import numpy as np

CERTAIN_TARGET, CERTAIN_OTHER = 1.0, -0.4
"""scores, in standard deviations, beyond which GrabCut must not change a pixel"""
LONGER_SIDE, BOX_SIDE = 288, 576
"""of the image that GrabCut sees, and the same for an object in a box: a support is worth more time"""


def sharp_mask(probability: np.ndarray, image: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Draw the target's border along the edges of an image, RGB (H, W, 3) uint8: boolean (H, W).

    The score of a pixel is the logit of its probability minus the threshold's, in standard deviations over the image.
    Scores far from 0 are GrabCut's fixed seeds; it decides the other pixels by their colours. If no probability is
    above the threshold, the mask is empty.
    """
    p = np.clip(probability.astype(np.float32), 1e-6, 1 - 1e-6)
    score = np.log(p / (1 - p)) - np.log(threshold / (1 - threshold))
    score /= max(float(score.std()), 1e-6)
    coarse = cv2.resize(score, _limited(score, LONGER_SIDE), interpolation=cv2.INTER_LINEAR)
    seeds = np.where(coarse > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    seeds[coarse > CERTAIN_TARGET], seeds[coarse < CERTAIN_OTHER] = cv2.GC_FGD, cv2.GC_BGD
    return _grab(image, seeds, iterations=1)


def mask_in_box(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Find the object in a box (x0, y0, x1, y1; x1 and y1 not included) of RGB (H, W, 3) uint8: boolean (H, W)."""
    inside = np.zeros(image.shape[:2], np.float32)
    inside[box[1] : box[3], box[0] : box[2]] = 1
    coarse = cv2.resize(inside, _limited(inside, BOX_SIDE), interpolation=cv2.INTER_AREA)
    mask = _grab(image, np.where(coarse > 0, cv2.GC_PR_FGD, cv2.GC_BGD), iterations=5) & (inside > 0)
    return mask if mask.any() else inside > 0  # GrabCut found nothing: the whole box


def _limited(image: np.ndarray, side: int) -> tuple[int, int]:
    """Return the width and height of an image that is shrunk to at most ``side``."""
    height, width = image.shape[:2]
    ratio = min(1.0, side / max(height, width))
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def _grab(image: np.ndarray, seeds: np.ndarray, iterations: int) -> np.ndarray:
    """Run GrabCut on RGB (H, W, 3) uint8 at the size of ``seeds`` (h, w): boolean (H, W).

    Seeds are OpenCV's GC_BGD, GC_FGD, GC_PR_BGD and GC_PR_FGD; too few of target or of other are returned as they are.
    """
    height, width = image.shape[:2]
    labels = seeds.astype(np.uint8)
    target = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if min(target.sum(), (~target).sum()) >= 8:  # fewer pixels do not show the colours
        small = cv2.resize(image, labels.shape[::-1], interpolation=cv2.INTER_AREA)
        bgr = np.ascontiguousarray(small[..., ::-1])
        cv2.setRNGSeed(0)  # GrabCut draws the first centres of its colour models
        cv2.grabCut(bgr, labels, (0, 0, 0, 0), np.zeros((1, 65)), np.zeros((1, 65)), iterations, cv2.GC_INIT_WITH_MASK)
        target = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return cv2.resize(target.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
