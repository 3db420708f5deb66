"""Prior mask C_p: where the query looks like the support's target, without any training (PFENet, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prior_mask(query_high: Tensor, support_high: Tensor) -> Tensor:
    """C_p from stage-4 features.

    For every query position the largest cosine similarity to any support position, min-max normalised over
    the image; the mean over the K shots. The caller zeroes the support features outside the target before and
    after stage 4, so that a position outside has similarity 0.

    Args:
        query_high: (B, C, h, w)
        support_high: (B, K, C, h, w), zero outside the target
    Returns:
        (B, 1, h, w) in [0, 1]; zeros where every similarity is the same (an empty support mask)
    """
    size = query_high.shape[-2:]
    query = F.normalize(query_high.float().flatten(2), dim=1)  # (B, C, hw)
    support = F.normalize(support_high.float().flatten(3), dim=2)  # (B, K, C, hw)
    shots = [torch.bmm(s.transpose(1, 2), query).float().amax(1) for s in support.unbind(1)]
    similarity = torch.stack(shots, dim=1)  # (B, K, hw): one shot at a time bounds the memory at (B, hw, hw)
    low, high = torch.aminmax(similarity, dim=2, keepdim=True)
    return ((similarity - low) / (high - low + 1e-7)).mean(1).unflatten(1, size).unsqueeze(1)
