"""Distracting object eliminating module (DOEM), section 3.5.1 of the paper.

The module has no weights: it mines the region that is neither background nor target, pools its prototype, and
FEM (eq. 9, ``fem.py``) takes that prototype in.
"""

from typing import Literal

import torch
from torch import Tensor

from model.ops import masked_average_pool, similarity_map

Average = Literal["region", "image"]
"""over which positions P_DO is the mean: those of Y_DO, as eq. 8 prints, or all, as the authors' code does"""


def distracting_object_mask(background: Tensor, target: Tensor) -> Tensor:
    """Compute Y_DO = 1 - (Y_BG or Y_target) of boolean maps of one shape, as a float map                (eq. 7)."""
    return (~(background | target)).float()


def mine_distracting_objects(
    query_feature: Tensor,
    bg_logits: Tensor,
    initial_logits: Tensor,
    average: Average,
    known: Tensor | None = None,
    *,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the query's distracting objects: their mask, and a prototype of them.

        Y_DO = 1 - (Y_BG or Y_ini)                                                                       (eq. 7)
        P_DO = sum(X^q * Y_DO) / sum(Y_DO)          average="region"                                     (eq. 8)
        P_DO = sum(X^q * Y_DO) / (h w)              average="image", the authors' code

    Both maps are binarised at probability 0.5, which is logit 0, so no gradient flows through the mask. An empty
    Y_DO gives a zero prototype. Eq. 8 gives a prototype of full length even if Y_DO has a few spurious
    positions; the mean over the whole image is shorter the smaller Y_DO is, so its length says how much of the
    query is distracting.

    Args:
        query_feature: X^q, (B, C, h, w)
        bg_logits, initial_logits: of y_BG and y_ini, (B, 1, h, w)
        known: probability of other distracting objects (model/base_learner.py), (B, 1, h, w); positions above 0.5 join
            Y_DO
        relative: ours: y_ini is binarised at 0.3 of its largest value in the image. On a small target it hardly ever
            exceeds 0.5, and Y_DO would cover the target.
    Returns:
        Y_DO (B, 1, h, w) and P_DO (B, C, 1, 1)
    """
    target = initial_logits > 0
    if relative:
        initial = initial_logits.sigmoid()
        target = initial > 0.3 * initial.amax((-2, -1), keepdim=True)
    mask = distracting_object_mask(bg_logits > 0, target)
    if known is not None:
        mask = torch.maximum(mask, (known > 0.5).to(mask.dtype))
    prototype = masked_average_pool(query_feature, mask)
    return mask, prototype if average == "region" else prototype * mask.mean((-2, -1), keepdim=True)


def distracting_similarity(query_feature: Tensor, do_prototype: Tensor) -> Tensor:
    """Compute S_DO, how much each query position is like the distracting objects; it is beyond the paper.

        S_DO(x) = cos(X^q(x), P_DO)

    FEM cannot tell which positions resemble P_DO, because P_DO is pooled from X^q and FEM sees X_act. This map
    compares them.

    Args:
        query_feature: X^q, (B, C, h, w)
        do_prototype: P_DO, (B, C, 1, 1)
    Returns:
        (B, 1, h, w) in [0, 1], since X^q is not negative; zeros if P_DO is zero
    """
    return similarity_map(query_feature, do_prototype)
