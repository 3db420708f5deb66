"""Training-free segmentation as a method that util/engine/evaluation.py scores: test.py --baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data.dataset import target_of
from util.data.episodes import EpisodeFiles
from util.engine.evaluation import IMAGE
from util.engine.feature_cache import Key
from util.engine.outside import PixelMethod
from util.photos.edges import sharp_mask
from util.photos.segmenter import EncodedQuery, TrainingFreeSegmenter


class TrainingFreeMethod(PixelMethod):
    """Training-free segmentation without and with edges: 'training_free' and 'training_free_edges'.

    Images are resized to the segmenter's own size. Only their features are cached, since a target is described quickly.
    """

    def __init__(self, segmenter: TrainingFreeSegmenter) -> None:
        model, side, hardware = segmenter.model, segmenter.side, segmenter.hardware
        features = 4 * model.channels * model.backbone.map_side(side) ** 2  # bytes, in float32
        super().__init__((model, side, hardware.precision), segmenter.encode_query, features, hardware.device)
        self.segmenter = segmenter

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Return probabilities minus one half."""
        scores: dict[str, list[Tensor]] = {"training_free": [], "training_free_edges": []}
        for episode, value in zip(episodes, values, strict=True):
            query: EncodedQuery = held[episode.query, IMAGE].image
            target = []
            for support, ids in (held[line, IMAGE] for line in episode.supports):
                target.append(self.segmenter.describe(support.features, target_of(ids, value).cpu().numpy()))
            probability = self.segmenter.segment_encoded(target, query).probability
            sharp = sharp_mask(probability, query.pixels).astype(np.float32)
            for name, values_of in zip(scores, (probability, sharp), strict=True):
                scores[name].append(torch.from_numpy(values_of).to(self.device) - 0.5)
        return scores
