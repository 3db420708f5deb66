"""A base learner, beyond the paper: it finds base classes in the query, which cannot be a novel target.

The idea is BAM's (Lang et al., "Learning What Not to Segment", CVPR 2022). A head that is trained on base classes alone
learns to mark their objects, also next to a novel target. Positions that resemble a base class and not the target count
as distracting objects (DOEM and FEM take B). The features by which it tells base classes apart
also tell novel ones apart, better than the backbone's: at the end its opinion joins FEM's prediction (A and B).

    B(x) = sum_c p_c(x) (1 - s_c)                 p: probabilities of the base classes, s: their means over the target
    A(x) = cos(h(x), h_s) - cos(h(x), h_q) / 2    h: the features before the classifier, h_s: their mean over the
    y    = FEM's logits + 12 (A - 0.325) - 2 B    supports' target, h_q: over the whole query

How alike all positions are differs from set to set and from image to image; h_q takes half of that out of A.
Positions of A above 0.325 are like the target, so they are no distracting objects of DOEM whatever B is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.ops import similarity_map
from model.parallel import Dropout2d

LIKE_THE_TARGET = 0.325
"""A above this speaks for the target, below against it"""


class BaseOutput(NamedTuple):
    """Output of the base learner for N images."""

    logits: Tensor
    """of background and n base classes, (N, n + 1, h, w)"""
    embedding: Tensor
    """h, (N, E, h, w)"""


class BaseMaps(NamedTuple):
    """Maps of B queries, made by comparing them with the supports' target."""

    elsewhere: Tensor
    """B, (B, 1, h, w) in [0, 1]"""
    agreement: Tensor
    """A, (B, 1, h, w) in [-1.5, 1.5]"""

    @property
    def distracting(self) -> Tensor:
        """Return B where the position is not like the target, else 0: (B, 1, h, w) in [0, 1]."""
        return self.elsewhere * (self.agreement <= LIKE_THE_TARGET)


class BaseLearner(nn.Module):
    """Segments the base classes, from the backbone's frozen middle features.

    Args:
        middle_channels: of the backbone's middle features.
        base_classes: number of classes in addition to the background, which is class 0.
        channels: E, of the hidden layers.
    """

    def __init__(self, *, middle_channels: int, base_classes: int, channels: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(middle_channels, channels, 1),
            Dropout2d(0.1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, base_classes + 1, 1),
        )

    def forward(self, middle: Tensor) -> BaseOutput:
        """Read middle features (N, middle_channels, h, w)."""
        embedding = self.layers[:4](middle)
        return BaseOutput(self.layers[4:](embedding), embedding.detach())


@torch.no_grad()
def base_posterior(logits: Tensor) -> Tensor:
    """Turn logits (N, n + 1, h, w) into p, the probabilities of the n base classes, without the background's."""
    return logits.float().softmax(1)[:, 1:]


def base_elsewhere(query: Tensor, target: Tensor) -> Tensor:
    """Compute B, how much each query position looks like base classes that the target does not look like.

    A target of base class c has s_c near 1, so its own class adds nothing, in training as in evaluation. The posterior
    of a novel target is spread over the base classes that it resembles. No label is needed.

    Args:
        query: p, (B, n, h, w)
        target: s, (B, n), the mean over all shots
    Returns:
        (B, 1, h, w) in [0, 1]
    """
    return (query * (1 - target[:, :, None, None])).sum(1, keepdim=True)


def base_agreement(query: Tensor, target: Tensor) -> Tensor:
    """Compute A, how much more each query position looks like the target to the base learner than like the query.

    Args:
        query: h, (B, E, h, w)
        target: h_s, (B, E), the mean over all shots
    Returns:
        (B, 1, h, w) in [-1.5, 1.5]
    """
    of_target = similarity_map(query, target[:, :, None, None])
    return of_target - similarity_map(query, query.mean((-2, -1), keepdim=True)) / 2


def join_base(logits: Tensor, maps: BaseMaps) -> Tensor:
    """Join FEM's logits (B, 1, h, w) with the base learner's maps.

    If FEM were trained on the sum, it would rely on the base learner and generalise worse, so the sum is used at
    inference only.
    """
    return logits + 12 * (maps.agreement - LIKE_THE_TARGET) - 2 * maps.elsewhere
