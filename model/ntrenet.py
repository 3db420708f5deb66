"""NTRENet: the paper's figure 3, readable top to bottom.

    query, supports --> backbone --> features                              backbone.py
    X^q, X^s, P^s from the middle features, prior C_p from the high ones   prior.py
    X  --BGMM--> y_BG                       (eq. 1-2)                      bgmm.py
    X^q --BGEM--> X_BG                      (eq. 4)                        bgem.py
    X_BG, P^s, C_p --FM--> X_act, y_ini     (eq. 5-6)                      matching.py
    y_BG, y_ini --DOEM--> Y_DO, P_DO        (eq. 7-8)                      doem.py; BGEM, FM and DOEM: elimination.py
    X_act, P_DO --FEM--> y                  (eq. 9)                        fem.py
    options beyond the paper: a base learner finds base classes            base_learner.py
    the training-free score joins y in evaluation                          training_free.py

Shapes: B batch, K shots (read from the tensor), C = 256 reduced channels, D prototype channels,
(H, W) image, (h, w) features.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.backbone import Backbone, Features
from model.base_learner import BaseLearner, BaseMaps, base_agreement, base_elsewhere, base_posterior, join_base
from model.bgem import BGEM
from model.bgmm import BGMM, DeepBGMM
from model.doem import Average, distracting_similarity
from model.elimination import Eliminated, Elimination
from model.fem import FEM, FEMOutput, FEMScale
from model.matching import FeatureMatching
from model.ops import foreground, masked_average_pool, pool, resize
from model.parallel import Dropout2d, log_mean
from model.prior import prior_mask
from model.training_free import episode_scores

EliminationKind = Literal["single", "authors"]
Initialisation = Literal["he", "torch"]


class NTRENetOutput(NamedTuple):
    """Predictions of one forward pass, as logits: y = sigmoid(logits)."""

    logits: Tensor
    """y^q at the size of the masks, (B, 1, H, W), joined with training-free score and base learner if they are on"""
    fem: FEMOutput
    """y^q before it is upsampled and joined; in training mode also FEM's prediction at each scale"""
    prior: Tensor
    """C_p, (B, 1, h, w) in [0, 1]"""
    query_feature: Tensor
    """X^q, (B, C, h, w)"""
    support_prototype: Tensor
    """P^s, (B, C, 1, 1)"""
    query_bg_logits: Tensor | None = None
    """y_BG^q, (B, 1, h, w); None without BGEM"""
    eliminated: tuple[Eliminated, ...] = ()
    """results of the one elimination, or of that at each of FEM's scales, fine to coarse; empty without DOEM"""
    support_features: Tensor | None = None
    """X^s, (B, K, C, h, w); in training mode only"""
    support_bg_logits: Tensor | None = None
    """y_BG^s, (B, K, 1, h, w); in training mode only, None without BGEM"""
    base_logits: Tensor | None = None
    """background and n base classes in the query, (B, n + 1, h, w); in training mode only, with a base learner"""


