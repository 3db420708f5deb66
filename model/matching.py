"""Support feature matching (FM), section 3.4 of the paper."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import classifier, refinement
from model.ops import concat_conv


class FeatureMatching(nn.Module):
    """Activates the target in the query feature and takes a first prediction from it.

        X_act = F_1x1(X_BG (+) P^s (+) C_p)                                                              (eq. 5)
        y_ini = F_3x3(X_act)                                                                             (eq. 6)

    F_1x1 and F_3x3 are built as in eq. 4 and eq. 1, with weights of their own (the shapes differ).

    Args:
        detach_initial: F_3x3 learns from X_act without shaping it. The gradient of y_ini's loss otherwise makes X_act
            tell the base classes from the rest, and FEM no longer finds novel classes in it.
        deep: as in the authors' code: a refinement is added to X_act, and F_3x3 is FEM's classifier.
    """

    def __init__(self, *, channels: int, detach_initial: bool = False, deep: bool = False) -> None:
        super().__init__()
        self.detach_initial = detach_initial
        self.conv = nn.Conv2d(2 * channels + 1, channels, 1, bias=False)
        self.refine = refinement(channels) if deep else None
        if deep:
            self.initial = classifier(channels)
        else:
            self.initial = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, 1, 3, padding=1),
            )

    def forward(self, feature: Tensor, support_prototype: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """X_BG (B, C, h, w), P^s (B, C, 1, 1), C_p (B, 1, h, w) -> X_act (B, C, h, w), logits of y_ini (B, 1, h, w)."""
        activated = F.relu_(concat_conv(self.conv, feature, support_prototype, prior))
        if self.refine is not None:
            activated = self.refine(activated) + activated
        return activated, self.initial(activated.detach() if self.detach_initial else activated)
