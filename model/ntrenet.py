"""NTRENet: the paper's figure 3, readable top to bottom.

    query, supports --> backbone --> X^q, X^s, prior C_p, P^s
    X  --BGMM--> y_BG                       (eq. 1-2)       bgmm.py
    X^q --BGEM--> X_BG                      (eq. 4)         bgem.py
    X_BG, P^s, C_p --FM--> X_act, y_ini     (eq. 5-6)       matching.py
    y_BG, y_ini --DOEM--> Y_DO, P_DO        (eq. 7-8)       doem.py         BGEM, FM, DOEM together: elimination.py
    X_act, P_DO --FEM--> y                  (eq. 9)         fem.py
    base learner, an option beyond the paper, says what is of base classes and what is like the target  base_learner.py

Shapes: B batch, K shots (read from the tensor), C = 256 reduced channels, D = 640 prototype channels,
(H, W) image, (h, w) features.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone
from model.base_learner import (
    BaseLearner,
    BaseMaps,
    BaseOutput,
    base_agreement,
    base_elsewhere,
    base_posterior,
    join_base,
)
from model.bgem import BGEM
from model.bgmm import BGMM, DeepBGMM
from model.doem import Average, distracting_similarity
from model.elimination import Eliminated, Elimination
from model.fem import FEM, FEMOutput, FEMScale
from model.matching import FeatureMatching
from model.ops import foreground, masked_average_pool, pool, resize
from model.parallel import Dropout2d
from model.prior import prior_mask, target_positions

EliminationKind = Literal["single", "per_scale", "authors"]


class NTRENetOutput(NamedTuple):
    """What the boxes of one forward give, in training and in evaluation alike.

    All predictions are logits: y = sigmoid(logits).
    """

    logits: Tensor
    """y^q at the image's size, (B, 1, H, W); with a base learner joined with what that says"""
    fem: FEMOutput
    """y^q before it is upsampled and joined, and from ``forward`` FEM's prediction at each scale"""
    prior: Tensor
    """C_p, (B, 1, h, w) in [0, 1]"""
    query_feature: Tensor
    """X^q, (B, C, h, w)"""
    support_prototype: Tensor
    """P^s, (B, C, 1, 1)"""
    query_bg_logits: Tensor | None = None
    """y_BG^q, (B, 1, h, w); None without BGEM"""
    eliminated: tuple[Eliminated, ...] = ()
    """of the one elimination, or of that at each of FEM's scales, fine to coarse; empty without DOEM"""
    support_features: Tensor | None = None
    """X^s, (B, K, C, h, w); from ``forward`` only"""
    support_bg_logits: Tensor | None = None
    """y_BG^s, (B, K, 1, h, w); from ``forward`` only, None without BGEM"""
    base_logits: Tensor | None = None
    """of background and n base classes in the query, (B, n + 1, h, w); from ``forward`` only, with a base learner"""


class QueryEncoding(NamedTuple):
    """What the network reads from B query images, whatever the target."""

    feature: Tensor
    """X^q, (B, C, h, w)"""
    high: Tensor
    """stage 4, (B, C4, h, w)"""
    base: Tensor
    """probabilities of the n base classes, (B, n, h, w); n and E are 0 without a base learner"""
    base_embedding: Tensor
    """the base learner's features, (B, E, h, w)"""


class SupportEncoding(NamedTuple):
    """What the network reads from the supports of B episodes: enough to segment any query."""

    prototype: Tensor
    """P^s, (B, C, 1, 1)"""
    high: Tensor
    """stage 4 where a support shows the target, (B, K, n, C4)"""
    base: Tensor
    """mean probabilities of the base classes over the target, (B, n)"""
    base_embedding: Tensor
    """mean of the base learner's features over the target, (B, E)"""


def join_shots(supports: Sequence[SupportEncoding]) -> SupportEncoding:
    """Join K encodings of one shot and B = 1 into one of K shots and B = 1.

    Those with fewer positions get zeros, such as every position beside a target has.
    """
    most = max(s.high.shape[2] for s in supports)
    high = torch.cat([F.pad(s.high, (0, 0, 0, most - s.high.shape[2])) for s in supports], 1)
    of_shots = zip(*((s.prototype, s.base, s.base_embedding) for s in supports), strict=True)
    prototype, base, embedding = (torch.stack(shots).mean(0) for shots in of_shots)
    return SupportEncoding(prototype, high, base, embedding)