class NTRENet(nn.Module):
    """Segments few-shot by eliminating what is not the target. Build it with :func:`build_ntrenet`.

    Without ``bgmm`` it is PFENet, FEM(X^q, P^s, C_p); with ``bgem`` and no ``eliminations`` the BGEM-only row of
    Table 3, FEM(X_BG, P^s, C_p). With ``eliminations`` FEM takes X_act, P_DO and, with ``fem_prior``, C_p, minus S_DO
    with ``do_similarity``. With ``per_scale`` each of FEM's scales has its own elimination (the authors' code). With
    ``training_free`` half the score of model/training_free.py is added to FEM's logits, except in training mode.
    """

    middle_scale: Tensor
    """() factor of the middle features; 1 until :meth:`measure_scale`, which training calls once"""

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
        fem_prior: bool = False,
        do_similarity: bool = False,
        training_free: bool = False,
        base_learner: BaseLearner | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reduce_query = reduce_query
        self.reduce_support = reduce_support
        self.bgmm = bgmm
        self.bgem = bgem
        self.eliminations = nn.ModuleList(eliminations)
        self.per_scale, self.fem_prior, self.do_similarity = per_scale, fem_prior, do_similarity
        self.training_free = training_free
        self.base_learner = base_learner
        self.fem = fem
        self.register_buffer("middle_scale", torch.ones(()))

    def forward(self, query: Tensor, supports: Tensor, support_masks: Tensor) -> NTRENetOutput:
        """Segment the query's pixels of the class that the support masks show.

        Args:
            query: (B, 3, H, W), normalised RGB
            supports: (B, K, 3, H, W), any K >= 1
            support_masks: (B, K, H, W), integer; 1 target, 0 other, 255 ignored
        """
        shots = supports.shape[:2]
        of_supports = self.backbone.features(supports.flatten(0, 1), support_masks.flatten(0, 1))
        return self.head(
            self.backbone.features(query), Features(*(x.unflatten(0, shots) for x in of_supports)), support_masks
        )

    def head(self, query: Features, supports: Features, support_masks: Tensor) -> NTRENetOutput:
        """Apply everything that is trained: figure 3 from the backbone's features on.

        Args:
            query: features of (B, ...)
            supports: features of (B, K, ...), zero off the target in ``high``
            support_masks: (B, K, H, W), as in :meth:`forward`
        """
        shots = support_masks.shape[:2]
        middle = supports.middle.flatten(0, 1) * self.middle_scale
        target = foreground(support_masks.flatten(0, 1), (middle.shape[-2], middle.shape[-1]))
        x_s = self.reduce_support(middle)
        p_s = masked_average_pool(x_s, target).unflatten(0, shots).mean(1)

        searched = query.middle * self.middle_scale
        base, base_logits = self._read_base(searched, middle, target, shots)
        x_q = self.reduce_query(searched)
        prior = prior_mask(query.high, supports.high)

        bg = None if self.bgmm is None else self.bgmm(x_q)
        eliminated = self._eliminate(x_q, bg, p_s, prior, base)
        fem = self._enrich(x_q, p_s, prior, eliminated, base)
        logits = fem.logits
        if self.training_free and not self.training:
            other = foreground((support_masks.flatten(0, 1) == 0).long(), (middle.shape[-2], middle.shape[-1]))
            shares = (share.squeeze(1).unflatten(0, shots) for share in (target, other))
            logits = logits + episode_scores(query.middle, supports.middle, *shares) / 2
        if base is not None:
            logits = join_base(logits, base)
        output = NTRENetOutput(
            logits=resize(logits, (support_masks.shape[-2], support_masks.shape[-1])),
            fem=fem,
            prior=prior,
            query_feature=x_q,
            support_prototype=p_s,
            query_bg_logits=bg,
            eliminated=eliminated,
        )
        if not self.training:
            return output
        bg_s = None if self.bgmm is None else self.bgmm(x_s).unflatten(0, shots)
        return output._replace(
            support_features=x_s.unflatten(0, shots), support_bg_logits=bg_s, base_logits=base_logits
        )

    @torch.no_grad()
    def measure_scale(self, images: Tensor) -> None:
        """Set ``middle_scale`` so that the middle features of these images (N, 3, H, W) have a mean square of 1.

        He's initialisation keeps that mean square through the head, whatever the backbone, so one learning rate fits
        all of them. The scale is part of the checkpoint.
        """
        mean_square = log_mean(self.backbone.for_head(self.backbone.middle(images)).float().square().mean())
        self.middle_scale.copy_(mean_square.clamp_min(1e-12).rsqrt())

    def _read_base(
        self, query: Tensor, supports: Tensor, target: Tensor, shots: Sequence[int]
    ) -> tuple[BaseMaps | None, Tensor | None]:
        """Compute the base learner's maps, and its logits for the query, from scaled middle features."""
        if self.base_learner is None:
            return None, None
        of_supports, of_query = self.base_learner(supports), self.base_learner(query)
        means = (
            masked_average_pool(x, target).flatten(1).unflatten(0, shots).mean(1)
            for x in (base_posterior(of_supports.logits), of_supports.embedding)
        )
        shares, embedding = means
        elsewhere = base_elsewhere(base_posterior(of_query.logits), shares)
        return BaseMaps(elsewhere, base_agreement(of_query.embedding, embedding)), of_query.logits

    def _eliminate(
        self, x_q: Tensor, bg: Tensor | None, p_s: Tensor, prior: Tensor, base: BaseMaps | None
    ) -> tuple[Eliminated, ...]:
        """Apply eq. 4 to 8 to the whole feature, or at each of FEM's scales to the pooled one."""
        if self.bgmm is None or bg is None:
            return ()
        full = (x_q.shape[-2], x_q.shape[-1])
        sizes = self.fem.sizes(full) if self.per_scale else [full] * len(self.eliminations)
        return tuple(
            eliminate(
                pool(x_q, size),
                self.bgmm.prototype,
                resize(bg, size),
                p_s,
                resize(prior, size),
                None if base is None else resize(base.distracting, size),
            )
            for eliminate, size in zip(self.eliminations, sizes, strict=True)
        )

    def _enrich(
        self, x_q: Tensor, p_s: Tensor, prior: Tensor, eliminated: tuple[Eliminated, ...], base: BaseMaps | None
    ) -> FEMOutput:
        """Apply eq. 9; with a base learner FEM takes B in place of C_p."""
        if not eliminated:  # BGEM alone, or PFENet
            feature = x_q if self.bgem is None or self.bgmm is None else self.bgem(x_q, self.bgmm.prototype)
            return self.fem(feature, p_s, prior)
        maps: list[Tensor] = []
        if self.fem_prior:
            maps.append(prior if base is None else base.elsewhere)
            if self.do_similarity:
                maps[0] = maps[0] - distracting_similarity(x_q, eliminated[0].do_prototype)
        evidence = torch.cat(maps, 1) if maps else None
        if not self.per_scale:
            (once,) = eliminated
            return self.fem(once.activated, once.do_prototype, evidence)
        size = (x_q.shape[-2], x_q.shape[-1])
        inputs = [
            (each.activated, each.do_prototype, None if evidence is None else resize(evidence, side))
            for each, side in zip(eliminated, self.fem.sizes(size), strict=True)
        ]
        return self.fem.enrich(inputs, size)


