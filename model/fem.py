"""Feature enrichment module (FEM): the segmentation network ``Seg`` of eq. 9, from PFENet (section 3.3 there).

Layer for layer PFENet's, so that its published weights fit; its two-class outputs become one logit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import classifier, conv_relu, refinement
from model.ops import concat_conv, conv_of_resized, pool, resize


class FEMOutput(NamedTuple):
    """What FEM returns."""

    logits: Tensor
    """(B, 1, h, w)"""
    scale_logits: tuple[Tensor, ...]
    """one (B, 1, side, side) for each scale, for the auxiliary loss; empty in eval mode"""


FEMInput = tuple[Tensor, Tensor, Tensor | None]
"""feature (B, C, *, *), prototype (B, C, 1, 1) and prior (B, maps, *, *) of one scale"""


class FEMScale(nn.Module):
    """Merges one scale with the prototype, takes in the finer one before it, and refines; in training, classifies."""

    def __init__(self, *, channels: int, maps: int, first: bool) -> None:
        super().__init__()
        self.merge = nn.Conv2d(2 * channels + maps, channels, 1, bias=False)
        self.inter_scale = None if first else conv_relu(2 * channels, channels, 1)
        self.refine = refinement(channels)
        self.classifier = classifier(channels)

    def forward(self, pooled: Tensor, prototype: Tensor, prior: Tensor | None, finer: Tensor | None) -> Tensor:
        """Maps at this scale's size, ``finer`` at any -> enriched feature (B, C, *, *)."""
        x = F.relu_(concat_conv(self.merge, pooled, prototype, prior))
        if self.inter_scale is not None and finer is not None:
            finer = resize(finer, (x.shape[-2], x.shape[-1]))
            x = self.inter_scale(torch.cat([x, finer], 1)) + x
        return self.refine(x) + x


class FEM(nn.Module):
    """Enriches a query feature with a prototype at several scales, from fine to coarse.

    Args:
        scales: fine to coarse: a whole number above 1 is a side in positions (60, 30, 15, 8), a number up to 1 a share
            of the feature's side (1, 0.5, 0.25, 0.125).
        maps: channels of ``forward``'s prior; 0 if it is given none.
    """

    def __init__(self, *, channels: int, scales: Sequence[float], maps: int) -> None:
        super().__init__()
        self.scale_sides = tuple(scales)
        self.scales = nn.ModuleList(FEMScale(channels=channels, maps=maps, first=i == 0) for i in range(len(scales)))
        self.fuse = conv_relu(channels * len(scales), channels, 1)
        self.refine = refinement(channels)
        self.classifier = classifier(channels)

    def forward(self, feature: Tensor, prototype: Tensor, prior: Tensor | None = None) -> FEMOutput:
        """Map feature (B, C, h, w), prototype (B, C, 1, 1) and prior (B, maps, h, w) to logits (B, 1, h, w)."""
        size = (feature.shape[-2], feature.shape[-1])
        inputs: list[FEMInput] = [
            (pool(feature, side), prototype, None if prior is None else resize(prior, side))
            for side in self.sizes(size)
        ]
        return self.enrich(inputs, size)

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (height, width) of every scale of a feature of this size."""
        return [_scale_size(side, size) for side in self.scale_sides]

    def enrich(self, inputs: Sequence[FEMInput], size: tuple[int, int]) -> FEMOutput:
        """Do everything after pooling: one input for each scale, at the scale's size; the result is of ``size``."""
        enriched: list[Tensor] = []
        scale_logits: list[Tensor] = []
        finer: Tensor | None = None
        for scale, (pooled, prototype, prior) in zip(self.scales, inputs, strict=True):
            assert isinstance(scale, FEMScale)
            x = scale(pooled, prototype, prior, finer)
            enriched.append(x)
            finer = resize(x, size)
            if self.training:
                scale_logits.append(scale.classifier(x))
        conv, relu = self.fuse
        assert isinstance(conv, nn.Conv2d)
        x = relu(conv_of_resized(conv, enriched, size))
        x = self.refine(x) + x
        return FEMOutput(self.classifier(x), tuple(scale_logits))


def _scale_size(side: float, size: tuple[int, int]) -> tuple[int, int]:
    if side > 1:
        return int(side), int(side)
    return max(1, int(size[0] * side)), max(1, int(size[1] * side))
