"""Training-free segmentation: compares a query's features with those of the supports' target and non-target.

This is ours and not the paper's network. It borrows the paper's idea of using non-target regions. Features are the
frozen ImageNet backbone's stages from stage 4 on, of whole images.

Shapes: C channels, n query positions, m positions of all supports together. q_j and s_i are features of unit length,
t_i and o_i are the shares of the support position i that are target and non-target.

    P_t = unit(sum_i t_i s_i),  P_o = unit(sum_i o_i s_i)                                   prototypes
    d1_j = P_t . q_j - P_o . q_j
    d2_j = max over target i of s_i . q_j  -  max over non-target i of s_i . q_j            nearest
    score = d1 / std(d1) + d2 / std(d2)
    twice: the query's own prototypes Q_t and Q_o, of its highest 5 % and lowest 30 % by score, are added to those of
    the supports, and d3 = unit(P_t + Q_t) . q - unit(P_o + Q_o) . q;
    score = score / std(score) + d3 / std(d3)                                               self_support

Examples of what the target is not (``--not``) are further positions i, with o_i what they show and t_i = 0. They also
lower the score where a position is nearer to one of them than to the target:

    n_j = max over target i of s_i . q_j  -  max over negative i of s_i . q_j
    score = score + 0.6 min(0, n / std(n))

Above 0 is target. The nearest neighbours are PFENet's prior with a non-target side; the self-support pass follows SSP
(Fan et al., ECCV 2022).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone, build_backbone, fuse_batch_norm, source_of
from model.weights import read_weights

PASSES = 2
"""self-support passes"""
TARGET_SHARE, OTHER_SHARE = 0.05, 0.3
"""shares of the query's positions, by score, that make its own prototypes"""
NEGATIVE_WEIGHT = 0.6
"""weight of the term n below 0, of positions that are nearer to what the target is not than to the target"""


class Described(NamedTuple):
    """The positions of one support or of several."""

    feature: Tensor
    """(C, m), of unit length"""
    target: Tensor
    """(m,) in [0, 1], the share of each position that is target"""
    other: Tensor
    """(m,) in [0, 1], the share of each position that is neither target nor ignored"""
    negative: Tensor | None = None
    """(m,) in [0, 1], the share of each position that was given as what the target is not; it is in ``other`` too"""


def join(supports: Sequence[Described]) -> Described:
    """Join the positions of several supports; their order does not matter."""
    features, targets, others, given = zip(*supports, strict=True)
    negatives = [torch.zeros_like(o) if n is None else n for o, n in zip(others, given, strict=True)]
    return Described(torch.cat(features, 1), torch.cat(targets), torch.cat(others), torch.cat(negatives))


def as_negative(example: Described) -> Described:
    """Turn an example of something into one of what the target is not, which joins the supports."""
    return Described(example.feature, torch.zeros_like(example.target), example.target, example.target)


def unit(x: Tensor) -> Tensor:
    """Divide features (C, ...) by their lengths; zeros stay."""
    return F.normalize(x, dim=0)


def prototypes(supports: Described) -> tuple[Tensor, Tensor]:
    """Return P_t and P_o, each (C,)."""
    return unit(supports.feature @ supports.target), unit(supports.feature @ supports.other)


