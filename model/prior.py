"""Prior mask C_p: where the query looks like the support's target, without any training (PFENet, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prior_mask(query_high: Tensor, support_high: Tensor) -> Tensor:
    """C_p from stage-4 features.

    For every query position the largest cosine similarity to any support position, min-max normalised over
    the image; the mean over the K shots. The K shots of an episode are one matrix product; one episode at a time
    bounds the memory at (K n, h w).

    Args:
        query_high: (B, C, h, w)
        support_high: (B, K, n, C), the n support positions that can win, see :func:`target_positions`
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


def target_positions(high: Tensor, target: Tensor) -> Tensor:
    """The support positions that can be most similar to a query position: those on the target, and one beside it.

    The lineage zeroes the features beside the target, so all positions there have similarity 0 and one stands for
    them all. A support with fewer target positions than another of the batch keeps more of the zeros.

    Args:
        high: stage-4 features of the supports, (N, C, h, w)
        target: (N, 1, h, w) in [0, 1], partial at the target's border; the features are multiplied by it
    Returns:
        (N, n, C), n the largest number of target positions in the batch plus one (h w at most)
    """
    target = target.flatten(1)  # (N, hw)
    inside = target > 0
    n = min(int(inside.sum(1).amax()) + 1, inside.shape[1])
    first = inside.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]  # target first, in their order
    image = torch.arange(len(first), device=first.device).unsqueeze(1)
    return high.flatten(2).transpose(1, 2)[image, first] * target.gather(1, first).unsqueeze(2)
