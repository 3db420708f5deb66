"""Sharp edges for a map of the target: OpenCV's GrabCut (Rother et al., SIGGRAPH 2004), seeded by the map."""

import cv2
import numpy as np

CERTAIN_TARGET, CERTAIN_OTHER = 1.0, -0.4
"""scores, in deviations, beyond which GrabCut leaves a pixel as it is; between them it decides"""
LONGER_SIDE = 288
"""of the picture that GrabCut sees: the rest is interpolated"""
BOX_SIDE = 576
"""the same where a mask is made of a box: a support is worth more time"""
MARGIN, CORE = 0.25, 0.5
"""of paint: shares of its frame around it, and of a stroke's depth in it, see mask_of_paint"""
FEWEST = 8
"""pixels of target, and of what is not, that GrabCut needs to know colours"""


def grab(picture: np.ndarray, seeds: np.ndarray, iterations: int = 1) -> np.ndarray:
    """Let GrabCut decide which pixels are target: boolean (H, W).

    Args:
        picture: RGB (H, W, 3) uint8
        seeds: (H, W) of OpenCV's GC_BGD, GC_FGD, GC_PR_BGD and GC_PR_FGD
    Returns:
        the seeds' own say where there are too few of either kind
    """
    labels = seeds.astype(np.uint8)
    target = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if min(target.sum(), (~target).sum()) < FEWEST:
        return target
    cv2.setRNGSeed(0)  # of its mixtures' first centres
    colours = np.ascontiguousarray(picture[..., ::-1])
    cv2.grabCut(colours, labels, (0, 0, 0, 0), np.zeros((1, 65)), np.zeros((1, 65)), iterations, cv2.GC_INIT_WITH_MASK)
    return np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))


def sharp_mask(probability: np.ndarray, picture: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Draw the target's border along the edges of a picture, RGB (H, W, 3) uint8: boolean (H, W).

    The logit of the probability, less that of the threshold, is taken in deviations over the picture. What it is
    certain of becomes GrabCut's seeds; about the rest, and its colours, GrabCut decides. A map without anything above
    the threshold stays empty.
    """
    p = np.clip(probability.astype(np.float32), 1e-6, 1 - 1e-6)
    score = np.log(p / (1 - p)) - np.log(threshold / (1 - threshold))
    score /= max(float(score.std()), 1e-6)
    height, width = score.shape
    ratio = min(1.0, LONGER_SIDE / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    coarse = cv2.resize(score, size, interpolation=cv2.INTER_LINEAR)
    seeds = np.where(coarse > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    seeds[coarse > CERTAIN_TARGET], seeds[coarse < CERTAIN_OTHER] = cv2.GC_FGD, cv2.GC_BGD
    target = grab(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), seeds)
    return cv2.resize(target.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5


def mask_in_box(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Find the object in a box (x0, y0, x1, y1; x1 and y1 not included) of RGB (H, W, 3) uint8: boolean (H, W).

    The whole box is returned where GrabCut finds no object in it.
    """
    height, width = picture.shape[:2]
    inside = np.zeros((height, width), np.float32)
    inside[box[1] : box[3], box[0] : box[2]] = 1
    ratio = min(1.0, BOX_SIDE / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    coarse = cv2.resize(inside, size, interpolation=cv2.INTER_AREA)
    seeds = np.where(coarse > 0, cv2.GC_PR_FGD, cv2.GC_BGD)
    target = grab(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), seeds, iterations=5)
    mask = (cv2.resize(target.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5) & (inside > 0)
    return mask if mask.any() else inside > 0


def mask_of_paint(picture: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """Find the object that rough paint (H, W), boolean, stands on in RGB (H, W, 3) uint8: boolean (H, W).

    The middle of each stroke is target for certain. What lies outside the frame of the paint, widened by ``MARGIN`` of
    its longer side, is not. The rest GrabCut decides, so that paint may lie over the object's border as well as miss a
    part of it. The paint itself is returned where GrabCut finds nothing.
    """
    height, width = paint.shape
    ratio = min(1.0, BOX_SIDE / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    coarse = cv2.resize(paint.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    x, y, w, h = cv2.boundingRect(coarse)
    margin = round(MARGIN * max(w, h))
    depth = cv2.distanceTransform(coarse, cv2.DIST_L2, 3)
    ridge = cv2.dilate(depth, np.ones((2 * margin + 1, 2 * margin + 1), np.uint8))
    seeds = np.full(coarse.shape, cv2.GC_BGD, np.uint8)
    seeds[max(y - margin, 0) : y + h + margin, max(x - margin, 0) : x + w + margin] = cv2.GC_PR_BGD
    seeds[coarse > 0] = cv2.GC_PR_FGD
    seeds[(coarse > 0) & (depth >= CORE * ridge)] = cv2.GC_FGD
    target = grab(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), seeds, iterations=5)
    mask = cv2.resize(target.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    return mask if mask.any() else paint
