"""The few tensor operations that several boxes of the paper's figure share.

Shapes: N images, C channels, D prototype channels, (h, w) feature side, (H, W) image side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, *, *) to (N, C, *size), bilinear with aligned corners; the same size is a no-op."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool the average to (N, C, *size); the same size is a no-op."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)


def foreground(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn integer masks (N, H, W) into a float map (N, 1, *size) in [0, 1] of their target; 255 is not target."""
    return resize((masks == 1).float().unsqueeze(1), size)


def similarity_map(feature: Tensor, prototype: Tensor) -> Tensor:
    """Compare each position of features (N, C, h, w) with a prototype (N, C, 1, 1): their cosine, (N, 1, h, w)."""
    return F.cosine_similarity(feature.float(), prototype.float(), dim=1, eps=1e-4).unsqueeze(1)


def masked_average_pool(feature: Tensor, mask: Tensor) -> Tensor:
    """Average ``feature`` (N, C, h, w) over ``mask`` (N, 1, h, w): (N, C, 1, 1); an empty mask gives zeros.

    The sums run in float32, also under autocast: they add thousands of positions.
    """
    mask = mask.float()
    total = (feature.float() * mask).sum((-2, -1), keepdim=True)
    return total / mask.sum((-2, -1), keepdim=True).clamp_min(1e-6)


def concat_conv(conv: nn.Conv2d, feature: Tensor, prototype: Tensor, maps: Tensor | None = None) -> Tensor:
    """Apply ``conv`` to feature (+) expanded prototype (+) maps, without building the concatenation.

    A convolution is linear in its input channels, so with the weight split as W = [Wx, Wp, Wm]

        conv(X (+) expand(P) (+) M) = Wx * X + Wp * expand(P) + Wm * M.

    The middle term convolves a constant map: one vector for a 1x1 kernel; for a 3x3 kernel a map that takes
    nine values only (corners, edges, inside, because of the zero padding), so it is computed on 3x3 positions
    and then repeated. Exact up to rounding, and the D prototype channels cost next to nothing.

    Args:
        conv: 1x1 without padding or 3x3 with padding 1, stride 1, on C + D + m channels.
        feature: X, (N, C, h, w) with h, w >= 2.
        prototype: P, (N or 1, D, 1, 1).
        maps: M, such as the prior mask, (N, m, h, w); None if m is 0.
    Returns:
        (N, conv.out_channels, h, w)
    """
    channels, dim = feature.shape[1], prototype.shape[1]
    extra = 0 if maps is None else maps.shape[1]
    if conv.in_channels != channels + dim + extra:
        raise ValueError(
            f"convolution takes {conv.in_channels} channels, got {channels} of the feature, {dim} of the prototype"
            f" and {extra} maps"
        )
    padding = conv.padding
    out = F.conv2d(feature, conv.weight[:, :channels], conv.bias, padding=padding)
    weight = conv.weight[:, channels : channels + dim]
    if conv.kernel_size == (1, 1):
        out += F.conv2d(prototype.to(feature.dtype), weight)
    else:
        small = F.conv2d(prototype.to(feature.dtype).expand(-1, -1, 3, 3), weight, padding=padding)
        rows, columns = (_edge_index(n, feature.device) for n in feature.shape[-2:])
        out += small[:, :, rows][:, :, :, columns]
    if maps is not None:
        last = conv.weight[:, channels + dim :]
        if conv.kernel_size == (1, 1):  # as products: torch.compile mistakes the layout of a convolution of one channel
            for each, column in zip(maps.split(1, 1), last.split(1, 1), strict=True):
                out += each.to(out.dtype) * column.to(out.dtype).transpose(0, 1)
        else:
            out += F.conv2d(maps.to(feature.dtype), last, padding=padding)
    return out


def conv_of_resized(conv: nn.Conv2d, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Apply ``conv`` (1x1) to resize(X_1) (+) resize(X_2) (+) ..., without building the concatenation.

    It is a sum with one term for each feature, and a 1x1 convolution mixes channels where resizing mixes positions, so

        conv(resize(X_1) (+) resize(X_2) (+) ...) = resize(W1 * X_1) + resize(W2 * X_2) + ...

    Exact up to rounding; small features are convolved small, and only they are kept for the backward pass.

    Args:
        features: X_i, (N, C, *, *)
    Returns:
        (N, conv.out_channels, *size)
    """
    weights = conv.weight.chunk(len(features), 1)
    out = resize(F.conv2d(features[0], weights[0], conv.bias), size)
    for feature, weight in zip(features[1:], weights[1:], strict=True):
        out += resize(F.conv2d(feature, weight), size)
    return out


def _edge_index(length: int, device: torch.device) -> Tensor:
    """For each of ``length`` rows the row of the 3-row map to repeat: first, inside ..., last."""
    index = torch.ones(length, dtype=torch.long, device=device)
    index[0], index[-1] = 0, 2
    return index
