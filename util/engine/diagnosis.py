"""Why a checkpoint scores as it does: where it predicts, on novel and base classes, and what a threshold changes.

A query's pixels are of three regions: the target, other objects (of any other class), and the background. For each
episode the scores of every region are counted in bins; everything below follows from these counts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model import IGNORE
from model.ntrenet import NTRENet
from util.config import Config
from util.data.class_index import ClassIndex
from util.data.episodes import find_supports, photos_of
from util.data.folds import base_classes
from util.engine.build import Hardware, build_eval_sampler
from util.engine.evaluation import NetworkMethod, evaluate
from util.engine.interruption import Interruption
from util.engine.metrics import scores
from util.progress import progress

REGIONS = ("target", "other objects", "background")
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
"""of the probability"""
EPISODES = 200
"""of base classes, by which a threshold is chosen, whatever ``eval.episodes`` is: few choose it by chance"""
EDGES = torch.tensor(np.unique([*np.linspace(-15, 15, 601), *(np.log(t / (1 - t)) for t in THRESHOLDS)]))
"""of the bins of logits; every threshold is an edge"""


def histogram(score: Tensor, ids: Tensor, value: int) -> Tensor:
    """Count the scores (H, W) of each region in bins, the outermost bins open: a measure for ``evaluate``.

    Args:
        ids: (H, W) class ids; 255 is in no region
        value: the target's id
    Returns:
        (3, bins), in the order of ``REGIONS``
    """
    bins = torch.bucketize(score.double(), EDGES.to(score.device), right=True)
    target, background = ids == value, ids == 0
    regions = (target, ~target & ~background & (ids != IGNORE), background)
    return torch.stack([torch.bincount(bins[region], minlength=len(EDGES) + 1) for region in regions])


def first_bin(threshold: float) -> int:
    """Return the first bin above a threshold of the probability."""
    logit = np.log(threshold / (1 - threshold))
    return int(np.searchsorted(EDGES.numpy(), logit)) + 1


def miou_by_threshold(counts: np.ndarray, class_ids: np.ndarray, classes: dict[int, str]) -> dict[float, float]:
    """Return the mIoU in [0, 1] at each of ``THRESHOLDS``, from counts (N, 3, bins) of :func:`histogram`."""
    found = {}
    for threshold in THRESHOLDS:
        positive, pixels = counts[:, :, first_bin(threshold) :].sum(2), counts.sum(2)  # (N, 3)
        tp, fp = positive[:, 0], positive[:, 1:].sum(1)
        table = np.stack([pixels[:, 1:].sum(1) - fp, fp, pixels[:, 0] - tp, tp], 1)
        found[threshold] = scores(table, class_ids, classes).miou
    return found


def best_threshold(mious: Mapping[float, float]) -> float:
    """Return the threshold with the highest mIoU, of equals the one nearest to 0.5."""
    return max(mious, key=lambda threshold: (mious[threshold], -abs(threshold - 0.5)))


def predicted_share(counts: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the share of each region's pixels that is predicted as target: (..., 3), NaN for an empty region."""
    with np.errstate(invalid="ignore"):
        return np.asarray(counts[..., first_bin(threshold) :].sum(-1) / counts.sum(-1))


def area_under_curve(counts: np.ndarray, region: int) -> float:
    """Return the chance that a target pixel has a higher score than one of a region, mean over the episodes (AUC).

    Equal bins count one half. Episodes that lack one of the two are left out; NaN if all do.
    """
    target, other = counts[:, 0], counts[:, region]
    both = (target.sum(1) > 0) & (other.sum(1) > 0)
    below = np.cumsum(other, 1) - other / 2
    areas = (target * below).sum(1)[both] / (target.sum(1) * other.sum(1))[both]
    return float(areas.mean()) if both.any() else float("nan")


def calibrated_threshold(
    model: NTRENet, index: ClassIndex, *, config: Config, hardware: Hardware, stop: Interruption | None = None
) -> tuple[float, float | None]:
    """Return the one of ``THRESHOLDS`` with the highest mIoU on held-out episodes of base classes, never of novel ones.

    Networks under-segment classes that they were not trained on: 0.5 leaves most of their pixels out. The second value
    is that mIoU in [0, 1]. They are 0.5 and None if no base class has enough images in the validation list.
    """
    classes = held_out(base_classes(config.data), index, config)
    if not classes:
        return 0.5, None
    sampler = build_eval_sampler(config, index, seed=0, classes=classes)
    episodes = [sampler(number) for number in range(EPISODES)]
    method = NetworkMethod(model, config, hardware)
    with progress(total=len(episodes), desc="calibration", unit="episode", leave=False) as bar:
        found = evaluate(method, index, episodes, config=config, bar=bar, stop=stop, measure=histogram, alone=True)
    class_ids = np.array([episode.class_id for episode in episodes])
    names = {c: config.data.classes[c - 1] for c in np.unique(class_ids).tolist()}
    miou = miou_by_threshold(found["network"], class_ids, names)
    threshold = best_threshold(miou)
    return threshold, miou[threshold]


def held_out(classes: Sequence[int], index: ClassIndex, config: Config) -> tuple[int, ...]:
    """Return the classes that have enough images for episodes in the validation list."""
    photos = photos_of(index, find_supports(index, classes, config.data.min_area))
    return tuple(c for c in classes if len(photos[c]) > config.data.shots)
