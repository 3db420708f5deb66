"""NTRENet in its plain formulation: the oracle of the tests, and the baseline of scripts/bench.py.

Same weights and results as ``model``, written as the equations read and as PFENet's code computes: batch norm layer by
layer, prototypes expanded and concatenated, one support after another, the prior from all positions of a support, one
episode at a time in evaluation. A base learner is not covered.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bgmm import DeepBGMM
from model.elimination import Eliminated, Elimination
from model.fem import FEM, FEMOutput, FEMScale
from model.ntrenet import NTRENet, NTRENetOutput
from model.ops import foreground, masked_average_pool, resize
from util.config import Config
from util.data.dataset import Episode, target_of
from util.data.transforms import normalize, to_original


def plain_forward(model: NTRENet, query: Tensor, supports: Tensor, support_masks: Tensor) -> NTRENetOutput:
    """``model(query, supports, support_masks)``, with everything that only a loss reads in eval mode too."""
    q_middle, third = backbone(model, query)
    with torch.no_grad():
        q_high = model.backbone.stage4(third)
    x_q = model.reduce_query(q_middle)
    features, prototypes, priors = [], [], []
    for image, mask in zip(supports.unbind(1), support_masks.unbind(1), strict=True):
        s_middle, third = backbone(model, image)
        target = foreground(mask, (third.shape[-2], third.shape[-1]))
        with torch.no_grad():
            s_high = model.backbone.stage4(third * target) * target
        features.append(model.reduce_support(s_middle))
        prototypes.append(masked_average_pool(features[-1], target))
        priors.append(prior(q_high, s_high))
    p_s, c_p = torch.stack(prototypes).mean(0), torch.stack(priors).mean(0)
    bg_q = bg_s = None
    if model.bgmm is not None:
        bg_q, *of_supports = (bgmm(model, x) for x in (x_q, *features))
        bg_s = torch.stack(of_supports, 1)
    eliminated, y = head(model, x_q, p_s, c_p, bg_q)
    return NTRENetOutput(
        logits=resize(y.logits, (query.shape[-2], query.shape[-1])),
        fem=y,
        prior=c_p,
        query_feature=x_q,
        support_prototype=p_s,
        support_features=torch.stack(features, 1),
        query_bg_logits=bg_q,
        support_bg_logits=bg_s,
        eliminated=eliminated,
    )


@torch.no_grad()
def backbone(model: NTRENet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Middle features, and stage 3."""
    part = model.backbone
    second = part.stage2(part.stage1(part.stem(images)))
    third = part.stage3(second)
    return torch.cat([third, resize(second, (third.shape[-2], third.shape[-1]))], 1) * model.middle_scale, third


@torch.no_grad()
def prior(query_high: Tensor, support_high: Tensor) -> Tensor:
    """C_p of one shot, from all h w positions of the support."""
    query = F.normalize(query_high.float().flatten(2), dim=1)
    support = F.normalize(support_high.float().flatten(2), dim=1)
    best = torch.bmm(support.transpose(1, 2), query).amax(1)
    low, high = best.amin(1, keepdim=True), best.amax(1, keepdim=True)
    return ((best - low) / (high - low + 1e-7)).view(len(best), 1, *query_high.shape[-2:])


def concat(conv: nn.Conv2d, feature: Tensor, *others: Tensor) -> Tensor:
    """``conv`` on the concatenation, with prototypes (1 x 1) expanded over the map."""
    size = feature.shape[-2:]
    return conv(torch.cat([feature, *(other.expand(len(feature), -1, *size) for other in others)], 1))


def bgmm(model: NTRENet, x: Tensor) -> Tensor:
    """Eq. 1 and 2."""
    assert model.bgmm is not None
    part = model.bgmm
    hidden = concat(part.conv, x, part.prototype).relu()
    if isinstance(part, DeepBGMM):
        hidden = part.dropout(hidden.clone())  # it works in place, and the gradient of the ReLU needs its result
        hidden = part.refine(hidden) + hidden
    logits: Tensor = part.classifier(hidden)
    return logits


