"""Predictions without any training, scored on the episodes of an evaluation: what a network has to beat."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from model.ntrenet import NTRENet
from model.training_free import on_backbone
from util.config import Config
from util.data.class_index import ClassIndex
from util.data.dataset import read_pair
from util.data.episodes import EpisodeFiles
from util.engine.build import Hardware
from util.engine.diagnosis import count, miou_by_threshold
from util.engine.metrics import confusion, scores
from util.engine.rounds import EncodingSize, plan_rounds
from util.progress import progress
from util.segment.edges import sharp_mask
from util.segment.segmenter import TrainingFreeSegmenter

TRAINING_FREE = ("training_free", "training_free_edges")
"""model/training_free.py, without and with edges"""
COMPARED_EPISODES = 100
"""at most so many tell whether a network is worth its training"""


def evaluate_training_free(
    segmenter: TrainingFreeSegmenter,
    index: ClassIndex,
    episodes: Sequence[EpisodeFiles],
    *,
    cache_gib: float,
    bar: tqdm | None = None,
) -> dict[str, np.ndarray]:
    """Count each episode at its query's original size, by the rules of :func:`util.engine.loops.evaluate`.

    The pictures are read at the segmenter's own size, whatever the network's.

    Args:
        cache_gib: memory for what episodes share.
        bar: advanced by one an episode.
    Returns:
        (N, 4) counts of :func:`util.engine.metrics.confusion` for each of ``TRAINING_FREE``
    """
    counts = {name: np.zeros((len(episodes), 4), np.int64) for name in TRAINING_FREE}
    empty = segmenter.encode_query(np.zeros((8, 8, 3), np.uint8)).features
    size = empty.numel() * empty.element_size()
    for part in plan_rounds(episodes, index, EncodingSize(query=size, whole=size), cache_gib * 2**30):
        pairs = {place: read_pair(index.items[place], part.class_id) for place in part.images}
        queries = {n: segmenter.encode_query(pairs[n][0]) for n, roles in part.images.items() if "query" in roles}
        targets = {n: segmenter.encode(*pairs[n], class_id=1) for n, roles in part.images.items() if "support" in roles}
        for number in part.episodes:
            episode = episodes[number]
            query, ground_truth = queries[episode.query], torch.from_numpy(pairs[episode.query][1])
            target = segmenter.join([targets[place] for place in episode.supports])
            found = segmenter.segment_encoded(target, query)
            masks = (found.mask, sharp_mask(found.probability, query.pixels))
            for name, mask in zip(TRAINING_FREE, masks, strict=True):
                counts[name][number] = confusion(torch.from_numpy(mask), ground_truth).numpy()
            if bar is not None:
                bar.update()
    return counts


def better_of(
    model: NTRENet,
    threshold: float,
    index: ClassIndex,
    episodes: Sequence[EpisodeFiles],
    *,
    config: Config,
    hardware: Hardware,
) -> str:
    """Compare a network with training-free segmentation on its own backbone, both as predict.py uses them.

    Args:
        threshold: of the network's probability.
        episodes: the first ``COMPARED_EPISODES`` of them are run.
    Returns:
        a sentence with both mIoUs that names the better of the two; a warning where that is not the network
    """
    episodes = episodes[:COMPARED_EPISODES]
    class_ids = np.array([episode.class_id for episode in episodes])
    names = {c: config.data.classes[c - 1] for c in np.unique(class_ids).tolist()}
    trained = 100 * miou_by_threshold(count(model, index, episodes, config=config, hardware=hardware), names)[threshold]
    name = config.model.backbone
    segmenter = TrainingFreeSegmenter(on_backbone(name, model.backbone), name, hardware)
    with progress(total=len(episodes), desc="without training", unit="episode", leave=False) as bar:
        counts = evaluate_training_free(segmenter, index, episodes, cache_gib=config.eval.cache_gib, bar=bar)
    free = 100 * scores(counts["training_free_edges"], class_ids, names).miou
    both = f"{trained:.1f} mIoU at its threshold, and training-free segmentation {free:.1f} with edges"
    told = f"on {len(episodes)} validation episodes best.pt has {both}"
    if trained >= free:
        return f"{told}: the trained network is the better of the two"
    return (
        f"warning: {told}: what needs no training is the better of the two; use predict.py without --checkpoint, or"
        " train longer or on more pictures"
    )
