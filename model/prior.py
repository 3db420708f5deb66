"""Prior mask C_p: how similar each query position is to the supports' target, without any training (PFENet, 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prior_mask(query_high: Tensor, support_high: Tensor) -> Tensor:
    """Compute C_p from high features.

    For every query position the largest cosine similarity to any support position, min-max normalised over
    the image; the mean over the K shots.

    Args:
        query_high: (B, C, h, w)
        support_high: (B, K, C, h, w), zero off the target
    Returns:
        (B, 1, h, w) in [0, 1]; zeros if every similarity is the same (an empty support mask)
    """
    pairs = zip(query_high.flatten(2), support_high.flatten(3), strict=True)
    similarity = torch.stack([_largest_similarity(query, shots) for query, shots in pairs])  # (B, K, hw)
    low, high = torch.aminmax(similarity, dim=2, keepdim=True)
    return ((similarity - low) / (high - low + 1e-7)).mean(1).unflatten(1, query_high.shape[-2:]).unsqueeze(1)


def _largest_similarity(query: Tensor, shots: Tensor) -> Tensor:
    """One episode's (C, hw) and (K, C, hw) -> (K, hw), float32; one at a time, so that memory is that of one."""
    largest = []
    for support in shots:
        if not (support.is_cuda or torch.compiler.is_compiling()):
            support = _target_and_one_zero(support)
        support = F.normalize(support.float(), dim=0).to(query.dtype)
        largest.append((support.T @ query).amax(0))
    return torch.stack(largest).float() / query.float().norm(dim=0).clamp_min(1e-12)


def _target_and_one_zero(support: Tensor) -> Tensor:
    """Keep the positions on the target and one of the zeros: the same maximum for a fraction of the product.

    The number of positions depends on the mask, so a GPU would have to wait for it and a compiled network would be
    compiled again: they take all positions.
    """
    shown = support.any(0)
    return support if shown.all() else F.pad(support[:, shown], (0, 1))