class NTRENet(nn.Module):
    """Segments few-shot by eliminating what is not the target. Build it with :func:`build_ntrenet`.

    Without ``bgmm`` it is PFENet, FEM(X^q, P^s, C_p); with ``bgem`` and no ``eliminations`` the BGEM-only row of
    Table 3, FEM(X_BG, P^s, C_p). ``eliminations`` are one: FEM follows with P_DO and, if it is built with a prior,
    C_p, less S_DO with ``do_similarity``. With ``per_scale`` each of FEM's scales has its own (the authors' code).
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        reduce_query: nn.Module,
        reduce_support: nn.Module,
        fem: FEM,
        bgmm: BGMM | DeepBGMM | None = None,
        bgem: BGEM | None = None,
        eliminations: Sequence[Elimination] = (),
        per_scale: bool = False,
        do_similarity: bool = False,
        base_learner: BaseLearner | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reduce_query = reduce_query
        self.reduce_support = reduce_support
        self.bgmm = bgmm
        self.bgem = bgem
        self.eliminations = nn.ModuleList(eliminations)
        self.per_scale, self.do_similarity = per_scale, do_similarity
        self.base_learner = base_learner
        self.fem = fem

    def forward(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> NTRENetOutput:
        """Segment the query's pixels of the class that the support masks show.

        Args:
            query: (B, 3, H, W), normalised RGB
            supports: (B, K, 3, H, W), any K >= 1
            support_masks: (B, K, H, W), integer; 1 target, 0 other, 255 ignored
        """
        size = (query.shape[-2], query.shape[-1])
        support, x_s = self.encode_supports(supports, support_masks)
        features = self.backbone(query)
        learned = None if self.base_learner is None else self.base_learner(features.middle)
        searched = self.read_query(features.middle, self.backbone.high(features.stage3), learned)
        x_q, p_s, prior = searched.feature, support.prototype, prior_mask(searched.high, support.high)
        base = self._base_maps([searched], [support])
        del features, searched, support  # stage 4 is large and no longer needed
        output = self.eliminate_and_enrich(x_q, p_s, prior, size, base=base, every_scale=True)
        bg_s = None if self.bgmm is None else self.bgmm(x_s.flatten(0, 1)).unflatten(0, x_s.shape[:2])
        base_logits = None if learned is None else learned.logits
        return output._replace(support_features=x_s, support_bg_logits=bg_s, base_logits=base_logits)

    def encode_query(self, query: Tensor) -> QueryEncoding:
        """Encode query images (B, 3, H, W)."""
        features = self.backbone(query)
        return self.read_query(features.middle, self.backbone.high(features.stage3))

    def encode_supports(self, supports: Tensor, support_masks: Tensor) -> tuple[SupportEncoding, Tensor]:
        """Encode (B, K, 3, H, W) with (B, K, H, W); also gives X^s (B, K, C, h, w), which the losses need."""
        batch_and_shots = supports.shape[:2]
        features = self.backbone(supports.flatten(0, 1))
        target = foreground(support_masks.flatten(0, 1), (features.stage3.shape[-2], features.stage3.shape[-1]))
        high = target_positions(self.backbone, features.stage3, target)
        each, x_s = self.read_supports(features.middle, high, target)
        of_shots = each.prototype, each.base, each.base_embedding
        prototype, base, embedding = (x.unflatten(0, batch_and_shots).mean(1) for x in of_shots)
        high = each.high.squeeze(1).unflatten(0, batch_and_shots)
        return SupportEncoding(prototype, high, base, embedding), x_s.unflatten(0, batch_and_shots)

    def read_query(self, middle: Tensor, high: Tensor, learned: BaseOutput | None = None) -> QueryEncoding:
        """Encode queries from what the frozen backbone gives: middle features and stage 4, both (N, *, h, w).

        Args:
            learned: what the base learner makes of the middle features, where that is known already.
        """
        return QueryEncoding(self.reduce_query(middle), high, *self.read_base(middle, learned))

    def read_base(self, middle: Tensor, learned: BaseOutput | None = None) -> tuple[Tensor, Tensor]:
        """Turn middle features (N, C_middle, h, w) into p (N, n, h, w) and h (N, E, h, w) of the base learner."""
        if self.base_learner is None:
            return middle[:, :0], middle[:, :0]
        logits, embedding = self.base_learner(middle) if learned is None else learned
        return base_posterior(logits), embedding

    def read_supports(self, middle: Tensor, high: Tensor, target: Tensor) -> tuple[SupportEncoding, Tensor]:
        """Encode N supports, as N episodes of one shot, from what the frozen backbone gives.

        Args:
            middle: middle features, (N, *, h, w)
            high: (N, n, C4) of :func:`model.prior.target_positions`
            target: (N, 1, h, w) of :func:`model.ops.foreground`
        Returns:
            also X^s (N, C, h, w)
        """
        x_s = self.reduce_support(middle)
        base = (masked_average_pool(x, target).flatten(1) for x in self.read_base(middle))
        return SupportEncoding(masked_average_pool(x_s, target), high.unsqueeze(1), *base), x_s

    def segment(
        self, queries: Sequence[QueryEncoding], supports: Sequence[SupportEncoding], size: tuple[int, int]
    ) -> NTRENetOutput:
        """Segment queries of an image size (H, W), each by its supports; all but the prior runs as one batch.

        The record lacks what only training asks for.
        """
        prior = torch.cat([prior_mask(q.high, s.high) for q, s in zip(queries, supports, strict=True)])
        x_q, p_s = torch.cat([q.feature for q in queries]), torch.cat([s.prototype for s in supports])
        return self.eliminate_and_enrich(x_q, p_s, prior, size, base=self._base_maps(queries, supports))

    def _base_maps(self, queries: Sequence[QueryEncoding], supports: Sequence[SupportEncoding]) -> BaseMaps | None:
        if self.base_learner is None:
            return None
        p, h = torch.cat([q.base for q in queries]), torch.cat([q.base_embedding for q in queries])
        s, h_s = torch.cat([s.base for s in supports]), torch.cat([s.base_embedding for s in supports])
        return BaseMaps(base_elsewhere(p, s), base_agreement(h, h_s))

    def eliminate_and_enrich(
        self,
        x_q: Tensor,
        p_s: Tensor,
        prior: Tensor,
        size: tuple[int, int],
        *,
        base: BaseMaps | None = None,
        every_scale: bool = False,
    ) -> NTRENetOutput:
        """Do the paper's figure 3 from X^q, P^s and C_p on, to the prediction at the image's size (H, W).

        Args:
            base: the base learner's maps; FEM then takes B in the place of C_p.
            every_scale: give FEM's prediction at each scale as well.
        """
        elsewhere = None if base is None else base.elsewhere
        bg: Tensor | None = None
        eliminated: tuple[Eliminated, ...] = ()
        feature = x_q
        if self.bgmm is not None:
            bg, p_bg = self.bgmm(x_q), self.bgmm.prototype
            feature = x_q if self.bgem is None else self.bgem(x_q, p_bg)
            eliminated = self._eliminate(x_q, p_bg, bg, p_s, prior, elsewhere)
        if self.per_scale:
            inputs = [(e.activated, e.do_prototype, None) for e in eliminated]
            fem = self.fem.enrich(inputs, (x_q.shape[-2], x_q.shape[-1]), every_scale=every_scale)
        elif eliminated:
            (once,) = eliminated
            seen = (prior if elsewhere is None else elsewhere) if self.fem.with_prior else None
            if seen is not None and self.do_similarity:
                seen = seen - distracting_similarity(x_q, once.do_prototype)
            fem = self.fem(once.activated, once.do_prototype, seen, every_scale=every_scale)
        else:  # PFENet, or BGEM alone
            fem = self.fem(feature, p_s, prior, every_scale=every_scale)
        return NTRENetOutput(
            logits=resize(fem.logits if base is None else join_base(fem.logits, base), size),
            fem=fem,
            prior=prior,
            query_feature=x_q,
            support_prototype=p_s,
            query_bg_logits=bg,
            eliminated=eliminated,
        )

    def _eliminate(
        self, x_q: Tensor, p_bg: Tensor, bg: Tensor, p_s: Tensor, prior: Tensor, known: Tensor | None
    ) -> tuple[Eliminated, ...]:
        """Apply eq. 4 to 8 to the whole feature, or at each of FEM's scales to what is pooled to it."""
        full = (x_q.shape[-2], x_q.shape[-1])
        sizes = self.fem.sizes(full) if self.per_scale else [full] * len(self.eliminations)
        return tuple(
            eliminate(
                pool(x_q, side),
                p_bg,
                resize(bg, side),
                p_s,
                resize(prior, side),
                None if known is None else resize(known, side),
            )
            for eliminate, side in zip(self.eliminations, sizes, strict=True)
        )


