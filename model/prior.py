"""Prior mask C_p: where the query looks like the support's target, without any training (PFENet, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import Backbone


def prior_mask(query_high: Tensor, support_high: Tensor) -> Tensor:
    """Compute C_p from stage-4 features.

    For every query position the largest cosine similarity to any support position, min-max normalised over
    the image; the mean over the K shots.

    Args:
        query_high: (B, C, h, w)
        support_high: (B, K, n, C), see :func:`target_positions`
    Returns:
        (B, 1, h, w) in [0, 1]; zeros where every similarity is the same (an empty support mask)
    """
    pairs = zip(query_high.flatten(2), support_high, strict=True)
    similarity = torch.stack([_largest_similarity(query, support) for query, support in pairs])  # (B, K, hw)
    low, high = torch.aminmax(similarity, dim=2, keepdim=True)
    return ((similarity - low) / (high - low + 1e-7)).mean(1).unflatten(1, query_high.shape[-2:]).unsqueeze(1)


def _largest_similarity(query: Tensor, support: Tensor) -> Tensor:
    """One episode's (C, hw) and (K, n, C) -> (K, hw), float32.

    The K shots are one matrix product. One episode at a time bounds the memory at (K n, hw), and at one float32 copy of
    its own features.
    """
    shots = len(support)
    support = F.normalize(support.float(), dim=2).to(query.dtype).flatten(0, 1)
    largest = (support @ query).unflatten(0, (shots, -1)).amax(1)
    return largest.float() / query.float().norm(dim=0).clamp_min(1e-12)


def target_positions(backbone: Backbone, stage3: Tensor, target: Tensor, most: int | None = None) -> Tensor:
    """Compute stage 4 where a support can be most similar to a query position: on the target, and one place beside it.

    PFENet zeroes the features beside the target, before stage 4 and after it, so all positions there have
    similarity 0 and one stands for them all. A support with fewer target positions than another of the batch keeps
    more of the zeros.

    A CPU computes only what the target depends on. A GPU, and a compiled network, compute stage 4 of the whole batch at
    once and, unless they are told the largest number of target positions, keep them all: a shape that depended on masks
    would have to be waited for, and would be another one at each step. Features there are not multiplied by a partial
    ``target``, which changes no cosine.

    Args:
        stage3: of the supports, (N, C3, h, w)
        target: (N, 1, h, w) in [0, 1], partial at the target's border; features are multiplied by it
        most: the largest number of positions above 0 in a ``target`` of the batch, where it is known
    Returns:
        (N, n, C4), n = ``most`` + 1 (h w at most)
    """
    masked, inside = stage3 * target, target.squeeze(1) > 0
    positions = inside[0].numel()
    if stage3.is_cuda or torch.compiler.is_compiling():
        high = backbone.high(masked).mul_(inside.unsqueeze(1)).flatten(2).transpose(1, 2)
        if most is None or most + 1 >= positions:
            return high
        first = inside.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : most + 1]
        return high.take_along_dim(first.unsqueeze(2), dim=1)
    n = min((int(inside.sum((1, 2)).amax()) if most is None else most) + 1, positions)
    found = []
    for x, weight, shown in zip(masked.split(1), target.squeeze(1), inside, strict=True):
        rows, columns = _window(shown.any(1)), _window(shown.any(0))
        high = backbone.high_within(x, rows, columns)[0].permute(1, 2, 0)
        shown = shown[rows, columns]
        target_rows = high[shown] * weight[rows, columns][shown].unsqueeze(1)
        found.append(F.pad(target_rows, (0, 0, 0, n - len(target_rows))))
    return torch.stack(found)


def _window(used: Tensor) -> slice:
    """From the first to the last true entry; the first place where there is none."""
    places = used.nonzero().flatten().tolist() or [0]
    return slice(places[0], places[-1] + 1)
