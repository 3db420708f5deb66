"""Why a checkpoint scores as it does: where it predicts, on novel and on base classes, and what a threshold is worth.

A query's pixels are of three regions: the target, other objects (of any other class), and the background. For each
episode the logits of every region are counted in bins; everything below follows from these counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import IGNORE
from model.ntrenet import NTRENet, NTRENetOutput
from model.ops import masked_average_pool, resize
from util.config import Config
from util.data.class_index import ClassIndex
from util.data.dataset import read_swapped_mask
from util.data.episodes import EpisodeFiles, EpisodeList
from util.data.folds import base_classes
from util.data.transforms import to_original
from util.engine.build import Hardware, build_eval_loader, build_eval_sampler
from util.engine.loops import forward
from util.engine.metrics import scores
from util.errors import UserError
from util.progress import progress

REGIONS = ("target", "other objects", "background")
THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
EDGES = np.unique([*np.linspace(-15, 15, 601), *(np.log(t / (1 - t)) for t in THRESHOLDS)])
"""of the bins of logits; every threshold is an edge"""


CALIBRATION_EPISODES = 200
"""at most so many; they take as long as so many of an evaluation"""


class Counts(NamedTuple):
    """Of N episodes."""

    histogram: np.ndarray
    """(N, 3, bins) pixels of each region whose logit falls into each bin, the outermost bins open"""
    distracting: np.ndarray
    """(N, 3) share of each region that Y_DO covers; NaN where the region is empty or there is no Y_DO"""
    class_ids: np.ndarray
    """(N,)"""


@torch.inference_mode()
def count(
    model: NTRENet,
    index: ClassIndex,
    episodes: Sequence[EpisodeFiles],
    *,
    config: Config,
    hardware: Hardware,
    target_as_distractor: bool = False,
) -> Counts:
    """Run the episodes at their queries' own sizes, by the rules of test.py.

    Args:
        target_as_distractor: the target's own prototype, from the ground truth, takes the place of P_DO. A network
            that reads P_DO then loses the target. Only for a network that eliminates once, without base learner.
    """
    model.eval()
    histogram = np.zeros((len(episodes), len(REGIONS), len(EDGES) + 1), np.int64)
    distracting = np.full((len(episodes), len(REGIONS)), np.nan)
    loader = build_eval_loader(config, EpisodeList(index, episodes), range(len(episodes)))
    done = 0
    with progress(total=len(episodes), unit="episode", leave=False) as bar:
        for batch in loader:
            on_device = batch.to(hardware.device)
            output = forward(model, on_device, hardware)
            if target_as_distractor:
                output = _with_target_as_distractor(model, output, on_device.query_mask, config.data.image_size)
            for place in range(len(batch.names)):
                episode = episodes[done]
                regions = _regions(read_swapped_mask(index.items[episode.query], episode.class_id))
                height, width = regions.shape[1:]
                logits = to_original(output.logits[place].float(), height, width, config.eval.geometry)[0]
                bins = np.digitize(logits.cpu().numpy(), EDGES)
                for r, region in enumerate(regions):
                    histogram[done, r] = np.bincount(bins[region], minlength=len(EDGES) + 1)
                if output.eliminated:
                    side = (config.data.image_size, config.data.image_size)
                    do_mask = resize(output.eliminated[0].do_mask[place : place + 1].float(), side)[0]
                    covered = (to_original(do_mask, height, width, config.eval.geometry)[0] > 0.5).cpu().numpy()
                    distracting[done] = [covered[r].mean() if r.any() else np.nan for r in regions]
                done += 1
            bar.update(len(batch.names))
    return Counts(histogram, distracting, np.array([episode.class_id for episode in episodes]))


def _regions(classes: np.ndarray) -> np.ndarray:
    """A mask (H, W) of 1 target, 0 background, other classes -> (3, H, W), boolean, as :data:`REGIONS`; 255 in none."""
    target, background = classes == 1, classes == 0
    return np.stack([target, ~target & ~background & (classes != IGNORE), background])


def _with_target_as_distractor(
    model: NTRENet, output: NTRENetOutput, query_masks: Tensor, image_size: int
) -> NTRENetOutput:
    """The prediction once more, with the target's mean of X^q in the place of P_DO."""
    x_q = output.query_feature
    target = resize((query_masks == 1).float().unsqueeze(1), (x_q.shape[-2], x_q.shape[-1]))
    prototype = masked_average_pool(x_q, target)
    if model.eliminations[0].do_average == "image":
        prototype = prototype * target.mean((-2, -1), keepdim=True)
    (elimination,) = model.eliminations
    hook = elimination.register_forward_hook(lambda _, inputs, found: found._replace(do_prototype=prototype))
    try:
        return model.eliminate_and_enrich(x_q, output.support_prototype, output.prior, (image_size, image_size))
    finally:
        hook.remove()


