"""Background mining module (BGMM), section 3.3.1 of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import concat_conv


class BGMM(nn.Module):
    """One learned background prototype P_BG and the network that segments the background with it.

        y_BG = F_3x3(X (+) P_BG)                                             (eq. 1 for the query, eq. 2 for a support)

    F_3x3 is two 3x3 convolutions with a ReLU between; query and supports share all weights. P_BG is drawn from
    a normal distribution ("randomly initialize"; the authors' code starts from zeros). Its deviation is small:
    the 9 D constant inputs act on every pixel at once, and at unit deviation the first steps at the paper's
    learning rate throw L_BG from 1.3 to 25 and leave most of the ReLUs dead.
    """

    def __init__(self, *, channels: int, prototype_channels: int) -> None:
        super().__init__()
        self.prototype = nn.Parameter(0.02 * torch.randn(1, prototype_channels, 1, 1))
        self.conv = nn.Conv2d(channels + prototype_channels, channels, 3, padding=1, bias=False)
        self.classifier = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, feature: Tensor) -> Tensor:
        """X (N, C, h, w) -> logits of y_BG (N, 1, h, w)."""
        return self.classifier(F.relu_(concat_conv(self.conv, feature, self.prototype)))
