"""mIoU, FB-IoU and precision from integer counts an episode; ratios are taken last."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import IGNORE


class Scores(NamedTuple):
    """All in [0, 1]."""

    miou: float
    """mean over the classes of the IoU of their summed counts"""
    fb_iou: float
    """mean of foreground and background IoU of all counts"""
    precision: float
    """TP / (TP + FP) of all counts"""
    per_class: dict[str, float]
    """IoU by class name"""


SCORE_TITLES = {"miou": "mIoU", "fb_iou": "FB-IoU", "precision": "precision"}
"""titles of the scores that test.py, TensorBoard and metrics.jsonl report"""


def confusion(prediction: Tensor, ground_truth: Tensor) -> Tensor:
    """Count the pixels of one episode, on its device: true negatives, false positives, false negatives, true positives.

    Args:
        prediction: (H, W), boolean
        ground_truth: (H, W), uint8: 1 target, 0 other, 255 ignored
    """
    target, other = ground_truth == 1, (ground_truth != 1) & (ground_truth != IGNORE)
    outcomes = (~prediction & other, prediction & other, ~prediction & target, prediction & target)
    return torch.stack([outcome.sum() for outcome in outcomes])


def iou(counts: np.ndarray) -> np.ndarray:
    """Compute the IoU of the target, TP / (TP + FP + FN), from counts (..., 4) of :func:`confusion`: (...).

    It is 1 if nothing is target and nothing is predicted: then the prediction is right. Every IoU of this project is
    computed here.
    """
    union = counts[..., 1:].sum(-1)
    return np.where(union == 0, 1.0, _ratio(counts[..., 3], union))


def mask_iou(mask: np.ndarray, ground_truth: np.ndarray) -> float:
    """Compute the :func:`iou` of one boolean mask (H, W); the ground truth is 1 target, 0 other, 255 ignored."""
    return float(iou(confusion(torch.from_numpy(mask), torch.from_numpy(ground_truth)).numpy()))


def scores(counts: np.ndarray, class_ids: np.ndarray, classes: dict[int, str]) -> Scores:
    """Score N episodes.

    A class without any episode has not been measured; as in the published code it counts as 0 in the mean, so that
    few episodes never look better than many.

    Args:
        counts: (N, 4), of :func:`confusion`
        class_ids: (N,)
        classes: ids and names of the classes that are scored
    Raises:
        ValueError: an episode is of another class.
    """
    if not np.isin(class_ids, list(classes)).all():
        raise ValueError(f"episodes of classes {np.unique(class_ids)}, but scored are {list(classes)}")
    of_class = np.stack([counts[class_ids == class_id].sum(0) for class_id in classes])
    per_class = np.where(np.isin(list(classes), class_ids), iou(of_class), 0.0)
    total = counts.sum(0)  # reversed these are the counts of the background
    return Scores(
        miou=float(per_class.mean()),
        fb_iou=float((iou(total) + iou(total[::-1])) / 2),
        precision=float(_ratio(total[3], total[1] + total[3])),
        per_class={name: float(value) for name, value in zip(classes.values(), per_class, strict=True)},
    )


RESAMPLES = 2000
"""bootstrap samples of an interval"""


def resampled_miou(counts: np.ndarray, class_ids: np.ndarray, classes: int) -> np.ndarray:
    """Compute the mIoU of bootstrap samples, (RESAMPLES,): each seed's episodes are drawn within each class.

    Methods that were counted on the same episodes are drawn alike, so that their differences are paired.

    Args:
        counts: (S, N, 4) of S seeds, of :func:`confusion`
        class_ids: (S, N), ids or names
        classes: number of classes that are scored; one without an episode counts as 0, as in :func:`scores`
    """
    rng = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for rows, ids in zip(counts, class_ids, strict=True):
        for class_id in np.unique(ids):
            own = rows[ids == class_id].astype(float)  # exact: sums are far below 2**53
            times = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=RESAMPLES)
            total += iou(times @ own)
    return total / (len(counts) * classes)


def interval(samples: np.ndarray) -> list[float]:
    """Return the middle 95 % of bootstrap samples, [from, to]."""
    return np.percentile(samples, [2.5, 97.5]).tolist()


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)