def miou_by_threshold(counts: Counts, classes: dict[int, str]) -> dict[float, float]:
    """mIoU in [0, 1] over ``classes`` (ids and names), by the rules of test.py, cut at each of :data:`THRESHOLDS`."""
    found = {}
    for threshold in THRESHOLDS:
        above = np.searchsorted(EDGES, np.log(threshold / (1 - threshold))) + 1
        positive, pixels = counts.histogram[:, :, above:].sum(2), counts.histogram.sum(2)  # (N, 3)
        tp, fp = positive[:, 0], positive[:, 1:].sum(1)
        table = np.stack([pixels[:, 1:].sum(1) - fp, fp, pixels[:, 0] - tp, tp], 1)
        found[threshold] = scores(table, counts.class_ids, classes).miou
    return found


def predicted_share(counts: Counts, threshold: float = 0.5) -> np.ndarray:
    """Share of each region's pixels, over all episodes, that is predicted as target: (3,), NaN where there are none."""
    above = np.searchsorted(EDGES, np.log(threshold / (1 - threshold))) + 1
    pixels = counts.histogram.sum(0)
    with np.errstate(invalid="ignore"):
        return np.asarray(pixels[:, above:].sum(1) / pixels.sum(1))


def area_under_curve(counts: Counts, region: int) -> float:
    """How well logits tell the target from a region: the chance that a target pixel's is larger, mean over episodes.

    0.5 is chance. Equal bins count one half. Episodes that lack one of the two are left out; NaN if all do.
    """
    target, other = counts.histogram[:, 0], counts.histogram[:, region]
    both = (target.sum(1) > 0) & (other.sum(1) > 0)
    below = np.cumsum(other, 1) - other / 2
    areas = (target * below).sum(1)[both] / (target.sum(1) * other.sum(1))[both]
    return float(areas.mean()) if both.any() else float("nan")


def calibrated_threshold(model: NTRENet, index: ClassIndex, *, config: Config, hardware: Hardware) -> float:
    """The one of :data:`THRESHOLDS` with the highest mIoU on held-out episodes of base classes, never of novel ones.

    A network is too careful on classes it was not trained on, and 0.5 leaves most of them out.

    Args:
        index: of the validation list, whose pictures the network was not trained on.
    Returns:
        0.5 where no base class has pictures enough in the list
    """
    classes = [c for c in base_classes(config.data) if _has_episodes(index, c, config)]
    if not classes:
        return 0.5
    sampler = build_eval_sampler(config, index, seed=0, classes=tuple(classes))
    episodes = [sampler(number) for number in range(min(config.eval.episodes, CALIBRATION_EPISODES))]
    names = {c: config.data.classes[c - 1] for c in sorted({episode.class_id for episode in episodes})}
    found = miou_by_threshold(count(model, index, episodes, config=config, hardware=hardware), names)
    return max(found, key=lambda threshold: found[threshold])


def _has_episodes(index: ClassIndex, class_id: int, config: Config) -> bool:
    try:
        build_eval_sampler(config, index, seed=0, classes=(class_id,))
    except UserError:
        return False
    return True
