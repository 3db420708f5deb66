"""NTRENet: the paper's figure 3, readable top to bottom.

    query, supports --> backbone --> X^q, X^s, prior C_p, P^s
    X  --BGMM--> y_BG                       (eq. 1-2)       bgmm.py
    X^q --BGEM--> X_BG                      (eq. 4)         bgem.py
    X_BG, P^s, C_p --FM--> X_act, y_ini     (eq. 5-6)       matching.py
    y_BG, y_ini --DOEM--> Y_DO, P_DO        (eq. 7-8)       doem.py
    X_act, P_DO --FEM--> y                  (eq. 9)         fem.py

Shapes: B batch, K shots (read from the tensor), C = 256 reduced channels, D = 640 prototype channels,
(H, W) image, (h, w) features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backbone import Backbone
from model.bgem import BGEM
from model.bgmm import BGMM
from model.doem import mine_distracting_objects
from model.fem import FEM, FEMScale
from model.matching import FeatureMatching
from model.ops import foreground, masked_average_pool, resize
from model.prior import prior_mask


class NTRENetOutput(NamedTuple):
    """What one forward gives, in training and in evaluation alike. All predictions are logits: y = sigmoid(logits)."""

    logits: Tensor
    """y^q at the image's size, (B, 1, H, W)"""
    feature_logits: Tensor
    """y^q before upsampling, (B, 1, h, w)"""
    scale_logits: tuple[Tensor, ...]
    """FEM's prediction at each scale, (B, 1, side, side)"""
    prior: Tensor
    """C_p, (B, 1, h, w) in [0, 1]"""
    query_feature: Tensor
    """X^q, (B, C, h, w)"""
    support_features: Tensor
    """X^s, (B, K, C, h, w)"""
    support_prototype: Tensor
    """P^s, (B, C, 1, 1)"""
    query_bg_logits: Tensor | None = None
    """y_BG^q, (B, 1, h, w); None without BGEM"""
    support_bg_logits: Tensor | None = None
    """y_BG^s, (B, K, 1, h, w); None without BGEM"""
    initial_logits: Tensor | None = None
    """y_ini, (B, 1, h, w); None without DOEM"""
    do_mask: Tensor | None = None
    """Y_DO^q, (B, 1, h, w) of 0 and 1; None without DOEM"""
    do_prototype: Tensor | None = None
    """P_DO^q, (B, C, 1, 1), zero where Y_DO is empty; None without DOEM"""


