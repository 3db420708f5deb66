"""Background eliminating module (BGEM), section 3.3.2 of the paper."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import concat_conv


class BGEM(nn.Module):
    """Filters the background out of the query feature.

        X_BG = F_1x1(X^q (+) P_BG)                                                                       (eq. 4)

    A ReLU follows the convolution, as everywhere in the authors' code: without it eq. 4 and eq. 5 would collapse
    into one linear map, in which P_BG is no more than a bias.
    """

    def __init__(self, *, channels: int, prototype_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + prototype_channels, channels, 1, bias=False)

    def forward(self, query_feature: Tensor, bg_prototype: Tensor) -> Tensor:
        """X^q (B, C, h, w), P_BG (1, D, 1, 1) -> X_BG (B, C, h, w)."""
        return F.relu_(concat_conv(self.conv, query_feature, bg_prototype))
