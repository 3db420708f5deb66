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


def confusion(prediction: Tensor, ground_truth: Tensor) -> Tensor:
    """Counts of one episode, on its device: true negatives, false positives, false negatives, true positives.

    Args:
        prediction: (H, W), boolean
        ground_truth: (H, W), uint8: 1 target, 0 other, 255 ignored
    """
    target, other = ground_truth == 1, (ground_truth != 1) & (ground_truth != IGNORE)
    outcomes = (~prediction & other, prediction & other, ~prediction & target, prediction & target)
    return torch.stack([outcome.sum() for outcome in outcomes])


def scores(counts: np.ndarray, class_ids: np.ndarray, classes: dict[int, str]) -> Scores:
    """Scores of N episodes.

    A class that never occurred and was never predicted has IoU 0; an absent denominator gives 0.

    Args:
        counts: (N, 4), of :func:`confusion`
        class_ids: (N,)
        classes: ids and names of the classes that are scored
    Raises:
        ValueError: an episode is of another class.
    """
    if not np.isin(class_ids, list(classes)).all():
        raise ValueError(f"episodes of classes {np.unique(class_ids)}, but scored are {list(classes)}")
    tn, fp, fn, tp = np.stack([counts[class_ids == class_id].sum(0) for class_id in classes]).T
    per_class = _ratio(tp, tp + fp + fn)
    foreground = _ratio(tp.sum(), (tp + fp + fn).sum())
    background = _ratio(tn.sum(), (tn + fp + fn).sum())
    return Scores(
        miou=float(per_class.mean()),
        fb_iou=float((foreground + background) / 2),
        precision=float(_ratio(tp.sum(), (tp + fp).sum())),
        per_class={name: float(iou) for name, iou in zip(classes.values(), per_class, strict=True)},
    )


def episode_iou(counts: np.ndarray) -> np.ndarray:
    """IoU of the target in each of N pictures, (N, 4) -> (N,); 1 where nothing is target and nothing is predicted."""
    union = counts[:, 1:].sum(1)
    return np.where(union == 0, 1.0, _ratio(counts[:, 3], union))


def mask_iou(mask: np.ndarray, ground_truth: np.ndarray) -> float:
    """:func:`episode_iou` of one picture: a boolean mask (H, W), and 1 target, 0 other, 255 ignored."""
    counts = confusion(torch.from_numpy(mask), torch.from_numpy(ground_truth))
    return float(episode_iou(counts.numpy()[None])[0])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)
