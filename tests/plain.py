"""NTRENet in its plain formulation: what scripts/bench.py measures against, and what the tests compare with.

The same weights and results as ``model``, written as the equations read and as the lineage computes: batch norm
on its own, prototypes expanded over the map and concatenated, supports one after another, the prior from all
positions of the support, one episode at a time in evaluation, a resampling for each step of augmentation. Nothing of
the product imports this file.
"""

from collections.abc import Sequence

import cv2
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
from util.data.dataset import Episode
from util.data.transforms import MEAN, STD, normalize, to_original


def plain_forward(model: NTRENet, query: Tensor, supports: Tensor, support_masks: Tensor) -> NTRENetOutput:
    """``model(query, supports, support_masks)``; shapes as there."""
    q_middle, _, q_high = backbone(model, query)
    x_q = model.reduce_query(q_middle)
    features, prototypes, priors = [], [], []
    for image, mask in zip(supports.unbind(1), support_masks.unbind(1), strict=True):
        s_middle, s_third, _ = backbone(model, image, high=False)
        target = foreground(mask, (s_third.shape[-2], s_third.shape[-1]))
        with torch.no_grad():
            s_high = model.backbone.stage4(s_third * target) * target
        features.append(model.reduce_support(s_middle))
        prototypes.append(masked_average_pool(features[-1], target))
        priors.append(prior(q_high, s_high))
    x_s, p_s, c_p = torch.stack(features, 1), torch.stack(prototypes).mean(0), torch.stack(priors).mean(0)

    bg_q = bg_s = None
    eliminated: list[Eliminated] = []
    sides = model.fem.sizes((x_q.shape[-2], x_q.shape[-1]))
    if model.bgmm is None:
        feature_logits, scale_logits = fem(model.fem, x_q, p_s, c_p)
    else:
        p_bg = model.bgmm.prototype
        bg_q, *each = (bgmm(model, x) for x in (x_q, *features))
        bg_s = torch.stack(each, 1)
        if model.bgem is not None:
            feature_logits, scale_logits = fem(model.fem, concat(model.bgem.conv, x_q, p_bg).relu(), p_s, c_p)
        elif not model.per_scale:
            eliminated = [elimination(model.eliminations[0], x_q, p_bg, bg_q, p_s, c_p)]
            seen = c_p if model.fem.with_prior else None
            if seen is not None and model.do_similarity:
                seen = seen - F.cosine_similarity(x_q, eliminated[0].do_prototype, dim=1, eps=1e-4).unsqueeze(1)
            feature_logits, scale_logits = fem(model.fem, eliminated[0].activated, eliminated[0].do_prototype, seen)
        else:
            for part, side in zip(model.eliminations, sides, strict=True):
                x = F.adaptive_avg_pool2d(x_q, side)
                eliminated.append(elimination(part, x, p_bg, resize(bg_q, side), p_s, resize(c_p, side)))
            inputs = [(e.activated, e.do_prototype, None) for e in eliminated]
            feature_logits, scale_logits = enrich(model.fem, inputs, (x_q.shape[-2], x_q.shape[-1]))
    return NTRENetOutput(
        logits=resize(feature_logits, (query.shape[-2], query.shape[-1])),
        fem=FEMOutput(feature_logits, scale_logits),
        prior=c_p,
        query_feature=x_q,
        support_prototype=p_s,
        support_features=x_s,
        query_bg_logits=bg_q,
        support_bg_logits=bg_s,
        eliminated=tuple(eliminated),
    )