def build_ntrenet(
    backbone: Backbone,
    *,
    bgem: bool,
    doem: bool,
    elimination: EliminationKind,
    do_average: Average,
    fem_prior: bool,
    do_similarity: bool,
    detach_initial: bool,
    relative_target: bool,
    training_free: bool,
    base_classes: int,
    channels: int,
    prototype_channels: int,
    fem_scales: Sequence[float],
    initialisation: Initialisation,
) -> NTRENet:
    """Build NTRENet or one of its ablations on a given backbone; util/config.py has the defaults.

    Args:
        bgem: mine and eliminate the background; off is PFENet.
        doem: match, mine and eliminate distracting objects; needs ``bgem``, whose background map it takes.
        elimination: "authors", at each of FEM's scales with a deeper BGMM and FM, or "single", once (figure 3).
        do_average, do_similarity, relative_target: see :mod:`model.doem`.
        fem_prior: FEM takes C_p in addition to P_DO.
        detach_initial: see :class:`model.matching.FeatureMatching`.
        training_free: see :class:`NTRENet`.
        base_classes: number of classes of the base learner; 0 for none.
        channels, prototype_channels: C, and D of P_BG (the paper's Fig. 6)
        fem_scales: see :class:`model.fem.FEM`.
        initialisation: "he", He's before each ReLU and the prior's channel made heavier, or "torch", torch's default,
            as in the authors' code.
    """
    sizes = {"channels": channels, "prototype_channels": prototype_channels}
    deep = elimination == "authors"
    per_scale = doem and deep
    count = len(fem_scales) if per_scale else int(doem)
    middle = backbone.middle_channels
    learner = BaseLearner(middle_channels=middle, base_classes=base_classes) if base_classes else None
    network = NTRENet(
        backbone=backbone,
        reduce_query=_reduction(middle, channels),
        reduce_support=_reduction(middle, channels),
        fem=FEM(channels=channels, scales=fem_scales, maps=int(fem_prior or not doem)),
        bgmm=(DeepBGMM if deep else BGMM)(**sizes) if bgem else None,
        bgem=BGEM(**sizes) if bgem and not doem else None,
        eliminations=[
            Elimination(
                **sizes,
                deep=deep,
                do_average=do_average,
                relative_target=relative_target,
                detach_initial=detach_initial,
            )
            for _ in range(count)
        ],
        per_scale=per_scale,
        fem_prior=fem_prior,
        do_similarity=do_similarity,
        training_free=training_free,
        base_learner=learner,
    )
    if initialisation == "he":
        _initialise(network)
    return network


@torch.no_grad()
def _initialise(network: NTRENet) -> None:
    """He's initialisation before every ReLU; a map such as the prior, one input among 2C + 1, starts as heavy as C.

    torch's default, which the authors' code uses, shrinks the signal at each of FEM's many layers and all but hides the
    prior: hundreds of steps go by before anything is learned.
    """
    heads = [part for part in network.children() if part is not network.backbone]
    for module in (m for part in heads for m in part.modules()):
        if isinstance(module, nn.Conv2d) and module.out_channels > 1:  # the others give logits
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    merges = [part.conv for part in network.eliminations.modules() if isinstance(part, FeatureMatching)]
    merges += [part.merge for part in network.fem.modules() if isinstance(part, FEMScale)]
    for merge in merges:
        merge.weight[:, 2 * merge.out_channels :] *= merge.out_channels**0.5


def _reduction(inputs: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, 1, bias=False)
    return nn.Sequential(conv, Dropout2d(0.5), nn.ReLU(inplace=True))  # in this order as in fem.classifier