def head(
    model: NTRENet, x_q: Tensor, p_s: Tensor, c_p: Tensor, bg_q: Tensor | None
) -> tuple[tuple[Eliminated, ...], FEMOutput]:
    """Eq. 4 to 9 of every ablation."""
    if model.bgmm is None or bg_q is None:
        return (), fem(model.fem, x_q, p_s, c_p)
    p_bg = model.bgmm.prototype
    if model.bgem is not None:
        return (), fem(model.fem, concat(model.bgem.conv, x_q, p_bg).relu(), p_s, c_p)
    size = (x_q.shape[-2], x_q.shape[-1])
    if model.per_scale:
        eliminated = tuple(
            elimination(part, F.adaptive_avg_pool2d(x_q, s), p_bg, resize(bg_q, s), p_s, resize(c_p, s))
            for part, s in zip(model.eliminations, model.fem.sizes(size), strict=True)
        )
    else:
        eliminated = (elimination(model.eliminations[0], x_q, p_bg, bg_q, p_s, c_p),)
    maps = c_p if model.fem_prior else None
    if maps is not None and model.do_similarity:
        maps = maps - F.cosine_similarity(x_q, eliminated[0].do_prototype, dim=1, eps=1e-4).unsqueeze(1)
    if not model.per_scale:
        return eliminated, fem(model.fem, eliminated[0].activated, eliminated[0].do_prototype, maps)
    inputs = [
        (
            e.activated,
            e.do_prototype,
            None if maps is None else resize(maps, (e.do_mask.shape[-2], e.do_mask.shape[-1])),
        )
        for e in eliminated
    ]
    return eliminated, enrich(model.fem, inputs, size)


def elimination(part: nn.Module, x_q: Tensor, p_bg: Tensor, bg: Tensor, p_s: Tensor, c_p: Tensor) -> Eliminated:
    """Eq. 4 to 8."""
    assert isinstance(part, Elimination)
    x_bg = concat(part.bgem.conv, x_q, p_bg).relu()
    x_act = concat(part.matching.conv, x_bg, p_s, c_p).relu()
    if part.matching.refine is not None:
        x_act = part.matching.refine(x_act) + x_act
    initial = part.matching.initial(x_act.detach() if part.matching.detach_initial else x_act)
    target = initial > 0
    if part.relative_target:
        target = torch.stack([one > 0.3 * one.max() for one in initial.sigmoid()])
    do_mask = (~((bg > 0) | target)).float()
    p_do = (x_q * do_mask).mean((2, 3), keepdim=True)
    if part.do_average == "region":
        p_do = masked_average_pool(x_q, do_mask)
    return Eliminated(x_act, initial, do_mask, p_do)


def fem(part: FEM, x: Tensor, prototype: Tensor, c_p: Tensor | None) -> FEMOutput:
    """Eq. 9."""
    size = (x.shape[-2], x.shape[-1])
    sides = part.sizes(size)
    maps = [None if c_p is None else resize(c_p, side) for side in sides]
    pooled = [F.adaptive_avg_pool2d(x, side) for side in sides]
    return enrich(part, [(p, prototype, m) for p, m in zip(pooled, maps, strict=True)], size)


def enrich(part: FEM, inputs: Sequence[tuple[Tensor, Tensor, Tensor | None]], size: tuple[int, int]) -> FEMOutput:
    """Eq. 9 after pooling."""
    enriched: list[Tensor] = []
    scale_logits: list[Tensor] = []
    for scale, (x, prototype, c_p) in zip(part.scales, inputs, strict=True):
        assert isinstance(scale, FEMScale)
        y = concat(scale.merge, x, prototype, *([] if c_p is None else [c_p])).relu()
        if enriched and scale.inter_scale is not None:
            y = scale.inter_scale(torch.cat([y, resize(enriched[-1], (x.shape[-2], x.shape[-1]))], 1)) + y
        y = scale.refine(y) + y
        scale_logits.append(scale.classifier(y))
        enriched.append(resize(y, size))
    x = part.fuse(torch.cat(enriched, 1))
    return FEMOutput(part.classifier(part.refine(x) + x), tuple(scale_logits))


@torch.inference_mode()
def plain_counts(model: NTRENet, episode: Episode, ids: np.ndarray, config: Config) -> np.ndarray:
    """Counts (4,) of a batch of one episode: true negatives, false positives, false negatives, true positives.

    ``ids`` (H, W) is the query's mask at its own size.
    """
    output = plain_forward(model, normalize(episode.query), normalize(episode.supports), episode.support_masks)
    logits = to_original(output.logits[0].float(), ids.shape[0], ids.shape[1], config.eval.geometry)[0]
    prediction = (logits > 0).cpu().numpy()
    truth = target_of(torch.tensor(ids), int(episode.target)).numpy()
    return np.array([((truth == t) & (prediction == p)).sum() for t in (0, 1) for p in (False, True)])
