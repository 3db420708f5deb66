"""mIoU, FB-IoU and precision from integer counts; ratios are taken last."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.ops import IGNORE


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


class Counts:
    """Confusion counts of binary predictions, summed over episodes, a 2x2 table a class.

    Args:
        classes: ids and names of the classes that are scored.
    """

    def __init__(self, classes: dict[int, str], device: torch.device) -> None:
        self.classes = classes
        self._row = {class_id: row for row, class_id in enumerate(classes)}
        self.table = torch.zeros(len(classes), 4, dtype=torch.long, device=device)
        """(classes, 4): true negatives, false positives, false negatives, true positives"""

    def add(self, prediction: Tensor, truth: Tensor, class_id: int) -> None:
        """Count one episode: boolean prediction and uint8 truth (1 target, 0 other, 255 ignored), both (H, W)."""
        outcome = torch.where(truth == IGNORE, 4, 2 * (truth == 1).long() + prediction.long())
        self.table[self._row[class_id]] += torch.bincount(outcome.flatten(), minlength=5)[:4]

    def scores(self) -> Scores:
        """A class that never occurred and was never predicted has IoU 0; an absent denominator gives 0."""
        table = self.table.cpu().numpy()
        tn, fp, fn, tp = table.T
        per_class = _ratio(tp, tp + fp + fn)
        foreground = _ratio(tp.sum(), (tp + fp + fn).sum())
        background = _ratio(tn.sum(), (tn + fp + fn).sum())
        return Scores(
            miou=float(per_class.mean()),
            fb_iou=float((foreground + background) / 2),
            precision=float(_ratio(tp.sum(), (tp + fp).sum())),
            per_class={name: float(iou) for name, iou in zip(self.classes.values(), per_class, strict=True)},
        )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)
