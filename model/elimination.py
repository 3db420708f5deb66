"""Background and distracting objects leave the query feature: BGEM, feature matching and DOEM in one go.

The paper eliminates once, on the whole feature; the authors' code does it at each of FEM's scales. Both are
this module: applied once, or as one module (with weights of its own) a scale.
"""

from typing import NamedTuple

from torch import Tensor, nn

from model.bgem import BGEM
from model.doem import Average, mine_distracting_objects
from model.matching import FeatureMatching


class Eliminated(NamedTuple):
    """Results of one elimination."""

    activated: Tensor
    """X_act, (B, C, h, w)"""
    initial_logits: Tensor
    """of y_ini, (B, 1, h, w)"""
    do_mask: Tensor
    """Y_DO, (B, 1, h, w) of 0 and 1"""
    do_prototype: Tensor
    """P_DO, (B, C, 1, 1)"""


class Elimination(nn.Module):
    """Applies eq. 4 to 8.

    Args:
        deep, detach_initial: see :class:`model.matching.FeatureMatching`.
        do_average, relative_target: see :func:`model.doem.mine_distracting_objects`.
    """

    def __init__(
        self,
        *,
        channels: int,
        prototype_channels: int,
        deep: bool,
        do_average: Average,
        relative_target: bool,
        detach_initial: bool,
    ) -> None:
        super().__init__()
        self.bgem = BGEM(channels=channels, prototype_channels=prototype_channels)
        self.matching = FeatureMatching(channels=channels, detach_initial=detach_initial, deep=deep)
        self.do_average: Average = do_average
        self.relative_target = relative_target

    def forward(
        self,
        query_feature: Tensor,
        bg_prototype: Tensor,
        bg_logits: Tensor,
        support_prototype: Tensor,
        prior: Tensor,
        known: Tensor | None = None,
    ) -> Eliminated:
        """Take X^q (B, C, h, w), P_BG (1, D, 1, 1), y_BG (B, 1, h, w), P^s (B, C, 1, 1) and C_p (B, 1, h, w).

        ``known`` (B, 1, h, w) is the probability of other distracting objects.
        """
        feature = self.bgem(query_feature, bg_prototype)
        activated, initial = self.matching(feature, support_prototype, prior)
        mined = mine_distracting_objects(
            query_feature, bg_logits, initial, self.do_average, known, relative=self.relative_target
        )
        return Eliminated(activated, initial, *mined)
