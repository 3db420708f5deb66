"""A base learner, beyond the paper: it says which base classes a picture shows, and so what cannot be a novel target.

The idea is BAM's (Lang et al., "Learning What Not to Segment", CVPR 2022). A head that is trained on base classes alone
learns to mark their objects wherever they stand, also beside a novel target. Here what looks like a base class, and
not like the target, counts as a distracting object.
"""

import torch
from torch import Tensor, nn

from model.parallel import Dropout2d


class BaseLearner(nn.Module):
    """Segments the base classes, from the backbone's frozen middle features.

    Args:
        middle_channels: of the backbone's middle features.
        base_classes: how many classes there are beside the background, which is class 0.
        channels: of the hidden layers.
    """

    def __init__(self, *, middle_channels: int, base_classes: int, channels: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(middle_channels, channels, 1),
            Dropout2d(0.1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, base_classes + 1, 1),
        )

    def forward(self, middle: Tensor) -> Tensor:
        """Turn middle features (N, middle_channels, h, w) into logits (N, n + 1, h, w), the background's first."""
        logits: Tensor = self.layers(middle)
        return logits


@torch.no_grad()
def base_posterior(logits: Tensor) -> Tensor:
    """Turn logits (N, n + 1, h, w) into the probabilities of the n base classes, without the background's."""
    return logits.float().softmax(1)[:, 1:]


def base_elsewhere(query: Tensor, target: Tensor) -> Tensor:
    """Measure how much each query position looks like base classes that the target does not look like.

        B(x) = sum_c p_c(x) (1 - s_c),    s_c = mean of p_c over the support's target, over all shots

    A target of base class c has s_c near 1, so its own class adds nothing, in training as in evaluation. The posterior
    of a novel target is spread over the base classes that it resembles. No label is needed.

    Args:
        query: p, (B, n, h, w)
        target: s, (B, n)
    Returns:
        (B, 1, h, w) in [0, 1]
    """
    return (query * (1 - target[:, :, None, None])).sum(1, keepdim=True)