@torch.no_grad()
def backbone(model: NTRENet, images: Tensor, *, high: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Middle features, stage 3 and stage 4 (stage 3 again unless ``high``), batch norm and all."""
    part = model.backbone
    second = part.stage2(part.stage1(part.stem(images)))
    third = part.stage3(second)
    middle = torch.cat([third, resize(second, (third.shape[-2], third.shape[-1]))], 1) * part.middle_scale
    return middle, third, part.stage4(third) if high else third


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
    hidden = concat(part.conv, x, part.prototype)
    if isinstance(part, DeepBGMM):
        hidden = part.dropout(hidden.relu())
        hidden = part.refine(hidden) + hidden
    else:
        hidden = hidden.relu()
    logits: Tensor = part.classifier(hidden)
    return logits


def elimination(part: nn.Module, x_q: Tensor, p_bg: Tensor, bg: Tensor, p_s: Tensor, c_p: Tensor) -> Eliminated:
    """Eq. 4 to 8."""
    assert isinstance(part, Elimination)
    x_bg = concat(part.bgem.conv, x_q, p_bg).relu()
    x_act = concat(part.matching.conv, x_bg, p_s, c_p).relu()
    if part.matching.refine is not None:
        x_act = part.matching.refine(x_act) + x_act
    initial = part.matching.initial(x_act.detach() if part.matching.detach_initial else x_act)
    do_mask = (~((bg > 0) | (initial > 0))).float()
    p_do = (x_q * do_mask).mean((2, 3), keepdim=True)
    if part.do_average == "region":
        p_do = masked_average_pool(x_q, do_mask)
    return Eliminated(x_act, initial, do_mask, p_do)


def fem(part: FEM, x: Tensor, prototype: Tensor, c_p: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Eq. 9."""
    size = (x.shape[-2], x.shape[-1])
    inputs = [
        (F.adaptive_avg_pool2d(x, side), prototype, None if c_p is None else resize(c_p, side))
        for side in part.sizes(size)
    ]
    return enrich(part, inputs, size)


def enrich(
    part: FEM, inputs: Sequence[tuple[Tensor, Tensor, Tensor | None]], size: tuple[int, int]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    enriched: list[Tensor] = []
    scale_logits: list[Tensor] = []
    before: Tensor | None = None
    for scale, (x, prototype, c_p) in zip(part.scales, inputs, strict=True):
        assert isinstance(scale, FEMScale)
        y = concat(scale.merge, x, prototype, *([] if c_p is None else [c_p])).relu()
        if before is not None and scale.inter_scale is not None:
            y = scale.inter_scale(torch.cat([y, resize(before, (x.shape[-2], x.shape[-1]))], 1)) + y
        y = scale.refine(y) + y
        scale_logits.append(scale.classifier(y))
        before = resize(y, size)
        enriched.append(before)
    x = part.fuse(torch.cat(enriched, 1))
    return part.classifier(part.refine(x) + x), tuple(scale_logits)


@torch.inference_mode()
def plain_counts(model: NTRENet, episode: Episode, truth: np.ndarray, config: Config) -> np.ndarray:
    """Counts (4,) of a batch of one episode: true negatives, false positives, false negatives, true positives.

    ``truth`` (H, W) is the query's mask at its own size: 1 target, 0 other, 255 ignored.
    """
    output = plain_forward(model, normalize(episode.query), normalize(episode.supports), episode.support_masks)
    logits = to_original(output.logits[0].float(), truth.shape[0], truth.shape[1], config.eval.geometry)[0]
    prediction = (logits > 0).numpy()
    return np.array([((truth == t) & (prediction == p)).sum() for t in (0, 1) for p in (False, True)])


def plain_augment(
    image: np.ndarray,
    mask: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    rotation: float,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`util.data.transforms.augment` with one resampling a step, and the picture normalised to float."""
    height, width = mask.shape
    factor = rng.uniform(*scale)
    angle = rng.uniform(-rotation, rotation) if rng.random() < 0.5 else 0.0
    flip = rng.random() < 0.5
    target_pixels = float((mask == 1).sum()) * factor**2
    whole = (round(width * factor), round(height * factor))
    image = cv2.resize(image, whole, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, whole, interpolation=cv2.INTER_NEAREST)
    if angle:
        matrix = cv2.getRotationMatrix2D(((whole[0] - 1) / 2, (whole[1] - 1) / 2), angle, 1)
        colour = tuple(round(255 * m) for m in MEAN)
        image = cv2.warpAffine(image, matrix, whole, flags=cv2.INTER_LINEAR, borderValue=colour)
        mask = cv2.warpAffine(mask, matrix, whole, flags=cv2.INTER_NEAREST, borderValue=255)
    if flip:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    image = (image.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    pad = max(size - whole[1], 0), max(size - whole[0], 0)
    around = (pad[0] // 2, pad[0] - pad[0] // 2, pad[1] // 2, pad[1] - pad[1] // 2)
    image = cv2.copyMakeBorder(image, *around, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    mask = cv2.copyMakeBorder(mask, *around, cv2.BORDER_CONSTANT, value=255)
    for _ in range(30):
        offsets = [rng.uniform(0, n * factor - size) if n * factor > size else 0.0 for n in (width, height)]
        left, top = (min(round(o), n - size) for o, n in zip(offsets, (mask.shape[1], mask.shape[0]), strict=True))
        window = mask[top : top + size, left : left + size]
        if (window == 1).sum() >= 0.85 * target_pixels:
            break
    return np.ascontiguousarray(image[top : top + size, left : left + size].transpose(2, 0, 1)), window
