"""Prior mask C_p: where the query looks like the support's target, without any training (PFENet, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import Backbone


def prior_mask(query_high: Tensor, support_high: Tensor) -> Tensor:
    """C_p from stage-4 features.

    For every query position the largest cosine similarity to any support position, min-max normalised over
    the image; the mean over the K shots. The K shots of an episode are one matrix product; one episode at a time
    bounds the memory at (K n, h w).

    Args:
        query_high: (B, C, h, w)
        support_high: (B, K, n, C), see :func:`target_positions`
    Returns:
        (B, 1, h, w) in [0, 1]; zeros where every similarity is the same (an empty support mask)
    """
    size, shots = query_high.shape[-2:], support_high.shape[1]
    query = query_high.flatten(2)  # (B, C, hw)
    support = F.normalize(support_high.float(), dim=3).to(query.dtype).flatten(1, 2)  # (B, Kn, C)
    largest = [(s @ q).unflatten(0, (shots, -1)).amax(1) for s, q in zip(support, query, strict=True)]
    similarity = torch.stack(largest).float()  # (B, K, hw), still to be divided by the query's length
    similarity = similarity / query.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    low, high = torch.aminmax(similarity, dim=2, keepdim=True)
    return ((similarity - low) / (high - low + 1e-7)).mean(1).unflatten(1, size).unsqueeze(1)


def target_positions(backbone: Backbone, stage3: Tensor, target: Tensor) -> Tensor:
    """Stage 4 at the support positions that can be most similar to a query position: on the target, and one beside it.

    The lineage zeroes the features beside the target, before stage 4 and after it, so all positions there have
    similarity 0 and one stands for them all. A support with fewer target positions than another of the batch keeps
    more of the zeros. A GPU computes stage 4 of the whole batch at once; a CPU only what the target depends on.

    Args:
        stage3: of the supports, (N, C3, h, w)
        target: (N, 1, h, w) in [0, 1], partial at the target's border; features are multiplied by it
    Returns:
        (N, n, C4), n the largest number of target positions in the batch plus one (h w at most)
    """
    masked, inside = stage3 * target, target.squeeze(1) > 0
    n = min(int(inside.sum((1, 2)).amax()) + 1, inside[0].numel())
    if stage3.is_cuda:
        high, weight = backbone.high(masked).flatten(2).transpose(1, 2), target.flatten(1)
        first = inside.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]  # target first
        image = torch.arange(len(first), device=first.device).unsqueeze(1)
        return high[image, first] * weight[image, first].unsqueeze(2)
    found = []
    for x, weight, positions in zip(masked.split(1), target.squeeze(1), inside, strict=True):
        rows, columns = _window(positions.any(1)), _window(positions.any(0))
        high = backbone.high_within(x, rows, columns)[0].permute(1, 2, 0)
        positions = positions[rows, columns]
        target_rows = high[positions] * weight[rows, columns][positions].unsqueeze(1)
        found.append(F.pad(target_rows, (0, 0, 0, n - len(target_rows))))
    return torch.stack(found)


def _window(used: Tensor) -> slice:
    """From the first to the last true entry; the first place where there is none."""
    places = used.nonzero().flatten().tolist() or [0]
    return slice(places[0], places[-1] + 1)