def describe_support(feature: Tensor, layers: Tensor, stride: int = 8, offset: int = 1) -> Described:
    """Describe the positions of a support.

    A position averages its pixels, 9 x 9 with a stride of 8 and an offset of 1, so that the smallest target is seen.

    Args:
        feature: (C, h, w), of unit length
        layers: (2, H, W) in [0, 1], each pixel's shares of target and of neither target nor ignored, of the image whose
            features these are
        stride, offset: of the backbone, see :class:`model.backbone.Backbone`
    """
    padding = offset * (stride // 2)
    seen = F.avg_pool2d(layers, stride + offset, stride, padding, count_include_pad=False).flatten(1)
    return Described(feature.flatten(1), seen[0], seen[1])


def nearest(query: Tensor, feature: Tensor, share: Tensor) -> Tensor:
    """Compute the similarity of each query position (C, n) to the nearest support position (C, m) that counts, (n,).

    Those with at least half of the largest share (m,) count, because a target of a few pixels fills no position. If
    all shares are 0, it is 0.
    """
    counts = (share >= 0.5 * share.max()).nonzero()[:, 0]  # torch.export takes no boolean index here
    return torch.where(share.any(), (feature.index_select(1, counts).T @ query).amax(0), 0.0)


def standardised(x: Tensor) -> Tensor:
    """Divide (n,) by its standard deviation, without centring; zeros if all values are the same."""
    std = x.std(correction=0)
    return torch.where(std > 1e-6, x / std, 0.0)


def self_support(query: Tensor, score: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """Compute the score (n,) again with the query's own prototypes added to those of the supports."""
    highest, lowest = (max(1, round(share * len(score))) for share in (TARGET_SHARE, OTHER_SHARE))
    own_target = unit(query[:, score.topk(highest).indices].mean(1))
    own_other = unit(query[:, score.topk(lowest, largest=False).indices].mean(1))
    d3 = (unit(target + own_target) - unit(other + own_other)) @ query
    return standardised(score) + standardised(d3)


def target_score(query: Tensor, supports: Described) -> Tensor:
    """Measure how much more similar each query position is to the target than to the non-target; above 0 is target.

    Without any non-target position, similarities are compared with the query's mean similarity.

    Args:
        query: (C, h, w), of unit length
    Returns:
        (h, w), of standard deviation 1 (0 if all positions of the query are the same)
    """
    size, query = query.shape[-2:], query.flatten(1)
    target, other = prototypes(supports)
    near_target, near_other = (nearest(query, supports.feature, share) for share in (supports.target, supports.other))
    d1, d2 = (target - other) @ query, near_target - near_other
    d1, d2 = (torch.where(supports.other.any(), d, d - d.mean()) for d in (d1, d2))
    score = standardised(d1) + standardised(d2)
    for _ in range(PASSES):
        score = self_support(query, score, target, other)
    score = standardised(score)
    if supports.negative is not None and supports.negative.any():
        n = near_target - nearest(query, supports.feature, supports.negative)
        score = standardised(score + NEGATIVE_WEIGHT * standardised(n).clamp(max=0))
    return score.unflatten(0, size)


def episode_scores(query: Tensor, supports: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """Compute :func:`target_score` of B episodes.

    Args:
        query: features (B, C, h, w)
        supports: features (B, K, C, h, w)
        target, other: shares of each support position, (B, K, h, w) in [0, 1]
    Returns:
        (B, 1, h, w), in float32 also under autocast
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = []
        for q, s, t, o in zip(query.float(), supports.float(), target.float(), other.float(), strict=True):
            described = Described(unit(s.transpose(0, 1).flatten(1)), t.flatten(), o.flatten())
            scores.append(target_score(unit(q), described))
        return torch.stack(scores).unsqueeze(1)


def presence(query: Tensor, supports: Described, score: Tensor) -> float:
    """Estimate in [0, 1] how sure it is that the target is in the query at all.

    r is the mean feature of the query's highest 5 % by score (h, w): sigmoid(7.7 cos(r, P_t) - 2.8 cos(r, P_o) - 1.8).
    The weights were fitted to features of EfficientNet-Lite0 (README of this folder); for others only the order counts.
    """
    positions = score.flatten().topk(max(1, round(TARGET_SHARE * score.numel()))).indices
    found = unit(query.flatten(1)[:, positions].mean(1))
    target, other = prototypes(supports)
    return (7.7 * target @ found - 2.8 * other @ found - 1.8).sigmoid().item()


class TrainingFree(nn.Module):
    """A frozen backbone with the features that :func:`target_score` compares."""

    def __init__(self, *, backbone: Backbone, last: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.last = None if last is None else last.requires_grad_(False).eval()
        convolutions = [] if last is None else [m for m in last.modules() if isinstance(m, nn.Conv2d)]
        self.channels = backbone.high_channels + (convolutions[-1].out_channels if convolutions else 0)

    @torch.no_grad()
    def describe(self, image: Tensor) -> Tensor:
        """Map a normalised image (3, H, W), of sides that the backbone takes, to its features (C, h, w).

        They are the high features and, if there are any, the last blocks'. Each of the two is of unit length at each
        position, and so is their concatenation.
        """
        stage4 = self.backbone.features(image[None]).high
        stages = [stage4] if self.last is None else [stage4, self.last(stage4.float())]
        return unit(torch.cat([unit(stage[0].float()) for stage in stages]))


def build_training_free(
    name: str = "efficientnet_lite0", *, weights: str = "imagenet", weights_dir: Path = Path("initmodel")
) -> TrainingFree:
    """Build the method on a backbone by name; see :func:`model.backbone.build_backbone`."""
    backbone, info = build_backbone(name, weights=weights, weights_dir=weights_dir)
    return on_backbone(name, backbone, weights if weights == "random" else info.source)


def on_backbone(name: str, backbone: Backbone, weights: str = "imagenet") -> TrainingFree:
    """Build the method on a backbone that is there already, such as a network's.

    EfficientNet-Lite0 is read to its last block: the blocks that the network leaves out separate classes best here.

    Args:
        weights: of those last blocks; 'imagenet' (from the pip package), 'random' or a file.
    """
    source, last = source_of(name), None
    if source.last is not None:
        path = source.imagenet(Path()) if weights == "imagenet" else Path(weights)
        last = source.last(None if weights == "random" else read_weights(path)[0])
        fuse_batch_norm(last)
        last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainingFree(backbone=backbone, last=last)
