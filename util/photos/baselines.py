"""Training-free segmentation as a method that util/engine/evaluation.py scores: test.py --baselines."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.data.dataset import target_of
from util.data.episodes import EpisodeFiles
from util.engine.evaluation import Key, Method
from util.photos.edges import sharp_mask
from util.photos.segmenter import EncodedQuery, TrainingFreeSegmenter


class Entry(NamedTuple):
    """One image."""

    query: EncodedQuery
    ids: Tensor
    """(H, W) uint8: class ids"""


class TrainingFreeMethod(Method):
    """Predicts without edges ('training_free') and with edges ('training_free_edges').

    Images are read at the segmenter's own size, and only their features are kept: targets are cheap to describe.
    """

    def __init__(self, segmenter: TrainingFreeSegmenter) -> None:
        self.segmenter = segmenter
        self.owner = ("training-free", segmenter, segmenter.SIDE)

    def keys(self, episode: EpisodeFiles) -> list[Key]:
        """Return one key for each image, whatever its role."""
        return [(line, "image") for line in (episode.query, *episode.supports)]

    def nbytes(self, key: Key) -> int:
        """Estimate the features of a square image, and its pixels and mask."""
        return 4 * self.segmenter.model.channels * (self.segmenter.SIDE // 8 + 1) ** 2 + 4 * 500 * 500

    def read(self, image: np.ndarray, ids: np.ndarray) -> Any:
        """Hand the files' contents on."""
        return image, ids

    def encode(self, missing: list[Key], samples: dict[int, Any], held: Mapping[Key, Any]) -> dict[Key, Any]:
        """Compute the features of each image."""
        device, entries = self.segmenter.hardware.device, {}
        for line, role in missing:
            image, ids = samples[line]
            query = self.segmenter.encode_query(np.asarray(image))
            entries[line, role] = Entry(query, torch.as_tensor(ids).to(device))
        return entries

    def predict(
        self, episodes: Sequence[EpisodeFiles], values: Sequence[int], held: Mapping[Key, Any]
    ) -> dict[str, list[Tensor]]:
        """Segment each episode; the score is the probability minus one half."""
        scores: dict[str, list[Tensor]] = {"training_free": [], "training_free_edges": []}
        device = self.segmenter.hardware.device
        for episode, value in zip(episodes, values, strict=True):
            entries = [held[line, "image"] for line in episode.supports]
            masks = [target_of(entry.ids.cpu().numpy(), value) for entry in entries]
            query = held[episode.query, "image"].query
            pairs = zip(entries, masks, strict=True)
            target = self.segmenter.join([self.segmenter.describe(e.query.features, mask) for e, mask in pairs])
            probability = self.segmenter.segment_encoded(target, query).probability
            sharp = sharp_mask(probability, query.pixels)
            for name, score in zip(scores, (probability, sharp.astype(np.float32)), strict=True):
                scores[name].append(torch.from_numpy(score).to(device) - 0.5)
        return scores
