"""Background mining module (BGMM), section 3.3.1 of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import classifier, refinement
from model.ops import concat_conv
from model.parallel import Dropout2d


class BGMM(nn.Module):
    """Holds the learned background prototype P_BG, and segments the background with it.

        y_BG = F_3x3(X (+) P_BG)                                             (eq. 1 for the query, eq. 2 for a support)

    F_3x3 is two 3x3 convolutions with a ReLU between; query and supports share all weights. P_BG is drawn from
    a normal distribution ("randomly initialize"). Its deviation is small: the 9 D constant inputs act on every pixel
    at once, and at unit deviation the first steps at the paper's learning rate throw L_BG from 1.3 to 25 and leave
    most of the ReLUs dead.
    """

    def __init__(self, *, channels: int, prototype_channels: int) -> None:
        super().__init__()
        self.prototype = nn.Parameter(0.02 * torch.randn(1, prototype_channels, 1, 1))
        self.conv = nn.Conv2d(channels + prototype_channels, channels, 3, padding=1, bias=False)
        self.classifier: nn.Module = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, feature: Tensor) -> Tensor:
        """X (N, C, h, w) -> logits of y_BG (N, 1, h, w)."""
        return self.classifier(F.relu_(concat_conv(self.conv, feature, self.prototype)))


class DeepBGMM(nn.Module):
    """BGMM of the authors' code: deeper, with dropout, and P_BG starts at zero.

    F is a 1x1 convolution, ReLU and Dropout2d(0.5), a refinement, and a classifier. Dropout comes before the
    ReLU, which is the same and keeps one map less for the backward pass.
    """

    def __init__(self, *, channels: int, prototype_channels: int) -> None:
        super().__init__()
        self.prototype = nn.Parameter(torch.zeros(1, prototype_channels, 1, 1))
        self.conv = nn.Conv2d(channels + prototype_channels, channels, 1, bias=False)
        self.dropout = Dropout2d(0.5)
        self.refine = refinement(channels)
        self.classifier = classifier(channels)

    def forward(self, feature: Tensor) -> Tensor:
        """X (N, C, h, w) -> logits of y_BG (N, 1, h, w)."""
        x = F.relu_(self.dropout(concat_conv(self.conv, feature, self.prototype)))
        logits: Tensor = self.classifier(self.refine(x) + x)
        return logits