def build_ntrenet(
    backbone: Backbone,
    *,
    bgem: bool = True,
    doem: bool = True,
    elimination: EliminationKind = "single",
    do_average: Average = "image",
    fem_prior: bool = True,
    do_similarity: bool = True,
    detach_initial: bool = True,
    base_classes: int = 0,
    channels: int = 256,
    prototype_channels: int = 640,
    fem_scales: Sequence[float] = (60, 30, 15, 8),
) -> NTRENet:
    """Build NTRENet or one of its ablations on a given backbone.

    Args:
        bgem: mine and eliminate the background; off is PFENet.
        doem: match, mine and eliminate distracting objects; needs ``bgem``, whose background map it takes.
        elimination: once (the paper), at each of FEM's scales, or at each with the authors' deeper BGMM and FM,
            which with ``do_average`` "image" and ``prototype_channels`` 256 is their network.
        do_average: see :func:`model.doem.mine_distracting_objects`.
        fem_prior: FEM takes C_p beside P_DO where ``elimination`` is single; at each scale FM has just taken it.
        do_similarity: S_DO is taken off that C_p, see :func:`model.doem.distracting_similarity`.
        detach_initial: see :class:`model.matching.FeatureMatching`; never with the authors' code.
        base_classes: of the base learner, see :mod:`model.base_learner`; 0 for none.
        channels: C
        prototype_channels: D of P_BG (the paper's Fig. 6)
        fem_scales: see :class:`model.fem.FEM`.
    """
    if doem and not bgem:
        raise ValueError("doem needs bgem: distracting objects are what is neither background nor target")
    if base_classes and not doem:
        raise ValueError("a base learner needs doem: it says which objects are distracting")
    sizes = {"channels": channels, "prototype_channels": prototype_channels}
    deep, per_scale = elimination == "authors", doem and elimination != "single"
    count = len(fem_scales) if per_scale else int(doem)
    middle = backbone.middle_channels
    learner = BaseLearner(middle_channels=middle, base_classes=base_classes) if base_classes else None
    network = NTRENet(
        backbone=backbone,
        reduce_query=_reduction(middle, channels),
        reduce_support=_reduction(middle, channels),
        fem=FEM(channels=channels, scales=fem_scales, with_prior=not doem or (fem_prior and not per_scale)),
        bgmm=(DeepBGMM if deep else BGMM)(**sizes) if bgem else None,
        bgem=BGEM(**sizes) if bgem and not doem else None,
        eliminations=[
            Elimination(**sizes, deep=deep, do_average=do_average, detach_initial=detach_initial and not deep)
            for _ in range(count)
        ],
        per_scale=per_scale,
        do_similarity=do_similarity,
        base_learner=learner,
    )
    _initialise(network)
    return network


@torch.no_grad()
def _initialise(network: NTRENet) -> None:
    """He's initialisation before every ReLU; the prior, one input among 2C + 1, starts with the weight of C.

    torch's default, which the authors' code uses, shrinks the signal at each of FEM's many layers and all but hides the
    prior: hundreds of steps go by before anything is learned.
    """
    heads = [part for part in network.children() if part is not network.backbone]
    for module in (m for part in heads for m in part.modules()):
        if isinstance(module, nn.Conv2d) and module.out_channels > 1:  # the others give logits
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    merges = [part.conv for part in network.eliminations.modules() if isinstance(part, FeatureMatching)]
    if network.fem.with_prior:
        merges += [part.merge for part in network.fem.modules() if isinstance(part, FEMScale)]
    for merge in merges:
        merge.weight[:, -1] *= merge.out_channels**0.5


def _reduction(inputs: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, 1, bias=False)
    return nn.Sequential(conv, Dropout2d(0.5), nn.ReLU(inplace=True))  # in this order as in fem.classifier