class NTRENet(nn.Module):
    """Few-shot segmentation by eliminating what is not the target. Build it with :func:`build_ntrenet`.

    Without ``bgmm`` and ``bgem`` it is PFENet, FEM(X^q, P^s, C_p); without ``matching`` it is the BGEM-only row
    of Table 3, FEM(X_BG, P^s, C_p).
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        reduce_query: nn.Module,
        reduce_support: nn.Module,
        fem: FEM,
        bgmm: BGMM | None = None,
        bgem: BGEM | None = None,
        matching: FeatureMatching | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reduce_query = reduce_query
        self.reduce_support = reduce_support
        self.bgmm = bgmm
        self.bgem = bgem
        self.matching = matching
        self.fem = fem

    def forward(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> NTRENetOutput:
        """Segment the query's pixels of the class that the support masks show.

        Args:
            query: (B, 3, H, W), normalised RGB
            supports: (B, K, 3, H, W), any K >= 1
            support_masks: (B, K, H, W), integer; 1 target, 0 other, 255 ignored
        """
        x_q, x_s, p_s, prior = self.encode(query, supports, support_masks)
        bg_q = bg_s = initial = do_mask = p_do = None

        feature, prototype = x_q, p_s
        fem_prior: Tensor | None = prior  # PFENet: FEM(X^q, P^s, C_p)
        if self.bgmm is not None and self.bgem is not None:
            bg_q = self.bgmm(x_q)
            bg_s = self.bgmm(x_s.flatten(0, 1)).unflatten(0, x_s.shape[:2])
            feature = self.bgem(x_q, self.bgmm.prototype)  # BGEM alone: FEM(X_BG, P^s, C_p)
            if self.matching is not None:
                feature, initial = self.matching(feature, p_s, prior)
                do_mask, p_do = mine_distracting_objects(x_q, bg_q, initial)
                prototype, fem_prior = p_do, None  # NTRENet: FEM(X_act, P_DO)
        out = self.fem(feature, prototype, fem_prior)

        return NTRENetOutput(
            logits=resize(out.logits, (query.shape[-2], query.shape[-1])),
            feature_logits=out.logits,
            scale_logits=out.scale_logits,
            prior=prior,
            query_feature=x_q,
            support_features=x_s,
            support_prototype=p_s,
            query_bg_logits=bg_q,
            support_bg_logits=bg_s,
            initial_logits=initial,
            do_mask=do_mask,
            do_prototype=p_do,
        )

    def encode(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X^q (B, C, h, w), X^s (B, K, C, h, w), P^s (B, C, 1, 1) and C_p (B, 1, h, w)."""
        batch_and_shots = supports.shape[:2]
        q = self.backbone(query)
        s = self.backbone(supports.flatten(0, 1))
        target = foreground(support_masks.flatten(0, 1), (s.stage3.shape[-2], s.stage3.shape[-1]))

        with torch.no_grad():  # the support's target alone: masked before stage 4 and after it
            s_high = self.backbone.high(s.stage3 * target) * target
            prior = prior_mask(self.backbone.high(q.stage3), s_high.unflatten(0, batch_and_shots))

        x_q = self.reduce_query(q.middle)
        x_s = self.reduce_support(s.middle)
        p_s = masked_average_pool(x_s, target).unflatten(0, batch_and_shots).mean(1)
        return x_q, x_s.unflatten(0, batch_and_shots), p_s, prior


def build_ntrenet(
    backbone: Backbone,
    *,
    bgem: bool = True,
    doem: bool = True,
    channels: int = 256,
    prototype_channels: int = 640,
    fem_scales: Sequence[float] = (60, 30, 15, 8),
) -> NTRENet:
    """NTRENet or one of its ablations, on a given backbone.

    Args:
        bgem: mine and eliminate the background; off is PFENet.
        doem: match, mine and eliminate distracting objects; needs ``bgem``, whose background map it takes.
        channels: C
        prototype_channels: D of P_BG (the paper's Fig. 6)
        fem_scales: see :class:`model.fem.FEM`.
    """
    if doem and not bgem:
        raise ValueError("doem needs bgem: distracting objects are what is neither background nor target")
    network = NTRENet(
        backbone=backbone,
        reduce_query=_reduction(backbone.middle_channels, channels),
        reduce_support=_reduction(backbone.middle_channels, channels),
        bgmm=BGMM(channels=channels, prototype_channels=prototype_channels) if bgem else None,
        bgem=BGEM(channels=channels, prototype_channels=prototype_channels) if bgem else None,
        matching=FeatureMatching(channels=channels) if doem else None,
        fem=FEM(channels=channels, scales=fem_scales, with_prior=not doem),
    )
    _initialise(network)
    return network


@torch.no_grad()
def _initialise(network: NTRENet) -> None:
    """He's initialisation before every ReLU; the prior, one input among 2C + 1, starts with the weight of C.

    torch's default, which the lineage uses, shrinks the signal at each of FEM's many layers and all but hides the
    prior: hundreds of steps go by before anything is learned.
    """
    heads = [part for part in network.children() if part is not network.backbone]
    for module in (m for part in heads for m in part.modules()):
        if isinstance(module, nn.Conv2d) and module.out_channels > 1:  # the others give logits
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if network.matching is not None:
        merges = [network.matching.conv]
    else:
        merges = [scale.merge for scale in network.fem.modules() if isinstance(scale, FEMScale)]
    for merge in merges:
        merge.weight[:, -1] *= merge.out_channels**0.5


def _reduction(inputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, channels, 1, bias=False), nn.ReLU(), nn.Dropout2d(0.5))
